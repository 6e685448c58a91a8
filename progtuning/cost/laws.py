"""The laws of partitions and schedules, to hold one's own against: each raises BrokenLaw with a counterexample.

Of parts, runs of blocks (Eq. 2 of Progtuning, arXiv 2506.21119)      cover, disjoint, ordered, balanced
Of the stages of a schedule (Eq. 3 to 5)                              bounded, nested, mirrored
Of a schedule over a number of optimizer steps                        monotone, shared, costs_add_up

A law that is not asked of every schedule is not one of all: "growing" is mirrored, not nested. They are plain
functions of plain values, for property-based tests.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction

from progtuning.stages import Schedule, Stage


class BrokenLaw(AssertionError):
    """A law does not hold; the message has the law and the values that break it."""


def _hold(holds: bool, law: str, counterexample: str) -> None:
    if not holds:
        raise BrokenLaw(f"{law}: {counterexample}")


def cover(parts: Sequence[range], num_blocks: int) -> None:
    """Every block 0 .. L - 1 is in a part, and no part has another."""
    found = {block for part in parts for block in part}
    missing, foreign = sorted(set(range(num_blocks)) - found), sorted(found - set(range(num_blocks)))
    _hold(not missing, "cover", f"block {missing[:1]} of {num_blocks} is in no part")
    _hold(not foreign, "cover", f"a part has block {foreign[:1]}, and there are {num_blocks}")


def disjoint(parts: Sequence[range]) -> None:
    """No block is in two parts."""
    home: dict[int, int] = {}
    for index, part in enumerate(parts):
        for block in part:
            _hold(block not in home, "disjoint", f"block {block} is in parts {home.get(block)} and {index}")
            home[block] = index


def ordered(parts: Sequence[range]) -> None:
    """Blocks rise within a part and from part to part."""
    blocks = [(block, index) for index, part in enumerate(parts) for block in part]
    for (low, first), (high, second) in zip(blocks, blocks[1:]):
        _hold(low < high, "ordered", f"block {low} of part {first} stands before block {high} of part {second}")


def balanced(parts: Sequence[range]) -> None:
    """The sizes of the parts differ by at most one block."""
    sizes = [len(part) for part in parts]
    _hold(max(sizes) - min(sizes) <= 1, "balanced", f"parts have {min(sizes)} and {max(sizes)} blocks")


def bounded(schedule: Schedule) -> None:
    """Every stage freezes 0 .. L blocks, counts itself by its place, and its blocks end with the last one."""
    for index, stage in enumerate(schedule.stages):
        low, blocks = stage.boundary, list(stage.blocks)
        _hold(0 <= low <= stage.num_blocks, "bounded", f"stage {index} freezes {low} of {stage.num_blocks} blocks")
        _hold(stage.index == index, "bounded", f"stage {index} calls itself {stage.index}")
        _hold(blocks == list(range(low, stage.num_blocks)), "bounded", f"stage {index} trains blocks {blocks}")


def nested(schedule: Schedule) -> None:
    """Every stage trains no block that the stage before did not: Eq. 3, Eq. 4."""
    for before, after in zip(schedule.stages, schedule.stages[1:]):
        new = sorted(set(after.blocks) - set(before.blocks))
        _hold(not new, "nested", f"stage {after.index} trains block {new[:1]}, which stage {before.index} did not")


def mirrored(schedule: Schedule, other: Schedule) -> None:
    """Stage t of one trains the blocks of stage T - 1 - t of the other, for the same share of the steps: Eq. 5."""
    one, two = (list(zip(each.stages, each.shares)) for each in (schedule, other))
    _hold(len(one) == len(two), "mirrored", f"there are {len(one)} and {len(two)} stages")
    for (stage, share), (mirror, mirror_share) in zip(one, reversed(two)):
        found = f"stage {stage.index} trains {list(stage.blocks)} for {share}, stage {mirror.index} of the other "
        same = stage.blocks == mirror.blocks and share == mirror_share
        _hold(same, "mirrored", f"{found}{list(mirror.blocks)} for {mirror_share}")


def monotone(schedule: Schedule, num_steps: int) -> None:
    """No step lies in an earlier stage than the step before it."""
    indices = [schedule.at_step(step, num_steps).index for step in range(num_steps)]
    for step, (before, after) in enumerate(zip(indices, indices[1:]), start=1):
        _hold(
            before <= after, "monotone", f"step {step - 1} of {num_steps} is in stage {before}, step {step} in {after}"
        )


def shared(schedule: Schedule, num_steps: int) -> None:
    """Every stage has its share of the steps, to less than one step."""
    indices = [schedule.at_step(step, num_steps).index for step in range(num_steps)]
    for stage, share in zip(schedule.stages, schedule.shares):
        count, due = indices.count(stage.index), Fraction(share * num_steps, sum(schedule.shares))
        _hold(
            abs(count - due) < 1, "shared", f"stage {stage.index} has {count} of {num_steps} steps, its share is {due}"
        )


def costs_add_up(schedule: Schedule, num_steps: int, cost: Callable[[Stage], int], total: int) -> None:
    """What the steps cost, each as `cost` says of its stage, adds up to `total`."""
    found = sum(cost(schedule.at_step(step, num_steps)) for step in range(num_steps))
    _hold(found == total, "costs_add_up", f"{num_steps} steps cost {found}, the total is {total}")
