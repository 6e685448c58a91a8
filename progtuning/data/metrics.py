"""The metrics of GLUE, equal to scikit-learn's and SciPy's wherever those are defined, and those of SQuAD.

n rows. Arguments are `predictions` (n,) and `labels` (n,): class indices for accuracy, f1 and matthews, numbers for
pearson and spearman; (n, C) for micro_f1 and macro_f1, 0 or 1 for each of C classes. Where a formula divides zero by
zero the value is 0, as scikit-learn's is for f1 and matthews: a constant prediction tells nothing of the labels. NaN is
never returned. Every function raises ValueError where the shapes differ, there is no row, or a value is not finite (or
not an integer, for class indices).

SQuAD's are those of the official evaluate-v1.1.py and evaluate-v2.0.py, as shares of 1 and not in percent.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

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


def micro_f1(predictions, labels) -> float:
    """2 * TP / (2 * TP + FP + FN), counted over all classes of all rows; 0 where there is neither."""
    predictions, labels = _sets(predictions, labels)
    positives = predictions.sum() + labels.sum()  # 2 TP + FP + FN
    return float(2 * np.sum(predictions & labels) / positives) if positives else 0.0


def macro_f1(predictions, labels) -> float:
    """The mean over the classes of each one's f1."""
    predictions, labels = _sets(predictions, labels)
    return float(np.mean([f1(predictions[:, i], labels[:, i]) for i in range(labels.shape[1])]))


METRICS = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "micro_f1": micro_f1,
    "macro_f1": macro_f1,
}


def compute(names: Iterable[str], predictions, labels) -> dict[str, float]:
    """Return {name: value} of the metrics `names`, keys of METRICS. Raises ValueError for any other name."""
    names = list(names)
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
    return {name: METRICS[name](predictions, labels) for name in names}


def by_class(predictions, labels, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return for each class, by its name, precision, recall and f1 against all others, and support, its rows.

    As in scikit-learn a share of nothing is 0.
    """
    if np.ndim(labels) == 1:
        predictions, labels = (rows[:, None] == np.arange(len(names)) for rows in _classes(predictions, labels))
    predictions, labels = _sets(predictions, labels)  # (n, C)
    found = {}
    for index, name in enumerate(names):
        right = int(np.sum(predictions[:, index] & labels[:, index]))
        predicted, support = int(predictions[:, index].sum()), int(labels[:, index].sum())
        found[name] = {
            "precision": right / predicted if predicted else 0.0,
            "recall": right / support if support else 0.0,
            "f1": 2 * right / (predicted + support) if predicted + support else 0.0,
            "support": support,
        }
    return found


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Return `text` in lower case, without ASCII punctuation and then articles, its words parted by one space."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    """1 where the normalised texts are the same, else 0."""
    return float(normalize_answer(answer) == normalize_answer(gold))


def word_f1(answer: str, gold: str) -> float:
    """The harmonic mean of precision and recall over the words of the normalised texts; 0 where they share none."""
    words, gold_words = normalize_answer(answer).split(), normalize_answer(gold).split()
    shared = sum((Counter(words) & Counter(gold_words)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(words), shared / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def squad(answers: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return what evaluate-v1.1.py prints: the means of "f1" and "exact" (match) over n questions.

    Each question counts at the gold answer that fits best; all have one or more. A text of nothing but articles and
    punctuation matches another exactly, at an f1 of 0. Raises ValueError where the lengths differ or are 0, or a
    question has no gold answer.
    """
    _check_questions(answers, golds)
    if not all(golds):
        raise ValueError("golds must be at least one for each question, got none")
    pairs = list(zip(answers, golds))
    return {
        "f1": float(np.mean([max(word_f1(answer, gold) for gold in texts) for answer, texts in pairs])),
        "exact": float(np.mean([max(exact_match(answer, gold) for gold in texts) for answer, texts in pairs])),
    }


def squad_v2(
    answers: Sequence[str], null_odds: Sequence[float], golds: Sequence[Sequence[str]], threshold: float = 0.0
) -> dict[str, float]:
    """Return what evaluate-v2.0.py prints (but its counts), for n questions of which some have no gold answer.

    `answers` are the best that are not "", which is the answer where null_odds (n,) exceeds `threshold`.

        f1, exact                        the means over all questions, each at the gold answer that fits best
        HasAns_f1, HasAns_exact, ...     the same over the questions that have a gold answer, or (NoAns_) have none
        best_f1, best_f1_thresh, ...     the highest f1 (exact) of any threshold, and that threshold

    Gold answers of nothing but articles and punctuation do not count: where a question has no others, an answer of
    that kind is right and "" above the threshold is wrong. The search for the best threshold is the script's too: it
    begins with no answer to any question (threshold 0), takes every answer that is not "" for wrong where none is
    right, and may cut between equal odds. Raises ValueError where the lengths differ or are 0.
    """
    _check_questions(answers, golds)
    odds = np.asarray(null_odds, dtype=np.float64)
    if odds.shape != (len(answers),) or not np.isfinite(odds).all():
        raise ValueError(f"null_odds must be {len(answers)} finite numbers, got {odds.dtype} {odds.shape}")
    has_answer = np.array([len(texts) > 0 for texts in golds])
    raw = per_question(answers, golds)
    scores = {name: np.where(odds > threshold, ~has_answer, raw[name]) for name in raw}
    values = {name: float(scores[name].mean()) for name in scores}
    for prefix, part in (("HasAns_", has_answer), ("NoAns_", ~has_answer)):
        if part.any():
            values |= {prefix + name: float(scores[name][part].mean()) for name in scores}
    costs = np.array([-float(answer != "") for answer in answers])
    for name in raw:
        gains = np.where(has_answer, raw[name], costs)
        values[f"best_{name}"], values[f"best_{name}_thresh"] = _best_threshold(odds, gains, np.sum(~has_answer))
    return values


def _check_questions(answers: Sequence[str], golds: Sequence[Sequence[str]]) -> None:
    if len(answers) != len(golds) or not len(golds):
        raise ValueError(f"answers and golds must be as many and at least one, got {len(answers)} and {len(golds)}")


def per_question(answers: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """Return "f1" and "exact" (n,) of evaluate-v2.0.py: as v1.1's, but that "" against "" is an f1 of 1."""
    f1s, exacts = np.empty(len(golds)), np.empty(len(golds))
    for i, (answer, texts) in enumerate(zip(answers, golds)):
        texts = [text for text in texts if normalize_answer(text)] or [""]
        exacts[i] = max(exact_match(answer, text) for text in texts)
        f1s[i] = max(exacts[i], *(word_f1(answer, text) for text in texts))
    return {"f1": f1s, "exact": exacts}


def _best_threshold(odds: np.ndarray, gains: np.ndarray, score: float) -> tuple[float, float]:
    """Return the highest mean score of any threshold on `odds` (n,), and that threshold.

    Below all odds the sum of the scores is `score`; a threshold at odds[i] adds gains[i] and those of all lower odds.
    """
    order = np.argsort(odds, kind="stable")
    totals = np.cumsum([score, *gains[order]])
    best = np.argmax(totals)  # of equal ones the lowest
    return float(totals[best] / len(odds)), float(odds[order][best - 1]) if best else 0.0


def _classes(predictions, labels) -> tuple[np.ndarray, np.ndarray]:
    predictions, labels = _rows(predictions, labels)
    for name, values in (("predictions", predictions), ("labels", labels)):
        if values.dtype.kind not in "iub" or values.min() < 0:
            raise ValueError(f"{name} must be class indices from 0, got {values.dtype} {values[:3]}...")
    return predictions.astype(np.int64), labels.astype(np.int64)


def _sets(predictions, labels) -> tuple[np.ndarray, np.ndarray]:
    """Return both as (n, C) bool: which classes a row has."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or predictions.ndim != 2 or not predictions.size:
        got = f"{predictions.shape} and {labels.shape}"
        raise ValueError(f"predictions and labels must be two tables of one shape (rows, classes), got {got}")
    for name, values in (("predictions", predictions), ("labels", labels)):
        if not np.isin(values, (0, 1)).all():
            raise ValueError(f"{name} must be 0 or 1 for each row and class, got {values.dtype} {values[:1]}...")
    return predictions.astype(bool), labels.astype(bool)


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
