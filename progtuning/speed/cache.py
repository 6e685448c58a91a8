"""The prefix cache: what the frozen blocks make of an example is kept, and the next step or stage starts from it.

    N  examples, example i of n_i tokens    D  hidden_size    b  the cut: E and blocks 0 .. b-1 are frozen

Frozen blocks without dropout give the same output for the same example. So it is kept, per example and unpadded, in one
buffer of n_0 + ... + n_{N-1} rows of D elements, whose size is known before the run (`closed_form.cache_bytes`).
Beside it stands each example's level: how many blocks its entry has passed; 0 says that nothing is kept. Cuts 0, 4, 8:

    stage 1   nothing is frozen, nothing is kept
    stage 2   an example's first use: E and blocks 0-3 run, and its level becomes 4;     every later use: read
    stage 3   an example's first use: read, blocks 4-7 run, and its level becomes 8;     every later use: read

An entry takes the place of the one it was made from, so a stage needs no second buffer; and a level of its own for each
example lets a stage begin in the middle of an epoch. A block's forward pass is paid once an example after it froze, not
once an epoch. Where a cut falls, a block trains that made the entries: the next stages have another buffer, a shelf of
their own. What that begins with is kept on the way, as long as nothing below has trained. Cuts 8, 4, 0 (`growing`):

    stage 1   an example's first use: E and blocks 0-3 run, kept on shelf 1; blocks 4-7 run, kept on shelf 0
    stage 2   every use: read from shelf 1; shelf 0 is given back
    stage 3   everything trains, nothing is kept

A batch is read by one gather: token j of example i is row starts[i] + j of the buffer. That lies in memory, in a mapped
file, or on the run's device, from where no entry crosses the bus.

Matrix products of other shapes round differently, so the last bits of an entry depend on the batch that it was made in.
The same batches make the same entries: so a resumed run gets its cache back (`CachedEngine.refill`).
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from progtuning.base.errors import InputError, RunError
from progtuning.cost.closed_form import ITEMSIZE
from progtuning.engine import StageEngine
from progtuning.model.bert import Model
from progtuning.stages import Stage
from progtuning.step.measure import free_disk, free_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PrefixCache:
    """Hidden states of N examples, each at a level of its own, in memory, in a memory-mapped file or on `device`.

    `lengths` are the examples' tokens. The file (`place` "disk") lies in the folder for temporary files (TMPDIR) and
    has no name, so that it is gone when the process ends, however it ends. The place "device" is the memory of the
    run's `device`; of a CPU that is "memory". What is read is what is stored: under bf16 also the first use of an
    example gets the rounded values.

    Several processes on a machine can divide the examples: each keeps those where `kept`, (N,) bool, says so (None:
    all), and runs the whole prefix of any other every time. The limit is for `num_sharing` caches of this size
    together. One that is not to be `used` is measured and checked, and takes no room.

    Raises InputError where the size exceeds `limit` bytes (None: half of what is free), RunError where the place
    cannot hold it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        hidden_size: int,
        place: str = "memory",
        dtype: str = "fp32",
        limit: int | None = None,
        kept: np.ndarray | None = None,
        num_sharing: int = 1,
        device: torch.device = torch.device("cpu"),
        used: bool = True,
    ):
        self.lengths = np.asarray(lengths, dtype=np.int64)  # (N,)
        self.kept = np.ones(len(self.lengths), dtype=bool) if kept is None else kept  # (N,)
        ends = np.cumsum(np.where(self.kept, self.lengths, 0))
        self.starts = ends - self.lengths  # (N,) of those that are kept: where the entry begins in the buffer
        self.levels = np.zeros_like(self.lengths)  # (N,) blocks that an entry has passed; 0: nothing is kept
        self.place, self.dtype = place, dtype
        self.device = device if place == "device" else torch.device("cpu")  # of the buffer
        shape = (int(ends[-1]), hidden_size)
        self.num_tokens = shape[0]
        self.nbytes = shape[0] * shape[1] * ITEMSIZE[dtype]
        _check_limit(num_sharing * self.nbytes, place, limit, self.device)
        self._states: Tensor | None = None  # (n_0 + ... + n_{N-1}, D)
        if used:
            made = _on_disk(self.nbytes) if place == "disk" else _in_memory(self.nbytes, place, self.device)
            self._states = made.view(DTYPES[dtype]).view(shape)
        self._arriving: list[tuple[np.ndarray, Tensor, torch.cuda.Event]] = []  # copies on their way from the device

    def fetch(
        self,
        rows: Sequence[int],
        cut: int,
        length: int,
        device: torch.device,
        run: Callable[[np.ndarray | None, int, Tensor | None], Tensor],
    ) -> Tensor:
        """Return what enters block `cut` for a batch of examples: (B, S, D) float32 on `device`, S = `length`.

        `rows` are the examples' numbers, `run(chosen, level, x)` runs the blocks `level` .. `cut` - 1 on the batch's
        entries `chosen` (None: all of them) from x (B', S, D), or from E where `level` is 0 and x None, without grad.
        It is called once for each level below the cut in the batch, and its results are kept. What lies at padding is
        arbitrary, but finite.

        Raises ValueError where an entry has passed more blocks than `cut`.
        """
        rows = np.asarray(rows)
        levels = self.levels[rows]
        if levels.max() > cut:
            raise ValueError(f"the cut must not fall below what is kept, got {cut} and an entry at {levels.max()}")
        groups = [np.flatnonzero(levels == level) for level in np.unique(levels)]
        parts = []
        for group in groups:
            level, examples = int(levels[group[0]]), rows[group]
            x = self._read(examples, length, device) if level else None
            if level < cut:
                x = run(None if len(groups) == 1 else group, level, x).to(DTYPES[self.dtype])
                self.keep(examples, x, cut)
            parts.append(x.float())
        if len(parts) == 1:
            return parts[0]
        order = torch.from_numpy(np.argsort(np.concatenate(groups))).to(device, non_blocking=True)
        return torch.cat(parts)[order]

    def lacks(self, rows: Sequence[int], cut: int) -> bool:
        """Say whether a batch has an example that is to be kept and whose entry has not passed `cut` blocks."""
        rows = np.asarray(rows)
        return bool((self.levels[rows] < cut)[self.kept[rows]].any())

    def close(self) -> None:
        """Give the memory or the disk space back. The cache is of no more use then; a `with` block ends so."""
        self._arriving.clear()
        self._states = None

    def __enter__(self) -> "PrefixCache":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _read(self, examples: np.ndarray, length: int, device: torch.device) -> Tensor:
        """Return the entries, (B', S, D) float32 on `device`; padding repeats an entry's last token.

        For CUDA what lies in memory is gathered in pinned memory, from which the copy needs no wait.
        """
        self._settle()
        last = self.lengths[examples, None] - 1  # (B', 1)
        places = self.starts[examples, None] + np.minimum(np.arange(length), last)  # (B', S) rows of the buffer
        pin = device.type == "cuda" and self.device.type == "cpu"
        x = torch.empty(
            places.size, self._states.shape[1], dtype=self._states.dtype, device=self.device, pin_memory=pin
        )
        torch.index_select(self._states, 0, self._index(places), out=x)
        return x.view(*places.shape, -1).to(device, non_blocking=True).float()

    def keep(self, examples: np.ndarray, x: Tensor, level: int) -> None:
        """Store those entries of x (B', S, D), which has passed `level` blocks, that are to be kept."""
        x = x.to(DTYPES[self.dtype])
        if not self.kept[examples].all():
            chosen = np.flatnonzero(self.kept[examples])
            examples, x = examples[chosen], x[torch.from_numpy(chosen).to(x.device, non_blocking=True)]
        if len(examples):
            self._store(examples, x)
            self.levels[examples] = level

    def _store(self, examples: np.ndarray, x: Tensor) -> None:
        """Take the entries from x (B', S, D). From CUDA to memory they come while the device goes on, to be stored
        later.
        """
        self._settle()
        if x.device.type == self.device.type:
            self._write(examples, x)
            return
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        pinned.copy_(x, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._arriving.append((examples, pinned, arrived))

    def _settle(self) -> None:
        for examples, x, arrived in self._arriving:
            arrived.synchronize()
            self._write(examples, x)
        self._arriving.clear()

    def _write(self, examples: np.ndarray, x: Tensor) -> None:
        """Put the real tokens of x (B', S, D), on the buffer's device, in their places."""
        columns = np.arange(x.shape[1])
        real = columns < self.lengths[examples, None]  # (B', S)
        places = (self.starts[examples, None] + columns)[real]  # (T,) rows of the buffer
        tokens = x.flatten(0, 1).index_select(0, self._index(np.flatnonzero(real)))  # (T, D)
        self._states.index_copy_(0, self._index(places), tokens)

    def _index(self, places: np.ndarray) -> Tensor:
        """Return row numbers, in order, as a tensor beside the buffer."""
        return torch.from_numpy(places.reshape(-1)).to(self.device, non_blocking=True)


class Shelves:
    """The prefix caches of a run: one for each series of stages whose cut does not fall (`closed_form.kept_levels`).

    `kept` is, by stage, what that returns; of a schedule that decides while it trains, the last stands for all that
    follow. `make` returns a new cache. Between two steps one stage is on, whose own cache `now` is.
    """

    def __init__(self, kept: Sequence[Mapping[int, int]], make: Callable[[], PrefixCache]):
        self._kept = kept
        self._caches = {shelf: make() for shelf in sorted(set().union(*kept))}
        self.now: PrefixCache | None = None
        self.ahead: list[tuple[int, PrefixCache]] = []  # by level, what is kept on the way for stages to come

    def enter(self, index: int) -> None:
        """Let the stage of 0-based `index` be on. What no stage needs from here on is given back."""
        kept = self._of(index)
        self.now = self._caches[min(kept)] if kept else None
        self.ahead = sorted(((kept[shelf], self._caches[shelf]) for shelf in sorted(kept)[1:]), key=lambda one: one[0])
        needed = set().union(*(self._of(later) for later in range(index, max(len(self._kept), index + 1))))
        for shelf in self._caches.keys() - needed:
            self._caches[shelf].close()

    def _of(self, index: int) -> Mapping[int, int]:
        return self._kept[min(index, len(self._kept) - 1)]

    @property
    def levels(self) -> np.ndarray:
        """(N,) blocks that the entries of the stage's own cache have passed; 0: nothing is kept."""
        return self.now.levels

    @property
    def num_tokens(self) -> int:
        """The tokens of which an entry can be kept, the same in each cache."""
        return next(iter(self._caches.values())).num_tokens

    @property
    def nbytes(self) -> int:
        """The bytes of all together."""
        return sum(cache.nbytes for cache in self._caches.values())

    def nbytes_of(self, index: int) -> int:
        """Return the bytes of those that a stage reads or fills."""
        return sum(self._caches[shelf].nbytes for shelf in self._of(index))

    def __enter__(self) -> "Shelves":
        return self

    def __exit__(self, *error) -> None:
        for cache in self._caches.values():
            cache.close()


def _check_limit(size: int, place: str, limit: int | None, device: torch.device) -> None:
    whose = "--cache-limit"
    if limit is None:
        whose = f"half of the free {'disk' if place == 'disk' else 'memory'}"
        free = free_disk(tempfile.gettempdir()) if place == "disk" else free_memory(device)
        if free is None:
            raise InputError(f"--cache-limit is needed with --cache {place}: this system does not tell its free memory")
        limit = free // 2
    if size > limit:
        raise InputError(
            f"--cache {place} needs {size / 1e9:.3g} GB, expected at most {limit / 1e9:.3g} GB ({whose}): "
            "raise --cache-limit, or give --cache-dtype bf16, another --cache, a shorter --max-length or fewer rows"
        )


def _in_memory(size: int, place: str, device: torch.device) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        raise RunError(f"--cache {place}: no room for {size / 1e9:.3g} GB: {error}") from None


def _on_disk(size: int) -> Tensor:
    """Map a file without a name, whose space is reserved at once: a disk that fills up later ends no run."""
    if not size:  # a process of more than there are rows; no system maps nothing
        return torch.empty(0, dtype=torch.uint8)
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
    except OSError as error:
        raise RunError(f"--cache disk: {folder}: no room for {size / 1e9:.3g} GB: {error.strerror or error}") from None


class CachedEngine(StageEngine):
    """A stage engine whose prefix is read from a cache where that has it.

    Pass the examples' numbers as `rows` with each batch; None goes past the cache.
    """

    def __init__(
        self,
        model: Model,
        optimizer: torch.optim.Optimizer | None,
        cache: Shelves,
        prefix_dropout: bool = False,
    ):
        super().__init__(model, optimizer, prefix_dropout)
        self.cache = cache

    def enter(self, stage: Stage) -> None:
        super().enter(stage)
        self.cache.enter(stage.index)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """Run the model, cut for the current stage. Arguments and result are those of `Model.forward`."""
        if rows is None or not self.cut:  # E alone is too cheap to keep
            return super().forward(input_ids, attention_mask, token_type_ids)
        return self.suffix(self.cached_prefix(input_ids, attention_mask, token_type_ids, rows), attention_mask)

    def cached_prefix(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        rows: Sequence[int] = (),
    ) -> Tensor:
        """Return what `prefix` does for the examples `rows`, running only the blocks that the cache has not kept.

        Raises ValueError where the prefix drops out, or the cut has fallen within a shelf.
        """
        if self.prefix_dropout:
            raise ValueError("a prefix cache needs prefix_dropout=False, got True")
        rows = np.asarray(rows)

        def run(chosen: np.ndarray | None, level: int, x: Tensor | None) -> Tensor:
            inputs, examples = (input_ids, attention_mask, token_type_ids), rows
            if chosen is not None:
                index = torch.from_numpy(chosen).to(input_ids.device, non_blocking=True)
                inputs, examples = [None if value is None else value[index] for value in inputs], rows[chosen]
            for stop, later in self.cache.ahead:
                if level < stop:
                    x = self.prefix(*inputs, start=level, x=x, stop=stop)
                    later.keep(examples, x, stop)
                    level = stop
            return self.prefix(*inputs, start=level, x=x)

        return self.cache.now.fetch(rows, self.cut, input_ids.shape[1], input_ids.device, run)

    def refill(self, rows: Sequence[int], inputs: dict[str, Tensor]) -> None:
        """Make the entries that a piece of a batch, `rows`, made in this stage: run its `inputs` again.

        For a run that is resumed: the frozen blocks still have the weights that they had then, and the same batches in
        the same order make the lost entries bit for bit. It costs what making them did, at most one forward pass of the
        frozen blocks for each example and shelf. Of a shelf that is given back by now the entries are others; those
        that it made on the way, of blocks that have not trained since, are the same.
        """
        if self.cut and self.cache.now.lacks(rows, self.cut):
            self.cached_prefix(**inputs, rows=rows)
