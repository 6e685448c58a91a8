"""Batches: which rows go together, in which order, and their padding.

B rows of a batch, S tokens of its longest row. Training shuffles the rows, sorts within spans of many batches by
length, cuts the batches and shuffles these: rows of one batch are of nearly equal length, so little is padded, and yet
every epoch differs. The order is a pure function of seed and epoch, so that a run can be resumed at any batch.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from progtuning.base.errors import InputError
from progtuning.data.tables import Example
from progtuning.data.tokenization import Encoding, Tokenizer

_SPAN_BATCHES = 50  # batches that are sorted together
Item, Prepared = TypeVar("Item"), TypeVar("Prepared")


class EncodedRows:
    """Encoded rows and their labels, to be collated into batches.

    `labels` are None, integers (classes) or floats (regression), or for each row as many of them. `ids` name the rows
    to people (None: by their 0-based number). Raises ValueError where the labels are not as many as the encodings.
    """

    def __init__(
        self,
        encodings: Sequence[Encoding],
        labels: Sequence[int] | Sequence[float] | Sequence[Sequence[int]] | Sequence[Sequence[float]] | None,
        pad_token_id: int,
        ids: Sequence[str | None] | None = None,
    ):
        if labels is not None and len(labels) != len(encodings):
            raise ValueError(f"labels must be as many as encodings, got {len(labels)} and {len(encodings)}")
        self.encodings = encodings
        self.pad_token_id = pad_token_id
        self.ids = ids or [None] * len(encodings)
        self.lengths = np.array([len(encoding.input_ids) for encoding in encodings], dtype=np.int64)
        self.labels = None
        if labels is not None:
            values = np.asarray(labels)
            self.labels = torch.from_numpy(values.astype(np.float32 if values.dtype.kind == "f" else np.int64))

    def __len__(self) -> int:
        return len(self.encodings)

    def name(self, index: int) -> str:
        """Return the id of row `index` as a person knows it."""
        return str(index) if self.ids[index] is None else self.ids[index]

    def digest(self) -> str:
        """Return the hexadecimal SHA-256 of what a run learns from the rows or measures with them, names left out."""
        digest = hashlib.sha256()
        for encoding in self.encodings:
            digest.update(len(encoding.input_ids).to_bytes(8, "little"))
            digest.update(encoding.input_ids.tobytes())
            digest.update(encoding.token_type_ids.tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def collate(self, indices: Sequence[int], length: int | None = None) -> dict[str, Tensor | None]:
        """Return the rows `indices` as a batch of CPU tensors, padded on the right to `length` (None: the longest) S.

            input_ids       (B, S) int64
            token_type_ids  (B, S) int64, 0 where padded
            attention_mask  (B, S) bool, False where padded; None where nothing is
            index           (B,)   int64, the rows' numbers in the data set
            labels          (B,)   int64 or float32, or (B, C); absent where the rows have none

        Raises ValueError for an empty batch.
        """
        if not len(indices):
            raise ValueError("a batch must have at least one row, got none")
        lengths = self.lengths[list(indices)]
        shape = (len(lengths), int(lengths.max()) if length is None else length)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        token_type_ids = np.zeros(shape, dtype=np.int64)
        for row, index in enumerate(indices):
            input_ids[row, : lengths[row]] = self.encodings[index].input_ids
            token_type_ids[row, : lengths[row]] = self.encodings[index].token_type_ids
        attention_mask = np.arange(shape[1]) < lengths[:, None]
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "token_type_ids": torch.from_numpy(token_type_ids),
            "attention_mask": None if attention_mask.all() else torch.from_numpy(attention_mask),
            "index": torch.tensor(list(indices), dtype=torch.int64),
        }
        if self.labels is not None:
            batch["labels"] = self.labels[batch["index"]]
        return batch


def encode_examples(examples: Sequence[Example], tokenizer: Tokenizer, max_length: int | None = None) -> EncodedRows:
    """Encode `examples` (all with a label or none) for `tokenizer`'s model. Raises what `Tokenizer.encode` raises."""
    pairs = [example.text_pair for example in examples]
    pairs = None if all(pair is None for pair in pairs) else pairs
    labels = [example.label for example in examples]
    labels = None if all(label is None for label in labels) else labels
    encodings = tokenizer.encode([example.text for example in examples], pairs, max_length=max_length)
    return EncodedRows(encodings, labels, tokenizer.config.pad_token_id, [example.id for example in examples])


class TrainBatches:
    """The batches of each training epoch, as lists of row indices.

    Every row comes once an epoch, and every batch but at most one has `batch_size` rows. Without `group_by_length` the
    rows are only shuffled. Raises ValueError where batch_size is less than 1, the seed negative, or there are no rows.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, group_by_length: bool = True):
        _check(lengths, batch_size)
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.group_by_length = group_by_length

    def __len__(self) -> int:
        """The number of batches, the same in every epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def epoch(self, epoch: int) -> list[list[int]]:
        """Return the batches of 0-based epoch `epoch`: a pure function of it, the seed and the lengths."""
        generator = np.random.default_rng([self.seed, epoch])
        batches = self._cut(self._order(generator))
        return [batches[i] for i in generator.permutation(len(batches))]

    def _order(self, generator: np.random.Generator) -> np.ndarray:
        rows = generator.permutation(len(self.lengths))
        if self.group_by_length:
            # At least 4 spans, or a small set would be sorted as a whole and its batches hardly differ between epochs.
            num_batches = -(-len(rows) // self.batch_size)
            span = self.batch_size * max(1, min(_SPAN_BATCHES, num_batches // 4))
            rows = rows[np.lexsort((-self.lengths[rows], np.arange(len(rows)) // span))]
        return rows

    def _cut(self, rows: np.ndarray) -> list[list[int]]:
        return _cut(rows, self.batch_size)


class TokenBatches(TrainBatches):
    """Batches of at most `budget` tokens, padding included: rows times longest row <= budget.

    Every one of `num_epochs` epochs has as many batches, so that stages and epochs change together and the number of
    steps is known: of an epoch that would have fewer, the batches of most rows are halved. Raises InputError where the
    longest row exceeds the budget, and what TrainBatches raises.
    """

    def __init__(self, lengths: Sequence[int], budget: int, num_epochs: int, seed: int, group_by_length: bool = True):
        super().__init__(lengths, max(1, budget * len(lengths) // max(1, sum(lengths))), seed, group_by_length)
        longest = self.lengths.max()
        if longest > budget:
            raise InputError(f"--batch-tokens must be at least {longest}, the longest row's tokens, got {budget}")
        self.budget = budget
        self.num_epochs = num_epochs
        self._count = 0
        self._count = max(len(super(TokenBatches, self).epoch(epoch)) for epoch in range(num_epochs))

    def __len__(self) -> int:
        return self._count

    def epoch(self, epoch: int) -> list[list[int]]:
        """As of TrainBatches. Raises ValueError for an epoch that is not one of the `num_epochs`."""
        if not 0 <= epoch < self.num_epochs:
            raise ValueError(f"epoch must be in 0..{self.num_epochs - 1}, got {epoch}")
        return super().epoch(epoch)

    def _cut(self, rows: np.ndarray) -> list[list[int]]:
        batches, longest = [], 0
        for row, length in zip(rows.tolist(), self.lengths[rows].tolist()):
            longest = max(longest, length)
            if not batches or (len(batches[-1]) + 1) * longest > self.budget:
                batches.append([])
                longest = length
            batches[-1].append(row)
        while len(batches) < self._count:
            most = max(range(len(batches)), key=lambda i: len(batches[i]))
            batches[most : most + 1] = split(batches[most], 2)
        return batches


def evaluation_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return batches that hold every row once, longest first, so that too large a batch fails at the start.

    `collate` gives the rows' numbers as `index`: `results[batch["index"]] = ...` puts results back in the order of the
    rows. Raises ValueError where batch_size is less than 1 or there are no rows.
    """
    _check(lengths, batch_size)
    return _cut(np.argsort(-np.asarray(lengths), kind="stable"), batch_size)


def split(batch: Sequence[int], pieces: int) -> list[Sequence[int]]:
    """Cut a batch into `pieces` micro-batches, in order, whose sizes differ by at most one; fewer where it has fewer
    rows.

    Raises ValueError where `pieces` is less than 1.
    """
    if pieces < 1:
        raise ValueError(f"pieces must be at least 1, got {pieces}")
    pieces = min(pieces, len(batch))
    return [batch[len(batch) * i // pieces : len(batch) * (i + 1) // pieces] for i in range(pieces)]


def prefetch(items: Iterable[Item], prepare: Callable[[Item], Prepared]) -> Iterator[Prepared]:
    """Yield `prepare(item)` for each item in order; a thread prepares the next while the caller works on one.

    What `prepare` raises is raised where its result would have come.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = None
        for item in items:
            current, following = following, pool.submit(prepare, item)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()


def _check(lengths: Sequence[int], batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not len(lengths):
        raise ValueError("there must be at least one row, got none")


def _cut(rows: np.ndarray, batch_size: int) -> list[list[int]]:
    return [rows[start : start + batch_size].tolist() for start in range(0, len(rows), batch_size)]
