"""A head's rows go by the names of their classes: trained on, measured and predicted with, against transformers."""

import itertools
import json
import shlex
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from progtuning.base.errors import InputError
from progtuning.cli.command import main
from progtuning.model.bert import build_model
from progtuning.model.config import BertConfig, format_label_map, parse_label_map
from progtuning.model.weights import load_model, reorder_classes, save_pretrained
from tests.conftest import WORDS
from tests.models import TINY, tiny_batch, tiny_model

NAMES = ("no", "yes", "maybe")  # TINY's classes
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def their_logits(folder, batch) -> dict[str, torch.Tensor]:
    """Return transformers' logits by class name."""
    transformers = pytest.importorskip("transformers")
    twin = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = twin(**{key: value.long() for key, value in batch.items()}).logits
    return {name: logits[:, i] for i, name in twin.config.id2label.items()}


def our_logits(model, batch) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(zip(model.config.labels, model.eval()(**batch).T))


def assert_equal_by_name(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module", params=["bert", "roberta"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_pretrained(tiny_model(model_type=request.param, pad_token_id=1), folder)
    return folder


def architecture(folder) -> BertConfig:
    return BertConfig.from_json(folder / "config.json", keep_head=False)


def test_rows_are_taken_by_class_name_in_any_order(folder):
    batch = tiny_batch(BertConfig.from_json(folder / "config.json"))
    theirs = their_logits(folder, batch)
    for labels in itertools.permutations(NAMES):
        model, report = load_model(folder, architecture(folder).with_head("classification", labels))
        assert model.config.labels == labels
        assert (report.fresh, report.unused, report.notes) == ((), (), ())
        assert_equal_by_name(our_logits(model, batch), theirs)
        reorder_classes(model, NAMES)
        assert model.config.labels == NAMES
        assert_equal_by_name(our_logits(model, batch), theirs)


@pytest.mark.parametrize("labels", [("yes", "no"), ("no", "never", "yes", "maybe"), ("other", "maybe", "third")])
def test_rows_of_classes_that_the_head_lacks_are_drawn_afresh_and_it_is_said(labels, folder):
    batch = tiny_batch(BertConfig.from_json(folder / "config.json"))
    model, report = load_model(folder, architecture(folder).with_head("classification", labels), seed=5)
    ours, theirs = our_logits(model, batch), their_logits(folder, batch)
    lacking = [name for name in labels if name not in NAMES]
    for name in ours:
        assert torch.allclose(ours[name], theirs.get(name, torch.tensor(1e9)), atol=1e-5) == (name not in lacking)
    layer = "classifier" if model.config.model_type == "bert" else "classifier.out_proj"
    assert report.fresh == ((f"{layer}.weight", f"{layer}.bias") if lacking else ())
    assert report.unused == ()
    if lacking:
        (note,) = report.notes
        assert f"the rows of {', '.join(lacking)} in the head's last layer" in note and "no, yes, maybe" in note
        with pytest.raises(InputError, match=f"lacks the rows of {', '.join(lacking)}"):
            load_model(folder, model.config, fresh_head=False)
    again, _ = load_model(folder, model.config, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


def of_another_kind(transformers, config):
    """Models of transformers whose `classifier` has as many rows as `config` wants, but is no head for it."""
    values = replace(TINY, hidden_act="gelu").to_dict()
    for key in ("architectures", "model_type", "problem_type", "id2label", "label2id"):
        del values[key]
    labels = config.labels if config.head == "classification" else ("LABEL_0",)
    theirs = transformers.BertConfig(**values, id2label=dict(enumerate(labels)))
    yield "for BertForTokenClassification", transformers.BertForTokenClassification(theirs), {}
    if config.head == "regression":
        yield "for BertForMultipleChoice", transformers.BertForMultipleChoice(theirs), {}
        single = {"problem_type": "single_label_classification"}
        yield "with two or more classes", transformers.BertForSequenceClassification(theirs), single
    whole = transformers.BertForSequenceClassification(theirs)
    several = "for multi-label, not for" if config.head == "classification" else "with two or more classes"
    yield several, whole, {"problem_type": "multi_label_classification"}
    yield "for a task that it does not name", whole, {"architectures": None}
    if config.head == "classification":
        yield "'regression' is supported with one", whole, {"problem_type": "regression"}
        yield "must map 0..2 to names", whole, {"id2label": {"1": "no", "2": "yes", "3": "maybe"}}
        yield "must map to distinct names", whole, {"id2label": {"0": "no", "1": "no", "2": "maybe"}}
        yield "the classes of the model are LABEL_0", whole, {"id2label": {str(i): f"LABEL_{i}" for i in range(3)}}
        yield "the classes of the model are No, Yes", whole, {"id2label": {"0": "No", "1": "Yes", "2": "Maybe"}}
        yield "has 3 rows, for 2 names", whole, {"id2label": {"0": "no", "1": "yes"}}


@pytest.mark.parametrize("head", ["classification", "regression"])
def test_a_head_of_another_kind_is_never_taken_by_position_and_trained_from_all_the_same(head, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = TINY.with_head(head, NAMES)
    for said, twin, changes in of_another_kind(transformers, config):
        twin.save_pretrained(tmp_path)
        edit(tmp_path, **changes)
        read = BertConfig.from_json(tmp_path / "config.json", keep_head=False).with_head(head, NAMES)
        model, report = load_model(tmp_path, read)
        assert {"classifier.weight", "classifier.bias"} <= set(report.fresh) & set(report.unused), said
        assert not torch.equal(model.classifier.weight, twin.classifier.weight), said
        assert torch.equal(model.encoder.layer[1].output.dense.weight, twin.bert.encoder.layer[1].output.dense.weight)
        assert len(report.notes) == 1 and said in report.notes[0] and "\n" not in report.notes[0]


def test_a_regression_head_and_one_for_answers_are_taken_whatever_the_names_of_their_outputs(tmp_path):
    for head, layer in (("regression", "classifier"), ("question-answering", "qa_outputs")):
        config = TINY.with_head(head)
        whole = build_model(config, seed=3)
        save_pretrained(whole, tmp_path)
        names = {"0": "similarity"} if head == "regression" else {"0": "end", "1": "start"}
        edit(tmp_path, id2label=names, problem_type=None)
        if head == "question-answering":
            edit(tmp_path, architectures=None, problem_type="multi_label_classification")
        model, report = load_model(tmp_path, config)
        assert report == load_model(tmp_path, config)[1] and not report.fresh and not report.notes
        assert torch.equal(model.get_parameter(f"{layer}.weight"), whole.get_parameter(f"{layer}.weight"))
    other, report = load_model(tmp_path, TINY)  # from answers to classes
    assert "classifier.weight" in report.fresh and "qa_outputs.weight" in report.unused
    assert report.notes == ("Drawn afresh: the pooler, which the model does not have.",)


# Whole commands


def make_folder(path, labels):
    """A tiny model with WORDS as its vocabulary and these classes."""
    path.mkdir()
    model = tiny_model(vocab_size=len(VOCABULARY), labels=labels).eval()
    ids = torch.randint(5, len(VOCABULARY), (64, 6), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 2, 3  # [CLS] and [SEP]
    with torch.no_grad():  # so that every class is the largest for some text
        model.classifier.weight.mul_(20)
        model.classifier.bias.sub_(model(ids).mean(0))
    save_pretrained(model, path)
    (path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return path


def call(capsys, *arguments) -> dict:
    capsys.readouterr()
    status = main([*map(str, arguments), "--device", "cpu"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out) if out.startswith("{") else {"out": out, "err": err}


def fails(capsys, *arguments) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def base(tmp_path):
    """A model with its classes in another order than that of data, which is by name."""
    return make_folder(tmp_path / "base", ("like", "dislike"))


@pytest.fixture
def opinions(base, tmp_path, capsys):
    """Data of one's own that `base` gets right in every row."""
    folder = tmp_path / "opinions"
    folder.mkdir()
    generator = np.random.default_rng(1)
    texts = [" ".join(generator.choice(WORDS, 4)) for _ in range(24)]
    (folder / "texts.tsv").write_text("\n".join(["text", *texts]) + "\n")
    rows = call(capsys, "predict", "--checkpoint", base, "--input", folder / "texts.tsv", "--output", "-")["out"]
    labels = [row.split("\t")[0] for row in rows.splitlines()[1:]]
    assert set(labels) == {"like", "dislike"}
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text("text\tlabel\n" + "".join(f"{a}\t{b}\n" for a, b in zip(texts, labels)))
    return folder


RIGHT = {"accuracy": 1.0, "matthews": 1.0}
OPTIONS = ["--epochs", 1, "--lr", 1e-12, "--batch-size", 16, "--hidden-dropout-prob", 0]


@pytest.mark.parametrize("peft", ["none", "lora", "bitfit"])
def test_training_on_from_classes_in_another_order_keeps_what_the_model_knows(peft, base, opinions, tmp_path, capsys):
    task, output = ["--task", "classification", "--data", opinions, "--json"], tmp_path / "output"
    train = ["train", "--model", base, *task, *OPTIONS, "--peft", peft]
    assert call(capsys, *train, "--output-dir", output)["metrics"] == RIGHT
    assert list(json.loads((output / "config.json").read_text())["label2id"]) == ["dislike", "like"]
    for checkpoint in (base, output):
        assert call(capsys, "evaluate", "--checkpoint", checkpoint, *task)["metrics"] == RIGHT
    if peft == "lora":
        assert call(capsys, *train, "--merge", "--output-dir", tmp_path / "merged")["metrics"] == RIGHT
        again = ["train", "--model", tmp_path / "merged", *task, *OPTIONS, "--output-dir", tmp_path / "again"]
        assert call(capsys, *again)["metrics"] == RIGHT


def test_a_lora_without_a_head_takes_that_of_its_base_by_name(base, opinions, tmp_path, capsys):
    task, output = ["--task", "classification", "--data", opinions, "--json"], tmp_path / "output"
    call(capsys, "train", "--model", base, *task, *OPTIONS, "--peft", "lora", "--output-dir", output)
    weights = output / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(weights).items() if "lora_" in key}, weights)
    values = json.loads((output / "adapter_config.json").read_text())
    (output / "adapter_config.json").write_text(json.dumps(values | {"modules_to_save": None}))
    assert call(capsys, "evaluate", "--checkpoint", output, *task)["metrics"] == RIGHT


def test_training_says_which_rows_of_the_head_it_draws_afresh_and_which_keys_it_passes_over(
    base, opinions, tmp_path, capsys
):
    edit(base, id2label={"0": "LABEL_0", "1": "LABEL_1"}, xla_device=None)
    task = ["--task", "classification", "--data", opinions]
    told = call(capsys, "train", "--model", base, *task, *OPTIONS, "--output-dir", tmp_path / "output")["err"]
    passed, drawn, read = told.splitlines()[:3]
    assert read.startswith("train: ")
    assert passed == "Passed over in config.json, as no part of the model: xla_device."
    classes = "(the classes of the model are LABEL_0, LABEL_1; wanted are dislike, like)"
    assert drawn == f"Drawn afresh: the head's last layer {classes}."
    summary = json.loads((tmp_path / "output" / "summary.json").read_text())
    assert summary["fresh_parameters"] == ["classifier.weight", "classifier.bias"]
    told = call(capsys, "evaluate", "--checkpoint", base, *task, "--label-map", "LABEL_0=like,LABEL_1=dislike")["err"]
    assert told.splitlines() == [passed]


def write_glue(folder, columns, rows, labels):
    folder.mkdir()
    for name in ("train", "dev"):
        lines = ["\t".join([*columns, "gold_label"]), *("\t".join([*row, label]) for row, label in zip(rows, labels))]
        for split in ("", "_matched", "_mismatched"):
            (folder / f"{name}{split}.tsv").write_text("\n".join(lines) + "\n")
            test = ["index\t" + "\t".join(columns), *("\t".join([str(i), *row]) for i, row in enumerate(rows))]
            (folder / f"test{split}.tsv").write_text("\n".join(test) + "\n")
    return folder


@pytest.fixture(scope="module")
def mnli(tmp_path_factory):
    generator = np.random.default_rng(0)
    rows = [[" ".join(generator.choice(WORDS, 4)), " ".join(generator.choice(WORDS, 3))] for _ in range(24)]
    labels = generator.choice(["entailment", "neutral", "contradiction"], 24)
    return write_glue(tmp_path_factory.mktemp("glue") / "MNLI", ["sentence1", "sentence2"], rows, labels)


MNLI = ("contradiction", "entailment", "neutral")  # another order than GLUE's


def their_predictions(folder, mnli) -> list[str]:
    """Return the class that transformers gives each test row, by name."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    rows = [line.split("\t")[1:] for line in (mnli / "test_matched.tsv").read_text().splitlines()[1:]]
    with torch.no_grad():
        logits = [model(**tokenizer(*row, return_tensors="pt")).logits[0] for row in rows]
    return [model.config.id2label[int(row.argmax())] for row in logits]


def test_evaluate_and_submissions_match_the_classes_of_a_glue_task_by_name(mnli, tmp_path, capsys):
    base = make_folder(tmp_path / "mnli", MNLI)
    predictions = their_predictions(base, mnli)
    assert len(set(predictions)) == 3
    gold = [line.split("\t")[-1] for line in (mnli / "dev_matched.tsv").read_text().splitlines()[1:]]
    task = ["--checkpoint", base, "--task", "mnli", "--data", mnli, "--json"]
    expected = sum(a == b for a, b in zip(predictions, gold)) / len(gold)
    metrics = call(capsys, "evaluate", *task)["metrics"]
    assert metrics and all(value == pytest.approx(expected) for value in metrics.values())
    call(capsys, "predict", *task, "--glue-submission", tmp_path / "out")
    written = [row.split("\t")[1] for row in (tmp_path / "out" / "MNLI-m.tsv").read_text().splitlines()[1:]]
    assert written == predictions


CASES = {
    "capitals": tuple(name.upper() for name in MNLI),
    "spelling": ("Contradiction", " entail-ment", "neu_tral"),
    "commas": ("contradiction!", "entail,ment", "neutral="),
}


@pytest.mark.parametrize("case", CASES)
def test_names_that_differ_in_spelling_are_refused_with_the_very_option_that_mends_it(case, mnli, tmp_path, capsys):
    base = make_folder(tmp_path / "mnli", MNLI)
    task = ["--task", "mnli", "--data", mnli, "--json"]
    expected = call(capsys, "evaluate", "--checkpoint", base, *task)
    edit(base, id2label=dict(enumerate(CASES[case])))
    line = fails(capsys, "evaluate", "--checkpoint", base, *task)
    assert "expected those of the task mnli: entailment, neutral, contradiction; where they differ in spelling" in line
    option = shlex.split(line[line.index("--label-map") :])
    assert parse_label_map(option[1]) == dict(zip(CASES[case], MNLI))
    assert call(capsys, "evaluate", "--checkpoint", base, *task, *option) == expected
    assert "differ in spelling" in fails(
        capsys, "predict", "--checkpoint", base, *task, "--glue-submission", tmp_path / "s"
    )
    call(capsys, "predict", "--checkpoint", base, *task, *option, "--glue-submission", tmp_path / "s")
    edit(base, id2label=dict(enumerate(MNLI)))
    call(capsys, "predict", "--checkpoint", base, *task, "--glue-submission", tmp_path / "t")
    assert (tmp_path / "s" / "MNLI-m.tsv").read_bytes() == (tmp_path / "t" / "MNLI-m.tsv").read_bytes()


def test_label_map_names_the_classes_of_a_checkpoint_that_has_none(base, opinions, tmp_path, capsys):
    unnamed = tmp_path / "unnamed"
    shutil.copytree(base, unnamed)
    edit(unnamed, id2label={"0": "LABEL_0", "1": "LABEL_1"})
    task = ["--task", "classification", "--data", opinions, "--json"]
    line = fails(capsys, "evaluate", "--checkpoint", unnamed, *task)
    hint = "if they are the same in this order, give --label-map LABEL_0=dislike,LABEL_1=like"
    assert line.endswith(hint)
    wrong = fails(capsys, "evaluate", "--checkpoint", unnamed, *task, "--label-map", "LABEL_0=no,LABEL_1=like")
    assert wrong.endswith(hint)  # by the names that the option takes, whatever it said before
    option = ["--label-map", "LABEL_0=like,LABEL_1=dislike"]
    assert call(capsys, "evaluate", "--checkpoint", unnamed, *task, *option)["metrics"] == RIGHT
    files = ["--input", opinions / "texts.tsv", "--output", "-"]
    expected = call(capsys, "predict", "--checkpoint", base, *files)
    assert call(capsys, "predict", "--checkpoint", unnamed, *files, *option) == expected
    exchanged = call(capsys, "predict", "--checkpoint", base, *files, "--label-map", "like=dislike,dislike=like")["out"]
    assert exchanged.replace("dislike", "LIKE").replace("like", "dislike").replace("LIKE", "like") == expected["out"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "--label-map must be OLD=NEW"),
        ("like", "--label-map must be OLD=NEW"),
        ("like=a,like=b", "each OLD once"),
        ("like=a=b", "--label-map must be OLD=NEW"),
        ('{"like": 1}', "--label-map must be OLD=NEW"),
        ("{like: a}", "--label-map must be OLD=NEW"),
        ("{}", "--label-map must be OLD=NEW"),
        ("LIKE=a", "gives a name to 'LIKE', expected classes of the model: like, dislike"),
        ("like=dislike", "must give distinct printable names to like, dislike, got dislike, dislike"),
        ('{"like": "a\\tb"}', "must give distinct printable names"),
    ],
)
def test_a_label_map_that_does_not_fit_is_refused(text, message, base, tmp_path, capsys):
    (tmp_path / "in.tsv").write_text("text\ngood film\n")
    files = ["--input", tmp_path / "in.tsv", "--output", "-"]
    assert message in fails(capsys, "predict", "--checkpoint", base, *files, "--label-map", text)


def test_a_label_map_is_refused_where_there_are_no_classes():
    for head in ("regression", "question-answering"):
        with pytest.raises(InputError, match=f"--label-map is for classes, got it with a {head} head"):
            TINY.with_head(head).renamed({"LABEL_0": "a"})


@pytest.mark.parametrize(
    "names", [{"a": "b"}, {"a b": "c"}, {"a,": "="}, {" a": "b"}, {"{": "é"}, {"a": "b", "c": "'"}]
)
def test_a_label_map_is_written_as_it_is_read(names):
    option, text = shlex.split(format_label_map(names))
    assert option == "--label-map" and parse_label_map(text) == names


def test_a_pooler_that_the_base_lacks_and_blocks_that_its_config_lacks_are_said(base, opinions, tmp_path, capsys):
    path = base / "model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "pooler" not in key}, path)
    edit(base, num_hidden_layers=3)
    task = ["--task", "classification", "--data", opinions, "--output-dir", tmp_path / "output"]
    told = call(capsys, "train", "--model", base, *task, *OPTIONS)["err"]
    assert "Drawn afresh: the pooler, which the model does not have" in told
    assert "The file has 4 blocks, config.json fewer: those above are left out." in told
