"""From logits to answers: against a plain loop and transformers, and the gold answers there and back."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from progtuning.base.errors import RunError
from progtuning.data.answers import Prediction, Span, best_token_spans, decode, to_jsonl, write_predictions
from progtuning.data.metrics import exact_match
from progtuning.data.squad import Question, encode_questions, read_squad
from progtuning.data.tokenization import load_tokenizer
from progtuning.model.config import BertConfig
from tests.test_squad import made_questions
from tests.test_tokenization import SPECIAL, config_for, vocab_and_merges, vocab_txt

seeded = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module", params=["BERT", "RoBERTa"])
def tokenizer(request, tmp_path_factory):
    form = vocab_txt if request.param == "BERT" else vocab_and_merges
    return load_tokenizer(*form(tmp_path_factory.mktemp("model")))


def random_outputs(rows, seed):
    """Logits for every window, and rows of padding after them that would win if they were looked at."""
    generator = np.random.default_rng(seed)
    logits = [generator.normal(size=(length, 2)).astype(np.float32) for length in rows.lengths]
    return [np.concatenate([array, np.full((3, 2), 99, np.float32)]) for array in logits]


def plain_decode(rows, outputs, null_answers, n_best, max_answer_length):
    """run_squad.py's search as a loop over every pair of tokens: {id: ([(score, start, end)], null score)}."""
    found = {question.id: {} for question in rows.questions}
    null_scores = {}
    for window, output in zip(rows.windows, outputs):
        question = rows.questions[window.question]
        null_score = float(output[0, 0]) + float(output[0, 1])
        null_scores[question.id] = min(null_scores.get(question.id, null_score), null_score)
        for first in range(len(window.offsets)):
            for last in range(len(window.offsets)):
                if last < first or last - first + 1 > max_answer_length:
                    continue
                start, end = int(window.offsets[first][0]), int(window.offsets[last][1])
                while start < end and question.context[start].isspace():
                    start += 1
                while start < end and question.context[end - 1].isspace():
                    end -= 1
                if start == end:
                    continue
                score = float(output[window.context_start + first, 0]) + float(output[window.context_start + last, 1])
                key = (start, end)
                found[question.id][key] = max(score, found[question.id].get(key, -1e9))
    best = {}
    for identity, spans in found.items():
        ranked = sorted(((score, *key) for key, score in spans.items()), reverse=True)[:n_best]
        best[identity] = (ranked, null_scores[identity] if null_answers else None)
    return best


@pytest.mark.parametrize(("n_best", "max_answer_length"), [(20, 30), (1, 1), (5, 4), (10**4, 1000)])
@pytest.mark.parametrize("null_answers", [False, True])
def test_spans_and_scores_equal_those_of_a_loop_over_all_pairs(tokenizer, n_best, max_answer_length, null_answers):
    rows = encode_questions(made_questions(count=12), tokenizer, max_length=64, stride=12)
    assert len(rows) > 20
    outputs = random_outputs(rows, seed=n_best)
    predictions = decode(rows, outputs, null_answers, n_best, max_answer_length)
    expected = plain_decode(rows, outputs, null_answers, n_best, max_answer_length)
    assert [prediction.id for prediction in predictions] == list(expected)
    for prediction, (spans, null_score) in zip(predictions, expected.values()):
        found = [(span.score, span.start, span.end) for span in prediction.spans]
        if len(spans) == n_best:  # several tokens of one character may have filled a window's list
            found, spans = found[:1], spans[:1]
        assert found == spans
        assert (prediction.null and prediction.null.score) == null_score


@seeded
@given(st.integers(1, 40), st.integers(1, 25), st.integers(1, 45), st.integers(0, 2**32))
def test_the_best_spans_of_a_window_equal_those_of_transformers(num_tokens, n_best, max_answer_length, seed):
    pipeline = pytest.importorskip("transformers.pipelines.document_question_answering")
    logits = np.random.default_rng(seed).normal(size=(num_tokens, 2))
    possible = sum(min(max_answer_length, num_tokens - i) for i in range(num_tokens))
    n_best = min(n_best, possible)  # theirs fills up with impossible spans
    start, end = np.exp(logits).T  # theirs multiplies probabilities
    starts, ends, _ = pipeline.decode_spans(start, end, n_best, max_answer_length, np.ones(num_tokens))
    assert best_token_spans(logits, n_best, max_answer_length) == list(zip(starts.tolist(), ends.tolist()))


def one_hot(rows):
    """Logits that are 5 at the labels and 0 elsewhere, and nowhere more than 0 in a window without the answer."""
    outputs = []
    for length, (start, end) in zip(rows.lengths, rows.labels.tolist()):
        outputs.append(np.zeros((length, 2), np.float32))
        if start:
            outputs[-1][start, 0] = outputs[-1][end, 1] = 5
    return outputs


def round_trip(rows):
    """Return how many answers lie in a window, and the questions whose decoded gold span equals none of their golds.

    Those must be golds that begin or end within a token, and the decoded span that of the tokens around it.
    """
    shown = {window.question for window, label in zip(rows.windows, rows.labels) if label[0]}
    exceptions = []
    for i, prediction in enumerate(decode(rows, one_hot(rows), False, n_best=1, max_answer_length=100)):
        question, span = rows.questions[i], prediction.spans[0]
        if i not in shown or any(exact_match(span.text, answer.text) for answer in question.answers):
            continue
        gold = question.answers[0]
        edges = {edge for w in rows.windows if w.question == i for pair in w.offsets.tolist() for edge in pair}
        assert not {gold.start, gold.start + len(gold.text)} <= edges
        assert span.start <= gold.start and span.end >= gold.start + len(gold.text)
        exceptions.append(question)
    return len(shown), exceptions


def test_gold_spans_of_made_questions_come_back(tokenizer):
    questions = [question for question in made_questions() if question.answers]
    rows = encode_questions(questions, tokenizer, max_length=64, stride=20)
    shown, exceptions = round_trip(rows)
    assert shown > 200 and not exceptions


def test_gold_spans_of_real_questions_come_back_but_where_a_gold_cuts_a_token(shared_data, minilm):
    tokenizer = load_tokenizer(minilm, BertConfig.from_json(minilm / "config.json"))
    total = wrong = 0
    for name in ("train-v1.1", "dev-v1.1", "train-v2.0", "dev-v2.0"):
        questions = [q for q in read_squad(shared_data / "squad" / f"{name}.json") if q.answers]
        shown, exceptions = round_trip(encode_questions(questions, tokenizer))
        assert shown == len(questions)  # windows overlap by more than any answer is long
        print(f"{name}: {shown - len(exceptions)} of {shown} gold spans come back, the others cut a token")
        total, wrong = total + shown, wrong + len(exceptions)
    print(f"all: {total - wrong} of {total}, {(total - wrong) / total:.3%}")
    assert total == 9403 + 3445 + 3680 + 2090 and 0 < wrong < 0.01 * total


@pytest.fixture
def bert(tmp_path):
    """A tokenizer that takes whole words."""
    tokens = [*SPECIAL, "the", "painter", "praised", "committee", "naive", "facade", "so", ",", "!"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return load_tokenizer(tmp_path, config_for(len(tokens)))


def decoded(bert, context, first, last, **changes):
    """Decode a context whose tokens first .. last have the best logits."""
    rows = encode_questions([Question("0", "the", context)], bert)
    output = np.zeros((rows.lengths[0], 2), np.float32)
    output[rows.windows[0].context_start + first, 0] = output[rows.windows[0].context_start + last, 1] = 2
    return decode(rows, [output], **{"null_answers": True, **changes})[0]


def test_the_answer_is_cut_from_the_context_as_it_stands(bert):
    context = "  The   Naïve\u00a0\n façade,  so! "
    span = decoded(bert, context, 1, 3).answer()
    assert span.text == "Naïve\u00a0\n façade," == context[span.start : span.end]


def test_an_answer_longer_than_the_limit_is_not_given(bert):
    assert decoded(bert, "the painter praised the committee", 0, 4).spans[0].text == "the painter praised the committee"
    short = decoded(bert, "the painter praised the committee", 0, 4, max_answer_length=4)
    assert all(len(span.text.split()) <= 4 for span in short.spans) and short.spans[0].score == 2


def test_no_answer_is_given_where_its_odds_exceed_the_threshold(bert):
    rows = encode_questions([Question("0", "the", "painter praised")], bert)
    output = np.zeros((rows.lengths[0], 2), np.float32)
    output[0] = 1.5, 1  # [CLS]
    output[rows.windows[0].context_start, 0] = output[rows.windows[0].context_start, 1] = 1
    (prediction,) = decode(rows, [output], null_answers=True)
    assert prediction.null_odds == 0.5
    assert [prediction.answer(threshold).text for threshold in (0.0, 0.49, 0.5)] == ["", "", "painter"]
    n_best = prediction.n_best()
    assert [span.text for span, _ in n_best] == ["", "painter", "painter praised", "praised"]
    scores = np.exp([2.5, 2, 1, 0])
    assert [probability for _, probability in n_best] == pytest.approx(scores / scores.sum())
    (without,) = decode(rows, [output], null_answers=False)
    assert without.null_odds is None and without.answer(-100).text == "painter" and len(without.n_best()) == 3


def test_the_score_of_no_answer_is_the_lowest_of_the_windows(bert):
    rows = encode_questions([Question("0", "the", "painter praised " * 60)], bert, max_length=64, stride=16)
    assert len(rows) > 2
    outputs = [np.zeros((length, 2), np.float32) for length in rows.lengths]
    for i, output in enumerate(outputs):
        output[0] = 3 - i % 2, 1
    assert decode(rows, outputs, null_answers=True)[0].null == Span("", 0, 0, 2.0, 1.0)


def test_a_context_without_a_token_is_answered_by_nothing(bert):
    rows = encode_questions([Question("0", "the", "\u200b\u200b")], bert)
    (prediction,) = decode(rows, [np.ones((rows.lengths[0], 2), np.float32)], null_answers=True)
    assert prediction.spans == (Span("", 0, 0, 0.0, 0.0),) and prediction.null_odds == 2.0
    assert prediction.answer(5.0).text == ""


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error_that_names_the_question(bert, value):
    rows = encode_questions([Question("q7", "the", "painter")], bert)
    output = np.zeros((rows.lengths[0], 2), np.float32)
    output[1, 1] = value
    with pytest.raises(RunError, match="^the model's outputs are not finite for question 'q7'$"):
        decode(rows, [output], null_answers=False)


def test_outputs_of_other_shapes_are_an_error(bert):
    rows = encode_questions([Question("0", "the", "painter praised")], bert)
    length = rows.lengths[0]
    for outputs in ([], [np.zeros((length, 2))] * 2, [np.zeros((length - 1, 2))], [np.zeros((length, 3))]):
        with pytest.raises(ValueError, match=r"^outputs must be \(S, 2\) for each of 1 windows"):
            decode(rows, outputs, null_answers=False)


PREDICTIONS = [
    Prediction("a", (Span("café", 3, 7, 2.0, 1.0), Span("x", 0, 1, 0.5, 0.5)), Span("", 0, 0, 1.0, 1.0)),
    Prediction("b", (Span("y\n", 0, 2, -1.0, 0.0),), Span("", 0, 0, 0.25, 0.25)),
]


def test_the_prediction_files_have_the_official_layout(tmp_path):
    write_predictions(PREDICTIONS, tmp_path)
    files = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()}
    assert set(files) == {"predictions.json", "nbest_predictions.json", "null_odds.json"}
    assert files["predictions.json"] == {"a": "café", "b": ""}
    assert files["null_odds.json"] == {"a": -1.0, "b": 1.5}
    n_best = files["nbest_predictions.json"]
    assert [row["text"] for row in n_best["a"]] == ["café", "", "x"]
    assert {frozenset(row) for row in n_best["a"]} == {frozenset(("text", "probability", "start_logit", "end_logit"))}
    assert sum(row["probability"] for row in n_best["a"]) == pytest.approx(1)
    write_predictions(PREDICTIONS, tmp_path, threshold=2.0)
    assert json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))["b"] == "y\n"


def test_v1_has_no_file_of_null_odds(tmp_path):
    write_predictions([Prediction("a", (Span("x", 0, 1, 0.0, 0.0),), None)], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"predictions.json", "nbest_predictions.json"}


def test_predictions_as_jsonl_have_an_answer_with_its_place_a_line():
    rows = [json.loads(line) for line in to_jsonl(PREDICTIONS).splitlines()]
    first, last = (row.pop("probability") for row in rows)
    assert rows == [
        {"id": "a", "answer": "café", "start": 3, "end": 7, "null_odds": -1.0},
        {"id": "b", "answer": "", "start": 0, "end": 0, "null_odds": 1.5},
    ]
    scores = np.exp([3, 2, 1])
    assert first == pytest.approx(scores[0] / scores.sum()) and last == pytest.approx(1 / (1 + np.exp(-1.5)))
