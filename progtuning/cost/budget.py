"""How many optimizer steps a budget pays: the FLOPs of a run before it is made, as `step/ledger.py` counts them.

    C(N)    FLOPs of a run of N optimizer steps: forward and backward, less what a prefix cache spares
    C_full  FLOPs of full fine-tuning by the same method, over the epochs asked for, of the same batches
    N(b)    the steps that budget b pays: C(N) <= b * C_full < C(N + 1)

Stages and the learning-rate line divide exactly those steps, so that C(N) is within a step of the budget. Where the cut
falls, as in `growing`, C can fall where a step more moves a long batch to a cheaper stage, so that there may be other
such N; it is one of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from operator import add
from typing import NamedTuple

from progtuning.base.errors import InputError
from progtuning.cost.closed_form import PLAIN, Units, kept_levels, prefix_flops, step_flops, units
from progtuning.model.config import BertConfig
from progtuning.settings.peft import PeftConfig
from progtuning.stages import Schedule, Stage, make_schedule

MOST = 200  # times the epochs asked for; steps of next to nothing, as of the head above a cache, are counted one by one


class Piece(NamedTuple):
    """What one process takes at once of a batch."""

    process: int
    rows: Sequence[int]
    length: int  # tokens of the longest row, to which the others are padded


class StageWork(NamedTuple):
    """What a stage of a run does: optimizer steps, and the FLOPs of their passes."""

    stage: Stage
    steps: int
    forward_flops: int
    backward_flops: int


@dataclass
class Forecast:
    """The batches of a run, and what they cost under a schedule.

    `batches(epoch)` are those of a 0-based epoch, each in its pieces; every epoch has `steps_per_epoch`. With a prefix
    cache, `keeper` names for each row the process that keeps it. Where `batches_stay`, every epoch has the same, and
    the first row of a piece tells what is kept of all.
    """

    config: BertConfig
    peft: PeftConfig
    batches: Callable[[int], Sequence[Sequence[Piece]]]
    steps_per_epoch: int
    keeper: Sequence[int] | None = None
    checkpointed: bool = False  # blocks, in full fine-tuning too
    batches_stay: bool = False
    _epochs: dict[int, Sequence[Sequence[Piece]]] = field(default_factory=dict)

    def flops(self, schedule: Schedule, num_steps: int) -> int:
        """Return C(num_steps)."""
        return sum(work.forward_flops + work.backward_flops for work in self.by_stage(schedule, num_steps))

    def by_stage(self, schedule: Schedule, num_steps: int) -> list[StageWork]:
        """Return what each stage does, but those that come to no step, which a run's summary leaves out too."""
        kept = kept_levels([_cut(self.config, self.peft, stage) for stage in schedule.stages])
        levels: dict[tuple[int, int, int], int] = {}  # (shelf, process, row) -> blocks that the kept entry has passed
        stages = []
        for stage, steps in spans(schedule, num_steps):
            epoch = self.steps_per_epoch
            tried = steps[: 2 * epoch] if self.batches_stay else steps  # from the second epoch on all are alike
            costs = [self._cost(stage, step, kept[stage.index], levels) for step in tried]
            if costs:
                epochs, rest = divmod(len(steps) - len(costs), epoch)
                again = [epochs * sum(cost) + sum(cost[:rest]) for cost in zip(*costs[-epoch:])]
                stages.append(StageWork(stage, len(steps), *map(add, map(sum, zip(*costs)), again)))
        return stages

    def full(self, num_epochs: int) -> int:
        """Return C_full."""
        schedule = make_schedule("full", self.config.num_hidden_layers, 1)
        return replace(self, keeper=None).flops(schedule, num_epochs * self.steps_per_epoch)

    def num_steps(self, schedule: Schedule, budget: float, num_epochs: int) -> int:
        """Return N(budget). Raises InputError where the budget pays no step, or more than MOST times the epochs."""
        limit = Fraction(str(budget)) * self.full(num_epochs)
        low, high = 0, num_epochs * self.steps_per_epoch + 1
        while self.flops(schedule, high) <= limit:
            if high > MOST * num_epochs * self.steps_per_epoch and not self.batches_stay:
                raise InputError(f"--budget {budget:g} pays more than {MOST} times the steps of --epochs: give fewer")
            low, high = high, 2 * high
        while high - low > 1:  # C(low) <= limit < C(high)
            middle = (low + high) // 2
            low, high = (middle, high) if self.flops(schedule, middle) <= limit else (low, middle)
        if low == 0:
            raise InputError(f"--budget {budget:g} pays no step of this run: give more, or more --epochs")
        return low

    def _cost(
        self, stage: Stage, step: int, kept: Mapping[int, int], levels: dict[tuple[int, int, int], int]
    ) -> tuple[int, int]:
        """Return the FLOPs, forward and backward, of a step of a stage that keeps `kept`, and keep in `levels` what its
        passes make."""
        forward = backward = 0
        for process, rows, length in self._batch(step):
            of_pass = _step(self.config, self.peft, stage, len(rows), length, self.checkpointed)
            forward, backward = forward + of_pass[0], backward + of_pass[1]
            if not kept or self.keeper is None:
                continue
            tracked, times = (rows[:1], len(rows)) if self.batches_stay else (rows, 1)
            for row in tracked:
                found = levels.get((min(kept), process, row), 0)
                forward -= times * _prefix(self.config, self.peft, found, length)
                if self.keeper[row] == process:
                    levels.update(((shelf, process, row), level) for shelf, level in kept.items() if level > found)
        return forward, backward

    def shapes(self, num_steps: int) -> set[tuple[int, int]]:
        """Return (rows, tokens of the longest) of what a process takes at once in these steps."""
        return {(len(rows), length) for step in range(num_steps) for _, rows, length in self._batch(step)}

    def _batch(self, step: int) -> Sequence[Piece]:
        epoch, batch = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[batch]

    def _epoch(self, epoch: int) -> Sequence[Sequence[Piece]]:
        if epoch not in self._epochs:
            self._epochs[epoch] = self.batches(epoch)
        return self._epochs[epoch]


def even_forecast(
    config: BertConfig,
    rows: int,
    batch: int,
    length: int,
    peft: PeftConfig = PLAIN,
    cache: bool = False,
    checkpointed: bool = False,
) -> Forecast:
    """Return the forecast of a run of one process whose `rows` all have `length` tokens."""
    batches = [[Piece(0, range(first, min(first + batch, rows)), length)] for first in range(0, rows, batch)]
    keeper = [0] * rows if cache else None
    return Forecast(config, peft, lambda epoch: batches, len(batches), keeper, checkpointed, batches_stay=True)


def spans(schedule: Schedule, num_steps: int) -> Iterator[tuple[Stage, range]]:
    """Yield each stage with its steps, as `Schedule.at_step` has them."""
    begin, total = 0, sum(schedule.shares)
    for stage, done in zip(schedule.stages, accumulate(schedule.shares)):
        end = -(-done * num_steps // total)
        yield stage, range(begin, end)
        begin = end


@lru_cache
def _active(config: BertConfig, peft: PeftConfig, stage: Stage) -> Units:
    return units(config, peft).during(stage)


@lru_cache
def _cut(config: BertConfig, peft: PeftConfig, stage: Stage) -> int | None:
    return _active(config, peft, stage).cut()


@lru_cache(maxsize=4096)
def _step(
    config: BertConfig, peft: PeftConfig, stage: Stage, rows: int, length: int, checkpointed: bool
) -> tuple[int, int]:
    return step_flops(config, _active(config, peft, stage), peft, rows, length, checkpointed)


@lru_cache(maxsize=4096)
def _prefix(config: BertConfig, peft: PeftConfig, level: int, length: int) -> int:
    return prefix_flops(config, peft, level, 1, length) if level else 0
