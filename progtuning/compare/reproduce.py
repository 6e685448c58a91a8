"""A table of the paper's as a series of runs: its rows x tasks x seeds, the printed figures beside ours."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from progtuning.base.errors import InputError, NotFinite
from progtuning.compare.frontier import spread
from progtuning.compare.presets import COLUMNS, Preset
from progtuning.compare.runs import append, got, rows_of, splits_of
from progtuning.cost.paper import METRIC_NOTES
from progtuning.report.tables import PHASES, table
from progtuning.run.build import lay_out
from progtuning.run.finetune import encoded, fine_tune, probe
from progtuning.settings.train import TrainConfig
from progtuning.step.device import choose_device
from progtuning.step.processes import World


@dataclass(frozen=True)
class Trial:
    """One run: a row of the table, a task and a seed. `data` is the task's folder."""

    model: str
    folder: Path
    row: str
    task: str
    data: str | None
    max_train_rows: int | None
    settings: TrainConfig
    device: str | None

    @property
    def key(self) -> tuple[str, str, int]:
        return self.row, self.task, self.settings.seed

    @property
    def digest(self) -> str:
        """Of the rows that are trained and measured on."""
        return digest_of(self.task, self.data, self.max_train_rows)

    @property
    def account(self) -> dict:
        """What a row says of its run before it is made."""
        row = {"row": self.row, "task": self.task, "seed": self.settings.seed, "date": date.today().isoformat()}
        return row | {
            "train_rows": len(splits_of(self.task, self.data, self.max_train_rows).train),
            "data": self.digest,
        }

    def result(self, scratch: Path) -> dict:
        """Make the run and return its row. That of one which diverged has the reason under "error", and no metrics."""
        splits, device = splits_of(self.task, self.data, self.max_train_rows), choose_device(self.device)
        row = self.account | {"epochs": self.settings.epochs, "lr": self.settings.lr}
        try:
            summary = fine_tune(self.model, self.folder, splits, self.settings, device)
        except NotFinite as error:
            return row | {"error": str(error)}
        return row | {
            "metrics": summary.metrics,
            "flops": summary.flops,
            "seconds": sum(summary.seconds(phase) for phase in PHASES),
            "updated_parameters": summary.updated_parameters,
        }


class Blocks(Trial):
    """A run of Figure 1: each block alone, with E and the head."""

    def result(self, scratch: Path) -> dict:
        """Return a row with the metrics of every block, from the lowest."""
        splits, device = splits_of(self.task, self.data, self.max_train_rows), choose_device(self.device)
        try:
            found = [row["metrics"] for row in probe(self.folder, splits, self.settings, device)]
        except NotFinite as error:
            return self.account | {"error": str(error)}
        return self.account | {"blocks": found, "metrics": found[-1]}


@lru_cache(maxsize=None)
def digest_of(task: str, data: str | None, max_train_rows: int | None) -> str:
    splits = splits_of(task, data, max_train_rows)
    return hashlib.sha256(
        repr((list(splits.train), {name: list(rows) for name, rows in splits.dev.items()})).encode()
    ).hexdigest()


def reproduce(
    trials: Sequence[Trial],
    identity: dict,
    output: str | Path,
    resume: bool = False,
    jobs: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Make the trials that `output` has no row of, `jobs` at a time, and return all its rows. Raises InputError."""
    check(trials)
    with rows_of(output, resume, identity, trials[0].device) as (folder, log):
        done = {(row["row"], row["task"], row["seed"]): row for row in log.rows}
        for trial in trials:
            if done.get(trial.key, {}).get("data", trial.digest) != trial.digest:
                raise InputError(
                    f"--resume: {folder} has runs of other rows of {trial.task}: give another --output-dir"
                )
        calls = [partial(trial.result, folder) for trial in trials if trial.key not in done]
        first = {trial.task: splits_of(trial.task, trial.data, None).task.main_metric for trial in trials}
        append(calls, jobs, log, partial(_text, first), "reproducing", say)
        return log.rows


def check(trials: Sequence[Trial]) -> None:
    """Raise InputError where the settings of a run do not fit its task, its rows, its model or the device."""
    encoding, config, rows = None, None, None
    for trial in sorted(trials, key=lambda trial: (trial.task, trial.settings.max_length or 0)):
        splits, settings = splits_of(trial.task, trial.data, trial.max_train_rows), trial.settings
        splits.task.check(settings)
        if encoding != (trial.task, settings.max_length, settings.squad):
            encoding = (trial.task, settings.max_length, settings.squad)
            config, _, rows = encoded(trial.folder, splits, settings)
        lay_out(config, rows, settings, choose_device(trial.device), World())


def _text(first: Mapping[str, str], row: dict) -> str:
    return f"{row['row']} on {row['task']}, seed {row['seed']}: {got(row, first[row['task']])}"


class Cell(NamedTuple):
    """A figure of a table: the paper's and ours, times 100."""

    row: str
    column: str
    printed: float
    ours: tuple[float, ...]  # one for each seed that ended; empty: not run
    failed: int = 0  # seeds that did not end


def cells(preset: Preset, rows: Sequence[Mapping]) -> list[Cell]:
    """Return every cell of a table, with what the rows have of it."""
    found = []
    for method in preset.methods:
        for column in preset.columns:
            task, metric = COLUMNS[column]
            own = [row for row in rows if (row["row"], row["task"]) == (method.row, task)]
            ours = tuple(100 * row["metrics"][metric] for row in own if "metrics" in row)
            found.append(Cell(method.row, column, preset.printed(method, column), ours, len(own) - len(ours)))
    return found


def page(preset: Preset, found: Sequence[Cell], account: Sequence[str]) -> str:
    """Return a table of the paper's with ours beside, as Markdown: "ours ± deviation (seeds) / the paper's"."""
    rows = [[method.row, *(_beside(cell) for cell in found if cell.row == method.row)] for method in preset.methods]
    ran = sum(bool(cell.ours) for cell in found)
    notes = {cell: METRIC_NOTES.get((preset.table, cell.row, cell.column)) for cell in found}
    notes = [f"{c.row}, {c.column}: the paper's {c.printed:g} is {note}." for c, note in notes.items() if note]
    printed = ", ".join(method.printed for method in preset.methods)
    lines = [
        f"{ran} of {len(found)} cells have runs of ours. A cell is ours (seeds) / the paper's, times 100.",
        f"The paper's are its rows {printed}.",
        f"Ours are {', '.join(f'{COLUMNS[column][1]} of {column}' for column in preset.columns)}.",
        *notes,
    ]
    parts = [f"# {preset.table}", "\n".join(f"- {line}" for line in account), table(["", *preset.columns], rows)]
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


def _beside(cell: Cell) -> str:
    ours = f"{spread([value / 100 for value in cell.ours])} ({len(cell.ours)})" if cell.ours else ""
    failed = f"{cell.failed} failed" if cell.failed else ""
    return f"{', '.join(filter(None, (ours, failed))) or 'not run'} / {cell.printed:.1f}"


def blocks_page(rows: Sequence[Mapping], account: Sequence[str]) -> str:
    """Return Figure 1 as a table: the mean of each metric by the block that trained alone, and its deviation."""
    tasks = {}
    for row in rows:
        if "blocks" in row:  # else it failed
            tasks.setdefault(row["task"], []).append(row["blocks"])
    lines = [
        [
            task,
            block + 1,
            *(spread([blocks[block][name] for blocks in of_task]) for name in (next(iter(of_task[0][0])),)),
        ]
        for task, of_task in tasks.items()
        for block in range(len(of_task[0]))
    ]
    text = "The paper prints its figure without numbers: of BERT-base's blocks on SST-2 the high ones do best."
    parts = ["# Figure 1", "\n".join(f"- {line}" for line in account)]
    return "\n\n".join([*parts, table(["task", "block that trains", "metric, times 100"], lines), text]) + "\n"
