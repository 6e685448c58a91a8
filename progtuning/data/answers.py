"""From the logits of a question-answering head to answers, and to the prediction files of the official scripts.

The score of a span is the logit of its first token as a start plus that of its last as an end. A question's spans are
those of all its windows, and one that stands in several windows has the best of its scores. All spans are searched:
run_squad.py of google-research/bert and run_qa.py of transformers pair only the best starts with the best ends, and may
miss the best span.

The score of no answer (v2.0) is that of [CLS], the lowest over the windows. Its odds are that score less the best
span's; where they exceed a threshold the answer is "".
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from progtuning.base.errors import NotFinite
from progtuning.base.files import write_json
from progtuning.data.squad import SquadRows, Window

N_BEST, MAX_ANSWER_LENGTH = 20, 30  # spans, tokens; the values of run_squad.py


@dataclass(frozen=True, slots=True)
class Span:
    """context[start : end] == text, without white space at its ends, and its logits. No answer is "" at 0."""

    text: str
    start: int
    end: int
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        return self.start_logit + self.end_logit


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model answers to the question `id`: its best spans, best first, and for v2.0 no answer."""

    id: str
    spans: tuple[Span, ...]  # one at least
    null: Span | None

    @property
    def null_odds(self) -> float | None:
        return None if self.null is None else self.null.score - self.spans[0].score

    def answer(self, threshold: float = 0.0) -> Span:
        """Return the best span, or no answer where its odds exceed `threshold`."""
        return self.null if self.null is not None and self.null_odds > threshold else self.spans[0]

    def n_best(self) -> list[tuple[Span, float]]:
        """Return the spans, and no answer at its rank, each with its probability among them."""
        spans = [*self.spans, *([] if self.null is None else [self.null])]
        spans.sort(key=lambda span: -span.score)
        exponentials = np.exp([span.score - spans[0].score for span in spans])
        return list(zip(spans, (exponentials / exponentials.sum()).tolist()))


def decode(
    rows: SquadRows,
    outputs: Sequence[np.ndarray],
    null_answers: bool,
    n_best: int = N_BEST,
    max_answer_length: int = MAX_ANSWER_LENGTH,
) -> list[Prediction]:
    """Return a prediction for each question of `rows`, in their order.

    outputs[i] (S, 2) are the logits of start and end at each token of window i; rows beyond its length are padding. A
    prediction has at most `n_best` spans, each of at most `max_answer_length` tokens. Where a context has no token but
    white space, its only span is "" with a score of 0. Raises NotFinite where a logit is not finite, and ValueError
    where the shapes do not fit.
    """
    shapes = [output[:length].shape for length, output in zip(rows.lengths, outputs)]
    if len(outputs) != len(rows) or shapes != [(length, 2) for length in rows.lengths]:
        raise ValueError(f"outputs must be (S, 2) for each of {len(rows)} windows, got {len(outputs)}, {shapes[:3]}...")
    found: list[dict[tuple[int, int], Span]] = [{} for _ in rows.questions]  # best span for each (start, end)
    nulls: list[Span | None] = [None] * len(rows.questions)
    for window, length, output in zip(rows.windows, rows.lengths, outputs):
        question = rows.questions[window.question]
        logits = np.asarray(output[:length], dtype=np.float64)
        if not np.isfinite(logits).all():
            raise NotFinite(f"the model's outputs are not finite for question {question.id!r}")
        spans = found[window.question]
        for span in _window_spans(window, question.context, logits, n_best, max_answer_length):
            known = spans.setdefault((span.start, span.end), span)
            if span.score > known.score:
                spans[span.start, span.end] = span
        null, lowest = Span("", 0, 0, *logits[0].tolist()), nulls[window.question]
        if null_answers and (lowest is None or null.score < lowest.score):
            nulls[window.question] = null
    predictions = []
    for question, spans, null in zip(rows.questions, found, nulls):
        best = sorted(spans.values(), key=lambda span: -span.score)[:n_best] or [Span("", 0, 0, 0.0, 0.0)]
        predictions.append(Prediction(question.id, tuple(best), null))
    return predictions


def write_predictions(predictions: Sequence[Prediction], folder: str | Path, threshold: float = 0.0) -> None:
    """Write predictions.json, nbest_predictions.json and for v2.0 null_odds.json, as run_squad.py lays them out.

    `folder` exists. Raises RunError where the disk refuses.
    """
    folder = Path(folder)
    write_json(folder / "predictions.json", {p.id: p.answer(threshold).text for p in predictions})
    n_best = {
        p.id: [
            {"text": s.text, "probability": probability, "start_logit": s.start_logit, "end_logit": s.end_logit}
            for s, probability in p.n_best()
        ]
        for p in predictions
    }
    write_json(folder / "nbest_predictions.json", n_best)
    if any(p.null is not None for p in predictions):
        write_json(folder / "null_odds.json", {p.id: p.null_odds for p in predictions})


def to_jsonl(predictions: Sequence[Prediction], threshold: float = 0.0) -> str:
    """Return a line of JSON for each prediction: id, answer, start, end, probability and for v2.0 null_odds.

    `start` and `end` are characters of the context: context[start:end] is the answer.
    """
    lines = []
    for prediction in predictions:
        answer = prediction.answer(threshold)
        row = {"id": prediction.id, "answer": answer.text, "start": answer.start, "end": answer.end}
        row["probability"] = dict(prediction.n_best())[answer]
        if prediction.null is not None:
            row["null_odds"] = prediction.null_odds
        lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    return "".join(lines)


def _window_spans(window: Window, context: str, logits: np.ndarray, n_best: int, max_answer_length: int) -> list[Span]:
    """Return the best spans of one window that are more than white space."""
    spans = []
    of_context = logits[window.context_start :][: len(window.offsets)]  # (W, 2)
    for first, last in best_token_spans(of_context, n_best, max_answer_length):
        text = context[window.offsets[first, 0] : window.offsets[last, 1]]
        start = int(window.offsets[first, 0]) + len(text) - len(text.lstrip())
        if text := text.strip():
            spans.append(Span(text, start, start + len(text), float(of_context[first, 0]), float(of_context[last, 1])))
    return spans


def best_token_spans(logits: np.ndarray, n_best: int, max_answer_length: int) -> list[tuple[int, int]]:
    """Return the (first, last) of the `n_best` spans of at most `max_answer_length` tokens, best first.

    logits (W, 2) are those of start and end. A span's score is logits[first, 0] + logits[last, 1].
    """
    num_tokens = len(logits)
    width = min(max_answer_length, num_tokens)
    if not width:
        return []
    ends = np.pad(logits[:, 1], (0, width - 1), constant_values=-np.inf)
    scores = logits[:, :1] + sliding_window_view(ends, width)  # (W, width): of the span from i to i + j
    scores = scores.ravel()
    best = np.argpartition(-scores, min(n_best, len(scores)) - 1)[:n_best]
    best = best[np.lexsort((best, -scores[best]))]
    return [(int(i) // width, int(i) // width + int(i) % width) for i in best if np.isfinite(scores[i])]
