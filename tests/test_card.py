"""The README.md of an output folder: metadata that the Hub reads back, and code that does what it says."""

import json
import re
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard

from progtuning.data.hub import dataset_of
from progtuning.model.config import HEADS
from progtuning.report.hub import USES, model_card
from progtuning.report.summary import read_summary
from progtuning.run.saved import load_checkpoint
from tests.conftest import WORDS
from tests.squad_files import write_squad
from tests.test_cli import FAST, METHODS, call, trained  # noqa: F401


def test_every_head_has_its_use_and_the_metadata_of_a_card_are_what_the_hub_reads(trained):
    assert list(USES) == list(HEADS)
    summary = read_summary(trained)
    data = ModelCard((trained / "README.md").read_text()).data
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "text-classification", ["progtuning"])
    assert data.metrics == ["accuracy", "matthews_correlation"]
    assert (data.base_model, data.datasets) == (None, None)  # folders on a disk
    assert data.model_name == f"{summary.model} fine-tuned on {summary.task}"
    found = {(one.metric_type, one.metric_name): one.metric_value for one in data.eval_results}
    assert found == {
        ("accuracy", "accuracy"): summary.metrics["accuracy"],
        ("matthews_correlation", "matthews"): summary.metrics["matthews"],
    }
    for one in data.eval_results:
        assert (one.task_type, one.task_name) == ("text-classification", summary.task)
        assert (one.dataset_name, one.dataset_type, one.dataset_split) == (summary.task, summary.task, None)


@pytest.mark.parametrize(
    "name", ['say "no": [x]', "a # b\n---\nc", "é\u2028\x85\ufeff\U0001f600\ud800", "- 'yes", "1e3", ""]
)
def test_a_name_of_any_kind_comes_back(name, trained):
    summary = replace(read_summary(trained), model=name, task=name, metrics={"accuracy": 1e-05})
    data = ModelCard(model_card(summary, "classification", True)).data
    assert data.model_name == f"{name} fine-tuned on {name}"
    (result,) = data.eval_results
    assert (result.dataset_name, result.task_name, result.metric_value) == (name, name, 1e-05)


@pytest.mark.parametrize(
    "model, base",
    [
        ("org/name@v1", "org/name"),
        ("bert-base-cased", "google-bert/bert-base-cased"),
        ("minilm-l6", None),
        ("pypi:x==1!a/b", None),
        ("here/folder", None),
    ],
)
def test_the_base_model_is_named_where_it_is_one_of_the_hub(model, base, trained, tmp_path, monkeypatch):
    (tmp_path / "here" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    lora = replace(read_summary(trained), model=model)
    lora.settings["peft"] = lora.settings["peft"] | {"method": "lora"}
    text = model_card(lora, "classification", False)
    assert ModelCard(text).data.base_model == base
    load = re.search("^base = (.*)$", text, re.MULTILINE)[1]
    assert load == (repr(base or str(tmp_path / model)) if base or "/folder" in model else f"model_folder({model!r})")
    assert (", revision='v1')" in text) == (model == "org/name@v1")


def test_each_held_out_split_of_a_task_of_the_hub_is_a_result_of_its_own(trained):
    metrics = {"dev_matched/accuracy": 0.5, "dev_mismatched/accuracy": 0.25}
    mnli = replace(read_summary(trained), metrics=metrics, dev_rows={"dev_matched": 8, "dev_mismatched": 4})
    data = ModelCard(model_card(mnli, "classification", True, dataset_of("MNLI", "glue_data/MNLI"))).data
    assert data.datasets == ["nyu-mll/glue"] and data.metrics == ["accuracy"]
    found = [(one.dataset_name, one.dataset_config, one.dataset_split, one.metric_value) for one in data.eval_results]
    assert found == [
        ("GLUE MNLI", "mnli", "validation_matched", 0.5),
        ("GLUE MNLI", "mnli", "validation_mismatched", 0.25),
    ]


def test_the_data_of_a_task_have_the_hubs_name_where_they_are_its():
    glue = {"name": "GLUE SST-2", "type": "nyu-mll/glue", "config": "sst2", "split": "validation"}
    assert dataset_of("sst2", "hub") == dataset_of("SST-2", "folder") == glue
    squad = {"name": "squad", "type": "rajpurkar/squad", "config": "plain_text", "split": "validation"}
    assert dataset_of("squad", "folder") == squad
    own = {"name": "org/name", "type": "org/name", "config": "en", "revision": "v1"}
    assert dataset_of("classification", "hub:org/name@v1:en") == own
    assert dataset_of("regression", "hub:org/name") == {"name": "org/name", "type": "org/name"}
    assert dataset_of("classification", "org/name.csv") is dataset_of("movie-reviews", None) is None


def write_rows(folder, task: str) -> None:
    """Write a small train and dev file of a task of one's own, or of pairs."""
    if task == "squad":
        write_squad(folder, "v1.1", train=16, dev=4)
        return
    folder.mkdir()
    labels = {"regression": ["1.5", "-1"], "multi-label": ["a,b", "b"]}.get(task, ["good", "bad"])
    pair = "\ttext_pair" if task == "pairs" else ""
    rows = [f"the {word} film{pair and chr(9) + 'a plot'}\t{labels[i % 2]}\n" for i, word in enumerate(WORDS[:8])]
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text(f"text{pair}\tlabel\n" + "".join(rows))


@pytest.mark.parametrize("method", ["none", "lora"])
@pytest.mark.parametrize("task", ["classification", "pairs", "regression", "multi-label", "squad"])
def test_the_code_of_the_card_loads_the_folder_and_gives_its_outputs(
    task, method, tiny_folder, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("transformers")
    if method == "lora":
        pytest.importorskip("peft")
    write_rows(tmp_path / "rows", task)
    name, run = task if task != "pairs" else "classification", tmp_path / "run"
    arguments = ["--model", tiny_folder, "--task", name, "--data", tmp_path / "rows", "--output-dir", run, *FAST]
    status, _, err = call("train", *arguments, "--peft", method)
    assert status == 0, err
    text = (run / "README.md").read_text()
    assert ModelCard(text).data.library_name == {"none": "transformers", "lora": "peft"}[method]
    (code,) = re.findall("^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert ("Its pair." in code) == (task == "pairs")
    monkeypatch.chdir(run)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), names := {})
    printed = capsys.readouterr().out.splitlines()
    checkpoint = load_checkpoint(run)
    inputs = names["inputs"]
    with torch.no_grad():
        ours = checkpoint.model(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["token_type_ids"])
    outputs = names["outputs"]
    theirs = torch.stack([outputs.start_logits, outputs.end_logits], -1) if task == "squad" else outputs.logits
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    labels, row = checkpoint.model.config.labels, ours[0]
    if task == "squad":
        assert len(printed) == 1
    elif task == "regression":
        assert float(printed[0]) == pytest.approx(row.item(), abs=1e-5)
    elif task == "multi-label":
        assert printed == [str([label for label, logit in zip(labels, row) if logit > 0])]
    else:
        assert printed == [labels[row.argmax()]]


@pytest.mark.parametrize("method", ["adapter", "bitfit", "spafit"])
def test_what_progtuning_alone_reads_says_so_and_its_command_runs(
    method, tiny_folder, tiny_task, tmp_path, monkeypatch
):
    run, options = tmp_path / "run", METHODS[method][0]
    arguments = ["--task", "classification", "--data", tiny_task, "--output-dir", run, *FAST, "--max-train-rows", 16]
    assert call("train", "--model", tiny_folder, *arguments, "--peft", method, *options)[0] == 0
    text = (run / "README.md").read_text()
    data = ModelCard(text).data
    assert data.library_name == "progtuning" and data.tags == ["progtuning", method]
    assert f"What `--peft {method}` trained is read by progtuning alone." in text and "```python" not in text
    assert ("`train --merge`" in text) == (method != "adapter")
    (command,) = re.findall("^```sh\nprogtuning (.*)\n```$", text, re.MULTILINE)
    monkeypatch.chdir(run)
    (run / "texts.tsv").write_text("text\na good film\n")
    assert call(*command.split())[0] == 0
    assert (run / "predictions.tsv").read_text().startswith("label\tprobability\n")


def test_a_merged_model_is_one_of_transformers_and_the_screen_has_the_card_alone(tiny_folder, tiny_task, tmp_path):
    arguments = ["--task", "classification", "--data", tiny_task, "--output-dir", tmp_path / "run", *FAST]
    arguments += ["--max-train-rows", 16, "--peft", "spafit", *METHODS["spafit"][0], "--merge"]
    status, out, err = call("train", "--model", tiny_folder, *arguments)
    assert status == 0, err
    text = (tmp_path / "run" / "README.md").read_text()
    assert ModelCard(text).data.library_name == "transformers" and "AutoModelForSequenceClassification" in text
    assert out.startswith("# ") and out.removesuffix(f"\nWritten: {tmp_path / 'run'}\n") in text
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["settings"]["peft"]["method"] == "spafit"
