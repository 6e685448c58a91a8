"""`--keep best` and `--patience`: which evaluation is the best, whose weights are written, when a run ends early."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from progtuning.engine import StageEngine
from progtuning.report.summary import LOG
from progtuning.run.best import Best, EnoughEvaluations
from progtuning.run.evaluate import Measured
from progtuning.run.saved import load_checkpoint
from progtuning.settings.train import TrainConfig
from progtuning.stages import Stage
from tests.models import tiny_model
from tests.test_cli import FAST, call, refused

ENGINE = StageEngine(tiny_model(num_hidden_layers=1))
ENGINE.enter(Stage(0, 1, 0, True))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.none() | st.integers(1, 4), st.integers(0, 11))
def test_the_first_of_the_highest_counts_and_a_run_ends_after_as_many_no_better_whenever_it_was_resumed(
    values, patience, at
):
    best, seen = Best(TrainConfig(patience=patience), "f1"), []
    for epoch, value in enumerate(values):
        if epoch == at:
            state = json.loads(json.dumps(best.state_dict()))
            best = Best(TrainConfig(patience=patience), "f1")
            best.load_state_dict(state)
        seen.append(value)
        waited = len(seen) - 1 - seen.index(max(seen))
        try:
            best.see(epoch, Measured({"accuracy": -value, "f1": value}, {"a/b": {"f1": value}}), ENGINE)
            assert patience is None or waited < patience
        except EnoughEvaluations:
            assert waited == patience
            break
    assert best.found == {
        "epoch": seen.index(max(seen)) + 1,
        "stage": 1,
        "metrics": {"accuracy": -max(seen), "f1": max(seen)},
    }
    assert best.written == Measured({"accuracy": -seen[-1], "f1": seen[-1]}, {"a/b": {"f1": seen[-1]}})


def test_of_several_held_out_sets_the_first_counts():
    best = Best(TrainConfig(), "accuracy")
    for epoch, (first, second) in enumerate(((0.5, 0.9), (0.6, 0.1))):
        best.see(epoch, Measured({"matched/accuracy": first, "mismatched/accuracy": second}), ENGINE)
    assert best.found["epoch"] == 2


def test_the_weights_put_back_are_those_of_the_best_evaluation_and_not_views_of_what_trains_on():
    engine = StageEngine(tiny_model(num_hidden_layers=1))
    engine.enter(Stage(0, 1, 0, True))
    best, weights = Best(TrainConfig(keep="best"), "f1"), []
    for epoch, value in enumerate((0.2, 0.9, 0.3)):
        with torch.no_grad():
            for parameter in engine.model.parameters():
                parameter.add_(1.0)
        best.see(epoch, Measured({"f1": value}), engine)
        weights.append({name: p.detach().clone() for name, p in engine.model.named_parameters()})
    best.put_back(engine)
    assert all(torch.equal(p, weights[1][name]) for name, p in engine.model.named_parameters())


def train(tiny_folder, tiny_task, folder, *options):
    data = ["--model", tiny_folder, "--task", "classification", "--data", tiny_task, "--output-dir", folder]
    status, out, err = call("train", *data, *FAST, "--json", *options)
    assert status == 0, err
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads(out), {row["epoch"]: row["metrics"] for row in rows if "metrics" in row}


def test_the_model_written_is_the_one_that_scored_best_and_summary_and_card_say_of_which_stage(
    tiny_folder, tiny_task, tmp_path, monkeypatch
):
    scores, seen = [0.2, 0.9, 0.5], []

    def measured(model, *_):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return Measured({"accuracy": scores[len(seen) - 1]})

    monkeypatch.setattr("progtuning.run.finetune.measure_splits", measured)
    summary, logged = train(tiny_folder, tiny_task, tmp_path / "run", "--keep", "best")
    assert [metrics["accuracy"] for metrics in logged.values()] == scores
    assert summary["best"] == {"epoch": 2, "stage": 2, "metrics": {"accuracy": 0.9}}
    assert summary["metrics"] == {"accuracy": 0.9} and summary["epochs"] == 3
    written = load_checkpoint(tmp_path / "run").model.state_dict()
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in written.items())
    assert not all(torch.equal(tensor, seen[2][name]) for name, tensor in written.items())
    card = (tmp_path / "run" / "README.md").read_text()
    assert "The weights are those of epoch 2 (stage 2), the best evaluation." in card
    seen.clear()
    train(tiny_folder, tiny_task, tmp_path / "last")
    card = (tmp_path / "last" / "README.md").read_text()
    assert "The best evaluation was after epoch 2 (stage 2): accuracy 0.9000; `--keep best` writes its weights." in card


def test_a_run_ends_when_its_patience_does_and_says_so(tiny_folder, tiny_task, tmp_path):
    summary, scores = train(tiny_folder, tiny_task, tmp_path / "run", "--patience", "1", "--epochs", "8", "--lr", "0")
    assert list(scores) == [1, 2] and summary["epochs"] == 2 and summary["best"]["epoch"] == 1
    assert sum(stage["steps"] for stage in summary["stages"]) == 80
    assert "The run ended after epoch 2: `--patience 1`." in (tmp_path / "run" / "README.md").read_text()


def test_a_run_that_comes_to_its_own_end_is_not_said_to_be_cut_short(tiny_folder, tiny_task, tmp_path):
    summary, _ = train(tiny_folder, tiny_task, tmp_path / "run", "--patience", "2", "--epochs", "3", "--lr", "0")
    assert summary["epochs"] == 3 and summary["best"]["epoch"] == 1
    assert "The run ended" not in (tmp_path / "run" / "README.md").read_text()


def test_the_loss_of_the_steps_before_an_early_end_is_logged_and_explained(tiny_folder, tiny_task, tmp_path):
    """Of 4 steps, where a row is due every 10 and at the planned end."""
    few = ["--patience", "1", "--epochs", "8", "--lr", "0", "--max-train-rows", "16"]
    train(tiny_folder, tiny_task, tmp_path / "run", *few)
    rows = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [rows[-1]["step"]]
    assert call("explain", "--run", tmp_path / "run", "-o", tmp_path / "page.html")[0] == 0


@pytest.mark.parametrize("option", [["--keep", "best"], ["--patience", "2"]])
def test_where_a_run_is_evaluated_once_there_is_nothing_to_compare(option, tiny_folder, tiny_task, tmp_path):
    data = ["--model", tiny_folder, "--task", "classification", "--data", tiny_task, "--output-dir", tmp_path / "run"]
    line = refused(*call("train", *data, *FAST, "--evaluate", "end", *option))
    assert f"{option[0]}" in line and "--evaluate end makes one" in line and not (tmp_path / "run").exists()
