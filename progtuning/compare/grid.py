"""Which runs a comparison makes: schedules x budgets x seeds, each schedule at the learning rate chosen for it.

    choice    a run on a part of the training rows, measured on the rest of them: schedule x learning rate
    result    a run on all training rows, measured on the held-out ones: schedule x budget x seed

Every schedule has the same learning rates to choose from, and chooses once, at the middle budget and the first seed.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from progtuning.base.checks import check_choices, check_number
from progtuning.base.errors import InputError
from progtuning.settings.train import SCHEDULE_KINDS, TrainConfig

CACHED = "+cache"
# What can stand behind a schedule, and what it changes in the settings.
SUFFIXES = {
    "cache": {"cache": "memory", "prefix_dropout": False},  # keeps what the frozen blocks give
    "eval": {"prefix_dropout": False},  # the frozen blocks do not drop out
    "never": {"embeddings": "never"},  # E is frozen throughout
    "always": {"embeddings": "always"},  # E trains in every stage, as in the paper
}
CHOICE, RESULT = "choice", "result"


class Run(NamedTuple):
    """What tells a run of a comparison from its others."""

    part: str  # CHOICE or RESULT
    schedule: str
    budget: float
    lr: float
    seed: int


@dataclass(frozen=True)
class Grid:
    """The schedules, budgets, learning rates and seeds that are compared. Raises InputError where one is amiss.

    A schedule is a named one or a calendar, with the SUFFIXES that it has: shrinking, 2+cache, full+never.
    """

    schedules: tuple[str, ...]
    budgets: tuple[float, ...]  # shares of the FLOPs of full fine-tuning
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]

    def __post_init__(self):
        for option, values in (("schedules", self.schedules), ("budgets", self.budgets), ("lrs", self.lrs)):
            if not values or len(set(values)) < len(values):
                raise InputError(f"--{option} must be at least one, each once, got {', '.join(map(str, values))}")
        for rate in self.lrs:
            TrainConfig.check(lr=rate)
        for budget in self.budgets:
            TrainConfig.check(budget=budget)

    def choices(self) -> list[Run]:
        """Return the runs that choose: none where there is one learning rate."""
        budget = sorted(self.budgets)[(len(self.budgets) - 1) // 2]
        rates = self.lrs if len(self.lrs) > 1 else ()
        return [Run(CHOICE, schedule, budget, lr, self.seeds[0]) for schedule in self.schedules for lr in rates]

    def results(self, chosen: Mapping[str, float]) -> list[Run]:
        """Return the runs whose results are compared, seed by seed; `chosen` has the learning rate of each schedule."""
        return [
            Run(RESULT, schedule, budget, chosen[schedule], seed)
            for seed in self.seeds
            for budget in self.budgets
            for schedule in self.schedules
            if schedule in chosen
        ]

    def choose(self, rows: Iterable[Mapping], metric: str) -> dict[str, float]:
        """Return for each schedule the learning rate with the highest metric; of equal ones the lowest.

        `rows` are those of the runs that choose. A schedule of which no run ended with a metric is left out.
        """
        if len(self.lrs) == 1:
            return dict.fromkeys(self.schedules, self.lrs[0])
        scores = {run_of(row): row["metrics"][metric] for row in rows if row["part"] == CHOICE and "metrics" in row}
        chosen = {}
        for schedule in self.schedules:
            own = {run.lr: scores[run] for run in self.choices() if run.schedule == schedule and run in scores}
            if own:
                chosen[schedule] = min(own, key=lambda lr: (-own[lr], lr))
        return chosen


def run_of(row: Mapping) -> Run:
    """Return the run that a row is of."""
    return Run(*(row[name] for name in Run._fields))


def settings_of(run: Run, base: TrainConfig) -> TrainConfig:
    """Return the settings of a run; `base` has what all share. Raises InputError where they do not go together."""
    name, *suffixes = run.schedule.split("+")
    if name not in SCHEDULE_KINDS and not re.match(r"\d", name):
        names = ", ".join(SCHEDULE_KINDS)
        raise InputError(f"--schedules must be of {names}, and calendars as 4 or 0:2,4:1, got {run.schedule!r}")
    changes = {"schedule": name} if name in SCHEDULE_KINDS else {"calendar": name, "stages": None}
    for suffix in suffixes:
        more = changes_of(suffix, name)
        if twice := changes.keys() & more.keys() - ({"prefix_dropout"} if suffixes.count(suffix) == 1 else set()):
            raise InputError(f"--schedules {run.schedule}: +{suffix} says again what stands before it: {min(twice)}")
        changes |= more
    place = {"cache": base.cache} if "cache" in suffixes and base.cache != "off" else {}
    common = {"cache": "off", "budget": run.budget, "lr": run.lr, "seed": run.seed, "evaluate": "end"}
    return replace(base, **common | changes | place)


def changes_of(suffix: str, name: str) -> dict:
    """Return what a suffix behind the schedule `name` changes in the settings: one of SUFFIXES, or lr0.8, --lr-decay.

    Raises InputError.
    """
    if decay := re.fullmatch(r"lr(0?\.\d{1,9})", suffix, re.ASCII):
        return {"lr_decay": float(decay[1])}
    check_choices(f"what stands behind {name} in --schedules", (suffix,), (*SUFFIXES, "lr0.8"))
    return SUFFIXES[suffix]


def default_schedules(num_blocks: int, num_stages: int) -> tuple[str, ...]:
    """Return full; shrinking and growing, where they have stages and blocks to divide; a third of the blocks frozen;
    and a third for two thirds of the steps, then two thirds: the best at half the cost in benchmarks/README.md.
    """
    third, two_thirds = max(1, num_blocks // 3), 2 * num_blocks // 3
    staged = ["shrinking", "growing"] if min(num_blocks, num_stages) > 1 else []
    calendars = [f"{third}", *([f"{third}:2,{two_thirds}:1"] if two_thirds > third else [])]
    return "full", *(name + CACHED for name in staged + calendars)


def default_rates(lr: float) -> tuple[float, ...]:
    """Return half of a learning rate, itself, and twice it."""
    return lr / 2, lr, 2 * lr


def split_for_choice(num_rows: int, share: float) -> int:
    """Return how many of the training rows the runs that choose are measured on. Raises InputError where none are."""
    held = min(int(num_rows * share), num_rows - 1)
    if held < 1:
        raise InputError(f"--choice-share {share:g} of {num_rows} training rows is no row to choose on")
    return held


def seeds_of(count: int, first: int) -> Sequence[int]:
    """Return `count` seeds from `first` on. Raises InputError."""
    check_number("--seeds", count, int, 1, 1000)
    return tuple(range(first, first + count))
