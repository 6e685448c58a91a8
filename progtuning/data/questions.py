"""The task of SQuAD: extractive question answering, by windows of `squad` and spans of `answers`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from progtuning.base.errors import InputError
from progtuning.data import metrics
from progtuning.data.answers import Prediction, decode, to_jsonl, write_predictions
from progtuning.data.squad import MAX_LENGTH, Question, SquadRows, encode_questions, read_questions, read_squad
from progtuning.data.task import Limits, Splits, Task
from progtuning.data.tokenization import Tokenizer
from progtuning.settings.train import DataConfig


@dataclass(frozen=True)
class Questions(Task):
    """Extractive question answering. With `null_answers` a question may be one that its context does not answer.

    Rows are `Question`s, encoded as windows, and a decision is a `Prediction` for each question.
    """

    null_answers: bool = False

    head = "question-answering"
    max_length = MAX_LENGTH
    kinds = ("jsonl", "json")
    writes_files = True

    @classmethod
    def of_model(cls, labels: tuple[str, ...], null_answers: bool) -> "Questions":
        return TASKS["squad_v2" if null_answers else "squad"]

    def strange_squad_options(self) -> tuple[str, ...]:
        return () if self.null_answers else ("null_threshold",)

    def read(self, path: str | Path, reading: DataConfig = DataConfig()) -> list[Question]:
        if reading.names_columns:
            raise InputError(f"{path}: questions and contexts stand under these names: leave out the columns' options")
        return read_questions(path)

    def pairs(self, rows: Sequence[Question]) -> None:
        return None

    def shape(self, rows: Sequence[Question], encoded: SquadRows) -> dict:
        return {"train_windows": len(encoded)}

    def account(self, splits: Splits, encoded: Mapping[str, SquadRows], limits: Limits) -> list[str]:
        rows = {"train": splits.train, **splits.dev}
        return [f"{name}: {len(rows[name]):,} questions in {len(encoded[name]):,} windows" for name in rows]

    def encode(self, rows: Sequence[Question], tokenizer: Tokenizer, limits: Limits) -> SquadRows:
        options = limits.squad
        return encode_questions(rows, tokenizer, limits.max_length, options.doc_stride, options.max_query_length)

    def decide(self, outputs: np.ndarray, rows: SquadRows, limits: Limits) -> list[Prediction]:
        """Return a prediction for each question of `rows`, for outputs (N, S, 2) of its N windows. Raises RunError."""
        return decode(rows, outputs, self.null_answers, limits.squad.n_best, limits.squad.max_answer_length)

    def score(self, decisions: Sequence[Prediction], rows: SquadRows, limits: Limits) -> dict[str, float]:
        """Return the metrics of SQuAD v1.1 or, with null answers, of v2.0."""
        golds = [[gold.text for gold in question.answers] for question in rows.questions]
        best = self.plain(decisions)
        if not self.null_answers:
            return metrics.squad(best, golds)
        null_odds = [prediction.null_odds for prediction in decisions]
        return metrics.squad_v2(best, null_odds, golds, _threshold(limits))

    def plain(self, decisions: Sequence[Prediction]) -> list[str]:
        """Return the best answers that are not ""."""
        return [prediction.spans[0].text for prediction in decisions]

    def answers(self, decisions: Sequence[Prediction], limits: Limits) -> list[str]:
        """Return the answers, "" where the odds of none are above the threshold."""
        return [prediction.answer(_threshold(limits)).text for prediction in decisions]

    def sampled(self, answers: Sequence[str], rows: Sequence[Question]) -> Callable[[np.ndarray], float]:
        """Return the mean of the questions' own values of the main metric."""
        golds = [[gold.text for gold in question.answers] for question in rows]
        if self.null_answers:
            values = metrics.per_question(answers, golds)[self.main_metric]
        else:
            values = np.array([metrics.squad([text], [texts])[self.main_metric] for text, texts in zip(answers, golds)])
        return lambda indices: float(values[indices].mean())

    def lines(self, outputs: np.ndarray, rows: SquadRows, limits: Limits, kind: str) -> str:
        """Return the lines of `answers.to_jsonl`, whatever the kind."""
        return to_jsonl(self.decide(outputs, rows, limits), _threshold(limits))

    def write(self, decisions: Sequence[Prediction], folder: Path, limits: Limits) -> None:
        """Write SQuAD's prediction files into an existing folder. Raises RunError where the disk refuses."""
        write_predictions(decisions, folder, _threshold(limits))


def _threshold(limits: Limits) -> float:
    """Return the odds above which the answer is ""."""
    return limits.squad.null_threshold or 0.0


_METRICS = ("f1", "exact")
TASKS = {
    "squad": Questions("squad", (), _METRICS),
    "squad_v2": Questions("squad_v2", (), _METRICS, null_answers=True),
}
_VERSIONS = {"squad": "v1.1", "squad_v2": "v2.0"}


def load_squad(name: str, folder: str | Path) -> Splits:
    """Read the training and the held-out questions of "squad" (v1.1) or "squad_v2" (v2.0) from a folder.

    The files are train-v1.1.json and dev-v1.1.json (or -v2.0), or train.json and dev.json. Raises InputError that names
    the file and the place in it.
    """
    task, splits = TASKS[name], {}
    for split in ("train", "dev"):
        official, own = (Path(folder) / f"{split}{suffix}.json" for suffix in (f"-{_VERSIONS[name]}", ""))
        file = own if own.exists() and not official.exists() else official
        splits[split] = read_squad(file, null_answers=task.null_answers)
    return Splits(task, splits["train"], {"dev": splits["dev"]})
