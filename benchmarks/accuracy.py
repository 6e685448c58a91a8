"""Accuracy of every method and schedule on real tasks: a grid of task x method x seed, one JSON row a run.

    python benchmarks/accuracy.py --study ablation
    python benchmarks/accuracy.py --study accuracy --glue ../shared/data/glue
    python benchmarks/accuracy.py --study whole --glue ../shared/data/glue --squad ../shared/data/squad --jobs 8
    python benchmarks/accuracy.py --table benchmarks/results/accuracy.jsonl --glue ../shared/data/glue

A study is a grid (STUDIES below). Its rows are appended to benchmarks/results/<study>.jsonl as the runs end; a run
whose row is there is not repeated, so that a study can be stopped and taken up again. `--table` prints, as Markdown,
mean and standard deviation over the seeds and, for tasks whose folder is given, the difference to full fine-tuning with
a paired bootstrap interval over held-out rows and seeds, and what one answer for all rows would score.

The studies "learning-rate" and "learning-rate-peft" try methods at several learning rates on one task and one seed; the
studies "accuracy", "accuracy-peft" and "whole" use the rates of _BEST, chosen so. No run of another study is chosen by
its result.
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from harness import append_row, check_positive, read_rows, run_script, spread

from progtuning.base.errors import InputError
from progtuning.base.sources import model_folder
from progtuning.compare.frontier import bootstrap, percentiles, points
from progtuning.compare.runs import predictions, side_by_side
from progtuning.data.glue import FOLDERS
from progtuning.data.registry import load_splits
from progtuning.data.task import Splits, limit_train
from progtuning.report import tables
from progtuning.report.summary import Summary
from progtuning.run.finetune import fine_tune
from progtuning.settings.peft import PeftConfig
from progtuning.settings.recipes import TASK_DEFAULTS
from progtuning.settings.train import DPSConfig, TrainConfig
from progtuning.step.device import choose_device

RESULTS = Path(__file__).parent / "results"

_ADAPTER, _BITFIT, _LORA = PeftConfig("adapter", adapter_size=48), PeftConfig("bitfit"), PeftConfig("lora")
_SPAFIT = PeftConfig("spafit")
# What each method changes in the settings. A PEFT method trains few parameters and takes a higher learning rate.
METHODS = {
    "full": {"schedule": "full"},
    "progtuning": {"schedule": "shrinking"},
    "progtuning, E always": {"schedule": "shrinking", "embeddings": "always"},
    "progtuning + cache": {"schedule": "shrinking", "prefix_dropout": False, "cache": "memory"},
    "growing": {"schedule": "growing"},
    "without-low-blocks": {"schedule": "without-low-blocks"},
    "adaptive": {"schedule": "adaptive"},
    "adapter": {"schedule": "full", "peft": _ADAPTER, "lr": 1e-3},
    "adapter + progtuning": {"schedule": "shrinking", "peft": _ADAPTER, "lr": 1e-3},
    "bitfit": {"schedule": "full", "peft": _BITFIT, "lr": 3e-3},
    "bitfit + progtuning": {"schedule": "shrinking", "peft": _BITFIT, "lr": 3e-3},
    "lora": {"schedule": "full", "peft": _LORA, "lr": 2e-3},
    "lora + progtuning": {"schedule": "shrinking", "peft": _LORA, "lr": 2e-3},
    "spafit": {"schedule": "full", "peft": _SPAFIT, "lr": 2e-3},
    "spafit + progtuning": {"schedule": "shrinking", "peft": _SPAFIT, "lr": 2e-3},
    "dps dense": {"schedule": "full", "dps": DPSConfig("dense")},
    "dps dense + progtuning": {"schedule": "shrinking", "dps": DPSConfig("dense")},
    "dps mix": {"schedule": "full", "dps": DPSConfig("mix")},
    "dps mix + progtuning": {"schedule": "shrinking", "dps": DPSConfig("mix")},
}
_FULL_MODEL = ["full", "progtuning", "progtuning, E always", "without-low-blocks", "growing"]
_PEFT = [name for name, changes in METHODS.items() if "peft" in changes or "dps" in changes]
_COMMON = {"epochs": 3, "batch_size": 32, "lr": 1e-4, "precision": "fp32", "evaluate": "end"}
_SMALL = _COMMON | {"precision": "bf16", "batch_size": 16}  # small batches: more steps out of few rows
# The best of the learning-rate studies. DPS and `adaptive` take that of full fine-tuning, the cache and a method under
# Progtuning that of the same without.
_BEST = {
    "full": 5e-5,
    "progtuning": 5e-5,
    "progtuning, E always": 5e-5,
    "progtuning + cache": 5e-5,
    "without-low-blocks": 1e-4,
    "growing": 2e-4,
    "adaptive": 5e-5,
    "adapter": 1e-3,
    "bitfit": 1.5e-3,
    "lora": 2e-3,
    "spafit": 5e-4,
    "dps dense": 5e-5,
    "dps mix": 5e-5,
}
STUDIES = {
    "ablation": {
        "tasks": ["movie-reviews"],
        "methods": [*_FULL_MODEL, "adaptive"],
        "seeds": [1, 2, 3],
        "rows": 1500,
        **_COMMON,
    },
    "peft": {"tasks": ["mrpc"], "methods": ["full", "progtuning", *_PEFT], "seeds": [1], "rows": 1000, **_COMMON},
    "learning-rate": {
        "tasks": ["sts-b"],
        "methods": _FULL_MODEL,
        "seeds": [1],
        "rows": 1000,
        "factors": [1, 1 / 2, 1 / 4, 2],
        **_SMALL,
    },
    "learning-rate-peft": {
        "tasks": ["sts-b"],
        "methods": ["adapter", "bitfit", "lora", "spafit"],
        "seeds": [1],
        "rows": 1000,
        "factors": [1, 1 / 2, 1 / 4, 1 / 8, 2],
        **_SMALL,
        "epochs": 8,
    },
    "accuracy": {
        "tasks": ["cola", "sst-2", "sts-b", "mrpc", "movie-reviews"],
        "methods": [*_FULL_MODEL, "progtuning + cache"],
        "seeds": [1, 2, 3],
        "rows": 1500,
        "rates": _BEST,
        **_SMALL,
    },
    "accuracy-peft": {
        "tasks": ["sts-b", "mrpc"],
        "methods": ["full", "progtuning", *_PEFT],
        "seeds": [1, 2],
        "rows": 1000,
        "rates": _BEST,
        **_SMALL,
        "epochs": 8,
    },
    "whole": {  # for a GPU: all training rows
        "tasks": ["rte", "mrpc", "sts-b", "cola", "movie-reviews", "sst-2", "squad"],
        "methods": list(METHODS),
        "seeds": [1, 2, 3, 4, 5],
        "rows": None,
        "rates": _BEST,
        **_SMALL,
    },
}
MODEL = "minilm-l6"


@dataclass(frozen=True)
class Data:
    """Where the tasks' files are: the parent of GLUE's official folders, and the folder of SQuAD."""

    glue: Path | None
    squad: Path | None

    def read(self, task: str) -> Splits:
        """Return a task's rows. Raises InputError where its folder was not given."""
        if task == "movie-reviews":
            return load_splits(task, None)
        if not self.has(task):
            option = "squad" if task == "squad" else "glue"
            raise InputError(f"the task {task} needs --{option}, the folder of its files")
        return load_splits(task, str(self.squad if task == "squad" else self.glue / FOLDERS[task]))

    def has(self, task: str) -> bool:
        return task == "movie-reviews" or (self.squad if task == "squad" else self.glue) is not None


@dataclass(frozen=True)
class Run:
    """One run of a study: a row of its file."""

    model: str
    task: str
    method: str
    rows: int | None  # a sample of the training rows; None: all
    settings: TrainConfig

    @property
    def key(self) -> tuple[str, str, int, float]:
        return self.task, self.method, self.settings.seed, self.settings.lr

    def row(self, data: Data, device: torch.device) -> dict:
        """Fine-tune, read back what was saved, and return the row: the summary's figures and the predictions."""
        splits = _sample(self.task, self.rows, data)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "run"
            summary = fine_tune(self.model, model_folder(self.model), splits, self.settings, device, output)
            answers = predictions(output, splits, self.settings, device)
        return row_of(summary) | {"predictions": answers, "method": self.method, "seed": self.settings.seed}


@lru_cache(maxsize=1)
def _sample(task: str, rows: int | None, data: Data) -> Splits:
    splits = data.read(task)
    return splits if rows is None else limit_train(splits, rows, seed=0)


def runs_of(study: dict) -> Iterator[Run]:
    """Yield the runs of a study, seed by seed."""
    for seed, task, method in itertools.product(study["seeds"], study["tasks"], study["methods"]):
        settings = {key: study[key] for key in _COMMON} | METHODS[method] | TASK_DEFAULTS.get(task, {})
        best = study.get("rates", {})
        settings["lr"] = best.get(method, best.get(method.removesuffix(" + progtuning"), settings["lr"]))
        for factor in study.get("factors", [1]):
            changes = {"lr": factor * settings["lr"], "seed": seed}
            yield Run(study.get("model", MODEL), task, method, study["rows"], TrainConfig(**settings | changes))


def run_study(name: str, data: Data, device: torch.device, jobs: int = 1) -> None:
    """Run what is missing of a study, `jobs` runs at a time, and append a row as each run ends."""
    path = RESULTS / f"{name}.jsonl"
    done = {(row["task"], row["method"], row["seed"], row["lr"]) for row in read_rows(path)}
    missing = [run for run in runs_of(STUDIES[name]) if run.key not in done]
    for task in dict.fromkeys(run.task for run in missing):
        data.read(task)  # what is not there is said before the first run
    for row in side_by_side([partial(run.row, data, device) for run in missing], jobs):
        append_row(path, row)


def row_of(summary: Summary) -> dict:
    """Return what is kept of a run's summary."""
    return {
        "task": summary.task,
        "metrics": summary.metrics,
        "updated_parameters": summary.updated_parameters,
        "flops": summary.flops,
        "seconds": sum(summary.seconds(phase) for phase in tables.PHASES),
        **({} if summary.decisions is None else {"decisions": summary.decisions}),
        "train_rows": summary.train_rows,
        "dev_rows": summary.dev_rows,
        **{key: summary.settings[key] for key in ("epochs", "batch_size", "lr", "max_length", "precision")},
        "model": summary.model,
        **{key: getattr(summary, key) for key in ("device", "processor", "versions")},
        "date": date.today().isoformat(),
    }


# The table


class HeldOut:
    """The held-out rows of a task, to draw samples of them."""

    def __init__(self, task: str, data: Data):
        splits = data.read(task)
        self.task, (self.examples,) = splits.task, splits.dev.values()

    def sampled(self, predictions: Sequence) -> Callable[[np.ndarray], float]:
        """Return the task's main metric of `predictions`, a function of the indices of rows."""
        return self.task.sampled(predictions, self.examples)

    def constant(self) -> float:
        """Return the metric of one answer for all rows: the larger class, any number, or no text."""
        if not isinstance(self.labels[0], int):
            return 0.0
        values, counts = np.unique(self.labels, return_counts=True)
        return self.sampled(np.full(len(self.labels), values[counts.argmax()]))(np.arange(len(self.labels)))

    @cached_property
    def labels(self) -> list:
        return [getattr(example, "label", None) for example in self.examples]


Groups = dict[tuple[str, str, float], list[dict]]  # the rows of each task, method and learning rate: its seeds


def table(path: Path, data: Data) -> str:
    """Return a line for each method and learning rate with all its tasks, one for each of its tasks, and decisions.

    Metrics are means and standard deviations over the seeds, times 100; differences to full fine-tuning are in points
    of the first metric, with their intervals; parameters and FLOPs are shares of full fine-tuning's.
    """
    every_row = read_rows(path)
    groups: Groups = {}
    for row in every_row:
        groups.setdefault((row["task"], row["method"], row["lr"]), []).append(row)
    tasks = {row["task"]: first_metric([row]) for row in every_row}
    held_out = {task: HeldOut(task, data) for task in tasks if data.has(task)}
    draws = {}
    for (task, method, lr), rows in groups.items():
        full = full_rows(groups, task)
        if full and method != "full" and all("predictions" in row for row in rows + full) and task in held_out:
            draws[task, method, lr] = differences(rows, full, held_out[task])
    parts = [account(every_row), by_method(groups, draws, held_out), by_task(groups, draws)]
    decided = [row for row in every_row if "decisions" in row]
    return "\n\n".join(parts + [by_decision(decided)] * bool(decided))


def account(rows: Sequence[dict]) -> str:
    """Return what the rows were measured with and on, a line for each setting."""
    lines = []
    for name in ("model", "train_rows", "epochs", "batch_size", "precision", "device", "processor", "versions", "date"):
        values = dict.fromkeys(str(row[name]) for row in rows if name in row)
        lines.append(f"- {name}: {'; '.join(values)}")
    return "\n".join(lines)


def by_method(
    groups: Groups, draws: Mapping[tuple[str, str, float], np.ndarray], held_out: Mapping[str, HeldOut]
) -> str:
    tasks = {task: first_metric(rows) for (task, _, _), rows in groups.items()}
    lines = []
    for method, lr in dict.fromkeys((method, lr) for _, method, lr in groups):
        rows = {task: groups[task, method, lr] for task in tasks if (task, method, lr) in groups}
        scores = [
            spread([100 * row["metrics"][metric] for row in rows[task]]) if task in rows else None
            for task, metric in tasks.items()
        ]
        of_tasks = [draws[task, method, lr] for task in rows if (task, method, lr) in draws]
        to_full = interval(np.mean(of_tasks, axis=0)) if len(of_tasks) == len(tasks) else None
        shares = [share(rows, groups, key) for key in ("updated_parameters", "flops")]
        lines.append([method, f"{lr:g}", *scores, to_full, *shares])
    scores = [f"{100 * held_out[task].constant():.1f}" if task in held_out else None for task in tasks]
    lines.append(["one answer for all rows", None, *scores, None, None, None])
    names = [f"{task}, {metric}" for task, metric in tasks.items()]
    return tables.table(["method", "lr", *names, "average, to full", "updated, of full", "FLOPs, of full"], lines)


def by_task(groups: Groups, draws: Mapping[tuple[str, str, float], np.ndarray]) -> str:
    lines = []
    for (task, method, lr), rows in groups.items():
        values = "; ".join(
            f"{name} {spread([100 * row['metrics'][name] for row in rows])}" for name in rows[0]["metrics"]
        )
        to_full = interval(draws[task, method, lr]) if (task, method, lr) in draws else None
        updated = tables.millions(mean(rows, "updated_parameters"))
        seconds = f"{statistics.mean(row['seconds'] for row in rows):.0f}"
        of_full = share({task: rows}, groups, "flops")
        lines.append([task, method, f"{lr:g}", len(rows), values, to_full, updated, of_full, seconds])
    header = ["task", "method", "lr", "seeds", "metrics", "first metric, to full", "updated, M", "FLOPs, of full"]
    return tables.table([*header, "seconds"], lines)


def by_decision(rows: Sequence[dict]) -> str:
    """Return a line for each run that decided for itself what to freeze: blocks, and after how many steps."""
    lines = []
    for row in rows:
        first: dict[int, int] = {}  # blocks frozen: the step of the first decision to freeze so many
        for decision in row["decisions"]:
            first.setdefault(decision["frozen_blocks"], decision["step"])
        frozen = ", ".join(f"{blocks} after {step}" for blocks, step in first.items() if blocks)
        lines.append([row["task"], row["method"], row["seed"], len(row["decisions"]), frozen or "none"])
    return tables.table(["task", "method", "seed", "decisions", "blocks frozen, after steps"], lines)


def first_metric(rows: Sequence[dict]) -> str:
    return next(iter(rows[0]["metrics"]))


def full_rows(groups: Groups, task: str) -> list[dict] | None:
    """Return the rows of full fine-tuning on a task, at the first of its learning rates."""
    return next((rows for (other, method, _), rows in groups.items() if (other, method) == (task, "full")), None)


def share(rows: Mapping[str, Sequence[dict]], groups: Groups, key: str) -> str | None:
    """Return a cost over that of full fine-tuning, each the mean over its seeds, summed over tasks.

    None where a task lacks full fine-tuning.
    """
    pairs = [(of_task, full_rows(groups, task)) for task, of_task in rows.items()]
    if not all(full for _, full in pairs):
        return None
    return f"{sum(mean(own, key) for own, _ in pairs) / sum(mean(full, key) for _, full in pairs):.2f}"


def mean(rows: Sequence[dict], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def differences(rows: Sequence[dict], full: Sequence[dict], held_out: HeldOut) -> np.ndarray:
    """Return `frontier.bootstrap` of a method and full fine-tuning. Tasks with as many seeds draw the same ones."""
    return bootstrap(rows, full, held_out.sampled, len(held_out.examples))


def interval(draws: np.ndarray) -> str | None:
    """Return the difference in points and the 95 % interval of its resamples."""
    if np.isnan(draws[0]):
        return None
    return points(draws[0], *percentiles(draws))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES)
    parser.add_argument("--glue", type=Path, help="folder of the GLUE tasks' official folders")
    parser.add_argument("--squad", type=Path, help="folder of SQuAD's files")
    parser.add_argument("--device")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, in processes that share the device")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a study's rows")
    args = parser.parse_args(arguments)
    check_positive(args, "jobs")
    data = Data(args.glue, args.squad)
    if args.study:
        run_study(args.study, data, choose_device(args.device), args.jobs)
    if args.table:
        print(table(args.table, data))


if __name__ == "__main__":
    run_script(main)
