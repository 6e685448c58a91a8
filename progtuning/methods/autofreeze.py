"""AutoFreeze (Liu et al., arXiv 2102.01386): the schedule "adaptive", which freezes from below what stops changing."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from progtuning.model.names import unit_of
from progtuning.partition import boundaries
from progtuning.stages import Stage, embeddings_train

if TYPE_CHECKING:
    from torch import Tensor


class AdaptiveSchedule:
    """Freeze from below what stops changing, in place of a calendar: AutoFreeze (Liu et al., arXiv 2102.01386).

    The rule is that of its authors' code, freeze_intermediate_e2e_lr.py of YuhanLiu11/AutoFreeze (commit 44d65c2; the
    scripts beside it, which cache, decide alike). The steps are divided in intervals of floor(num_steps /
    num_intervals); a rest makes more of them. Over an interval the gradients of each parameter are summed, as backward
    gives them, before any clipping. G_i is the L1 norm of each of block i's sums, added up over its parameters. At the
    end of every interval but the first a block's score is |G_i(before) - G_i(now)| / G_i(before), or 0 where G_i(now)
    is 0, and the active blocks below the first whose score is not below the `percentile` of all active ones (50: the
    median) are frozen; so the last block never is. E freezes with block 1 (`embeddings`, "with-block-1"), and what lies
    below the cut does not drop out (`TrainConfig.drops_out_prefix`). 50 is the script's default. Its README runs 20
    intervals in 4 epochs, which gives the default of five an epoch; the script itself has 10 a run.

    What differs on purpose. Their optimizer starts afresh at each decision, its moments lost; here what trains on keeps
    them. They clip each tensor by itself, their Adam corrects no bias, and the learning rate falls to 0.7 and 0.4 after
    30 and 60 % of the steps without a warm-up; here all that is as in every other schedule. With accumulation they add
    what the gradient is after each piece; here a batch counts once, whole, over its pieces and processes, before any
    mask of DPS, and not at all where it is skipped. A threshold of 0 thaws all blocks there, a G_i(before) of 0 ends
    the run; here nothing thaws, and such a score is infinite. A block without a trainable parameter has no score.

    Every decision is kept, with its scores, in `decisions`.
    """

    name = "adaptive"
    sums_gradients = True

    def __init__(self, num_blocks: int, num_intervals: int, embeddings: str = "with-block-1", percentile: float = 50.0):
        boundaries(num_blocks, num_intervals)  # checks both counts
        self.num_blocks = num_blocks
        self.num_intervals = num_intervals
        self.embeddings = embeddings
        self.percentile = percentile
        self.stages: list[Stage] = []
        self.decisions: list[dict] = []
        self._interval = 0
        self._before: dict[int, float] = {}
        self._now: dict[int, float] = {}
        self.sums: GradientSums | None = None
        self._enter(0)

    @property
    def shares(self) -> tuple[int, ...]:
        """Of the steps, as far as can be planned: all are the first stage's."""
        return (1,)

    @property
    def planned(self) -> tuple[tuple[Stage, Stage], ...]:
        """The most that it can cost: its first stage throughout, the cache at the furthest, which trains B_L and H."""
        boundary = self.num_blocks - 1
        furthest = Stage(0, self.num_blocks, boundary, embeddings_train(self.embeddings, boundary))
        return tuple((stage, furthest) for stage in self.stages)

    def watch(self, candidates: Mapping[str, "Tensor"]) -> None:
        """Sum the gradients of these parameters, by name, from now on."""
        self.sums = GradientSums(candidates)

    def after_backward(self, step: int, num_steps: int) -> None:
        """Add the gradients of 0-based optimizer step `step`; at an interval's end take their norms."""
        self.sums.add()
        if self.ends_interval(step, num_steps):
            self.observe(self.sums.take())

    def state_bytes(self, names: Collection[str]) -> int:
        """Return the bytes of the sums while the parameters `names` train."""
        return self.sums.nbytes(names)

    def ends_interval(self, step: int, num_steps: int) -> bool:
        """Say whether an interval ends with 0-based optimizer step `step` out of `num_steps`."""
        return (step + 1) % self._interval_length(num_steps) == 0

    def observe(self, norms: Mapping[int, float]) -> None:
        """Take G_i of the interval that ends, by block: numbers, or tensors of one element, read when it is decided."""
        self._now = dict(norms)

    def at_step(self, step: int, num_steps: int) -> Stage:
        """Return the stage of 0-based optimizer step `step` out of `num_steps`. Steps are to be asked for in order.

        Raises ValueError where the step lies outside 0 .. num_steps - 1.
        """
        if not 0 <= step < num_steps:
            raise ValueError(f"step must be in 0..{num_steps - 1}, got {step}")
        interval = step // self._interval_length(num_steps)
        if interval != self._interval:
            self._interval = interval
            if self.sums and self.sums.sums:  # the interval's last batch was skipped
                self.observe(self.sums.take())
            self._decide(step)
        return self.stages[-1]

    def state_dict(self) -> dict:
        """Return what a resumed run needs: "schedule" (numbers, None for one that is not finite, and the norms as they
        were given) and "gradient_sums", the sums of the interval that is on."""
        values = {
            "interval": self._interval,
            "boundaries": [stage.boundary for stage in self.stages],
            "decisions": [
                decision
                | {"scores": {str(block): _none_if_infinite(score) for block, score in decision["scores"].items()}}
                | {"threshold": _none_if_infinite(decision["threshold"])}
                for decision in self.decisions
            ],
            "before": {str(block): norm for block, norm in self._before.items()},
            "now": {str(block): norm for block, norm in self._now.items()},
        }
        return {"schedule": values, "gradient_sums": self.sums.state_dict() if self.sums else {}}

    def summary(self) -> dict:
        """Return the decisions as `summary.json` has them: blocks counted from 1, null for a score that is infinite."""
        decisions = [
            decision | {"scores": {int(block) + 1: score for block, score in decision["scores"].items()}}
            for decision in self.state_dict()["schedule"]["decisions"]
        ]
        return {"decisions": decisions}

    def load_state_dict(self, state: Mapping) -> None:
        """Take up the state of a schedule of the same run."""
        if self.sums:
            self.sums.load_state_dict(state["gradient_sums"])
        state = state["schedule"]
        self._interval = state["interval"]
        self.stages.clear()
        for boundary in state["boundaries"]:
            self._enter(boundary)
        self.decisions = [
            decision
            | {"scores": {int(block): _infinite_if_none(score) for block, score in decision["scores"].items()}}
            | {"threshold": _infinite_if_none(decision["threshold"])}
            for decision in state["decisions"]
        ]
        self._before = {int(block): norm for block, norm in state["before"].items()}
        self._now = {int(block): norm for block, norm in state["now"].items()}

    def _interval_length(self, num_steps: int) -> int:
        return max(1, num_steps // self.num_intervals)

    def _decide(self, step: int) -> None:
        before, now = self._before, {block: float(norm) for block, norm in self._now.items()}
        scores = {block: _relative_change(before[block], norm) for block, norm in now.items() if block in before}
        if scores:
            threshold = percentile(scores.values(), self.percentile)
            changing = (block for block in sorted(scores) if scores[block] >= threshold)
            lowest, still = min(scores), self.stages[-1].boundary
            first = next(changing, lowest)  # where a norm is not a number, none is found to change
            boundary = still if first == lowest else first
            self.decisions.append({"step": step, "scores": scores, "threshold": threshold, "frozen_blocks": boundary})
            if boundary > still:
                self._enter(boundary)
        if now:  # else every batch of the interval was skipped
            self._before, self._now = now, {}

    def _enter(self, boundary: int) -> None:
        trains = embeddings_train(self.embeddings, boundary)
        self.stages.append(Stage(len(self.stages), self.num_blocks, boundary, trains))


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the `percent`-th percentile, linear between two values, as numpy.percentile has it to the last bit.

    NaN where a value is NaN. Between a finite and an infinite value it is infinite.
    """
    ordered = sorted(values)
    if any(math.isnan(value) for value in ordered):
        return math.nan
    place = (len(ordered) - 1) * (percent / 100)
    low, share = math.floor(place), place % 1
    a, b = ordered[low], ordered[math.ceil(place)]
    if a == b or math.isinf(b):
        return b
    return a + (b - a) * share if share < 0.5 else b - (b - a) * (1 - share)


def _relative_change(before: float, now: float) -> float:
    if now == 0 or before == now:
        return 0.0
    return abs(before - now) / before if before else math.inf


def _none_if_infinite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _infinite_if_none(value: float | None) -> float:
    return math.inf if value is None else value


class GradientSums:
    """The sums of gradients over an interval of steps, by which AutoFreeze decides (see `AdaptiveSchedule`).

    `candidates` are parameters by name. Those of E and H have no part in it. What is summed takes one tensor, of the
    gradient's shape and dtype, for each parameter of a block that has a gradient; what froze leaves with the interval.
    """

    def __init__(self, candidates: Mapping[str, "Tensor"]):
        self.parameters = {name: p for name, p in candidates.items() if isinstance(unit_of(name), int)}
        self.sums: dict[str, "Tensor"] = {}

    def nbytes(self, names: Collection[str]) -> int:
        """Return the bytes of the sums while the parameters `names` train, in fp32."""
        return 4 * sum(p.numel() for name, p in self.parameters.items() if name in names)

    def add(self) -> None:
        """Add the gradients of a step."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            if name in self.sums:
                self.sums[name] += parameter.grad
            else:
                self.sums[name] = parameter.grad.clone()

    def take(self) -> dict[int, "Tensor"]:
        """Return by block the L1 norms of its sums, added up, as float64 tensors of one element; begin a new interval.

        Nothing here waits for the device.
        """
        import torch  # here, since `plan`, which sums nothing, does without

        norms: dict[int, list[Tensor]] = {}
        for name, total in self.sums.items():
            norms.setdefault(unit_of(name), []).append(torch.linalg.vector_norm(total, 1))
        self.sums.clear()
        return {block: torch.stack(of_block).double().sum() for block, of_block in norms.items()}

    def state_dict(self) -> dict[str, "Tensor"]:
        """Return what a resumed run needs: the sums so far. The next step changes them."""
        return dict(self.sums)

    def load_state_dict(self, state: Mapping[str, "Tensor"]) -> None:
        self.sums = {name: total.to(self.parameters[name].device, copy=True) for name, total in state.items()}
