"""A task in which a row has any number of the classes: transformers' `multi_label_classification`."""

from collections.abc import Sequence

import numpy as np

from progtuning.data.batching import EncodedRows
from progtuning.data.tables import Example, written_rows
from progtuning.data.task import Classes, Limits


class MultiLabel(Classes):
    """Any number of the classes for each row: labels and decisions are 1 or 0 for each class."""

    head = "multi-label"

    def decide(self, outputs: np.ndarray, rows: EncodedRows, limits: Limits) -> np.ndarray:
        """Return (N, C) int64, for logits (N, C) 1 where the class is likelier than not."""
        return (outputs > 0).astype(np.int64)

    def spread(self, rows: Sequence[Example]) -> str:
        """Return the number of rows that have each class, of the first 20, and that have none or several."""
        has = np.array([row.label for row in rows]) > 0  # (N, C)
        sizes = has.sum(axis=1)
        counts = self.listed(has.sum(axis=0).tolist())
        return f"{counts}; {(sizes == 0).sum():,} with none, {(sizes > 1).sum():,} with several"

    def lines(self, outputs: np.ndarray, rows: EncodedRows, limits: Limits, kind: str) -> str:
        """Return a table of the classes as `label`, and of each one's `probability`."""
        probabilities = np.exp(-np.logaddexp(0, -outputs.astype(np.float64)))  # the logistic function, (N, C)
        decided = zip(self.decide(outputs, rows, limits), probabilities.tolist())
        cells = ([[name for name, has in zip(self.labels, row) if has], *values] for row, values in decided)
        return written_rows(["label", *(f"probability of {name}" for name in self.labels)], cells, kind)
