"""The metrics of GLUE, equal to scikit-learn's and SciPy's wherever those are defined.

n rows. Arguments are `predictions` (n,) and `labels` (n,): class indices for accuracy, f1 and matthews, numbers for
pearson and spearman. Where a formula divides zero by zero the value is 0, as scikit-learn's is for f1 and matthews: a
constant prediction tells nothing of the labels. NaN is never returned. Every function raises ValueError where the
shapes differ, there is no row, or a value is not finite (or not an integer, for class indices).
"""

from collections.abc import Iterable

import numpy as np


def accuracy(predictions, labels) -> float:
    """The share of rows predicted right."""
    predictions, labels = _classes(predictions, labels)
    return float(np.mean(predictions == labels))


def f1(predictions, labels) -> float:
    """2 * TP / (2 * TP + FP + FN) of class 1 against class 0; 0 where neither predictions nor labels have a 1."""
    predictions, labels = _classes(predictions, labels)
    if max(predictions.max(), labels.max()) > 1:
        raise ValueError(f"f1 needs two classes, got class {max(predictions.max(), labels.max())}")
    positives = predictions.sum() + labels.sum()  # 2 TP + FP + FN
    return float(2 * np.sum(predictions & labels) / positives) if positives else 0.0


def matthews(predictions, labels) -> float:
    """Matthews' correlation of any number of classes (Gorodkin, 2004, "Comparing two K-category assignments", Eq. 8).

    0 where the predictions or the labels are constant.
    """
    predictions, labels = _classes(predictions, labels)
    n = len(labels)
    predicted = np.bincount(predictions)  # rows predicted as each class
    actual = np.bincount(labels)
    shared = min(len(predicted), len(actual))
    # Python's integers: n^2 times n^2 below exceeds 64 bits from some 55,000 rows on.
    product = int(predicted[:shared] @ actual[:shared])
    predicted_spread = n * n - int(predicted @ predicted)
    actual_spread = n * n - int(actual @ actual)
    if not predicted_spread or not actual_spread:
        return 0.0
    covariance = n * int(np.sum(predictions == labels)) - product
    return covariance / (predicted_spread * actual_spread) ** 0.5


def pearson(predictions, labels) -> float:
    """The linear correlation; 0 where the predictions or the labels are constant."""
    return _correlation(*_numbers(predictions, labels))


def spearman(predictions, labels) -> float:
    """The correlation of the ranks, where ties share their mean rank; 0 where the predictions or the labels are
    constant.
    """
    predictions, labels = _numbers(predictions, labels)
    return _correlation(_ranks(predictions), _ranks(labels))


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


def compute(names: Iterable[str], predictions, labels) -> dict[str, float]:
    """Return {name: value} of the metrics `names`, keys of METRICS. Raises ValueError for any other name."""
    names = list(names)
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
    return {name: METRICS[name](predictions, labels) for name in names}


def _classes(predictions, labels) -> tuple[np.ndarray, np.ndarray]:
    predictions, labels = _rows(predictions, labels)
    for name, values in (("predictions", predictions), ("labels", labels)):
        if values.dtype.kind not in "iub" or values.min() < 0:
            raise ValueError(f"{name} must be class indices from 0, got {values.dtype} {values[:3]}...")
    return predictions.astype(np.int64), labels.astype(np.int64)


def _numbers(predictions, labels) -> tuple[np.ndarray, np.ndarray]:
    predictions, labels = _rows(predictions, labels)
    for name, values in (("predictions", predictions), ("labels", labels)):
        if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite numbers, got {values.dtype} with NaN, infinity or no numbers")
    return predictions.astype(np.float64), labels.astype(np.float64)


def _rows(predictions, labels) -> tuple[np.ndarray, np.ndarray]:
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or predictions.ndim != 1:
        raise ValueError(
            f"predictions and labels must be two vectors of one length, got {predictions.shape} and {labels.shape}"
        )
    if not len(labels):
        raise ValueError("predictions and labels must have at least one row, got none")
    return predictions, labels


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    return float(np.clip(_unit(x) @ _unit(y), -1, 1))


def _unit(x: np.ndarray) -> np.ndarray:
    """Return x less its mean, scaled to length 1, of an x that is not constant.

    A correlation changes with neither offset nor scale. Powers of two are taken out so that no square over- or
    underflows, and the first value so that an offset does not drown the differences.
    """
    x = _scaled(x)
    x = _scaled(x - x[0])
    x = x - x.mean()
    return x / np.linalg.norm(x)


def _scaled(x: np.ndarray) -> np.ndarray:
    """Return x by the power of two that brings its largest magnitude into 0.5 .. 1."""
    return np.ldexp(x, -np.frexp(np.abs(x).max())[1])


def _ranks(x: np.ndarray) -> np.ndarray:
    """Return the 1-based ranks of x, ties at the mean of theirs."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
