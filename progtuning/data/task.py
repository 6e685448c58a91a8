"""Tasks: what is predicted from a row, and by which metrics.

A task reads and encodes its rows for a model, decides from the outputs of its head, scores what was decided, and writes
it. There is a subclass for each head: `Classes` and `Numbers` of texts and pairs of texts here, `MultiLabel` in
`multi_label`, `Questions` in `questions`.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from progtuning.base.errors import InputError
from progtuning.data import metrics
from progtuning.data.batching import EncodedRows, encode_examples
from progtuning.data.tables import Example, class_index, has_pairs, parse_number, read_table, shorten, written_rows
from progtuning.data.tokenization import Tokenizer
from progtuning.model.config import HEADS
from progtuning.settings.options import option_name, options
from progtuning.settings.train import DataConfig, SquadConfig


class Limits(Protocol):
    """What a user may set of a task, as TrainConfig and a fine-tuned model have it."""

    max_length: int  # tokens of a sequence
    squad: SquadConfig


@dataclass(frozen=True)
class Task:
    """What is predicted, and by which metrics; what follows here is of texts and pairs of texts, `Example`s.

    Outputs are those of the head, (N, C) float32 for N rows (for questions (N, S, 2)), and decisions what a subclass
    makes of them, one for each row.
    """

    name: str
    labels: tuple[str, ...]  # class names in the order of their indices; () where what is predicted is no class
    metrics: tuple[str, ...]  # names in `progtuning.data.metrics`

    head: ClassVar[str]  # that a model needs for the task, a row of `config.HEADS`
    max_length: ClassVar[int] = 128  # tokens, where the user names none
    kinds: ClassVar[tuple[str, ...]] = ("tsv", "csv", "jsonl")  # of files of predictions; the first, if none is named
    writes_files: ClassVar[bool] = False  # whether it has `write(decisions, folder, limits)`, for official scripts

    @classmethod
    def of_model(cls, labels: tuple[str, ...], null_answers: bool) -> "Task":
        """Return the task of a model that has `labels`, and of questions whether some have no answer."""
        return cls(cls.head, labels if HEADS[cls.head].has_labels else (), ())

    @property
    def main_metric(self) -> str:
        """The metric by which one run is compared with another."""
        return self.metrics[0]

    def check(self, limits: Limits) -> None:
        """Raise InputError where an option is given that the task does not have."""
        for name in self.strange_squad_options():
            if getattr(limits.squad, name) != getattr(SquadConfig, name):
                whose = "squad_v2" if name == "null_threshold" else "squad or squad_v2"
                flag = option_name(SquadConfig, name)
                raise InputError(f"{flag} is for --task {whose}, got it with the task {self.name}")

    def strange_squad_options(self) -> Collection[str]:
        """The fields of SquadConfig that the task does not have."""
        return options(SquadConfig)

    def read(self, path: str | Path, reading: DataConfig = DataConfig()) -> Sequence:
        """Read rows to be predicted, without labels, from a file (`-`: standard input). Raises InputError."""
        return read_table(path, require_label=False, reading=reading)[1]

    def pairs(self, rows: Sequence) -> bool | None:
        """Say whether `rows` are pairs of texts (True) or single ones (False); None: neither."""
        return has_pairs(rows)

    def shape(self, rows: Sequence, encoded: EncodedRows) -> dict:
        """Return what `summary.json` says of the training rows, beside their number."""
        return {"pairs": self.pairs(rows)}

    def account(self, splits: "Splits", encoded: Mapping[str, EncodedRows], limits: Limits) -> list[str]:
        """Return the lines that say what was read, for `encoded` splits by name, "train" among them."""
        lines, seen = [], {(row.text, row.text_pair) for row in splits.train}
        for name, rows in {"train": splits.train, **splits.dev}.items():
            lengths = encoded[name].lengths + np.array([one.num_cut for one in encoded[name].encodings])
            cut, empty = (lengths > encoded[name].lengths).sum(), sum(map(_is_empty, rows))
            lines.append(f"{name}: {len(rows):,} rows: {self.spread(rows)}")
            lines.append(
                f"  {lengths.mean():.1f} tokens a row, {lengths.max():,} the longest; "
                f"{cut:,} rows cut to --max-length {limits.max_length}; {empty:,} empty texts"
            )
            if name != "train":
                both = sum((row.text, row.text_pair) in seen for row in rows)
                lines.append(f"  {both:,} of its texts stand in train too")
        return lines

    def spread(self, rows: Sequence) -> str:
        """Return how the labels of rows are spread."""
        raise NotImplementedError

    def encode(self, rows: Sequence, tokenizer: Tokenizer, limits: Limits) -> EncodedRows:
        """Return the rows as a model reads them, with their labels where all have one. Raises InputError."""
        return encode_examples(rows, tokenizer, limits.max_length)

    def decide(self, outputs: np.ndarray, rows: EncodedRows, limits: Limits) -> Sequence:
        """Return what is decided for each of `rows`."""
        raise NotImplementedError

    def score(self, decisions: Sequence, rows: EncodedRows, limits: Limits) -> dict[str, float]:
        """Return the task's metrics of decisions for `rows`, which have labels."""
        return metrics.compute(self.metrics, decisions, rows.labels.numpy())

    def score_by_class(self, decisions: Sequence, rows: EncodedRows) -> dict[str, dict[str, float]]:
        """Return what `metrics.by_class` does of decisions for `rows`, which have labels; {} where no class is."""
        return {}

    def plain(self, decisions: Sequence) -> list:
        """Return the decisions as JSON has them, for each a string, a number or a list of numbers."""
        raise NotImplementedError

    def answers(self, decisions: Sequence, limits: Limits) -> list:
        """Return what a user is told for each row, as JSON has it: decisions by the limits that the user set."""
        return self.plain(decisions)

    def sampled(self, answers: Sequence, rows: Sequence) -> Callable[[np.ndarray], float]:
        """Return the main metric of `answers` for `rows`, which have labels: a function of indices, some repeated."""
        values, labels = np.array(answers), np.array([row.label for row in rows])
        metric = metrics.METRICS[self.main_metric]
        return lambda indices: metric(values[indices], labels[indices])

    def lines(self, outputs: np.ndarray, rows: EncodedRows, limits: Limits, kind: str) -> str:
        """Return what `predict` writes, a line for each row, as a file of `kind`, one of `kinds`."""
        raise NotImplementedError


class Classes(Task):
    """A class for each row: a decision is its index, and a label too."""

    head = "classification"

    def parse_label(self, where: str, cell: str, index: Mapping[str, int]) -> int:
        """Return the label that a cell of a file is; `index` has the classes as the file writes them.

        Raises InputError, beginning with `where`.
        """
        return class_index(where, cell, index)

    def check_label(self, where: str, label) -> None:
        """Raise InputError, beginning with `where`, unless a value is a label of the task."""
        if not (isinstance(label, int) and 0 <= label < len(self.labels)):
            raise InputError(f"{where}: got label {shorten(label)}, expected a class in 0..{len(self.labels) - 1}")

    def decide(self, outputs: np.ndarray, rows: EncodedRows, limits: Limits) -> np.ndarray:
        """Return (N,) int64, for outputs (N, C) the class of the highest."""
        return outputs.argmax(axis=1)

    def score_by_class(self, decisions: Sequence, rows: EncodedRows) -> dict[str, dict[str, float]]:
        return metrics.by_class(decisions, rows.labels.numpy(), self.labels)

    def spread(self, rows: Sequence[Example]) -> str:
        """Return the number of rows of each class, of the first 20."""
        counts = Counter(row.label for row in rows)
        return self.listed([counts[i] for i in range(len(self.labels))])

    def listed(self, counts: Sequence[int]) -> str:
        """Return counts, one for each class, with the classes' names, those of the first 20."""
        names = [f"{name} {count:,}" for name, count in zip(self.labels[:20], counts)]
        return ", ".join(names) + (f", and {len(self.labels) - 20:,} classes more" if len(self.labels) > 20 else "")

    def plain(self, decisions: np.ndarray) -> list[int]:
        return decisions.tolist()

    def lines(self, outputs: np.ndarray, rows: EncodedRows, limits: Limits, kind: str) -> str:
        """Return a table of the class `label` and its `probability`."""
        exponentials = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        decided = zip(self.decide(outputs, rows, limits), probabilities)
        return written_rows(("label", "probability"), ((self.labels[i], float(row[i])) for i, row in decided), kind)

    def cells(self, decisions: np.ndarray, names: Sequence[str], bounds: tuple[float, float]) -> list[str]:
        """Return the decisions as a submission writes them: by the classes' `names`. Raises ValueError."""
        if decisions.dtype.kind not in "iu" or not ((decisions >= 0) & (decisions < len(names))).all():
            raise ValueError(f"predictions must be class indices 0..{len(names) - 1}, got {decisions[:3]}...")
        return [names[value] for value in decisions]


class Numbers(Task):
    """A number for each row, by regression."""

    head = "regression"

    def parse_label(self, where: str, cell: str, index: Mapping[str, int]) -> float:
        """As of Classes."""
        return parse_number(where, cell)

    def check_label(self, where: str, label) -> None:
        """As of Classes."""
        if not (isinstance(label, float) and math.isfinite(label)):
            raise InputError(f"{where}: got label {shorten(label)}, expected a finite number")

    def decide(self, outputs: np.ndarray, rows: EncodedRows, limits: Limits) -> np.ndarray:
        """Return (N,) float32, for outputs (N, 1)."""
        return outputs[:, 0]

    def spread(self, rows: Sequence[Example]) -> str:
        """Return the least, the mean and the highest number."""
        values = [row.label for row in rows]
        return f"{min(values):g} to {max(values):g}, {np.mean(values):.4g} on average"

    def plain(self, decisions: np.ndarray) -> list[float]:
        return [float(f"{score:.9g}") for score in decisions]  # all that a float32 holds

    def lines(self, outputs: np.ndarray, rows: EncodedRows, limits: Limits, kind: str) -> str:
        """Return a table of `score`."""
        scores = self.decide(outputs, rows, limits)
        return written_rows(("score",), ((score,) for score in scores.tolist()), kind, number=".6g")

    def cells(self, decisions: np.ndarray, names: Sequence[str], bounds: tuple[float, float]) -> list[str]:
        """As of Classes: clipped to the `bounds` of the labels."""
        if not np.isfinite(decisions).all():
            raise ValueError("predictions must be finite numbers")
        return [f"{value:.6f}" for value in np.clip(decisions, *bounds)]


def _is_empty(row: Example) -> bool:
    return not (row.text.strip() and (row.text_pair is None or row.text_pair.strip()))


@dataclass(frozen=True)
class Splits:
    """The rows of a task: `dev` maps the name of a held-out split to its rows (MNLI has two)."""

    task: Task
    train: list[Example]
    dev: dict[str, list[Example]]
    division: dict | None = None  # "dev_share" and "split_seed", by which one file's rows were divided


def limit_train(splits: Splits, max_train: int, seed: int = 0) -> Splits:
    """Return `splits` with at most `max_train` training rows: a sample without replacement, in the order of the file.

    Raises InputError where max_train is less than 1.
    """
    if max_train < 1:
        raise InputError(f"--max-train-rows must be at least 1, got {max_train}")
    if max_train >= len(splits.train):
        return splits
    chosen = sorted(random.Random(seed).sample(range(len(splits.train)), max_train))
    return replace(splits, train=[splits.train[i] for i in chosen])
