"""SQuAD and GLUE submissions on the command line: train, evaluate, predict, and the files they write."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from progtuning.data.metrics import squad, squad_v2
from progtuning.data.squad import read_squad
from progtuning.model.weights import load_model
from tests.squad_files import OPINIONS, write_squad
from tests.test_cli import call, refused

FAST = ["--batch-size", "16", "--lr", "1e-2", "--evaluate", "end", "--device", "cpu", "--json"]
NAMES = {"squad": "v1.1", "squad_v2": "v2.0"}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    for version in NAMES.values():
        write_squad(folder, version)
    return folder


@pytest.fixture(scope="module", params=NAMES)
def trained(request, tiny_folder, films, tmp_path_factory):
    """The task, the output folder of `train` with its defaults, and its summary."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    arguments = ["--model", tiny_folder, "--task", request.param, "--data", films, "--output-dir", folder]
    status, out, err = call("train", *arguments, *FAST)
    assert status == 0, err
    return request.param, folder, json.loads(out)


def test_the_papers_epochs_and_stages_are_the_defaults_of_each_version(trained):
    task, _, summary = trained
    epochs = {"squad": 3, "squad_v2": 2}[task]
    assert (summary["settings"]["epochs"], len(summary["stages"])) == (epochs, epochs)
    lowest = {"squad": [1, 2, 3], "squad_v2": [1, 3]}[task]
    assert [stage["active_blocks"] for stage in summary["stages"]] == [[low, 4] for low in lowest]
    assert summary["settings"]["max_length"] == 24  # of the model: less than 384
    assert summary["task"] == task and summary["train_rows"] == 240


def test_made_questions_are_learnt_and_evaluate_gives_the_metrics_of_training(trained, films):
    task, folder, summary = trained
    assert summary["metrics"]["f1"] >= summary["metrics"]["exact"] > 0.6
    if task == "squad_v2":
        assert summary["metrics"]["best_f1"] >= summary["metrics"]["f1"]
        assert {"HasAns_f1", "HasAns_exact", "NoAns_f1", "NoAns_exact", "best_exact_thresh"} < set(summary["metrics"])
    status, out, err = call("evaluate", "--checkpoint", folder, "--task", task, "--data", films, "--json")
    assert status == 0, err
    assert json.loads(out)["metrics"] == pytest.approx(summary["metrics"], rel=1e-5)  # batches are larger


@pytest.mark.parametrize("schedule", ["full", "growing", "without-low-blocks", "adaptive"])
def test_every_other_schedule_trains_on_questions(schedule, tiny_folder, films, tmp_path):
    arguments = ["--model", tiny_folder, "--task", "squad", "--data", films, "--output-dir", tmp_path / "run"]
    status, out, err = call("train", *arguments, *FAST, "--schedule", schedule, "--max-train-rows", "64")
    assert status == 0, err
    summary = json.loads(out)
    assert summary["train_rows"] == 64 <= summary["train_windows"]
    assert len(summary["stages"]) == 3 or schedule == "adaptive"
    assert all(stage["backward_flops"] > 0 for stage in summary["stages"])


METHODS = {
    "adapter": ["--peft", "adapter", "--adapter-size", "4"],
    "lora": ["--peft", "lora", "--lora-r", "2"],
    "lora, merged": ["--peft", "lora", "--lora-r", "2", "--merge"],
    "bitfit": ["--peft", "bitfit"],
    "spafit": ["--peft", "spafit", "--spafit-bounds", "1,2"],
    "dps": ["--dps", "mix", "--dps-update-ratio", "0.25"],
    "cache": ["--cache", "memory"],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_questions_and_evaluates_as_it_did(method, tiny_folder, films, tmp_path):
    task = ["--task", "squad_v2", "--data", films]
    arguments = ["--model", tiny_folder, *task, "--output-dir", tmp_path / "run", "--max-train-rows", "64"]
    status, out, err = call("train", *arguments, *FAST, *METHODS[method])
    assert status == 0, err
    status, again, err = call("evaluate", "--checkpoint", tmp_path / "run", *task, "--json")
    assert status == 0, err
    assert json.loads(again)["metrics"] == pytest.approx(json.loads(out)["metrics"], rel=1e-4, abs=1e-5)


def test_transformers_loads_the_output_folder_and_gives_the_same_logits(trained, films):
    transformers = pytest.importorskip("transformers")
    _, folder, _ = trained
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, report = load_model(folder, fresh_head=False)
    assert report.unused == ()
    questions = read_squad(films / "dev-v1.1.json")[:8]
    texts = [question.text for question in questions], [question.context for question in questions]
    inputs = tokenizer(*texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = theirs(**inputs)
        ours = model(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["token_type_ids"])
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[..., 0][real], found.start_logits[real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[..., 1][real], found.end_logits[real], rtol=1e-4, atol=1e-4)


def test_evaluate_writes_the_official_files_and_their_answers_have_its_metrics(trained, films, tmp_path):
    task, folder, summary = trained
    arguments = ["--checkpoint", folder, "--task", task, "--data", films]
    folder = tmp_path / "new" / "files"
    status, out, err = call("evaluate", *arguments, "--output-dir", folder, "--n-best", "3", "--json")
    assert status == 0, err
    files = {path.name: json.loads(path.read_text()) for path in folder.iterdir()}
    expected = {"predictions.json", "nbest_predictions.json", *(["null_odds.json"] if task == "squad_v2" else [])}
    assert set(files) == expected
    questions = read_squad(films / f"dev-{NAMES[task]}.json")
    assert all(list(content) == [question.id for question in questions] for content in files.values())
    golds = [[gold.text for gold in question.answers] for question in questions]
    values = {name: json.loads(out)["metrics"][name] for name in ("f1", "exact")}
    answers = list(files["predictions.json"].values())
    scores = squad(answers, golds) if task == "squad" else squad_v2(answers, [0.0] * len(answers), golds)
    assert {name: scores[name] for name in values} == pytest.approx(values)
    assert max(map(len, files["nbest_predictions.json"].values())) == 3 + (task == "squad_v2")
    line = refused(*call("evaluate", *arguments, "--output-dir", tmp_path / "new"))
    assert "--output-dir must be a new or empty folder" in line


def test_a_null_threshold_decides_between_the_best_span_and_no_answer(trained, films, tmp_path):
    task, folder, _ = trained
    arguments = ["--checkpoint", folder, "--task", task, "--data", films]
    if task == "squad":
        line = refused(*call("evaluate", *arguments, "--null-threshold", "0"))
        assert "--null-threshold is for --task squad_v2, got it with the task squad" in line
        return
    for odds, is_blank in (("1e6", False), ("-1000000.5", True)):
        options = ["--null-threshold", odds, "--output-dir", tmp_path / odds, "--json"]
        status, out, err = call("evaluate", *arguments, *options)
        assert status == 0, err
        answers = json.loads((tmp_path / odds / "predictions.json").read_text())
        assert {text == "" for text in answers.values()} == {is_blank}
        values = json.loads(out)["metrics"]
        assert (values["NoAns_exact"] == 1, values["HasAns_exact"] > 0.5) == (is_blank, not is_blank)


def test_predict_answers_from_every_kind_of_input_with_the_place_in_the_context(trained, films, tmp_path):
    task, folder, _ = trained
    rows = [("what was the film", f"  the\u00a0film  was {word} ") for word in OPINIONS]
    rows += [("what", "\u200b"), ("is", "Good,good")]
    jsonl = "".join(json.dumps({"question": q, "context": c, "id": f"x{i}"}) + "\n" for i, (q, c) in enumerate(rows))
    tsv = "id\tquestion\tcontext\n" + "".join(f"x{i}\t{q}\t{c}\n" for i, (q, c) in enumerate(rows))
    (tmp_path / "in.tsv").write_text(tsv, encoding="utf-8")
    paragraphs = [{"context": c, "qas": [{"id": f"x{i}", "question": q}]} for i, (q, c) in enumerate(rows)]
    (tmp_path / "in.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    arguments = ["predict", "--checkpoint", folder, "--output"]
    status, out, err = call(*arguments, "-", "--input", "-", stdin=jsonl.encode())
    assert status == 0, err
    for name in ("in.tsv", "in.json"):
        assert call(*arguments, tmp_path / "out", "--input", tmp_path / name)[0] == 0
        assert (tmp_path / "out").read_text(encoding="utf-8") == out
    for name in ("out.csv", "out.tsv", "out.parquet", "out.jsonl.gz"):
        line = refused(*call(*arguments, tmp_path / name, "--input", tmp_path / "in.tsv"))
        assert f"{name}: got a name that ends in {Path(name).suffix}, expected .jsonl or .json" in line
        assert not (tmp_path / name).exists()
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["id"] for row in found] == [f"x{i}" for i in range(len(rows))]
    assert all(context[row["start"] : row["end"]] == row["answer"] for row, (_, context) in zip(found, rows))
    assert all(0 <= row["probability"] <= 1 for row in found)
    assert sum(row["answer"] == word for row, word in zip(found, OPINIONS)) >= 6
    assert ("null_odds" in found[0]) == (task == "squad_v2")


def test_answers_do_not_depend_on_the_batch_and_long_contexts_are_searched_whole(trained, tmp_path):
    task, folder, _ = trained
    filler = "the plot is story " * 12  # several windows of 24 tokens
    contexts = [filler + "good " + filler, "good " + filler, filler + "good", "good"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"question": "what", "context": c}) + "\n" for c in contexts))
    outputs = []
    for size in ("1", "3", "64"):
        arguments = ["--input", tmp_path / "in.jsonl", "--output", "-", "--batch-size", size, "--doc-stride", "4"]
        status, out, err = call("predict", "--checkpoint", folder, *arguments, "--null-threshold", "1e6")
        assert status == 0, err
        outputs.append([(row["answer"], row["start"]) for row in map(json.loads, out.splitlines())])
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0] == [("good", context.index("good")) for context in contexts]


@pytest.fixture(scope="module")
def rte(tiny_folder, tmp_path_factory):
    """A folder of RTE with a test file, and a model that was trained on it."""
    folder = tmp_path_factory.mktemp("rte")
    for name in ("train", "dev", "test"):
        label = "" if name == "test" else "\tlabel"
        rows = ["index\tsentence1\tsentence2" + label]
        for i in range(20):
            cells = [str(3 * i), "the film", f"is {OPINIONS[i % 8]}", ("entailment", "not_entailment")[i % 2]]
            rows.append("\t".join(cells if label else cells[:3]))
        (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    arguments = ["--model", tiny_folder, "--task", "rte", "--data", folder, "--output-dir", folder / "run"]
    status, _, err = call("train", *arguments, "--epochs", "1", *FAST)
    assert status == 0, err
    return folder


def test_a_submission_has_the_predictions_for_the_test_rows_by_their_official_numbers(rte, tmp_path):
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission" / "CoLA.tsv").write_text("of another task")
    arguments = ["--task", "rte", "--data", rte, "--glue-submission", tmp_path / "submission"]
    status, out, err = call("predict", "--checkpoint", rte / "run", *arguments)
    assert status == 0 and out == f"Written: {tmp_path / 'submission' / 'RTE.tsv'}\n", err
    rows = [line.split("\t") for line in (tmp_path / "submission" / "RTE.tsv").read_text().splitlines()]
    assert rows[0] == ["index", "prediction"] and [row[0] for row in rows[1:]] == [str(3 * i) for i in range(20)]
    texts = "text\ttext_pair\n" + "".join(f"the film\tis {OPINIONS[i % 8]}\n" for i in range(20))
    _, plain, _ = call("predict", "--checkpoint", rte / "run", "--input", "-", "--output", "-", stdin=texts.encode())
    assert [row[1] for row in rows[1:]] == [line.split("\t")[0] for line in plain.splitlines()[1:]]
    assert (tmp_path / "submission" / "CoLA.tsv").read_text() == "of another task"


def test_a_model_of_mnli_predicts_the_diagnostic_set_and_every_row_of_wnli_has_the_majority_class(
    tiny_folder, rte, tmp_path, caplog
):
    names = ("entailment", "neutral", "contradiction")
    rows = [f"{7 * i}\tthe film\tis {OPINIONS[i % 8]}" for i in range(12)]
    for name in ("train", "dev_matched", "dev_mismatched"):
        lines = ["index\tsentence1\tsentence2\tgold_label", *(f"{row}\t{names[i % 3]}" for i, row in enumerate(rows))]
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    tests = "\n".join(["index\tsentence1\tsentence2", *rows]) + "\n"
    for name in ("test_matched", "test_mismatched", "AX", "test"):
        (tmp_path / f"{name}.tsv").write_text(tests)
    run, folder = tmp_path / "run", tmp_path / "submission"
    arguments = ["--model", tiny_folder, "--task", "mnli", "--data", tmp_path, "--output-dir", run, "--epochs", "1"]
    assert call("train", *arguments, *FAST)[0] == 0
    options = ["--data", tmp_path, "--glue-submission", folder, "--device", "cpu"]
    for task in ("mnli", "ax", "wnli"):
        status, out, err = call("predict", "--checkpoint", run, "--task", task, *options)
        assert status == 0, err
    assert out == f"Written: {folder / 'WNLI.tsv'}\n"
    assert caplog.messages == ["wnli: every row has the majority class, not_entailment; the model is not asked"]
    files = {file.name: file.read_text() for file in folder.iterdir()}
    assert set(files) == {"MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv", "WNLI.tsv"}
    assert files["AX.tsv"] == files["MNLI-m.tsv"] and set(files["AX.tsv"].split()) & set(names)
    assert files["WNLI.tsv"] == "index\tprediction\n" + "".join(f"{7 * i}\t0\n" for i in range(12))
    line = refused(*call("predict", "--checkpoint", rte / "run", "--task", "ax", *options))
    assert "has the classes entailment, not_entailment, expected those of the task ax: entailment, neutral" in line
    line = refused(*call("evaluate", "--checkpoint", run, "--task", "wnli", "--data", tmp_path))
    assert "--task wnli is for predict --glue-submission alone" in line


BAD_PREDICT = {
    "nothing": ([], "predict needs --input"),
    "no output": (["--input", "x"], "predict needs --output"),
    "no data": (["--glue-submission", "s", "--task", "rte"], "--glue-submission needs --data"),
    "an input too": (["--glue-submission", "s", "--task", "rte", "--data", "d", "--input", "x"], "--input does not go"),
    "a task of its own": (["--input", "x", "--output", "y", "--task", "rte"], "--task does not go with --input"),
    "no GLUE task": (["--glue-submission", "s", "--task", "squad", "--data", "d"], "--task must be one of cola, "),
    "other classes": (["--glue-submission", "s", "--task", "sst-2", "--data", "d"], "has the classes entailment, not"),
    "another head": (["--glue-submission", "s", "--task", "sts-b", "--data", "d"], "has a classification head, which"),
    "n-best": (["--input", "x", "--output", "y", "--n-best", "0"], "--n-best must be an integer in 1..1000, got 0"),
    "odds": (["--input", "x", "--output", "y", "--null-threshold", "nan"], "--null-threshold must be a number in"),
}


@pytest.mark.parametrize("kind", BAD_PREDICT)
def test_wrong_options_of_predict_are_refused_in_one_line(kind, rte, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, message = BAD_PREDICT[kind]
    assert message in refused(*call("predict", "--checkpoint", rte / "run", *options))
    assert not list(tmp_path.iterdir())


def test_wrong_options_of_questions_are_refused_in_one_line(rte, trained, tiny_folder, films, tmp_path):
    train = ["train", "--model", tiny_folder, "--task", "squad", "--output-dir", tmp_path / "run"]
    refusals = {
        "--task squad needs --data": train,
        "--max-query-length must be an integer in 1..1000, got 0": [*train, "--data", films, "--max-query-length", "0"],
        "--doc-stride must be an integer in 0..1000, got -1": [*train, "--data", films, "--doc-stride", "-1"],
        "--max-length must be in 5..24 for this model, got 25": [*train, "--data", films, "--max-length", "25"],
        "--null-threshold is for --task squad_v2": [*train, "--data", films, "--null-threshold", "1"],
        "train-v1.1.json: cannot be read": [*train, "--data", rte],
        "has a classification head, which does not fit the task squad": [
            *("evaluate", "--checkpoint", rte / "run", "--task", "squad", "--data", films)
        ],
        "has a question-answering head, which does not fit the task rte": [
            *("evaluate", "--checkpoint", trained[1], "--task", "rte", "--data", rte)
        ],
        "--output-dir is for the prediction files of SQuAD, got it with the task rte": [
            *("evaluate", "--checkpoint", rte / "run", "--task", "rte", "--data", rte, "--output-dir", tmp_path / "x")
        ],
        "--task must be one of cola, sst-2, mrpc, sts-b, qqp, mnli, qnli, rte, squad, squad_v2, movie-reviews,": [
            *("evaluate", "--checkpoint", rte / "run", "--task", "squad2", "--data", films)
        ],
    }
    for message, arguments in refusals.items():
        assert message in refused(*call(*arguments))
    assert not list(tmp_path.iterdir())


def test_the_recipe_of_bert_on_questions_is_taken_where_nothing_is_given(tiny_folder, films, tmp_path):
    arguments = ["--model", tiny_folder, "--task", "squad_v2", "--data", films, "--output-dir", tmp_path / "run"]
    options = ["--recipe", "paper", "--max-length", "20", "--max-train-rows", "16", "--json"]
    status, out, err = call("train", *arguments, *options)
    assert status == 0, err
    settings = json.loads(out)["settings"]
    assert {key: settings[key] for key in ("lr", "epochs", "batch_size")} == {"lr": 5e-5, "epochs": 2, "batch_size": 48}
    assert settings["max_length"] == 20


def test_a_run_on_questions_resumes_to_the_same_weights_and_metrics(tiny_folder, films, tmp_path):
    arguments = ["--model", tiny_folder, "--task", "squad_v2", "--data", films, "--max-train-rows", "64", *FAST]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, expected, err = call("train", *arguments, "--save-every", "3", "--output-dir", whole)
    assert status == 0, err
    shutil.copytree(whole, parts)
    for name in ("summary.json", "model.safetensors"):  # as if it had been killed before its end
        (parts / name).unlink()
    status, out, err = call("train", *arguments, "--save-every", "3", "--output-dir", parts, "--resume")
    assert status == 0, err
    assert json.loads(out)["metrics"] == json.loads(expected)["metrics"]
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    line = refused(*call("train", *arguments, "--doc-stride", "3", "--output-dir", parts, "--resume"))
    assert "is of another run: --doc-stride was 128, now 3" in line
