"""What each stage of a run did and cost: steps, FLOPs, seconds, bytes, updated parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from progtuning.cost import closed_form
from progtuning.model.config import BertConfig
from progtuning.report.summary import Speed, StageSummary
from progtuning.settings.peft import PeftConfig
from progtuning.stages import Schedule, Stage, make_schedule
from progtuning.step.measure import Clock, peak_bytes, reset_peak_bytes
from progtuning.step.processes import World

if TYPE_CHECKING:  # what it is given, it does not import
    from progtuning.engine import StageEngine
    from progtuning.speed.cache import Shelves

# What each process counts for itself, and `summary.json` has for all of them together.
_OF_ALL_PROCESSES = "forward_flops backward_flops cache_bytes cache_hits cache_misses examples tokens slots".split()


@dataclass
class StageCost:
    """What one stage of a run did and cost."""

    stage: Stage
    names: frozenset[str]  # of the parameters that train
    trainable_parameters: int
    clock: Clock
    steps: int = 0
    skipped_steps: int = 0  # batches without an update, as their loss or gradient was not finite
    forward_flops: int = 0
    backward_flops: int = 0
    gradient_sum_bytes: int = 0  # of the sums by which the schedule "adaptive" decides
    peak_bytes: int | None = None
    cache_bytes: int = 0
    cache_hits: int = 0  # times that an example's whole prefix was read
    cache_misses: int = 0  # times that blocks of it ran
    allreduced_bytes: int = 0  # of gradients that each process gave to be summed over all; 0 where it is alone
    examples: int = 0
    tokens: int = 0  # real ones
    slots: int = 0  # tokens and padding

    def measure_peak(self, device: torch.device) -> None:
        peak = peak_bytes(device)
        if peak is not None:
            self.peak_bytes = max(peak, self.peak_bytes or 0)

    def state_dict(self) -> dict:
        """Return the stage and its account as numbers and names."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {"stage": asdict(self.stage), "seconds": self.clock.seconds(), **counts}

    @classmethod
    def from_state_dict(cls, state: Mapping, names: frozenset[str], device: torch.device) -> "StageCost":
        counts = {name: state[name] for name in _COUNTS if name in state}  # one that is newer is 0
        return cls(Stage(**state["stage"]), names, clock=Clock(device, state["seconds"]), **counts)

    def summary(self, active: closed_form.Units, updated_parameters: int) -> StageSummary:
        """The stage as `summary.json` has it.

        `active` are the units with what trains; a PEFT method may have nothing to train in E or in a block of the
        stage.
        """
        return StageSummary(
            stage=self.stage.index + 1,
            steps=self.steps,
            skipped_steps=self.skipped_steps,
            active_blocks=active.active_blocks(),
            embeddings=bool(active.embeddings.trainable),
            trainable_parameters=self.trainable_parameters,
            updated_parameters=updated_parameters,
            forward_flops=self.forward_flops,
            backward_flops=self.backward_flops,
            seconds=self.clock.seconds(),
            gradient_sum_bytes=self.gradient_sum_bytes,
            peak_bytes=self.peak_bytes,
            cache_bytes=self.cache_bytes,
            cache_hits=self.cache_hits,
            cache_misses=self.cache_misses,
            allreduced_bytes=self.allreduced_bytes,
            allreduced_bytes_per_step=self.allreduced_bytes / (self.steps + self.skipped_steps or 1),
            gradient_bytes=4 * self.trainable_parameters,  # fp32: the closed form of the line above
            examples=self.examples,
            tokens=self.tokens,
            slots=self.slots,
        )


_COUNTS = tuple(one.name for one in fields(StageCost) if one.name not in ("stage", "names", "clock"))  # numbers


@dataclass
class Ledger:
    """The account of a run, a StageCost for each stage so far in `costs`; the last is that of the stage that is on.

    What trains is what the engine says of a stage. `cache` is that of the engine, where it has one. `lengths` has the
    tokens of each training row, `matmul_peak` is the FLOP/s of the device's fastest product, None where not known.
    """

    engine: "StageEngine"
    schedule: Schedule
    cache: "Shelves | None"
    peft: PeftConfig
    checkpointed: bool
    epochs: int
    steps_per_epoch: int
    lengths: np.ndarray
    device: torch.device
    matmul_peak: float | None
    world: World = World()
    costs: list[StageCost] = field(default_factory=list)

    @property
    def now(self) -> StageCost:
        """The account of the stage that is on."""
        return self.costs[-1]

    @property
    def clock(self) -> Clock:
        return self.now.clock

    def enter(self, stage: Stage) -> None:
        """Begin the account of a stage, before the engine enters it. Its peak counts from `reset_peak` on."""
        if self.costs:
            self.measure_peak()
        names = frozenset(self.engine.trainable_names(stage))
        count = sum(self.engine.candidates[name].numel() for name in names)
        cost = StageCost(stage, names, count, Clock(self.device), gradient_sum_bytes=self.schedule.state_bytes(names))
        if self.cache and self.engine.cut_of(stage):
            cost.cache_bytes = self.cache.nbytes_of(stage.index)
        self.costs.append(cost)

    def measure_peak(self) -> None:
        """Note the most memory since `reset_peak`, where that is more than the stage had before."""
        self.now.measure_peak(self.device)

    def reset_peak(self) -> None:
        """Leave out of the stage's peak what was held until now: by the stage before, by an evaluation."""
        reset_peak_bytes(self.device)

    def count(self, rows: Sequence[int], length: int, weight: float = 1.0) -> None:
        """Add the work of one forward and backward pass over `rows`, padded to `length` tokens, before it is done.

        Rows of weight 0 stand in for a share of a batch that is empty: work, but no examples.
        """
        cost, config, peft = self.now, self.engine.model.config, self.peft
        forward, backward = _flops(config, peft, cost.names, len(rows), length, self.checkpointed)
        cost.forward_flops += forward
        cost.backward_flops += backward
        if weight:
            cost.examples += len(rows)
            cost.tokens += int(self.lengths[rows].sum())
            cost.slots += len(rows) * length
        if self.cache and self.engine.cut:
            levels = self.cache.levels[rows].tolist()  # of each row, how many of its lowest blocks are kept and spared
            cost.forward_flops -= sum(_prefix_flops(config, peft, level, 1, length) for level in levels if level)
            hits = levels.count(self.engine.cut)
            cost.cache_hits += hits
            cost.cache_misses += len(rows) - hits

    def speed(self) -> Speed | None:
        """Return this process's speed in the stage that is on, so far; on CUDA the host waits for the device."""
        cost, seconds = self.now, sum(self.clock.seconds().values())
        flops = cost.forward_flops + cost.backward_flops
        return Speed.of(cost.examples, cost.tokens, cost.slots, flops, seconds, self.matmul_peak)

    def stage_of(self, step: int) -> int:
        """Return the stage, counted from 1, of a 0-based step so far."""
        for cost in self.costs:
            step -= cost.steps + cost.skipped_steps
            if step < 0:
                break
        return cost.stage.index + 1

    def account(self) -> dict:
        """Return what `summary.json` says of the stages: all processes' work and cache together, this one's seconds."""
        config, full = self.engine.model.config, make_schedule("full", self.engine.model.num_blocks, 1)
        updated = closed_form.updated_by_stage(
            (cost.trainable_parameters, Fraction(cost.steps, self.steps_per_epoch)) for cost in self.costs
        )
        active = [_active(config, self.peft, cost.names) for cost in self.costs]
        own = [cost.summary(*values) for cost, *values in zip(self.costs, active, updated)]
        of_ranks = self.world.gather([stage.to_json() for stage in own])
        stages = [_of_all(stage, of_stage) for stage, *of_stage in zip(own, *of_ranks)]
        return {
            "processes": self.world.size,
            "matmul_peak": self.matmul_peak,
            "stages": stages,
            **self.schedule.summary(),
            "updated_parameters": sum(updated),
            "updated_parameters_full": closed_form.updated_parameters(config, full, self.epochs, self.peft),
        }

    def state_dict(self) -> list[dict]:
        """Return this process's account of each stage so far, as numbers and names."""
        self.measure_peak()
        return [cost.state_dict() for cost in self.costs]

    def load_state_dict(self, state: Sequence[Mapping]) -> None:
        """Take up what `state_dict` gave."""
        names = (frozenset(self.engine.trainable_names(Stage(**cost["stage"]))) for cost in state)
        self.costs = [StageCost.from_state_dict(cost, of_cost, self.device) for cost, of_cost in zip(state, names)]
        self.reset_peak()


def _of_all(stage: StageSummary, of_ranks: Sequence[Mapping]) -> StageSummary:
    """Put into a process's stage what all together did, from each one's own."""
    counts = {key: sum(of_rank[key] for of_rank in of_ranks) for key in _OF_ALL_PROCESSES}
    return replace(stage, **counts, peak_bytes=max(of_rank["peak_bytes"] or 0 for of_rank in of_ranks) or None)


@lru_cache
def _active(config: BertConfig, peft: PeftConfig, names: frozenset[str]) -> closed_form.Units:
    return closed_form.units(config, peft).training(names)


@lru_cache(maxsize=4096)  # a run has few shapes: lengths up to the limit, in a few stages
def _flops(
    config: BertConfig, peft: PeftConfig, names: frozenset[str], batch: int, length: int, checkpointed: bool
) -> tuple[int, int]:
    return closed_form.step_flops(config, _active(config, peft, names), peft, batch, length, checkpointed)


_prefix_flops = lru_cache(maxsize=4096)(closed_form.prefix_flops)
