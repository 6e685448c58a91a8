"""Several processes train one model: data parallelism over torch.distributed, as torchrun starts it.

    W  processes; each has a rank, 0 .. W-1, and the whole model. With W = 1 nothing here communicates
    B  rows of a global batch: one optimizer step, whatever W is

A rank works on its share of a batch, weighted so that the gradients' sum over the ranks is that of the mean over the
batch, also where W does not divide B. The sum is taken by PyTorch's DistributedDataParallel (DDP) while the backward
pass runs, so every rank takes the same step. DDP is built for the parameters that train now, and built again when they
change: it never searches for unused ones, and a stage that trains less sends less:

    stage 1   all-reduce of E, all blocks, H            closed form: 4 bytes a trainable parameter,
    stage 2   all-reduce of the upper blocks, H         a step and rank, however many pieces a share has
    stage 3   all-reduce of the top blocks, H

Row i belongs to rank i mod W, which alone keeps its prefix in a cache. Batches are drawn as if there were one process,
so what belongs to a rank is not evenly spread over them: a rank takes its own rows of a batch up to an even share, and
the rest goes to the ranks that have less, which run those rows' frozen blocks again. So no rank waits for another's
share, the caches together are as large as one process's, and a row at home is found in its cache. Away from home are,
on average, 7 % of the rows for 2 ranks and batches of 32, 12 % for 4 ranks and 18 % for 8.
"""

import atexit
import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from progtuning.base.errors import InputError, RunError
from progtuning.data.batching import split

# The longest that a rank waits for one that is alive: a step, a download, what rank 0 writes. A dead one is noticed at
# once.
TIMEOUT = timedelta(minutes=10)
PATIENCE = 10  # seconds that a rank waits for the others to start before it says so
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them. `World()` is a process alone."""

    rank: int = 0
    size: int = 1  # W
    local_rank: int = 0  # among the processes of this machine
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and speaks."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """Return the seed of what each rank must draw for itself, as dropout: `seed` on rank 0."""
        return seed if self.is_main else int(np.random.SeedSequence([seed, self.rank]).generate_state(1)[0])

    def owns(self, count: int) -> np.ndarray:
        """Say of each of `count` rows whether this rank keeps its prefix: (count,) bool."""
        return np.arange(count) % self.size == self.rank

    def pieces(
        self, batch: Sequence[int], count: int, row_weights: np.ndarray | None = None
    ) -> list[tuple[Sequence[int], float]]:
        """Cut this rank's share of a batch into `count` pieces (fewer where it has fewer rows), each with its weight.

        The weights, times the pieces' mean losses, sum over all ranks to the mean loss of the batch, in which rows
        count by `row_weights`, or all the same. A rank whose share is empty gets a row of weight 0: it must take part
        when gradients are summed.
        """
        share = shares(batch, self.size)[self.rank]
        if not share:
            return [(batch[:1], 0.0)]
        pieces = split(share, count)
        if row_weights is None:
            return [(piece, len(piece) / len(batch)) for piece in pieces]
        return [(piece, float(row_weights[piece].sum() / row_weights[batch].sum())) for piece in pieces]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: int) -> int:
        """Return the largest of the ranks' numbers."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def first(self, value):
        """Return rank 0's `value`, a JSON document."""
        return self.gather(value)[0]

    def gather(self, value) -> list:
        """Return every rank's `value`, a JSON document, in the order of the ranks."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(text)]))
        longest = max(int(length) for length in lengths)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, nn.functional.pad(text, (0, longest - len(text))))
        return [json.loads(bytes(text[: int(length)].tolist())) for text, length in zip(texts, lengths)]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Let a block end well on every rank or on none. All ranks must come to it.

        Where it ends on some ranks with an error that the command line reports, all of them end with the lowest such
        rank's: rank 0 raises it, InputError or RunError, and the others exit in silence with its status.
        """
        error = None
        try:
            yield
        except (InputError, RunError, OSError, MemoryError) as failure:
            if self.size == 1:
                raise
            error = [isinstance(failure, InputError), str(failure) or type(failure).__name__]
        failed = [found for found in self.gather(error) if found]
        if failed:
            is_input, message = failed[0]
            raise self.once((InputError if is_input else RunError)(message))

    def once(self, error: InputError | RunError | KeyboardInterrupt) -> BaseException:
        """Return what to raise for an error that every rank meets: on rank 0 the error, elsewhere a silent exit.

        The exit has the status that the command line gives the error.
        """
        if self.is_main:
            return error
        if isinstance(error, KeyboardInterrupt):
            return SystemExit(128 + getattr(error, "signal", signal.SIGINT))
        return SystemExit(_status(error))

    def first_alone(self, fetch: Callable[[], Result]) -> Result:
        """Return fetch(), which one process of each machine calls before the others, so that these download nothing."""
        with self.agreed():
            result = fetch() if self.local_rank == 0 else None
        with self.agreed():
            return result if self.local_rank == 0 else fetch()


def shares(batch: Sequence[int], size: int) -> list[list[int]]:
    """Deal the rows of a batch to `size` ranks; the shares differ by at most one row, and keep the order of the batch.

    A row goes to its own rank, row mod size, while that has room. Where the rows do not divide evenly, the ranks with
    most rows of their own get one more.

    >>> shares([4, 0, 6, 3, 2], 2)
    [[4, 0, 6], [3, 2]]
    """
    own = [[row for row in batch if row % size == rank] for rank in range(size)]
    most = sorted(range(size), key=lambda rank: -len(own[rank]))  # these get a row more where there is a remainder
    room = {rank: len(batch) // size + (place < len(batch) % size) for place, rank in enumerate(most)}
    rank_of = {row: rank for rank in range(size) for row in own[rank][: room[rank]]}
    free = (rank for rank in range(size) for _ in range(room[rank] - len(own[rank])))
    rank_of |= {row: next(free) for row in batch if row not in rank_of}
    return [[row for row in batch if rank_of[row] == rank] for rank in range(size)]


class Replica:
    """A module that every rank has, and calls with its own rows; the gradients are summed over the ranks, not averaged.

    The module's weights become rank 0's when the parameters that require a gradient change. After a backward pass
    within `reducing(last=True)` every such parameter has the same gradient on all ranks; each must have got one.
    """

    def __init__(self, module: nn.Module, world: World):
        self.module = module
        self.world = world
        self._bytes = 0  # of gradients that this rank has given to be summed, since `take_bytes`
        self._parallel: DistributedDataParallel | None = None
        self._trained: list[bool] = []  # of each parameter, whether `_parallel` sums its gradient

    def __call__(self, *args, **kwargs) -> Tensor:
        """Call the module."""
        return (self.module if self._parallel is None else self._parallel)(*args, **kwargs)

    @contextmanager
    def reducing(self, last: bool) -> Iterator[None]:
        """Run one forward and backward pass in the block; a step's `last` one sums the gradients of all of them."""
        self._rebuild()
        with nullcontext() if last or self._parallel is None else self._parallel.no_sync():
            yield

    def take_bytes(self) -> int:
        """Return the bytes of gradients that this rank has given to be summed since it was asked last."""
        taken, self._bytes = self._bytes, 0
        return taken

    def _rebuild(self) -> None:
        if self.world.size == 1:
            return
        trained = [parameter.requires_grad for parameter in self.module.parameters()]
        if trained == self._trained:
            return
        self._parallel = None
        gc.collect()  # DDP sits in a reference cycle, and its buffers are as large as the gradients
        self._parallel = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
        self._parallel.register_comm_hook(self, Replica._sum)
        self._trained = trained

    def _sum(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self._bytes += bucket.buffer().nbytes
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])


@contextmanager
def join(say: Callable[[str], None] = lambda text: None) -> Iterator[World]:
    """Join the processes that torchrun started, for the length of the block; without torchrun, give a world of one.

    Must be called in the main thread. After an error the process is to end: SIGINT and SIGTERM have no effect any more,
    and where threads of the backend may still be at work, the interpreter ends without its teardown.
    GPUs communicate by NCCL, tensors on the CPU by gloo. `say` is told where the others are long in coming. Raises
    InputError where torchrun's environment is incomplete, and RunError where another process of the run ends or does
    not answer.
    """
    world = _launched()
    if world.size == 1:
        yield world
        return
    with_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        with _waiting(world, say):
            dist.init_process_group("cpu:gloo,cuda:nccl" if with_nccl else "gloo", timeout=TIMEOUT)
        yield world
    except BaseException as error:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # torchrun ends the rest after one: let each end by itself
        if isinstance(error, KeyboardInterrupt):
            _end_without_teardown(128 + getattr(error, "signal", signal.SIGINT))
            raise world.once(error) from None
        if isinstance(error, (RunError, InputError, SystemExit)):
            if with_nccl:  # to destroy its group may wait for another process, to leave it standing is warned of
                _end_without_teardown(_status(error))
            else:
                dist.destroy_process_group()  # ends gloo's threads
            raise
        _end_without_teardown(1)
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = " ".join(str(error).split())
        message = f"rank {world.rank} of {world.size}: another process has ended or does not answer: {reason}"
        raise RunError(message) from None
    dist.destroy_process_group()  # after other errors it might wait for a process that is no more


def _status(error: InputError | RunError | SystemExit) -> int:
    """Return the exit status of a process that ends by this error."""
    return error.code if isinstance(error, SystemExit) else 2 if isinstance(error, InputError) else 1


def _end_without_teardown(status: int) -> None:
    """Give the process this exit status when the interpreter ends, and spare it the teardown.

    There a thread of gloo aborts the process where it waits for the interpreter's lock, and NCCL warns. Such a thread
    can be at work where the process group is not destroyed, which might wait for a process that is no more.
    """

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # closed, or never there
                stream.flush()
        os._exit(status)

    atexit.register(end)


@contextmanager
def _waiting(world: World, say: Callable[[str], None]) -> Iterator[None]:
    """Say where the block takes long that it waits for the other processes, which perhaps nobody has started."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    text = (
        f"Rank {world.rank} waits at {where} for the other processes of {world.size}, at most {TIMEOUT}. "
        "To train in one process unset RANK and WORLD_SIZE."
    )
    timer = threading.Timer(PATIENCE, say, [text])
    timer.daemon = True
    timer.start()
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would run only when the wait is over
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt)
        timer.cancel()


def _launched() -> World:
    """Return the world that torchrun's environment variables describe.

    RANK, WORLD_SIZE and the address may be those of a job in whose shell one types; LOCAL_RANK only a launcher sets,
    which tells each process its GPU.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return World()
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "0"}
    texts = {name: os.environ.get(name, default) for name, default in names.items()}
    for name, text in texts.items():
        if not text.isdecimal():
            raise InputError(f"torchrun sets {name} to a number, got {text!r}")
    rank, size, local_rank, local_size, _ = map(int, texts.values())
    if rank >= size:
        raise InputError(f"torchrun sets RANK to less than WORLD_SIZE, got {rank} and {size}")
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        raise InputError(
            f"RANK={rank} and WORLD_SIZE={size} are set, but not {', '.join(missing)}, as torchrun sets them for each "
            "process: unset them to train in one process, or start train by torchrun"
        )
    return World(rank, size, local_rank, local_size)
