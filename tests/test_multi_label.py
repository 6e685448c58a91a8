"""Rows of several classes: the loss and logits of transformers, scikit-learn's metrics, the same rows from every form,
and a run from file to prediction."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from progtuning.base.errors import InputError
from progtuning.data.metrics import by_class, compute, macro_f1, micro_f1
from progtuning.data.own import load_dev, load_own
from progtuning.data.tables import read_table
from progtuning.methods.saved import tuned_config
from progtuning.model.config import BertConfig
from progtuning.model.heads import MultiLabel
from progtuning.model.weights import load_model, save_pretrained
from progtuning.settings.train import DataConfig
from tests.conftest import WORDS
from tests.models import tiny_batch, tiny_model
from tests.test_cli import FAST, call, refused
from tests.test_own import as_bytes, error_of

LABELS = ("comedy", "drama", "war")
ROWS = [
    ("a good film", ["comedy", "war"]),
    ("a sad story", []),
    ("the great cast", ["drama"]),
    ("an awful plot", ["war", "drama", "comedy"]),
]
HOT = [(1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 1.0, 1.0)]


def in_form(rows, form: str) -> bytes:
    lists = form in ("jsonl", "parquet")
    return as_bytes([{"text": text, "label": has if lists else ",".join(has)} for text, has in rows], form)


def test_twenty_steps_have_the_losses_and_logits_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = tiny_model(head="multi-label", labels=LABELS, initializer_range=0.05)
    save_pretrained(ours, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).train()
    assert theirs.config.problem_type == "multi_label_classification" and theirs.config.id2label[2] == "war"
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (ours, theirs)]
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(20):
        batch = tiny_batch(ours.config, seed=step)
        labels = torch.randint(0, 2, (5, 3), generator=generator).float()
        outputs = ours(**batch)
        output = theirs(**{key: value.long() for key, value in batch.items()}, labels=labels)
        torch.testing.assert_close(outputs, output.logits, rtol=0, atol=1e-5)
        both = MultiLabel.loss(outputs, labels), output.loss
        losses.append([loss.item() for loss in both])
        for loss, optimizer in zip(both, optimizers):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    found, expected = torch.tensor(losses).T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found[0] - found[-1] > 1e-3  # the steps changed what is compared


flags = st.lists(st.booleans(), min_size=3, max_size=3)


@given(st.lists(st.tuples(flags, flags), min_size=1, max_size=12))
def test_micro_and_macro_f1_and_those_of_each_class_are_scikit_learns(pairs):
    sklearn = pytest.importorskip("sklearn.metrics")
    predictions, labels = (np.array(column) for column in zip(*pairs))
    found = compute(("micro_f1", "macro_f1"), predictions.astype(int), labels.astype(np.float32))
    for average in ("micro", "macro"):
        expected = sklearn.f1_score(labels, predictions, average=average, zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(expected, abs=1e-12)
    expected = sklearn.precision_recall_fscore_support(labels, predictions, zero_division=0)
    for name, *values in zip(LABELS, *expected):
        assert list(by_class(predictions, labels, LABELS)[name].values()) == pytest.approx(values)


def test_metrics_of_other_shapes_and_values_are_refused():
    for metric in (micro_f1, macro_f1):
        for predictions, labels in (([0, 1], [0, 1]), ([[0, 1]], [[0, 1, 1]]), (np.zeros((0, 2)), np.zeros((0, 2)))):
            with pytest.raises(ValueError, match="two tables of one shape"):
                metric(predictions, labels)
        for bad in (0.5, np.nan, 2, -1):
            with pytest.raises(ValueError, match="predictions must be 0 or 1"):
                metric([[bad, 1]], [[0, 1]])
            with pytest.raises(ValueError, match="labels must be 0 or 1"):
                metric([[0, 1]], [[bad, 1]])


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet", "csv.gz"])
def test_the_same_rows_come_from_every_form(form, tmp_path):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"films.{form}"
    path.write_bytes(in_form(ROWS, form))
    labels, rows = read_table(path, multi_label=True)
    assert labels == LABELS
    assert [(row.text, row.label) for row in rows] == [(text, hot) for (text, _), hot in zip(ROWS, HOT)]
    backwards = read_table(path, labels=LABELS[::-1], multi_label=True)[1]  # the order of a model's classes
    assert [row.label for row in backwards] == [hot[::-1] for hot in HOT]


def test_numbers_are_classes_too_as_in_the_files_of_goemotions(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\na\t2,10\nb\t 10\nc\t\n")
    labels, rows = read_table(path, multi_label=True)
    assert labels == ("2", "10") and [row.label for row in rows] == [(1.0, 1.0), (0.0, 1.0), (0.0, 0.0)]
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": [2, 10.0]}\n{"text": "b", "label": 10}\n{"text": "c", "label": []}\n')
    assert read_table(path, multi_label=True) == (labels, rows)


def test_a_list_of_numbered_classes_of_the_library_datasets_has_their_names(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": text, "label": [LABELS.index(name) for name in has]} for text, has in ROWS]
    of_class = {"names": list(LABELS), "_type": "ClassLabel"}
    for number, kind in enumerate(({"feature": of_class, "_type": "List"}, [of_class])):
        features = {"info": {"features": {"text": {"dtype": "string", "_type": "Value"}, "label": kind}}}
        table = pyarrow.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(features)})
        parquet.write_table(table, tmp_path / f"{number}.parquet")
        labels, found = read_table(tmp_path / f"{number}.parquet", multi_label=True)
        assert labels == LABELS and [row.label for row in found] == HOT
    for bad in ([[3]], [[-1]], [[0.0]], [[[0]]], [[None]]):
        rows = [{"text": "a", "label": label} for label in bad]
        table = pyarrow.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(features)})
        parquet.write_table(table, path := tmp_path / "bad.parquet")
        assert error_of(read_table, path, multi_label=True).endswith(f"got label {bad[0]}, expected a class in 0..2")


@pytest.mark.parametrize(
    "cell, message",
    [
        ('["war", "war"]', "got label ['war', 'war'], expected each class once"),
        ('"war,,drama"', "got label '', expected a name"),
        ('["war, drama"]', "expected a list of names without commas"),
        ('[["war"]]', "expected a list of names without commas"),
        ('[{"a": 1}]', "got label {'a': 1}, expected a string or a number"),
        ('["War ", "war"]', "got label 'War ', expected a name without space"),
    ],
)
def test_labels_that_are_no_list_of_classes_are_refused_with_file_and_line(cell, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": ["war"]}\n{"text": "b", "label": ' + cell + "}\n")
    found = error_of(read_table, path, multi_label=True)
    assert found.startswith(f"{path}: line 2: ") and message in found


def test_a_file_of_no_label_or_one_class_or_a_class_that_train_lacks_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(in_form([("a", []), ("b", [])], "csv"))
    assert error_of(load_own, path, multi_label=True) == f"{path}: got no label in any row, expected some"
    path.write_bytes(in_form([("a", ["war"]), ("b", [])], "csv"))
    assert "got one label, 'war', expected two or more" in error_of(load_own, path, multi_label=True)
    path.write_bytes(in_form([("a", ["war"]), ("b", ["peace"])], "csv"))
    message = f"{path}: line 3: got label 'peace', expected one of 'comedy', 'drama', 'war'"
    assert error_of(load_dev, path, LABELS, DataConfig(dev_share=1), multi_label=True) == message


def test_a_list_of_labels_is_refused_for_one_of_one_class_and_says_which_task_takes_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(in_form(ROWS, "jsonl"))
    found = error_of(load_own, path, regression=False)
    assert found == f"{path}: line 1: got label ['comedy', 'war'], expected one; --task multi-label takes several"


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """One file of rows that are easy to learn: each class has a word of its own."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(240):
        has = [name for name in LABELS if generator.random() < 0.4]
        words = [WORDS[LABELS.index(name)] for name in has] + [WORDS[8 + generator.integers(8)] for _ in range(2)]
        rows.append((" ".join(generator.permutation(words)), has))
    path = tmp_path_factory.mktemp("films") / "films.csv"
    path.write_bytes(in_form(rows, "csv"))
    return path


@pytest.fixture(scope="module")
def trained(tiny_folder, films, tmp_path_factory):
    run = tmp_path_factory.mktemp("multi") / "run"
    options = ["--task", "multi-label", "--data", films, *FAST, "--epochs", "6", "--schedule", "growing"]
    status, out, err = call("train", "--model", tiny_folder, *options, "--output-dir", run)
    assert status == 0, err
    assert "with none" in err and "with several" in err and "comedy" in err
    return run


def test_a_run_learns_and_evaluates_as_it_did_and_its_card_has_each_class(trained, films):
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["metrics"]["micro_f1"] > 0.9 and set(summary["by_class"]) == set(LABELS)
    evaluate = ["evaluate", "--checkpoint", trained, "--task", "multi-label", "--data", films, "--device", "cpu"]
    status, out, err = call(*evaluate, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert (found["metrics"], found["by_class"]) == (summary["metrics"], summary["by_class"])
    assert "| class  | precision |" in (trained / "README.md").read_text()


def test_predict_writes_the_classes_and_the_probability_of_each_as_transformers_computes_it(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    texts = ["good fine", "the cast", "fine great story"]
    (tmp_path / "new.csv").write_text("text\n" + "\n".join(texts) + "\n")
    options = ["--checkpoint", trained, "--input", tmp_path / "new.csv", "--output", "-", "--device", "cpu"]
    status, out, err = call("predict", *options)
    assert status == 0, err
    found = list(csv.DictReader(io.StringIO(out), delimiter="\t"))
    assert [row["label"] for row in found] == ["comedy,drama", "", "drama,war"]
    for kind in ("csv", "jsonl"):
        assert call("predict", *options, "--output", tmp_path / f"out.{kind}")[0] == 0
    with open(tmp_path / "out.csv", newline="") as file:
        assert list(csv.DictReader(file)) == found
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row.pop("label") for row in rows] == [["comedy", "drama"], [], ["drama", "war"]]
    assert rows == [{key: float(value) for key, value in row.items() if key != "label"} for row in found]
    pipeline = transformers.pipeline("text-classification", model=str(trained), top_k=None)
    for row, theirs in zip(found, pipeline(texts)):
        for one in theirs:
            assert float(row[f"probability of {one['label']}"]) == pytest.approx(one["score"], abs=1e-5)


def test_the_saved_model_is_read_back_as_what_it_is_and_no_other_task_takes_it(trained, films, tiny_task, tmp_path):
    config = BertConfig.from_json(trained / "config.json")
    assert (config.head, config.labels) == ("multi-label", LABELS)
    assert load_model(trained)[0].config.head == "multi-label"
    other = ["evaluate", "--checkpoint", trained, "--task", "classification", "--data", tiny_task, "--device", "cpu"]
    assert "has a multi-label head, which does not fit the task classification" in refused(*call(*other))


@pytest.mark.parametrize("peft", ["lora", "bitfit"])
def test_what_a_peft_method_trained_evaluates_as_it_did(peft, tiny_folder, films, tmp_path):
    options = ["--task", "multi-label", "--data", films, *FAST, "--peft", peft]
    status, out, err = call("train", "--model", tiny_folder, *options, "--json", "--output-dir", tmp_path / "run")
    assert status == 0, err
    evaluate = ["evaluate", "--checkpoint", tmp_path / "run", "--task", "multi-label", "--data", films]
    assert json.loads(call(*evaluate, "--device", "cpu", "--json")[1])["metrics"] == json.loads(out)["metrics"]


def test_weights_and_smoothing_of_classes_are_refused(tiny_folder, films, tmp_path):
    options = ["--task", "multi-label", "--data", films, *FAST, "--output-dir", tmp_path / "run"]
    for option in (["--class-weights", "balanced"], ["--label-smoothing", "0.1"]):
        message = refused(*call("train", "--model", tiny_folder, *options, *option))
        assert f"{option[0]} is for classification, got it with a multi-label head" in message


def test_compare_takes_it_and_keeps_its_predictions(tiny_folder, films, tmp_path):
    options = (
        "--task multi-label --schedules full 2+cache --budgets 0.5 --lrs 3e-3 --seeds 2 --epochs 2 --batch-size 32"
    )
    arguments = ["--model", tiny_folder, "--data", films, "--output-dir", tmp_path / "out", *options.split()]
    status, out, err = call("compare", *arguments, "--max-length", "16", "--device", "cpu", "--json")
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(set(map(len, row["predictions"])) == {3} for row in rows)


def test_loading_the_whole_of_a_divided_file_refuses_rows_that_a_run_trained_on(trained, films):
    options = ["--checkpoint", trained, "--task", "multi-label", "--data", films, "--dev-share", "0.5"]
    message = refused(*call("evaluate", *options, "--device", "cpu"))
    assert "divided the rows of the run" in message


def test_what_the_library_peft_trained_is_multi_label_where_its_base_is(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    base.mkdir()
    save_pretrained(tiny_model(head="multi-label", labels=LABELS), base)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    peft.get_peft_model(theirs, config).save_pretrained(tuned)
    found = tuned_config(tuned, base)
    assert (found.head, found.labels) == ("multi-label", LABELS)


def test_a_config_of_one_class_is_refused():
    values = tiny_model(head="multi-label", labels=LABELS).config.to_dict()
    assert BertConfig.from_dict(values).head == "multi-label"
    with pytest.raises(InputError, match="is supported with two or more classes, got 1"):
        BertConfig.from_dict(values | {"id2label": {"0": "war"}, "label2id": {"war": 0}})
