"""The command line as its user meets it: what it writes, what it prints, and how it refuses."""

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from progtuning.base.files import new_folder
from progtuning.cli.command import main
from progtuning.data.tables import keyed_rows
from tests.conftest import WORDS

FAST = ["--epochs", "3", "--batch-size", "8", "--lr", "5e-3", "--max-length", "16", "--device", "cpu"]


def call(*arguments, stdin: bytes = b"") -> tuple[int, str, str]:
    """Run the command in this process: exit status, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    old = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            status = exit.code
        finally:
            sys.stdin = old
    return status, out.getvalue(), err.getvalue()


def refused(status, out, err) -> str:
    """Assert that a call ended with status 2 and one line; return the line."""
    assert (status, out) == (2, "")
    assert err.endswith("\n") and err.count("\n") == 1, err
    assert "error: " in err and "Traceback" not in err
    return err.strip()


@pytest.fixture(scope="session")
def trained(tiny_folder, tiny_task, tmp_path_factory) -> Path:
    """An output folder of `train`."""
    folder = tmp_path_factory.mktemp("runs") / "new" / "run"
    arguments = ["--model", tiny_folder, "--task", "classification", "--data", tiny_task, "--output-dir", folder]
    status, out, err = call("train", *arguments, *FAST)
    assert status == 0, err
    return folder


def test_train_writes_the_model_in_hugging_face_layout_with_tokenizer_summary_log_and_card(trained):
    names = {path.name for path in trained.iterdir()}
    model_files = {"config.json", "model.safetensors", "vocab.txt"}
    assert names - {"tokenizer_config.json"} == model_files | {"summary.json", "metrics.jsonl", "run.json", "README.md"}
    config = json.loads((trained / "config.json").read_text())
    assert config["id2label"] == {"0": "dislike", "1": "like"}
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_transformers_loads_the_output_folder_and_gives_the_same_predictions(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    texts = ["the film was good", "the plot is very awful", "great"]
    source, target = tmp_path / "in.tsv", tmp_path / "out.tsv"
    source.write_text("text\n" + "\n".join(texts) + "\n")
    assert call("predict", "--checkpoint", trained, "--input", source, "--output", target)[0] == 0
    ours = [line.split("\t") for line in target.read_text().splitlines()]
    assert ours[0] == ["label", "probability"] and len(ours) == 4
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(trained).eval()
    with torch.no_grad():
        theirs = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1)
    for (label, probability), row in zip(ours[1:], theirs):
        assert label == model.config.id2label[row.argmax().item()]
        assert float(probability) == pytest.approx(row.max().item(), abs=2e-6)


def test_summary_has_the_metrics_and_the_account_of_every_stage(trained):
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["metrics"]["accuracy"] > 0.8  # the words give it away
    assert [stage["active_blocks"] for stage in summary["stages"]] == [[1, 4], [2, 4], [3, 4]]
    assert [stage["embeddings"] for stage in summary["stages"]] == [True, False, False]
    backward = [stage["backward_flops"] for stage in summary["stages"]]
    assert backward[0] > backward[1] > backward[2] > 0
    assert summary["updated_parameters"] == sum(stage["updated_parameters"] for stage in summary["stages"])
    assert summary["updated_parameters"] < summary["updated_parameters_full"]
    assert set(summary["stages"][0]["seconds"]) == {"forward", "backward", "optimizer"}
    assert summary["settings"]["schedule"] == "shrinking" and summary["settings"]["lr"] == 5e-3
    assert summary["versions"]["torch"] == torch.__version__
    assert {*summary["attention_backends"]} == {"training", "eval"}
    # No dropout of attention in this model.
    assert summary["attention_backends"]["training"]["padded"] == "flash_attention"


def test_the_log_has_losses_and_the_metrics_of_every_epoch(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "metrics" in row] == [1, 2, 3]
    assert [row["step"] for row in rows if "loss" in row] == [*range(10, 121, 10)]


def test_the_card_has_the_table_of_stages(trained):
    card = (trained / "README.md").read_text()
    assert "|     3 | 3-4, H" in card and "accuracy" in card


def test_evaluate_gives_the_metrics_of_training_from_the_dev_file_alone(trained, tiny_task, tmp_path):
    (dev,) = tiny_task.glob("dev.*")
    shutil.copy(dev, tmp_path)
    arguments = ["--checkpoint", trained, "--task", "classification", "--data", tmp_path]
    status, out, err = call("evaluate", *arguments, "--json")
    assert status == 0, err
    assert json.loads(out)["metrics"] == json.loads((trained / "summary.json").read_text())["metrics"]
    status, out, _ = call("evaluate", *arguments)
    assert status == 0 and out.startswith("| metric ")


def test_train_prints_its_summary_as_json_on_standard_output_alone(tiny_folder, tiny_task, tmp_path):
    task = ["--task", "classification", "--data", tiny_task]
    arguments = ["--model", tiny_folder, *task, "--output-dir", tmp_path / "run"]
    status, out, _ = call("train", *arguments, *FAST, "--max-train-rows", 32, "--json")
    assert status == 0
    assert json.loads(out) == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert json.loads(out)["train_rows"] == 32


def test_predict_reads_tsv_and_jsonl_from_file_and_standard_input_row_for_row(trained, tmp_path):
    texts = [" ".join(WORDS[i % 7 : i % 7 + 1 + i % 5]) for i in range(50)] + ["unknown zebra", 'a "quoted" word']
    tsv = ("text\n" + "".join(f"{text}\n" for text in texts)).encode()
    jsonl = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    source, target, outputs = tmp_path / "in", tmp_path / "out", set()
    for data in (tsv, jsonl):
        status, out, err = call("predict", "--checkpoint", trained, "--input", "-", "--output", "-", stdin=data)
        assert status == 0, err
        outputs.add(out)
        source.write_bytes(data)
        assert call("predict", "--checkpoint", trained, "--input", source, "--output", target)[0] == 0
        outputs.add(target.read_text())
    assert len(outputs) == 1
    assert outputs.pop().count("\n") == 1 + len(texts)
    status, out, _ = call("predict", "--checkpoint", trained, "--input", source, "--output", target, "--json")
    assert status == 0 and json.loads(out) == {"written": [str(target)]}
    arguments = ["--input", source, "--output", "-", "--json"]
    assert "--json does not go with --output -" in refused(*call("predict", "--checkpoint", trained, *arguments))


def test_regression_trains_and_predicts_scores(tiny_folder, tmp_path):
    rows = "".join(f"{word} film\t{score}\n" for word, score in zip(WORDS[:8] * 4, [1.5] * 4 + [-1.5] * 4 * 7))
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\n" + rows)
    run = tmp_path / "run"
    arguments = ["--model", tiny_folder, "--task", "regression", "--data", tmp_path, "--output-dir", run]
    status, out, err = call("train", *arguments, *FAST, "--json")
    assert status == 0, err
    assert set(json.loads(out)["metrics"]) == {"pearson", "spearman"}
    status, out, _ = call("predict", "--checkpoint", run, "--input", "-", "--output", "-", stdin=b"text\ngood\n")
    assert status == 0 and out.startswith("score\n") and float(out.split()[1]) == pytest.approx(0, abs=5)
    files = ["--input", "-", "--output"]
    assert call("predict", "--checkpoint", run, *files, tmp_path / "x.csv", stdin=b"text\ngood\n")[0] == 0
    assert call("predict", "--checkpoint", run, *files, tmp_path / "x.jsonl", stdin=b"text\ngood\n")[0] == 0
    assert (tmp_path / "x.csv").read_text() == out
    assert json.loads((tmp_path / "x.jsonl").read_text()) == {"score": float(out.split()[1])}


def test_train_on_pairs_of_a_glue_task(tiny_folder, tmp_path):
    for name in ("train", "dev"):
        lines = [
            f"{i}\tthe film is {w}\tthe plot was {w}\t{('entailment', 'not_entailment')[i % 2]}"
            for i, w in enumerate(WORDS)
        ]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *lines]) + "\n")
    arguments = ["--model", tiny_folder, "--task", "rte", "--data", tmp_path, "--output-dir", tmp_path / "run"]
    status, out, err = call("train", *arguments, *FAST, "--schedule", "growing", "--stages", 2, "--json")
    assert status == 0, err
    assert [stage["active_blocks"] for stage in json.loads(out)["stages"]] == [[3, 4], [1, 4]]


METHODS = {
    "adapter": (["--adapter-size", "4"], {"trained.json", "trained.safetensors"}),
    "lora": (["--lora-r", "2", "--lora-targets", "query,output"], {"adapter_config.json", "adapter_model.safetensors"}),
    "bitfit": ([], {"trained.json", "trained.safetensors"}),
    "spafit": (["--spafit-bounds", "1,2"], {"trained.json", "trained.safetensors"}),
}


@pytest.mark.parametrize("schedule", ["full", "shrinking"])
@pytest.mark.parametrize("method", METHODS)
def test_a_peft_method_writes_what_it_trained_and_evaluates_as_it_did(
    method, schedule, tiny_folder, tiny_task, tmp_path
):
    options, files = METHODS[method]
    task = ["--task", "classification", "--data", tiny_task]
    arguments = ["--model", tiny_folder, *task, "--output-dir", tmp_path / "run", "--schedule", schedule]
    status, out, err = call("train", *arguments, "--peft", method, *FAST, *options, "--json")
    assert status == 0, err
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= files | {"config.json", "vocab.txt", "summary.json"} and "model.safetensors" not in names
    summary = json.loads(out)
    assert summary["updated_parameters"] <= summary["updated_parameters_full"]
    assert (summary["updated_parameters"] == summary["updated_parameters_full"]) == (schedule == "full")
    status, out, err = call("evaluate", "--checkpoint", tmp_path / "run", *task, "--json")
    assert status == 0, err
    assert json.loads(out)["metrics"] == summary["metrics"]


@pytest.mark.parametrize("method", METHODS)
def test_what_a_peft_method_trained_on_a_base_without_a_pooler_evaluates_as_it_did(
    method, tiny_folder, tiny_task, tmp_path
):
    base, task = tmp_path / "base", ["--task", "classification", "--data", tiny_task]
    shutil.copytree(tiny_folder, base)
    tensors = load_file(base / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "pooler" not in name}, base / "model.safetensors")
    arguments = ["--model", base, *task, "--output-dir", tmp_path / "run", "--peft", method, *METHODS[method][0]]
    status, out, err = call("train", *arguments, *FAST, "--json")
    assert status == 0, err
    summary = json.loads(out)
    assert "pooler.dense.weight" in summary["fresh_parameters"]
    status, out, err = call("evaluate", "--checkpoint", tmp_path / "run", *task, "--json")
    assert status == 0, err
    assert json.loads(out)["metrics"] == summary["metrics"]


@pytest.mark.parametrize("options, trained_pooler", [([], True), (["--lora-pooler"], False), ([], False)])
def test_a_run_says_where_lora_freezes_a_pooler_that_was_never_trained(
    options, trained_pooler, tiny_folder, tiny_task, tmp_path
):
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    tensors = load_file(base / "model.safetensors")
    if not trained_pooler:
        tensors["bert.pooler.dense.bias"].zero_()
    save_file(tensors, base / "model.safetensors")
    arguments = ["--model", base, "--task", "classification", "--data", tiny_task, "--peft", "lora", *options, *FAST]
    status, _, err = call("train", *arguments, "--dry-run", "--output-dir", tmp_path / "run")
    assert status == 0, err
    assert ("if nothing is learnt, --lora-pooler trains it" in err) == (not trained_pooler and not options)


BLOCKS = {"lora": (False, [1, 4]), "adapter": (False, [1, 4]), "bitfit": (True, [1, 4]), "spafit": (False, [2, 4])}


@pytest.mark.parametrize("method", METHODS)
def test_the_summary_and_plan_name_what_trains_in_a_stage_and_not_what_may(method, tiny_folder, tiny_task, tmp_path):
    options = ["--peft", method, *METHODS[method][0], "--epochs", 2]
    arguments = ["--task", "classification", "--data", tiny_task, "--output-dir", tmp_path / "run", *FAST]
    status, out, err = call("train", "--model", tiny_folder, *arguments, *options, "--max-train-rows", 16, "--json")
    assert status == 0, err
    stages = json.loads(out)["stages"]
    assert (stages[0]["embeddings"], stages[0]["active_blocks"]) == BLOCKS[method]
    status, out, err = call("plan", "--model", tiny_folder, *options, "--json")
    assert status == 0, err
    for key in ("embeddings", "active_blocks", "trainable_parameters"):
        assert [stage[key] for stage in stages] == [stage[key] for stage in json.loads(out)["stages"]]


@pytest.mark.parametrize("method", ["lora", "bitfit", "spafit"])
def test_merge_writes_a_whole_model_that_evaluates_as_it_did(method, tiny_folder, tiny_task, tmp_path):
    task = ["--task", "classification", "--data", tiny_task]
    arguments = ["--model", tiny_folder, *task, "--output-dir", tmp_path / "run", "--peft", method, "--merge"]
    status, out, err = call("train", *arguments, *FAST, *METHODS[method][0], "--json")
    assert status == 0, err
    assert (tmp_path / "run" / "model.safetensors").is_file() and not (tmp_path / "run" / "trained.json").exists()
    status, again, err = call("evaluate", "--checkpoint", tmp_path / "run", *task, "--json")
    assert status == 0, err
    assert json.loads(again)["metrics"] == json.loads(out)["metrics"]


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_cache_says_its_size_before_the_run_and_its_use_in_the_summary(
    place, trained, tiny_folder, tiny_task, tmp_path
):
    task = ["--task", "classification", "--data", tiny_task]
    arguments = ["--model", tiny_folder, *task, "--output-dir", tmp_path / "run"]
    status, out, err = call("train", *arguments, *FAST, "--cache", place, "--cache-limit", "1MB", "--json")
    assert status == 0, err
    rows = (tiny_task / "train.tsv").read_text().splitlines()[1:]
    tokens = sum(len(row.split("\t")[0].split()) + 2 for row in rows)  # each word is one, and [CLS] and [SEP]
    assert f"The prefix cache takes {tokens * 64 / 1e9:.3g} GB of {place}: {tokens:,} tokens in fp32.\n" in err
    summary = json.loads(out)
    assert [stage["cache_bytes"] for stage in summary["stages"]] == [0, tokens * 64, tokens * 64]
    assert [stage["cache_misses"] for stage in summary["stages"]] == [0, 320, 320]
    assert summary["settings"]["prefix_dropout"] is False
    plain = json.loads((trained / "summary.json").read_text())
    assert plain["settings"]["prefix_dropout"] is True
    assert summary["stages"][2]["forward_flops"] < plain["stages"][2]["forward_flops"]
    assert summary["metrics"]["accuracy"] > 0.8


@pytest.mark.parametrize("mode", ["dense", "mix"])
@pytest.mark.parametrize("schedule", ["full", "shrinking"])
def test_dps_trains_under_a_schedule(mode, schedule, tiny_folder, tiny_task, tmp_path):
    task = ["--task", "classification", "--data", tiny_task]
    arguments = ["--model", tiny_folder, *task, "--output-dir", tmp_path / "run", "--schedule", schedule, "--dps", mode]
    status, out, err = call("train", *arguments, *FAST, "--accumulation-steps", "2", "--json")
    assert status == 0, err
    assert json.loads(out)["metrics"]["accuracy"] > 0.6
    assert json.loads(out)["settings"]["dps"]["mode"] == mode


def test_a_recipe_sets_what_is_not_given_and_nothing_else(tiny_folder, tiny_task, tmp_path):
    task = ["--model", tiny_folder, "--task", "classification", "--data", tiny_task, "--max-train-rows", "64", "--json"]
    arguments = ["--recipe", "paper", "--peft", "bitfit", "--epochs", "2", "--max-length", "16"]
    status, out, err = call("train", *task, *arguments, "--output-dir", tmp_path / "bitfit")
    assert status == 0, err
    settings = json.loads(out)["settings"]
    assert {key: settings[key] for key in ("lr", "batch_size", "epochs")} == {"lr": 1e-3, "batch_size": 8, "epochs": 2}
    assert (settings["lr_schedule"], settings["adam_epsilon"], settings["warmup"]) == ("constant", 1e-6, 0)
    assert "learning rate 0.001 (constant)" in (tmp_path / "bitfit" / "README.md").read_text()
    arguments = ["--recipe", "paper", "--dps", "dense", "--dps-p", "0.4", "--epochs", "5", "--max-length", "16"]
    status, out, err = call("train", *task, *arguments, "--output-dir", tmp_path / "dps")
    assert status == 0, err
    settings = json.loads(out)["settings"]
    assert settings["dps"] == {"mode": "dense", "p": 0.4, "update_ratio": 0.05}
    assert (settings["batch_size"], settings["hidden_dropout_prob"]) == (16, 0.0)


@pytest.mark.parametrize("rows, dropout", [("48", 0.0), ("64", 0.1)])  # 6 and 8 steps
def test_the_recipe_of_dps_counts_the_steps_over_the_rows_that_train(
    rows, dropout, tiny_folder, tiny_task, tmp_path, monkeypatch
):
    monkeypatch.setattr("progtuning.settings.recipes._DPS_DENSE_DROPS_OUT_FROM", 8)
    task = ["--model", tiny_folder, "--task", "classification", "--data", tiny_task, "--max-train-rows", rows, "--json"]
    options = [
        "--recipe",
        "paper",
        "--dps",
        "dense",
        "--dps-update-ratio",
        "0.5",
        "--epochs",
        "2",
        "--max-length",
        "16",
    ]
    status, out, err = call("train", *task, *options, "--output-dir", tmp_path / "run")
    assert status == 0, err
    assert json.loads(out)["settings"]["hidden_dropout_prob"] == dropout


@pytest.mark.parametrize("schedule", ["shrinking", "without-low-blocks", "growing"])
def test_the_recipe_trains_e_in_every_stage_as_the_paper_and_in_its_ablations_too(
    schedule, tiny_folder, tiny_task, tmp_path
):
    task = ["--model", tiny_folder, "--task", "classification", "--data", tiny_task, "--max-train-rows", "64", "--json"]
    arguments = ["--recipe", "paper", "--schedule", schedule, "--max-length", "16", "--output-dir", tmp_path / "run"]
    status, out, err = call("train", *task, *arguments)
    assert status == 0, err
    summary = json.loads(out)
    assert [stage["embeddings"] for stage in summary["stages"]] == [True, True, True]
    assert (summary["settings"]["embeddings"], summary["settings"]["adam_epsilon"]) == ("always", 1e-6)
    line = refused(*call("train", *task, *arguments[:-1], tmp_path / "cached", "--cache", "memory"))
    assert "--embeddings always" in line


BAD_DATA = {
    "columns": (b"text\tlabel\ngood\tlike\nbad\n", "line 3: got 1 tab-separated columns, expected 2"),
    "label": (b"text\tlabel\ngood\tlove\n", "line 2: got label 'love', expected one of 'dislike', 'like'"),
    "empty": (b"", "got an empty file"),
    "header alone": (b"text\tlabel\n", "got no rows"),
    "bytes": (b"text\tlabel\n\xff\xfe\tlike\n", "line 2: got a byte that is not UTF-8"),
    "nul": (b"text\tlabel\na\x00b\tlike\n", "line 2: got a NUL byte"),
    "nan": (b"text\tlabel\ngood\tnan\n", "line 2: got label 'nan'"),
    "no label column": (b"text\tother\ngood\tlike\n", "line 1: got columns"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_is_refused_with_file_and_line_and_no_output_folder(kind, tiny_folder, tiny_task, tmp_path):
    data, message = BAD_DATA[kind]
    (tmp_path / "train.tsv").write_bytes((tiny_task / "train.tsv").read_bytes())
    (tmp_path / "dev.tsv").write_bytes(data)
    task = ["--task", "classification", "--data", tmp_path]
    arguments = ["--model", tiny_folder, *task, "--output-dir", tmp_path / "run"]
    line = refused(*call("train", *arguments, *FAST))
    assert str(tmp_path / "dev.tsv") in line and message in line
    assert not (tmp_path / "run").exists()


BAD_OPTIONS = {
    "length": (["--max-length", "25"], "--max-length must be in 3..24 for this model, got 25"),
    "no length": (["--max-length", "2"], "--max-length must be in 3..24 for this model, got 2"),
    "schedule": (["--schedule", "falling"], "--schedule must be one of full, shrinking"),
    "embeddings": (["--embeddings", "sometimes"], "--embeddings must be one of"),
    "epochs": (["--epochs", "0"], "--epochs must be an integer in 1..100000, got 0"),
    "word": (["--epochs", "three"], "argument --epochs: invalid int value: 'three'"),
    "unknown": (["--epoch-count", "3"], "unrecognized arguments: --epoch-count"),
    "rows": (["--max-train-rows", "0"], "got 0"),
    "abbreviated": (["--epoch", "3"], "unrecognized arguments: --epoch"),
    "peft": (["--peft", "prefix"], "--peft must be one of none, adapter, bitfit, lora, spafit, got 'prefix'"),
    "rank": (["--peft", "lora", "--lora-r", "17"], "--lora-r must be in 1..16 for query (16 x 16), got 17"),
    "target": (["--peft", "lora", "--lora-targets", "query,gate"], "--lora-targets must be among query, key,"),
    "bounds": (["--peft", "spafit", "--spafit-bounds", "3,2"], "--spafit-bounds must be 4-9 or 4-14, or N1,N2 with"),
    "high bounds": (["--peft", "spafit", "--spafit-bounds", "3,5"], "0 <= N1 <= N2 <= 4, got '3,5'"),
    "two sizes": (["--batch-tokens", "64"], "--batch-size and --batch-tokens exclude each other"),
    "cache": (["--cache", "ram"], "--cache must be one of off, memory, disk, device, got 'ram'"),
    "cache and dropout": (["--cache", "disk", "--prefix-dropout"], "leave out --prefix-dropout"),
    "cache of nothing": (["--cache", "memory", "--embeddings", "always"], "--cache memory has nothing to keep"),
    "cache limit": (
        ["--cache", "memory", "--cache-limit", "50KB"],
        "--cache memory needs 0.000102 GB, expected at most 5e-05",
    ),
    "cache limit's unit": (
        ["--cache-limit", "2 cups"],
        "--cache-limit must be a number of GB, or one with a unit (500MB, 2GiB)",
    ),
    "dps and peft": (["--peft", "lora", "--dps", "dense"], "--dps masks weights that --peft lora freezes"),
    "dps window": (["--dps", "mix", "--dps-update-ratio", "0.0001"], "--dps-update-ratio 0.0001 of 120 steps"),
    "recipe": (["--recipe", "paper", "--peft", "spafit"], "--recipe paper has values for"),
    "recipe without a batch": (
        ["--recipe", "paper", "--dps", "dense", "--batch-size", "0"],
        "--batch-size must be an integer in 1..16777216, got 0",
    ),
    "rate's line": (["--lr-schedule", "cosine"], "--lr-schedule must be one of linear, constant, got 'cosine'"),
    "merge": (["--peft", "adapter", "--merge"], "--merge needs --peft lora, bitfit or spafit, got adapter"),
    "device": (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
    "task": (["--task", "snli"], "--task must be one of"),
    "model": (["--model", "no-such-model"], "no-such-model"),
    "data": (["--data", "no/such/folder/at/all"], "no/such/folder/at/all"),
}


@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_a_wrong_option_is_refused_in_one_line_that_names_it(kind, tiny_folder, tiny_task, tmp_path):
    options, message = BAD_OPTIONS[kind]
    task = ["--task", "classification", "--data", tiny_task]
    arguments = ["--model", tiny_folder, *task, "--output-dir", tmp_path / "run"]
    assert message in refused(*call("train", *arguments, *FAST, *options))
    assert not (tmp_path / "run").exists()


def test_an_output_folder_with_files_is_refused_and_left_alone(tiny_folder, tiny_task, tmp_path):
    (tmp_path / "precious").write_text("x")
    arguments = ["--model", tiny_folder, "--task", "classification", "--data", tiny_task]
    assert "--output-dir must be a new or empty folder" in refused(*call("train", *arguments, "--output-dir", tmp_path))
    assert "--output-dir must be a new or empty folder" in refused(
        *call("train", *arguments, "--output-dir", tmp_path / "precious")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    assert new_folder(tmp_path / "a" / "b").is_dir()


def damaged(folder: Path, tmp_path: Path, name: str, content: bytes) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / name).write_bytes(content)
    return copy


def test_damaged_model_files_are_refused_by_name(tiny_folder, trained, tiny_task, tmp_path):
    truncated = (trained / "model.safetensors").read_bytes()[:-7]
    folder = damaged(trained, tmp_path, "model.safetensors", truncated)
    arguments = ["--task", "classification", "--data", tiny_task]
    assert "model.safetensors: not a readable" in refused(*call("evaluate", "--checkpoint", folder, *arguments))
    line = refused(*call("train", "--model", folder, *arguments, "--output-dir", tmp_path / "run"))
    assert "model.safetensors: not a readable" in line and not (tmp_path / "run").exists()
    config = json.loads((trained / "config.json").read_text()) | {"num_attention_heads": 3}
    (folder / "config.json").write_text(json.dumps(config))
    line = refused(*call("evaluate", "--checkpoint", folder, *arguments))
    assert "config.json: hidden_size must be divisible by num_attention_heads, got 16 and 3" in line


def test_a_checkpoint_for_another_task_is_refused(trained, tiny_folder, tmp_path):
    (tmp_path / "dev.tsv").write_text("text\tlabel\na\tx\nb\ty\n")
    arguments = ["--data", tmp_path, "--checkpoint", trained]
    line = refused(*call("evaluate", "--task", "classification", *arguments))
    assert "dev.tsv: line 2: " in line and "'x'" in line and "dislike" in line
    assert "has a classification head, which does not fit" in refused(
        *call("evaluate", "--task", "regression", *arguments)
    )
    (tmp_path / "train.tsv").write_text("sentence\tlabel\na film\t1\n")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\na film\t1\n")
    line = refused(*call("evaluate", "--task", "sst-2", *arguments))
    assert "has the classes dislike, like, expected those of the task sst-2: " in line


def test_a_model_of_single_texts_is_not_given_pairs_nor_one_of_pairs_single_texts(trained, tiny_folder, tmp_path):
    pairs = "text\ttext_pair\tlabel\n" + "good film\tbad plot\tlike\nbad film\tbad plot\tdislike\n" * 4
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text(pairs)
    task = ["--task", "classification", "--data", tmp_path]
    assert call("train", "--model", tiny_folder, *task, *FAST, "--output-dir", tmp_path / "run")[0] == 0
    line = refused(*call("evaluate", "--checkpoint", trained, *task))
    assert f"got pairs of texts, --checkpoint {trained} was trained on single texts" in line
    (tmp_path / "in.tsv").write_text("text\ngood film\n")
    arguments = ["--input", tmp_path / "in.tsv", "--output", tmp_path / "out.tsv"]
    line = refused(*call("predict", "--checkpoint", tmp_path / "run", *arguments))
    assert "in.tsv: got single texts, --checkpoint " in line and not (tmp_path / "out.tsv").exists()
    assert call("evaluate", "--checkpoint", tmp_path / "run", *task)[0] == 0


def test_the_name_of_a_folder_of_ones_own_sets_nothing(tiny_folder, tiny_task, tmp_path):
    shutil.copytree(tiny_task, tmp_path / "squad_v2")
    arguments = [
        "--task",
        "classification",
        "--data",
        tmp_path / "squad_v2",
        "--max-train-rows",
        "8",
        "--device",
        "cpu",
    ]
    arguments += ["--max-length", "16", "--json"]
    status, out, err = call("train", "--model", tiny_folder, *arguments, "--output-dir", tmp_path / "run")
    assert status == 0, err
    assert json.loads(out)["settings"]["epochs"] == 3


@pytest.mark.parametrize("command", ["predict", "probe", "demo"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    command, trained, tiny_folder, tiny_task, minilm, tmp_path, monkeypatch
):
    work = {"predict": "saved.predict_file", "probe": "finetune.probe", "demo": "finetune.fine_tune"}[command]
    monkeypatch.setattr(f"progtuning.run.{work}", lambda *_: pytest.fail("the work has begun"))
    (tmp_path / "file").write_text("")
    arguments = {
        "predict": ["--checkpoint", trained, "--input", "-", "--output", tmp_path / "file" / "out.tsv"],
        "probe": ["--model", tiny_folder, "--task", "classification", "--data", tiny_task],
        "demo": [],
    }[command]
    output = [] if command == "predict" else ["--output-dir", tmp_path / "file" / "folder"]
    status, out, err = call(command, *arguments, *output, stdin=b"text\ngood\n")
    assert (status, out) == (2, "") and str(tmp_path / "file") in err.splitlines()[-1]


def test_the_demo_takes_its_own_model_and_data_where_folders_of_their_names_stand(minilm, tmp_path, monkeypatch):
    began = []
    monkeypatch.setattr("progtuning.run.finetune.fine_tune", lambda *given: began.append(given) or 1 / 0)
    monkeypatch.chdir(tmp_path)
    for name in ("minilm-l6", "movie-reviews"):
        (tmp_path / name).mkdir()
    with pytest.raises(ZeroDivisionError):
        call("demo", "--output-dir", tmp_path / "demo")
    _, folder, splits, *_ = began[0]
    assert (folder / "config.json").is_file() and len(splits.train) == 3000


def test_the_demo_leaves_the_folder_of_a_run_alone_and_takes_its_own_again(trained, tmp_path, monkeypatch):
    began = []
    monkeypatch.setattr("progtuning.base.sources.model_folder", lambda *_: began.append(1) or 1 / 0)
    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    line = refused(*call("demo", "--output-dir", trained))
    assert f"--output-dir must not be the folder of a run, got {trained} with run.json in it" in line
    assert before == {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    (tmp_path / "file").write_text("")
    assert "--output-dir" in refused(*call("demo", "--output-dir", tmp_path / "file"))
    (tmp_path / "old" / "savings.png").mkdir(parents=True)
    assert "savings.png is a folder" in refused(*call("demo", "--output-dir", tmp_path / "old"))
    assert not began
    (tmp_path / "demo").mkdir()
    for name in ("summary.json", "savings.png"):
        (tmp_path / "demo" / name).write_text("{}")
    with pytest.raises(ZeroDivisionError):
        call("demo", "--output-dir", tmp_path / "demo")


def test_every_command_that_reads_a_model_of_few_parameters_takes_the_place_of_its_base(tiny_folder, tmp_path):
    base, run, data = tmp_path / "base", tmp_path / "run", tmp_path / "RTE"
    shutil.copytree(tiny_folder, base)
    data.mkdir()
    rows = [f"{i}\tthe film\tgood\t{'not_' * (i % 2)}entailment" for i in range(4)]
    for split in ("train", "dev"):
        (data / f"{split}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    (data / "test.tsv").write_text("index\tsentence1\tsentence2\n0\tthe film\tgood\n")
    (tmp_path / "in.tsv").write_text("text\ttext_pair\nthe film\tgood\n")
    task = ["--task", "rte", "--data", data]
    arguments = [*task, "--peft", "lora", "--lora-r", 2, *FAST[2:], "--epochs", 1]
    status, _, err = call("train", "--model", base, *arguments, "--output-dir", run)
    assert status == 0, err
    commands = (
        ["evaluate", *task, "--json"],
        ["predict", "--input", tmp_path / "in.tsv", "--output", "-"],
        ["predict", *task, "--glue-submission", tmp_path / "submission", "--json"],
    )
    before = [call(*command, "--checkpoint", run) for command in commands]
    assert [status for status, _, _ in before] == [0, 0, 0]
    base.rename(tmp_path / "moved")
    for command, expected in zip(commands, before):
        line = refused(*call(*command, "--checkpoint", run))
        assert f"{run / 'adapter_config.json'}: key 'base_model_name_or_path' '{base}': no such folder" in line
        assert call(*command, "--checkpoint", run, "--base-model", tmp_path / "moved") == expected
    line = refused(*call("train", "--model", run, *arguments, "--output-dir", tmp_path / "again"))
    assert f"--model '{run}': is no whole model: adapter_config.json says what was trained beside one" in line


@pytest.mark.parametrize(
    "option",
    [
        "predict --checkpoint x --input y --output",
        "predict --checkpoint x --output y --input",
        "predict --input x --output y --checkpoint",
        "predict --checkpoint x --task rte --data y --glue-submission",
        "evaluate --checkpoint x --task rte --data",
        "evaluate --checkpoint x --task rte --base-model",
        "evaluate --checkpoint x --task rte --output-dir",
        "train --task rte --output-dir x --model",
        "train --model x --task rte --output-dir",
        "probe --model x --task rte --output-dir",
        "compare --model x --task rte --output-dir",
        "reproduce table1 --glue",
        "plan --model",
        "explain -o x --run",
        "explain -o x --model y --comparison",
        "explain --model x --output",
        "report x --output",
        "report -o x DIR",
        "demo --output-dir",
    ],
)
def test_an_option_that_names_a_file_or_folder_is_refused_where_it_names_none(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *arguments, last = option.split()
    line = refused(*call(*arguments, *([] if last == "DIR" else [last]), ""))
    assert last in line and "got no name" in line
    assert not list(tmp_path.iterdir())


def test_predictions_are_the_kind_of_file_that_the_outputs_name_says_and_can_be_read_again(trained, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(trained, run)
    config, names = json.loads((run / "config.json").read_text()), ['a "b", c', "1"]
    config["id2label"] = dict(enumerate(names))
    config["label2id"] = {name: i for i, name in enumerate(names)}
    (run / "config.json").write_text(json.dumps(config))
    command = ["predict", "--checkpoint", run, "--input", "-", "--output"]
    texts = "text\n" + "".join(f"the film was {word}\n" for word in WORDS)
    _, tsv, _ = call(*command, "-", stdin=texts.encode())
    rows = [line.split("\t") for line in tsv.splitlines()]
    assert {row[0] for row in rows[1:]} == set(names)
    for name in ("x.csv", "x.CSV", "x.jsonl", "x.tsv", "x.txt", "csv"):
        status, _, err = call(*command, out / name, stdin=texts.encode())
        assert status == 0, err
    with open(out / "x.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == rows
    assert (out / "x.CSV").read_bytes() == (out / "x.csv").read_bytes()
    assert all((out / name).read_text() == tsv for name in ("x.tsv", "x.txt", "csv"))
    found = [json.loads(line) for line in (out / "x.jsonl").read_text().splitlines()]
    assert found == [{"label": label, "probability": float(value)} for label, value in rows[1:]]
    read = [
        [row["text"] for _, row in keyed_rows(out / f"x.{kind}", ["text"], [], {"text": "label"})]
        for kind in ("csv", "jsonl", "tsv")
    ]
    assert read == [[row[0] for row in rows[1:]]] * 3


@pytest.mark.parametrize("name", ["x.json", "x.parquet", "x.csv.gz", "X.PARQUET"])
def test_predictions_of_a_kind_that_is_not_written_are_refused_before_the_work(name, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("progtuning.run.saved.predict_file", lambda *_: pytest.fail("the work has begun"))
    line = refused(*call("predict", "--checkpoint", trained, "--input", "-", "--output", tmp_path / name))
    assert f"{name}: got a name that ends in {Path(name.lower()).suffix}, expected .tsv or .csv or .jsonl" in line
    assert not list(tmp_path.iterdir())


def test_predict_leaves_an_old_output_file_where_the_input_is_bad(trained, tmp_path):
    source, target = tmp_path / "in.tsv", tmp_path / "out.tsv"
    target.write_text("old")
    source.write_bytes(b"text\ngood\tbad\n")
    line = refused(*call("predict", "--checkpoint", trained, "--input", source, "--output", target))
    assert "in.tsv: line 2: got 2 tab-separated columns, expected 1" in line
    assert target.read_text() == "old"


def test_plan_prints_the_integers_of_bert_base_as_json():
    status, out, _ = call(*"plan --model bert-base-uncased --batch-size 8 --length 128 --epochs 3 --json".split())
    document = json.loads(out)
    assert status == 0 and (document["model"], document["num_blocks"]) == ("bert-base-uncased", 12)
    assert [stage["active_blocks"] for stage in document["stages"]] == [[1, 12], [5, 12], [9, 12]]
    backward = [stage["backward_flops"] for stage in document["stages"]]
    assert backward == [357_574_950_912, 234_765_729_792, 115_580_387_328]
    assert {stage["forward_flops"] for stage in document["stages"]} == {178_787_475_456}
    assert document["updated_parameters"] < document["updated_parameters_full"]


def test_plan_reads_a_config_json_or_its_folder(tiny_folder):
    tables = {call("plan", "--model", path)[1] for path in (tiny_folder, tiny_folder / "config.json")}
    assert len(tables) == 1 and "1-4, H" in tables.pop()
    assert "--model must be one of bert-base-uncased" in refused(*call("plan", "--model", "gpt2"))


def test_plan_takes_the_names_of_models_that_train_takes_and_a_folder_of_that_name_before_them(
    tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for short, today in (("roberta-large", "FacebookAI/roberta-large"), ("bert-base-chinese", None)):
        names = [short, today or f"google-bert/{short}"]
        plans = [json.loads(call("plan", "--model", name, "--json")[1]) for name in names]
        assert [plan.pop("model") for plan in plans] == names and plans[0] == plans[1]
    assert "--model must be one of" in refused(*call("plan", "--model", "other/bert-base-chinese"))
    Path("bert-base-chinese").symlink_to(tiny_folder)
    assert "1-4, H" in call("plan", "--model", "bert-base-chinese")[1]


def test_plan_answers_in_under_three_seconds_without_torch_and_without_network():
    code = (
        "import sys, time\nbegin = time.time()\nfrom progtuning.cli.command import main\n"
        "assert main(['plan', '--model', 'bert-large-uncased']) == 0\n"
        "assert 'torch' not in sys.modules and time.time() - begin < 3"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_an_interrupt_while_the_commands_modules_are_loaded_ends_in_one_line():
    code = (
        "import builtins, sys\nbefore = builtins.__import__\n"
        "def interrupted(name, *rest):\n"
        "    if name == 'progtuning.cli.plan': raise KeyboardInterrupt\n"
        "    return before(name, *rest)\n"
        "builtins.__import__ = interrupted\nfrom progtuning.__main__ import main\nsys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "progtuning: error: interrupted\n")


def test_paper_prints_every_row_and_says_which_disagree():
    status, out, _ = call("paper", "--json")
    rows, cells = json.loads(out)["rows"], json.loads(out)["metrics"]
    keys = {"table", "row", "model", "task", "epochs", "ours", "paper", "agrees"}
    assert status == 0 and all(set(row) >= keys for row in rows)
    assert {row["row"] for row in rows if row["agrees"] is False} == {"Adapter + Progtuning"}
    status, out, _ = call("paper")
    assert status == 0 and "Adapter + Progtuning: " in out and "LoRA: the paper says BERT-base" in out
    assert len(cells) == 140 and all(str(cell["paper"]) in out for cell in cells)


def test_the_installed_command_and_python_m_are_the_same_program():
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    program, options = [sys.executable, "-m", "progtuning"], {"capture_output": True, "text": True, "env": environment}
    done = subprocess.run([*program, "--version"], **options)
    assert done.returncode == 0 and done.stdout.startswith("progtuning 0.")
    done = subprocess.run(program, **options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_help_names_every_command_and_every_option_has_a_text():
    status, out, _ = call("--help")
    assert status == 0 and all(name in out for name in ("demo", "train", "evaluate", "predict", "plan", "paper"))


def test_a_submission_refuses_columns_of_ones_own_files(tmp_path):
    asked = ["--checkpoint", "c", "--task", "mrpc", "--data", tmp_path, "--glue-submission", tmp_path / "s"]
    line = refused(*call("predict", *asked, "--text-column", "x"))
    assert line.endswith("--text-column does not go with --glue-submission")


def test_no_memory_at_all_is_refused():
    assert "--memory must be more than 0, got '0'" in refused(*call("plan", "--model", "minilm-l6", "--memory", "0"))


@pytest.mark.parametrize("command", [["plan"], ["explain", "-o", "page.html"]], ids=lambda command: command[0])
def test_labels_that_the_head_of_a_plan_cannot_have_are_refused_by_their_option(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = [*command, "--model", "bert-base-uncased", "--labels"]
    line = refused(*call(*asked, "1", "--head", "multi-label"))
    assert line.endswith("--labels must be in 2..100000 for --head multi-label, got 1")
    assert "--labels must be in 1..100000 for --head classification, got 0" in refused(*call(*asked, "0"))
    for labels in ("2", "7"):
        line = refused(*call(*asked, labels, "--head", "question-answering"))
        assert line.endswith("--labels is for heads that have classes, got it with --head question-answering")
    for taken in (["1"], ["1", "--head", "classification"], ["2", "--head", "multi-label"]):
        assert call(*asked, *taken)[0] == 0
