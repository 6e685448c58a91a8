"""Eq. 3 to 5 of Progtuning (arXiv 2506.21119): which blocks train in which stage, and when a stage begins.

    L  num_blocks     Transformer blocks, 0-based
    T  num_stages     stages; as many as epochs unless the user asks otherwise
    S_t               stage t: a contiguous run of top blocks, and always the head H (pooler included)
    boundary          lowest active block; the blocks below it are frozen; L where the head trains alone
    E                 embeddings: whether they train is a policy of its own (see `embeddings_train`)

Fixed schedules, for parts P_1 .. P_T of `partition.parts`, each stage with the same share of the optimizer steps:

    shrinking           S_t = P_t .. P_T           Eq. 3, Progtuning: high blocks train in more stages than low ones
    without-low-blocks  S_t = P_{t+1} .. P_T       Eq. 4, ablation: the last stage is the head alone
    growing             S_t = P_{T-t+1} .. P_T     Eq. 5, ablation: shrinking in reverse, gradual unfreezing
    full                S_t = P_1 .. P_T           plain fine-tuning, the baseline, by the same code
"""

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from progtuning.partition import boundaries

# A calendar's boundaries, one a stage, of the boundaries b_0 .. b_T of the parts.
CALENDARS: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "full": lambda b: (0,) * (len(b) - 1),
    "shrinking": lambda b: b[:-1],  # Eq. 3: P_t begins at b_{t-1}
    "growing": lambda b: b[-2::-1],  # Eq. 5: P_{T-t+1} begins at b_{T-t}
    "without-low-blocks": lambda b: b[1:],  # Eq. 4: P_{t+1} begins at b_t, and b_T = L leaves the head alone
}
SCHEDULES = tuple(CALENDARS)
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
    """The T stages of a run, and the map from optimizer step or epoch to stage.

    A schedule answers for itself what a run has to know of it. This one is a calendar: it looks at nothing and has no
    state. One that decides while it trains has the same methods.
    """

    name: str
    embeddings: str
    stages: tuple[Stage, ...]
    shares: tuple[int, ...]  # of the optimizer steps that each stage has, in parts of their sum
    sums_gradients = False  # whether it keeps a sum of each block's gradients, to decide by

    def at_step(self, step: int, num_steps: int) -> Stage:
        """Return the stage of 0-based step `step` out of `num_steps`; of equal shares floor(step * T / num_steps).

        Where T divides the number of epochs, these change exactly where epochs do. Raises ValueError for other steps.
        """
        if not 0 <= step < num_steps:
            raise ValueError(f"step must be in 0..{num_steps - 1}, got {step}")
        ends = list(accumulate(self.shares))
        return self.stages[bisect_right(ends, step * ends[-1] // num_steps)]

    def at_epoch(self, epoch: int, num_epochs: int) -> Stage:
        """Return the stage in which 0-based epoch `epoch` out of `num_epochs` begins."""
        return self.at_step(epoch, num_epochs)  # e * steps_per_epoch * T / (num_epochs * steps_per_epoch)

    @property
    def planned(self) -> tuple[tuple[Stage, Stage], ...]:
        """For each stage that can be planned: what trains, and the stage at whose cut a prefix cache then stands."""
        return tuple((stage, stage) for stage in self.stages)

    def watch(self, candidates: Mapping[str, object]) -> None:
        """Take note of the parameters, by name, that a run may train. A calendar decides by none."""

    def after_backward(self, step: int, num_steps: int) -> None:
        """The parameters have the whole gradient of 0-based optimizer step `step`, neither masked nor clipped."""

    def state_bytes(self, names: Collection[str]) -> int:
        """Return the bytes that the schedule keeps while the parameters `names` train."""
        return 0

    def summary(self) -> dict:
        """Return what `summary.json` has of the schedule beside its stages."""
        return {}

    def state_dict(self) -> dict:
        """Return what a checkpoint holds of the schedule, to be given to `load_state_dict`."""
        return {}

    def load_state_dict(self, state: Mapping) -> None:
        """Take up the state of a schedule of the same run."""


def make_schedule(name: str, num_blocks: int, num_stages: int, embeddings: str = "with-block-1") -> Schedule:
    """Build the schedule `name`, one of SCHEDULES, of `num_stages` stages over `num_blocks` blocks.

    >>> [list(stage.blocks) for stage in make_schedule("shrinking", num_blocks=6, num_stages=3).stages]
    [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5], [4, 5]]

    Raises ValueError for an unknown name or policy, and what `partition.boundaries` raises.
    """
    if name not in CALENDARS:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    lowest = CALENDARS[name](boundaries(num_blocks, num_stages))
    return make_calendar(name, [(boundary, 1) for boundary in lowest], num_blocks, embeddings)


def make_calendar(
    name: str, calendar: Sequence[tuple[int, int]], num_blocks: int, embeddings: str = "with-block-1"
) -> Schedule:
    """Build a schedule of any stages: for each its lowest active block and its share of the steps, parts of their sum.

    Raises ValueError where a boundary is not in 0 .. L or a share not more than 0, and for an unknown policy.
    """
    for boundary, share in calendar:
        if not 0 <= boundary <= num_blocks or share <= 0:
            raise ValueError(f"a stage must freeze 0..{num_blocks} blocks for a share above 0, got {boundary}:{share}")
    stages = (Stage(i, num_blocks, b, embeddings_train(embeddings, b)) for i, (b, _) in enumerate(calendar))
    return Schedule(name, embeddings, tuple(stages), tuple(share for _, share in calendar))
