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

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

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
    """Freeze from below when the blocks stop changing, in place of a fixed calendar.

    This is the gradient-norm test of AutoFreeze (arXiv 2102.01386). The steps are divided in intervals of equal length.
    Over an interval the norm of each active block's gradient is added up, step by step, to G_i. Between two intervals a
    block's score is |G_i(before) - G_i(now)| / G_i(before), and the lowest active blocks up to the first whose score is
    not below the median of all active ones are frozen. The boundary never falls and never passes the last block. Every
    decision is kept, with its scores, in `decisions`.
    """

    name = "adaptive"

    def __init__(self, num_blocks: int, num_intervals: int, embeddings: str = "with-block-1"):
        boundaries(num_blocks, num_intervals)  # checks both counts
        self.num_blocks = num_blocks
        self.num_intervals = num_intervals
        self.embeddings = embeddings
        self.stages: list[Stage] = []
        self.decisions: list[dict] = []
        self._interval = 0
        self._before: dict[int, float] = {}
        self._now: dict[int, float] = {}
        self._enter(0)

    def observe(self, norms: Mapping[int, float]) -> None:
        """Add a step's gradient norms by active block: numbers, or tensors of one element, read when it is decided."""
        for block, norm in norms.items():
            self._now[block] = self._now[block] + norm if block in self._now else norm

    def at_step(self, step: int, num_steps: int) -> Stage:
        """Return the stage of 0-based optimizer step `step` out of `num_steps`. Steps are to be asked for in order.

        Raises ValueError where the step lies outside 0 .. num_steps - 1.
        """
        if not 0 <= step < num_steps:
            raise ValueError(f"step must be in 0..{num_steps - 1}, got {step}")
        interval = step * self.num_intervals // num_steps
        if interval != self._interval:
            self._interval = interval
            self._decide(step)
        return self.stages[-1]

    def state_dict(self) -> dict:
        """Return what a resumed run needs: numbers, None for an infinite score, and the norms as they were given."""
        return {
            "interval": self._interval,
            "boundaries": [stage.boundary for stage in self.stages],
            "decisions": [
                decision
                | {"scores": {str(block): _none_if_infinite(score) for block, score in decision["scores"].items()}}
                | {"median": _none_if_infinite(decision["median"])}
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
            | {"median": _infinite_if_none(decision["median"])}
            for decision in state["decisions"]
        ]
        self._before = {int(block): norm for block, norm in state["before"].items()}
        self._now = {int(block): norm for block, norm in state["now"].items()}

    def _decide(self, step: int) -> None:
        before, now = self._before, {block: float(norm) for block, norm in self._now.items()}
        scores = {block: _relative_change(before[block], norm) for block, norm in now.items() if block in before}
        if scores:
            middle = median(scores.values())
            changing = (block for block in sorted(scores) if scores[block] >= middle)
            still = self.stages[-1].boundary  # where a norm is not a number, none is found to change
            boundary = min(next(changing, still), self.num_blocks - 1)
            self.decisions.append({"step": step, "scores": scores, "median": middle, "frozen_blocks": boundary})
            if boundary > self.stages[-1].boundary:
                self._enter(boundary)
        self._before, self._now = now, {}

    def _enter(self, boundary: int) -> None:
        trains = embeddings_train(self.embeddings, boundary)
        self.stages.append(Stage(len(self.stages), self.num_blocks, boundary, trains))


def _relative_change(before: float, now: float) -> float:
    if before == now:
        return 0.0
    return abs(before - now) / before if before else float("inf")


def _none_if_infinite(value: float) -> float | None:
    return None if value == float("inf") else value


def _infinite_if_none(value: float | None) -> float:
    return float("inf") if value is None else value
