"""The metrics against scikit-learn, SciPy and exact rational arithmetic; those of SQuAD by hand and by properties."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from progtuning.data.metrics import (
    METRICS,
    accuracy,
    compute,
    exact_match,
    f1,
    matthews,
    normalize_answer,
    pearson,
    spearman,
    squad,
    squad_v2,
    word_f1,
)

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


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("micro_f1", "macro_f1")])
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


# ---- SQuAD


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel Tower, Paris!", "eiffel tower paris"),
        ("an apple a day", "apple day"),
        ("theatre and Ana", "theatre and ana"),  # articles are whole words
        ("U.S.A.", "usa"),  # without its points it is one word, and no article is left of it
        ("A.", ""),
        ("the-a", "thea"),  # punctuation goes first
        ("\u00a0Déjà\tvu\n", "déjà vu"),
        ("“the” 東京。", "“ ” 東京。"),  # only ASCII punctuation goes; a quotation mark parts words
        ("", ""),
    ],
)
def test_answers_are_normalised_as_the_official_script_does(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "expected"),
    [
        ("the Eiffel tower", "Eiffel Tower!", 1, 1),
        ("tower in Paris", "the Eiffel Tower", 0, 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("to be or to be", "to be", 0, 2 * (2 / 5) * 1 / (2 / 5 + 1)),  # a word counts as often as both have it
        ("London", "Paris", 0, 0),
        ("", "Paris", 0, 0),
        ("Paris", "", 0, 0),
        ("", "", 1, 0),  # evaluate-v1.1.py
        ("the", "", 1, 0),
        ("the", "a", 1, 0),
    ],
)
def test_exact_match_and_f1_of_one_answer(answer, gold, exact, expected):
    assert exact_match(answer, gold) == exact
    assert word_f1(answer, gold) == pytest.approx(expected)


words = st.lists(st.sampled_from("a the an cat Cat cats dog 1842 東京 é, -- U.S.".split()), max_size=6)
answer_texts = words.map(" ".join)


@seeded
@given(answer_texts, answer_texts)
def test_f1_is_symmetric_within_0_and_1_and_of_a_word_or_more_no_less_than_exact_match(answer, gold):
    assert word_f1(answer, gold) == word_f1(gold, answer)
    assert 0 <= word_f1(answer, gold) <= 1
    assert exact_match(answer, gold) <= word_f1(answer, gold) or not normalize_answer(answer)
    assert exact_match(answer, gold) == exact_match(gold, answer)


@seeded
@given(words, answer_texts, st.data())
def test_case_articles_punctuation_and_white_space_change_nothing(answer, gold, data):
    changed = list(answer)
    for article in data.draw(st.lists(st.sampled_from(["a", "An", "THE"]), max_size=3)):
        changed.insert(data.draw(st.integers(0, len(changed))), article)
    text = data.draw(st.sampled_from([" ", "  ", "\n", " \u00a0"])).join(changed)
    for mark in data.draw(st.lists(st.sampled_from("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"), max_size=4)):
        place = data.draw(st.integers(0, len(text)))
        text = text[:place] + mark + text[place:]
    text = data.draw(st.sampled_from([str.upper, str.lower, str.title, str]))(text)
    assert normalize_answer(text) == normalize_answer(" ".join(answer))
    assert word_f1(text, gold) == word_f1(" ".join(answer), gold)
    assert exact_match(text, gold) == exact_match(" ".join(answer), gold)


def test_the_gold_that_fits_best_counts_and_articles_match_at_an_f1_of_0_as_in_evaluate_v1():
    golds = [["Paris", "the city of Paris"], ["x"], ["The", "a"], ["the", "x"]]
    assert squad(["city of Paris", "y", "", "x"], golds) == {"f1": 0.5, "exact": 0.75}
    assert squad(["in Paris", "y", "z", "an"], golds) == {"f1": pytest.approx(2 / 3 / 4), "exact": 0.25}


V2_CORNERS = {  # answer, odds, golds, (f1, exact) at threshold 0
    "no answer, rightly": ("x", 1.0, [], (1, 1)),
    "an answer, wrongly": ("x", -1.0, [], (0, 0)),
    "an article where none is right": ("the", -1.0, [], (1, 1)),
    "no span where none is right": ("", -1.0, [], (1, 1)),
    "no answer, golds of articles": ("x", 1.0, ["a", "The."], (0, 0)),
    "an article, golds of articles": ("an", -1.0, ["a", "The."], (1, 1)),
    "an answer, golds of articles": ("x", -1.0, ["a"], (0, 0)),
    "an article, one gold an article": ("the", -1.0, ["a", "x"], (0, 0)),
    "no answer, golds of a word": ("x", 1.0, ["x"], (0, 0)),
    "at the threshold": ("x y", 0.0, ["x", "the"], (2 / 3, 0)),
}


@pytest.mark.parametrize("kind", V2_CORNERS)
def test_one_question_scores_as_in_evaluate_v2(kind):
    answer, odds, golds, (f1, exact) = V2_CORNERS[kind]
    values = squad_v2([answer], [odds], [golds])
    prefix = "HasAns_" if golds else "NoAns_"
    assert values["f1"] == values[f"{prefix}f1"] == pytest.approx(f1)
    assert values["exact"] == values[f"{prefix}exact"] == exact


BEST_CORNERS = {  # (answer, odds, golds) of each question; best exact and its threshold
    "no threshold is better than none": ([("x", -1.0, []), ("y", 2.0, ["z"])], 0.5, 0.0),
    "of equal thresholds the lowest": ([("x", -2.0, ["x"]), ("y", -1.0, ["z"]), ("z", 0.5, ["q"])], 1 / 3, -2.0),
    "a cut between equal odds": ([("x", 1.0, ["x"]), ("y", 1.0, [])], 1.0, 1.0),
    "an article counts as wrong where none is right": ([("the", -1.0, []), ("x", 1.0, ["x"])], 0.5, 0.0),
    "no span costs nothing": ([("", -1.0, []), ("x", 1.0, ["x"])], 1.0, 1.0),
    "golds of articles": ([("an", -1.0, ["a"]), ("x", 1.0, [])], 1.0, -1.0),
}


@pytest.mark.parametrize("kind", BEST_CORNERS)
def test_the_best_threshold_is_that_of_evaluate_v2(kind):
    rows, best, threshold = BEST_CORNERS[kind]
    values = squad_v2(*zip(*[(answer, odds, golds) for answer, odds, golds in rows]))
    assert (values["best_exact"], values["best_exact_thresh"]) == (pytest.approx(best), threshold)
    assert (values["best_f1"], values["best_f1_thresh"]) == (pytest.approx(best), threshold)


def test_squad_v2_breaks_down_by_answerable_and_finds_the_best_threshold():
    golds = [["x"], ["y z"], [], []]
    values = squad_v2(["x", "y", "p", "q"], [-3.0, 1.0, 0.0, 2.0], golds)
    # The second and the last have odds above 0 and are answered by nothing.
    assert values == {
        "f1": 0.5,
        "exact": 0.5,
        "HasAns_f1": 0.5,
        "HasAns_exact": 0.5,
        "NoAns_f1": 0.5,
        "NoAns_exact": 0.5,
        "best_f1": 0.75,  # x alone
        "best_f1_thresh": -3.0,
        "best_exact": 0.75,
        "best_exact_thresh": -3.0,
    }
    everywhere = squad_v2(["x", "y", "p", "q"], [-3.0, 1.0, 0.0, 2.0], golds, threshold=5.0)
    assert (everywhere["f1"], everywhere["NoAns_f1"]) == (pytest.approx((1 + 2 / 3) / 4), 0)
    assert "NoAns_f1" not in squad_v2(["x"], [0.0], [["x"]]) and "HasAns_f1" not in squad_v2(["x"], [0.0], [[]])


questions = st.lists(
    st.tuples(answer_texts, st.sampled_from([-2.0, -1.5, 0.0, 0.5, 3.0]), st.lists(answer_texts, max_size=3)),
    min_size=1,
    max_size=12,
)


@seeded
@given(questions, st.sampled_from([-3.0, -1.5, 0.0, 0.2, 3.0]))
def test_squad_v2_equals_the_scores_of_the_answers_given_and_no_threshold_beats_the_best(rows, threshold):
    answers, odds, golds = (list(column) for column in zip(*rows))

    def mean(limit, keep=lambda texts: True):
        """The mean f1 where the odds above `limit` give no answer."""
        scores = []
        for answer, value, texts in rows:
            if keep(texts):
                left = [text for text in texts if normalize_answer(text)] or [""]
                words = max(max(word_f1(answer, text), exact_match(answer, text)) for text in left)
                scores.append(float(not texts) if value > limit else words)
        return pytest.approx(sum(scores) / len(scores)) if scores else None

    values = squad_v2(answers, odds, golds, threshold)
    assert values["f1"] == mean(threshold)
    assert values.get("HasAns_f1") == mean(threshold, bool)
    assert values.get("NoAns_f1") == mean(threshold, lambda texts: not texts)
    wordless = any(not texts and answer and not normalize_answer(answer) for answer, _, texts in rows)
    for limit in [-10.0, *odds]:
        assert wordless or mean(limit).expected <= values["best_f1"] + 1e-9


def test_squad_metrics_refuse_other_lengths_and_odds_that_are_not_finite():
    for answers, golds in ((["x"], []), ([], []), (["x"], [["x"], []])):
        with pytest.raises(ValueError, match="answers and golds must be as many and at least one"):
            squad(answers, golds)
    with pytest.raises(ValueError, match="golds must be at least one for each question"):
        squad(["x", ""], [["x"], []])
    for odds in ([], [0.0, 1.0], [math.nan], [math.inf]):
        with pytest.raises(ValueError, match="null_odds must be 1 finite numbers"):
            squad_v2(["x"], odds, [["x"]])
