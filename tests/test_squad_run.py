"""SQuAD and GLUE submissions on the command line: train, evaluate, predict, and the files they write."""

import json

import numpy as np
import pytest
import torch

from progtuning.checkpoint import load_model
from progtuning.config import SquadConfig, TrainConfig, recipe
from progtuning.data.squad import encode_questions, load_squad, read_squad
from progtuning.data.tokenization import load_tokenizer
from progtuning.train import answer
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
    assert (summary["settings"]["epochs"], summary["settings"]["stages"]) == (epochs, epochs)
    lowest = {"squad": [1, 2, 3], "squad_v2": [1, 3]}[task]
    assert [stage["active_blocks"] for stage in summary["stages"]] == [[low, 4] for low in lowest]
    assert summary["settings"]["max_length"] == 24  # of the model: less than 384
    assert summary["task"] == task and summary["train_rows"] == 240


def test_made_questions_are_learnt_and_evaluate_gives_the_metrics_of_training(trained, films):
    task, folder, summary = trained
    print(summary["metrics"])
    assert summary["metrics"]["f1"] >= summary["metrics"]["exact"] > 0.6
    if task == "squad_v2":
        assert summary["metrics"]["best_f1"] >= summary["metrics"]["f1"]
        assert {"HasAns_f1", "HasAns_exact", "NoAns_f1", "NoAns_exact", "best_exact_thresh"} < set(summary["metrics"])
    status, out, err = call("evaluate", "--checkpoint", folder, "--task", task, "--data", films, "--json")
    assert status == 0, err
    assert json.loads(out)["metrics"] == pytest.approx(summary["metrics"], rel=1e-5)  # batches are larger
