"""Weights of classes and smoothed labels in the loss, and what a run says of each class."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from progtuning.base.errors import InputError
from progtuning.data.metrics import by_class
from progtuning.model.heads import Classification
from progtuning.run.build import class_weights
from progtuning.settings.train import TrainConfig, parse_class_weights
from progtuning.step.processes import World
from tests.models import TINY, gradients
from tests.test_cli import FAST, call, refused
from tests.test_train import rows, trainer

sklearn_metrics = pytest.importorskip("sklearn.metrics")
THREE = TINY.with_head("classification", ("a", "b", "c"))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20))
def test_precision_recall_and_f1_of_each_class_are_scikit_learns(pairs):
    predictions, labels = map(np.array, zip(*pairs))
    found = by_class(predictions, labels, ("a", "b", "c", "d"))
    expected = sklearn_metrics.precision_recall_fscore_support(labels, predictions, labels=range(4), zero_division=0)
    for name, *values in zip("abcd", *expected):
        assert list(found[name].values()) == pytest.approx(values)


def test_balanced_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    data = rows(40)
    labels = data.labels.numpy()
    config = TINY.with_head("classification", ("a", "b"))
    found = class_weights(TrainConfig(class_weights="balanced"), config, data)
    assert found == pytest.approx(compute_class_weight("balanced", classes=np.arange(2), y=labels))
    three = class_weights(TrainConfig(class_weights="balanced"), THREE, data)  # of the third class there is no row
    assert three == pytest.approx([*(found * 2 / 3), 1.0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_torchs(weighted, smoothing):
    outputs, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2, 1, 0])
    of_classes = torch.tensor([1.0, 2.0, 0.5]) if weighted else None
    expected = nn.CrossEntropyLoss(of_classes, label_smoothing=smoothing)(outputs, labels)
    found = Classification.loss(outputs, labels, class_weights=of_classes, label_smoothing=smoothing)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [1, 3])
def test_the_weights_of_the_pieces_make_their_weighted_means_that_of_the_batch(size):
    outputs, labels = torch.randn(10, 2, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 2
    of_classes = torch.tensor([1.0, 5.0])
    row_weights, batch = of_classes.numpy()[labels.numpy()], list(range(10))
    pieces = [piece for rank in range(size) for piece in World(rank, size).pieces(batch, 2, row_weights)]
    assert len(pieces) == 2 * size
    total = sum(Classification.loss(outputs[r], labels[r], class_weights=of_classes) * weight for r, weight in pieces)
    torch.testing.assert_close(total, Classification.loss(outputs, labels, class_weights=of_classes))


def test_a_step_in_pieces_has_the_gradients_of_one_in_whole_and_not_those_of_one_without_weights():
    changes = {"class_weights": "no=1,yes=4", "label_smoothing": 0.1}
    found = []
    for run in (trainer(**changes), trainer(**changes, accumulation_steps=4), trainer()):
        run.engine.train()
        run.enter(run.schedule.stages[0])
        run.backward(next(iter(run.loader.epoch(0))))
        found.append(gradients(run.engine.model))
    whole, pieces, plain = found
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-3, atol=1e-6)
    assert not torch.allclose(plain["classifier.weight"], whole["classifier.weight"], rtol=1e-2)


@pytest.mark.parametrize("text", ["", "a", "a=0", "a=-1", "a=nan", "a=1,a=2", "a=1=2", "{", '{"a": "b"}', "[1]"])
def test_weights_that_are_none_are_refused(text):
    with pytest.raises(InputError, match="^--class-weights must be balanced, or CLASS=WEIGHT"):
        TrainConfig(class_weights=text)


def test_a_name_with_signs_of_the_option_stands_in_json():
    assert parse_class_weights('{"a=1, b": 3}') == {"a=1, b": 3.0}


def test_a_class_that_is_not_there_and_a_head_without_classes_are_refused():
    with pytest.raises(InputError, match="^--class-weights: got the class d, expected one of a, b, c$"):
        class_weights(TrainConfig(class_weights="a=2,d=3"), THREE, rows(8))
    for changes, option in (({"class_weights": "balanced"}, "--class-weights"), ({"label_smoothing": 0.1}, "--label")):
        with pytest.raises(InputError, match=f"^{option}.* is for classification, got it with a regression head$"):
            class_weights(TrainConfig(**changes), TINY.with_head("regression", ("x",)), rows(8, regression=True))


def test_summary_card_and_evaluate_have_each_class_and_the_same(tiny_folder, tiny_task, tmp_path):
    data = ["--task", "classification", "--data", tiny_task]
    options = ["--class-weights", "balanced", "--label-smoothing", "0.1", "--json"]
    run = tmp_path / "run"
    status, out, err = call("train", "--model", tiny_folder, *data, *FAST, *options, "--output-dir", run)
    assert status == 0, err
    summary = json.loads(out)
    assert set(summary["by_class"]) == {"like", "dislike"}
    assert sum(one["support"] for one in summary["by_class"].values()) == summary["dev_rows"]["dev"]
    assert "| class   | precision |" in (run / "README.md").read_text()
    evaluate = ["evaluate", "--checkpoint", run, *data, "--device", "cpu"]
    assert json.loads(call(*evaluate, "--json")[1])["by_class"] == summary["by_class"]
    assert "| class   | precision |" in call(*evaluate)[1]
    line = refused(
        *call("train", "--model", tiny_folder, *data, *FAST, "--class-weights", "love=2", "--output-dir", run)
    )
    assert "--class-weights: got the class love, expected one of dislike, like" in line or "output-dir" in line
