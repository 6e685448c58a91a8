"""Eq. 3 to 5 of Progtuning (arXiv 2506.21119): which blocks train in which stage, and when a stage begins.

    L  num_blocks     Transformer blocks, 0-based
    T  num_stages     stages; as many as epochs unless the user asks otherwise
    S_t               stage t: a contiguous run of top blocks, and always the head H (pooler included)
    boundary          lowest active block; the blocks below it are frozen; L where the head trains alone
    E                 embeddings: whether they train is a policy of its own (see `embeddings_train`)

Fixed schedules, for parts P_1 .. P_T of `partition.parts`:

    shrinking           S_t = P_t .. P_T           Eq. 3, Progtuning: high blocks train in more stages than low ones
    without-low-blocks  S_t = P_{t+1} .. P_T       Eq. 4, ablation: the last stage is the head alone
    growing             S_t = P_{T-t+1} .. P_T     Eq. 5, ablation: shrinking in reverse, gradual unfreezing
    full                S_t = P_1 .. P_T           plain fine-tuning, the baseline, by the same code
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from progtuning.partition import boundaries

SCHEDULES = ("full", "shrinking", "growing", "without-low-blocks")
EMBEDDING_POLICIES = ("with-block-1", "always", "never")


def embeddings_train(policy: str, boundary: int) -> bool:
    """Say whether E trains in a stage whose lowest active block is `boundary`.

    The paper trains E in every epoch ("always"), and its tables count it so. But a gradient for E crosses every frozen
    block, so then no backward pass can be cut. "with-block-1", the default, trains E exactly while the lowest block
    trains. Raises ValueError for any other policy.
    """
    if policy not in EMBEDDING_POLICIES:
        raise ValueError(f"embeddings must be one of {', '.join(EMBEDDING_POLICIES)}, got {policy!r}")
    return policy == "always" or (policy == "with-block-1" and boundary == 0)


@dataclass(frozen=True)
class Stage:
    """What trains in one stage: `blocks` (0-based, a run that ends with the last block, or empty), E or not, and H."""

    index: int  # 0-based
    num_blocks: int  # L
    boundary: int  # lowest active block, 0 .. L
    embeddings: bool  # whether E trains

    @property
    def blocks(self) -> range:
        return range(self.boundary, self.num_blocks)


@dataclass(frozen=True)
class Schedule:
    """The T stages of a run, and the map from optimizer step or epoch to stage. Build one with `make_schedule`."""

    name: str
    embeddings: str
    stages: tuple[Stage, ...]

    def at_step(self, step: int, num_steps: int) -> Stage:
        """Return the stage of 0-based optimizer step `step` out of `num_steps`: stage floor(step * T / num_steps).

        Where T divides the number of epochs, stages change exactly where epochs do.
        Raises ValueError where the step lies outside 0 .. num_steps - 1.
        """
        if not 0 <= step < num_steps:
            raise ValueError(f"step must be in 0..{num_steps - 1}, got {step}")
        return self.stages[step * len(self.stages) // num_steps]

    def at_epoch(self, epoch: int, num_epochs: int) -> Stage:
        """Return the stage in which 0-based epoch `epoch` out of `num_epochs` begins."""
        return self.at_step(epoch, num_epochs)  # e * steps_per_epoch * T / (num_epochs * steps_per_epoch)


def make_schedule(name: str, num_blocks: int, num_stages: int, embeddings: str = "with-block-1") -> Schedule:
    """Build the schedule `name`, one of SCHEDULES, of `num_stages` stages over `num_blocks` blocks.

    >>> [list(stage.blocks) for stage in make_schedule("shrinking", num_blocks=6, num_stages=3).stages]
    [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5], [4, 5]]

    Raises ValueError for an unknown name or policy, and what `partition.boundaries` raises.
    """
    b = boundaries(num_blocks, num_stages)
    lowest = {
        "shrinking": b[:-1],  # Eq. 3: P_t begins at b_{t-1}
        "without-low-blocks": b[1:],  # Eq. 4: P_{t+1} begins at b_t, and b_T = L leaves the head alone
        "growing": b[-2::-1],  # Eq. 5: P_{T-t+1} begins at b_{T-t}
        "full": (0,) * num_stages,
    }
    if name not in lowest:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    stages = (
        Stage(index, num_blocks, boundary, embeddings_train(embeddings, boundary))
        for index, boundary in enumerate(lowest[name])
    )
    return Schedule(name, embeddings, tuple(stages))


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
        self._enter(0)

    @property
    def furthest(self) -> Stage:
        """The stage that freezes the most: the last block and H train."""
        boundary = self.num_blocks - 1
        return Stage(0, self.num_blocks, boundary, embeddings_train(self.embeddings, boundary))

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
            self._decide(step)
        return self.stages[-1]

    def state_dict(self) -> dict:
        """Return what a resumed run needs: numbers, None for one that is not finite, and the norms as they were given.

        The sums of the interval that is on are not in it: whoever sums keeps them.
        """
        return {
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

    def load_state_dict(self, state: Mapping) -> None:
        """Take up the state of a schedule of the same run."""
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
