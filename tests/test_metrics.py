"""The metrics against scikit-learn, SciPy and exact rational arithmetic."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from progtuning.metrics import METRICS, accuracy, compute, f1, matthews, pearson, spearman

seeded = settings(max_examples=200, deadline=None, derandomize=True)

binary = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)
classes = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)
# Few distinct values, so that ties and constant columns are common.
tied = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30)
floats = st.floats(-1e3, 1e3, allow_nan=False, width=32)
numbers = st.lists(st.tuples(floats, floats), min_size=2, max_size=30)


def columns(pairs, dtype=None):
    return np.array([p for p, _ in pairs], dtype=dtype), np.array([y for _, y in pairs], dtype=dtype)


@seeded
@given(classes)
def test_accuracy_and_matthews_equal_scikit_learn(pairs):
    sklearn = pytest.importorskip("sklearn.metrics")
    predictions, labels = columns(pairs)
    assert accuracy(predictions, labels) == sklearn.accuracy_score(labels, predictions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = sklearn.matthews_corrcoef(labels, predictions)
    assert matthews(predictions, labels) == pytest.approx(expected, abs=1e-12)


@seeded
@given(binary)
def test_f1_equals_scikit_learn_also_where_a_class_is_missing(pairs):
    sklearn = pytest.importorskip("sklearn.metrics")
    predictions, labels = columns(pairs)
    assert f1(predictions, labels) == pytest.approx(sklearn.f1_score(labels, predictions, zero_division=0), abs=1e-15)


@seeded
@given(tied | numbers)
def test_correlations_equal_scipy_and_are_0_where_scipy_has_nan(pairs):
    stats = pytest.importorskip("scipy.stats")
    predictions, labels = columns(pairs, float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected_pearson = stats.pearsonr(predictions, labels)[0]
        expected_spearman = stats.spearmanr(predictions, labels)[0]
    assert spearman(predictions, labels) == pytest.approx(np.nan_to_num(expected_spearman), abs=1e-9)
    spread = min(np.ptp(predictions), np.ptp(labels))
    if spread == 0 or spread > 1e-6 * max(np.abs(predictions).max(), np.abs(labels).max()):  # SciPy is exact enough
        assert pearson(predictions, labels) == pytest.approx(np.nan_to_num(expected_pearson), abs=1e-7)


def exact_pearson(x, y):
    x, y = [Fraction(float(v)) for v in x], [Fraction(float(v)) for v in y]
    x, y = [v - sum(x) / len(x) for v in x], [v - sum(y) / len(y) for v in y]
    covariance = sum(a * b for a, b in zip(x, y))
    square = covariance**2 / (sum(a * a for a in x) * sum(b * b for b in y))
    return math.copysign(math.sqrt(square), covariance)


@seeded
@given(numbers, st.sampled_from([0.0, 1e6, -1e12, 1e15]), st.sampled_from([1e-300, 1e-9, 1.0, 1e250]))
def test_pearson_is_exact_at_large_offsets_and_extreme_scales(pairs, offset, scale):
    predictions, labels = columns(pairs, float)
    predictions, labels = predictions + offset, labels * scale
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        assert pearson(predictions, labels) == 0.0
    else:
        assert pearson(predictions, labels) == pytest.approx(exact_pearson(predictions, labels), abs=1e-9)


@seeded
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_correlations_stay_within_1_for_any_finite_numbers(values):
    labels = np.arange(len(values), dtype=float)
    for metric in (pearson, spearman):
        value = metric(np.array(values), labels)
        assert -1 <= value <= 1
        assert metric(labels, np.array(values)) == pytest.approx(value, abs=1e-12)


def test_degenerate_inputs_have_the_defined_value_and_warn_of_nothing():
    ones, zeros, both = np.ones(4, int), np.zeros(4, int), np.array([0, 1, 0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert f1(zeros, zeros) == f1(zeros, ones) == f1(ones, zeros) == 0.0
        assert f1(ones, ones) == 1.0
        assert matthews(ones, both) == matthews(both, ones) == matthews(ones, ones) == 0.0
        assert pearson(ones, both) == spearman(both, ones) == pearson(ones, ones) == 0.0
        assert pearson([0.1] * 3, [1.0, 2.0, 3.0]) == 0.0  # the mean of three 0.1 is not 0.1
        assert pearson([3.0], [4.0]) == spearman([3.0], [4.0]) == 0.0


def test_matthews_of_many_rows_does_not_overflow_64_bits():
    labels = np.arange(200_000) % 2
    predictions = labels.copy()
    predictions[:50_000] = 0
    tp, tn, fn = 75_000, 100_000, 25_000  # no false positive
    assert matthews(predictions, labels) == pytest.approx(
        tp * tn / math.sqrt(tp * (tp + fn) * tn * (tn + fn)), rel=1e-12
    )


@pytest.mark.parametrize("name", METRICS)
def test_shapes_emptiness_and_values_that_are_not_finite_are_errors(name):
    metric = METRICS[name]
    with pytest.raises(ValueError, match=r"one length, got \(2,\) and \(3,\)"):
        metric([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="two vectors"):
        metric([[0, 1]], [[0, 1]])
    with pytest.raises(ValueError, match="at least one row"):
        metric(np.array([], dtype=int), np.array([], dtype=int))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="^predictions must be"):
            metric([0.0, bad], [0, 1])
        with pytest.raises(ValueError, match="^labels must be"):
            metric([0, 1], [0.0, bad])
    with pytest.raises(ValueError, match="^labels must be"):
        metric([0, 1], ["0", "1"])


def test_class_metrics_refuse_what_are_not_their_classes():
    with pytest.raises(ValueError, match="labels must be class indices from 0, got int64"):
        accuracy([0, 1], [0, -1])
    with pytest.raises(ValueError, match="f1 needs two classes, got class 2"):
        f1([0, 2], [0, 1])


def test_compute_returns_the_named_metrics_and_refuses_others():
    assert compute(("f1", "accuracy"), [1, 1, 0, 0], [1, 0, 0, 0]) == {"f1": pytest.approx(2 / 3), "accuracy": 0.75}
    with pytest.raises(ValueError, match="metric must be one of accuracy, f1.*'bleu'"):
        compute(["bleu"], [1], [1])
