"""The runs of a comparison: made one by one or side by side, a row of `rows.jsonl` as each ends."""

import json
import multiprocessing
import os
import random
import shutil
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import lru_cache, partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from signal import SIGINT, Signals

import torch

from progtuning.base.errors import InputError, Interrupted, NotFinite, RunError
from progtuning.base.files import check_new_folder, made_folder, read_json, write_json
from progtuning.compare.grid import CHOICE, Grid, Run, run_of, settings_of, split_for_choice
from progtuning.data.registry import load_splits
from progtuning.data.task import Splits, limit_train
from progtuning.methods.saved import base_digest
from progtuning.model.config import BertConfig
from progtuning.model.weights import load_model
from progtuning.report.summary import RUN
from progtuning.report.tables import PHASES
from progtuning.run.build import build_loader, forecast, lay_out
from progtuning.run.checkpoint import FORMAT
from progtuning.run.evaluate import predict
from progtuning.run.finetune import encoded, fine_tune, prepare
from progtuning.run.identity import check_same
from progtuning.run.log import RunLog
from progtuning.run.saved import load_checkpoint
from progtuning.run.signals import StopSignals
from progtuning.settings.train import DataConfig, TrainConfig
from progtuning.step.device import choose_device
from progtuning.step.measure import environment
from progtuning.step.processes import World

ROWS = "rows.jsonl"
_TEMPORARY = ".run-"  # begins the name of the folder that a run writes its model into, to be read back


@dataclass(frozen=True)
class Setup:
    """What all runs of a comparison share. It goes to the processes that make them."""

    model: str
    folder: Path
    task: str
    data: str | None
    reading: DataConfig
    max_train_rows: int | None
    choice_share: float  # of the training rows, on which the learning rate is chosen
    base: TrainConfig
    device: str | None

    @property
    def splits(self) -> Splits:
        """The rows of the task. Raises InputError."""
        return splits_of(self.task, self.data, self.max_train_rows, self.reading)

    def splits_of(self, run: Run) -> Splits:
        """Return the rows that a run trains and is measured on: to choose, both are training rows."""
        splits = self.splits
        if run.part != CHOICE:
            return splits
        held = split_for_choice(len(splits.train), self.choice_share)
        order = list(range(len(splits.train)))
        random.Random(0).shuffle(order)
        chosen = set(order[:held])
        train, dev = ([row for i, row in enumerate(splits.train) if (i in chosen) == kept] for kept in (False, True))
        return replace(splits, train=train, dev={"chosen on": dev})

    def row(self, run: Run, scratch: Path) -> dict:
        """Make a run and return its row. That of one which diverged has the reason under "error", and no metrics.

        The predictions, of results alone, are for the first of the held-out splits, by the model as it was saved.
        """
        splits, settings = self.splits_of(run), settings_of(run, self.base)
        row = run._asdict() | {"date": date.today().isoformat()}
        device = choose_device(self.device)
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=scratch) as place:
            output = Path(place) / "run"
            try:
                summary = fine_tune(self.model, self.folder, splits, settings, device, output)
            except NotFinite as error:
                return row | {"error": str(error)}
            row |= {
                "metrics": summary.metrics,
                "steps": sum(stage.steps for stage in summary.stages),
                "flops": summary.flops,
                "flops_full": flops_of_full(self.folder, splits, settings, device),
                "seconds": sum(summary.seconds(phase) for phase in PHASES),
                "updated_parameters": summary.updated_parameters,
                "peak_bytes": max((stage.peak_bytes or 0 for stage in summary.stages), default=0) or None,
            }
            if run.part != CHOICE:
                row["predictions"] = predictions(output, splits, settings, device)
        return row


@lru_cache(maxsize=1)
def splits_of(task: str, data: str | None, max_train_rows: int | None, reading: DataConfig = DataConfig()) -> Splits:
    """Return the rows of a task, the last that were asked for without reading them again. Raises InputError."""
    splits = load_splits(task, data, reading)
    return splits if max_train_rows is None else limit_train(splits, max_train_rows)


def flops_of_full(folder: Path, splits: Splits, settings: TrainConfig, device: torch.device) -> int:
    """Return the FLOPs of which `settings.budget` is a share."""
    config, settings, rows = encoded(folder, splits, settings)
    return forecast(config, build_loader(config, rows, settings, device), settings).full(settings.epochs)


def predictions(output: Path, splits: Splits, settings: TrainConfig, device: torch.device) -> list:
    """Return what a model that was saved predicts for the first held-out split: classes, numbers or texts."""
    saved, task = load_checkpoint(output), splits.task
    examples = next(iter(splits.dev.values()))
    rows = task.encode(examples, saved.tokenizer, saved)
    outputs = predict(saved.model, rows, settings.batch_size, device, settings.precision)
    return task.answers(task.decide(outputs, rows, saved), saved)


def compare(
    setup: Setup,
    grid: Grid,
    output: str | Path,
    resume: bool = False,
    jobs: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Make the runs of `grid` that `output` does not have yet, `jobs` at a time, and return all rows of it.

    `output` is a new or empty folder, or to resume that of a comparison with the same setup; schedules, budgets,
    learning rates and seeds may be more than it had. Raises InputError before the first run where anything is amiss.
    """
    splits = setup.splits
    what = account(setup, grid)
    with rows_of(output, resume, identify(setup), setup.device) as (folder, log):
        say(what)
        make_missing(setup, grid.choices(), log, folder, jobs, "choosing learning rates", say)
        chosen = grid.choose(log.rows, splits.task.main_metric)
        make_missing(setup, grid.results(chosen), log, folder, jobs, "comparing", say)
        return log.rows


@contextmanager
def rows_of(output: str | Path, resume: bool, identity: dict, device: str | None) -> Iterator[tuple[Path, RunLog]]:
    """Open the folder of a series of runs and its `rows.jsonl`; what a run that was killed left there is removed.

    `output` is new or empty, or to resume has a series of the same `identity`. Raises InputError. Where a signal stops
    a run, Interrupted says how to go on.
    """
    folder = check_folder(output, resume)
    document = {"format": FORMAT, "identity": identity, "versions": environment(choose_device(device))["versions"]}
    document = json.loads(json.dumps(document))  # tuples become lists, as they are in the file
    if (folder / RUN).exists():
        check_same(read_json(folder / RUN), document, folder)
    else:
        write_json(made_folder(folder, "--output-dir") / RUN, document)
    log = RunLog(folder, ROWS)
    try:
        log.rewind((folder / ROWS).read_bytes().rfind(b"\n") + 1)
        for left in folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)
        with StopSignals():  # between two runs too
            yield folder, log
    except KeyboardInterrupt as error:
        number = Signals(getattr(error, "signal", SIGINT))
        hint = f"{len(log.rows)} runs are kept in {folder}; to go on: the same command with --resume"
        raise Interrupted(f"stopped by {number.name}: {hint}", number) from None
    finally:
        log.close()


def check_folder(output: str | Path, resume: bool) -> Path:
    """Return the folder of a series of runs. Raises InputError where it cannot be one."""
    path = Path(output)
    if not (resume and (path / RUN).is_file()):
        if resume and path.is_dir() and any(path.iterdir()):
            raise InputError(f"--resume needs the output folder of this command, got {path} without {RUN}")
        check_new_folder(output)
    return path


def account(setup: Setup, grid: Grid) -> str:
    """Return how many runs a grid has and what they cost. Raises InputError where one of them could not be made."""
    results = grid.results(dict.fromkeys(grid.schedules, grid.lrs[0]))
    for run in dict.fromkeys(run._replace(lr=grid.lrs[0], seed=grid.seeds[0]) for run in (*grid.choices(), *results)):
        check_run(setup, run)
    choices = len(grid.choices())
    cost = sum(run.budget for run in results)
    cost += sum(run.budget for run in grid.choices()) * (1 - setup.choice_share)
    full = f"{cost:.1f} times the FLOPs of full fine-tuning of {setup.base.epochs} epochs"
    return f"{choices} runs to choose learning rates and {len(results)} to compare: {full}."


def check_run(setup: Setup, run: Run) -> None:
    """Raise InputError where a run has settings that exclude each other, keeps nothing, or has no step to make."""
    settings, device = settings_of(run, setup.base), choose_device(setup.device)
    config, settings, rows = encoded(setup.folder, setup.splits_of(run), settings)
    try:
        lay_out(config, rows, settings, device, World())
    except InputError as error:
        raise InputError(f"--schedules {run.schedule} at --budgets {run.budget:g}: {error}") from None


def identify(setup: Setup) -> dict:
    """Return what two comparisons must share for one to go on with the rows of the other."""
    values = asdict(setup.base)
    for name in ("schedule", "calendar", "budget", "lr", "seed", "cache_limit", "matmul_peak"):
        del values[name]
    config, _, tokenizer, train, dev = prepare(setup.folder, setup.splits, setup.base)
    return {
        "settings": values,
        "task": {"name": setup.splits.task.name, "labels": list(setup.splits.task.labels)},
        **of_model(setup.folder, config),
        "share of the training rows to choose on": setup.choice_share,
        "training rows": train.digest(),
        "held-out rows": {name: rows.digest() for name, rows in dev.items()},
        "tokenizer": tokenizer.digest(),
        "device": choose_device(setup.device).type,
    }


def of_model(folder: Path, config: BertConfig) -> dict:
    """Return what tells a model from another, by whatever name it came."""
    model, _ = load_model(folder, config, seed=0)
    return {"architecture": config.to_dict(), "weights": base_digest(model, held=())}


def make_missing(
    setup: Setup, runs: Sequence[Run], log: RunLog, folder: Path, jobs: int, what: str, say: Callable[[str], None]
) -> None:
    """Make the runs that `log` has no row of."""
    done = {run_of(row) for row in log.rows}
    calls = [partial(setup.row, run, folder) for run in runs if run not in done]
    append(
        calls, jobs, log, lambda row: f"{describe(run_of(row))}: {got(row, setup.splits.task.main_metric)}", what, say
    )


def append(
    calls: Sequence[Callable[[], dict]],
    jobs: int,
    log: RunLog,
    text: Callable[[dict], str],
    what: str,
    say: Callable[[str], None],
) -> None:
    """Make the runs, log their rows as they end, and say how long the rest will take."""
    start = time.monotonic()
    for count, row in enumerate(side_by_side(calls, jobs), start=1):
        log(row)
        rest = (time.monotonic() - start) / count * (len(calls) - count) / 60
        say(f"{what} ({count} of {len(calls)}, about {rest:.0f} min left): {text(row)}")


def got(row: dict, metric: str) -> str:
    """Return what came out of a run: a metric, the first where that one has several splits, or why it failed."""
    if "error" in row:
        return f"failed: {row['error']}"
    values = row["metrics"]
    return f"{metric} {values.get(metric, next(iter(values.values()))):.4f}"


def describe(run: Run) -> str:
    seed = "" if run.part == CHOICE else f", seed {run.seed}"
    return f"{run.schedule} at budget {run.budget:g}, lr {run.lr:g}{seed}"


class _Killed(RunError):
    """A worker is no more."""


@contextmanager
def _alive() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError):
        raise _Killed("a process of a run was killed, perhaps for want of memory: try fewer --jobs") from None


class _Worker:
    """A process that makes calls one after the other."""

    def __init__(self, threads: int):
        spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_work, args=(theirs, threads), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is seen here

    def begin(self, call: Callable[[], dict]) -> None:
        """Let it make a call. Raises RunError where the process is no more."""
        with _alive():
            self.connection.send(call)

    def result(self) -> dict:
        """Return what the call returned, or raise what it raised. Raises RunError where the process is no more."""
        with _alive():
            result, error, trace = self.connection.recv()
        if error is not None:
            raise error from RuntimeError(trace)
        return result

    def end(self, at_once: bool) -> None:
        self.connection.close()  # after its present call it meets the end
        if at_once:
            self.process.kill()
        self.process.join()


def _work(connection: Connection, threads: int) -> None:
    """Make the calls that come, until there is an end of them or of the process that began this one."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, OSError, KeyboardInterrupt):  # of a signal the other end speaks
        while True:
            call = connection.recv()
            try:
                result = call(), None, None
            except BaseException as error:
                result = None, _portable(error), traceback.format_exc()
            connection.send(result)


def _portable(error: BaseException) -> BaseException:
    """Return an error that can go to another process: this one, or where it is a library's its words alone."""
    own = type(error).__module__ in ("builtins", InputError.__module__)
    return error if own else RuntimeError(f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    """End this process where the one that began it is killed: nobody else would."""
    multiprocessing.parent_process().join()
    os._exit(1)


def side_by_side(calls: Sequence[Callable[[], dict]], jobs: int) -> Iterator[dict]:
    """Yield what the calls return: in turn, or as they end in `jobs` processes, which divide the CPU's threads.

    They share the device. Where a call raises, those that have not begun are not begun; where a signal stops this or a
    process is killed, for which RunError is raised, all end at once.
    """
    if jobs == 1 or len(calls) < 2:
        yield from (call() for call in calls)
        return
    jobs, left, at_once = min(jobs, len(calls)), deque(calls), False
    workers = [_Worker(max(1, torch.get_num_threads() // jobs)) for _ in range(jobs)]
    busy = {worker.connection: worker for worker in workers}
    try:
        for worker in workers:
            worker.begin(left.popleft())
        while busy:
            for connection in wait(list(busy)):
                yield busy[connection].result()
                if left:
                    busy[connection].begin(left.popleft())
                else:
                    del busy[connection]
    except (KeyboardInterrupt, _Killed):
        at_once = True
        raise
    finally:
        for worker in workers:
            worker.end(at_once)
