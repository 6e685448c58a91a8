"""A batch's way: rows, this process's share of them in pieces, tensors, the device."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from progtuning.data.batching import EncodedRows, TokenBatches, TrainBatches, prefetch
from progtuning.settings.train import TrainConfig
from progtuning.step.processes import World


class Piece(NamedTuple):
    """A part of a batch that is processed at once."""

    rows: Sequence[int]
    weight: float  # of its mean loss in that of the batch
    tensors: dict[str, Tensor]  # on the CPU


class Loader:
    """The training batches, each as the pieces of this process's share.

    `data` are all rows, `batches` says which of them go together, `pieces` in how many parts a process takes its share.
    `row_weights` (N,) says how much each row counts in the mean loss of its batch (None: all the same). Rows are padded
    to the longest of their piece, or to the next of its multiples of `multiple` tokens, but never beyond `most`.
    """

    def __init__(
        self,
        data: EncodedRows,
        batches: TrainBatches,
        device: torch.device,
        world: World,
        pieces: int = 1,
        row_weights: np.ndarray | None = None,
        multiple: int = 1,
        most: int = 2**63 - 1,
    ):
        self.data, self.batches, self.device, self.world, self.pieces = data, batches, device, world, pieces
        self.row_weights, self.multiple, self.most = row_weights, multiple, most

    def __len__(self) -> int:
        """The number of batches, the same in every epoch."""
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Piece]]:
        """Yield the batches of a 0-based epoch from number `start` on, each in its pieces.

        For CUDA a thread has the next batch ready in pinned memory.
        """
        on_cuda = self.device.type == "cuda"

        def collate(batch: list[int]) -> list[Piece]:
            pieces = self.world.pieces(batch, self.pieces, self.row_weights)
            return [
                Piece(piece, weight, collate_inputs(self.data, piece, self.padded_length(piece), pin=on_cuda))
                for piece, weight in pieces
            ]

        batches = self.batches.epoch(epoch)[start:]
        return prefetch(batches, collate) if on_cuda else map(collate, batches)

    def padded_length(self, rows: Sequence[int]) -> int:
        """Return the tokens to which a piece of these rows is padded."""
        longest = int(self.batches.lengths[rows].max())
        return max(longest, min(-(-longest // self.multiple) * self.multiple, self.most))

    def rows_of(self, step: int) -> list[str]:
        """Return the ids of the rows of 0-based step `step`."""
        epoch, batch = divmod(step, len(self.batches))
        return [self.data.name(row) for row in self.batches.epoch(epoch)[batch]]


def make_batches(lengths: Sequence[int], settings: TrainConfig) -> TrainBatches:
    """Return the training batches of `settings`. Raises InputError where a row exceeds the tokens of a batch."""
    if settings.batch_tokens is None:
        return TrainBatches(lengths, settings.batch_size, settings.seed, settings.group_by_length)
    return TokenBatches(lengths, settings.batch_tokens, settings.epochs, settings.seed, settings.group_by_length)


def collate_inputs(
    data: EncodedRows, rows: Sequence[int], length: int | None = None, pin: bool = False
) -> dict[str, Tensor]:
    """Return the model's inputs and the labels of `rows`, padded to `length` tokens (None: to the longest).

    With `pin` they lie in memory that CUDA copies from without a wait.
    """
    batch = {key: value for key, value in data.collate(rows, length).items() if value is not None and key != "index"}
    return {key: value.pin_memory() for key, value in batch.items()} if pin else batch


def to_device(tensors: Mapping[str, Tensor], device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the model's inputs and the labels, None where there are none, on the device."""
    batch = {key: value.to(device, non_blocking=True) for key, value in tensors.items()}
    return {key: value for key, value in batch.items() if key != "labels"}, batch.get("labels")


def load(data: EncodedRows, rows: list[int], device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the model's inputs and the labels of `rows`, on the device."""
    return to_device(collate_inputs(data, rows), device)
