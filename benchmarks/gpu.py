"""All that a GPU is asked for, in order of worth, within a few minutes and without a network.

    PYTHONPATH=. python benchmarks/gpu.py --minutes 9 --glue .gpu/glue --cache .gpu/cache --output "$OUT"
    PYTHONPATH=. python benchmarks/gpu.py --minutes 3 --device cpu --rehearse --output runs/rehearsal

Each step is a process of its own under its own limit of seconds; one that fails, or whose time is up, does not stop the
next. After each, `steps.jsonl`, `steps.md` and `results.tgz` (logs, tables, summaries) in --output are written anew. A
step that is done there is not repeated: the same command goes on, also on another machine that was given the folder.
The last lines are a table: step, seconds, figure, ideal. The ideal is what the FLOPs promise, if nothing else is said.

--glue and --cache are folders made beforehand: GLUE's official folders, and progtuning's cache with the model
(PROGTUNING_CACHE). With --rehearse all sizes are tiny, and model and task are made up.
"""

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import harness
import soak
from safetensors.torch import load_file

from progtuning.base.errors import RunError
from progtuning.base.files import read_json, write_json, write_text
from progtuning.report import tables
from progtuning.report.summary import LOG, SUMMARY, read_summary
from progtuning.run.folder import checkpoints_of
from progtuning.run.signals import StopSignals
from progtuning.step.device import choose_device
from progtuning.step.measure import environment

ROOT = Path(__file__).resolve().parents[1]
ROWS, PAGE, ARCHIVE = "steps.jsonl", "steps.md", "results.tgz"
RESERVE = 5  # seconds that are kept for the last table
DONE, FAILED, LATE, NOT_BEGUN = "done", "failed", "its time was up", "no time was left"


class Figure(NamedTuple):
    what: str
    value: str
    ideal: str | None = None


@dataclass(frozen=True)
class Step:
    """A command with a limit of seconds, and the figures that it leaves, read when it ends, however it ends."""

    name: str
    limit: float
    command: Sequence[str]
    figures: Callable[[], Iterator[Figure]] = lambda: iter(())


def run(
    steps: Sequence[Step], output: Path, minutes: float, env: dict[str, str], signals: StopSignals = StopSignals()
) -> None:
    """Run the steps that are not done yet, and write a row for each, and the table, as they end."""
    end = time.monotonic() + 60 * minutes - RESERVE
    output.mkdir(parents=True, exist_ok=True)
    for step in steps:
        rows = {row["step"]: row for row in harness.read_rows(output / ROWS)}
        if rows.get(step.name, {}).get("status") == DONE:
            continue
        begin = time.monotonic()
        limit = min(step.limit, end - begin)
        if limit < step.limit / 2:
            status = NOT_BEGUN
        else:
            print(f"{step.name}: at most {limit:.0f} s", flush=True)
            status = run_limited(step.command, limit, output / f"{step.name}.log", env, signals)
        row = {"step": step.name, "status": status, "seconds": round(time.monotonic() - begin, 1)}
        row |= {"limit": step.limit, "figures": [] if status == NOT_BEGUN else list(step.figures())}
        harness.append_row(output / ROWS, row)
        write_text(output / PAGE, table(steps, output) + "\n")
        pack(output)


def run_limited(command: Sequence[str], seconds: float, log: Path, env: dict[str, str], signals: StopSignals) -> str:
    """Run a command, its output in `log`; where the time is up all its processes end. Return what became of it."""
    with open(log, "w") as file:
        with signals.held():  # one that comes while the process begins would leave it behind
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=env, start_new_session=True
            )
        try:
            signals.check()
            return DONE if process.wait(seconds) == 0 else FAILED
        except subprocess.TimeoutExpired:
            return LATE
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # of what it started too
            except ProcessLookupError:
                pass
            process.wait()


def pack(output: Path) -> None:
    """Put all results in one file: what brings them back may take few."""
    with tarfile.open(output / ARCHIVE, "w:gz") as archive:
        for path in sorted(output.rglob("*")):
            if path.is_file() and path.name != ARCHIVE:
                archive.add(path, path.relative_to(output))


def table(steps: Sequence[Step], output: Path) -> str:
    """Return the steps, the last row of each, with a line for each figure."""
    rows = {row["step"]: row for row in harness.read_rows(output / ROWS)}
    lines = []
    for step in steps:
        row = rows.get(step.name, {"status": "not begun", "seconds": None, "figures": []})
        seconds = None if row["status"] == NOT_BEGUN else row["seconds"]
        lines.append([step.name, seconds, "", row["status"], None])
        lines += [["", None, *figure] for figure in row["figures"]]
    return tables.table(["step", "seconds", "of what", "figure", "ideal"], lines)


# The figures of a step, from what it has written


def test_figures(log: Path) -> Iterator[Figure]:
    counts = dict(reversed(pair) for pair in re.findall(r"(\d+) (passed|failed|skipped|error)", log.read_text()[-400:]))
    passed, failed = int(counts.get("passed", 0)), int(counts.get("failed", 0)) + int(counts.get("error", 0))
    yield Figure("tests that pass", str(passed), str(passed + failed))


def savings_figures(path: Path, model: str) -> Iterator[Figure]:
    rows = [row for row in (read_json(path)["rows"] if path.exists() else []) if row["model"] == model]
    for row in rows:
        name = f"{row['method']}, {row['frozen_blocks']} frozen, {row['form']}"
        if row["out_of_memory"]:
            yield Figure(name, "out of memory")
            continue
        peak = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 2**20:,.0f} MiB"
        share = f", at {row['share_of_matmul_peak']:.2f} of the matmul peak"
        for kind, more in (("backward", ""), ("step", share + peak)):
            measured, ideal = row[f"{kind}_measured"]["median"], row[f"{kind}_ideal"]
            yield Figure(f"{kind}: {name}{more}", f"{measured:.3f}", f"{ideal:.3f}")


def peers_figures(path: Path) -> Iterator[Figure]:
    rows = {row["variant"]: row for row in (read_json(path)["rows"] if path.exists() else [])}
    for name, row in rows.items():
        if row["peer"] and row["step_of_peer"]:
            ideal = sum(row["counted_flops"]) / sum(rows[row["peer"]]["counted_flops"])
            yield Figure(f"step: {name}, of {row['peer']}", f"{row['step_of_peer']['median']:.3f}", f"{ideal:.3f}")


def run_figures(folder: Path, kept: Path, beside: Path, without_padding: bool = False) -> Iterator[Figure]:
    """A run's tokens a second, and what an example takes in each stage, of stage 1. `kept` gets its summary.

    Ideal are as many FLOPs a second as the run has that is kept in `beside`, or for a run `without_padding` that what
    is empty in the other's batches takes no time.
    """
    if not (folder / SUMMARY).exists():
        return
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / SUMMARY, kept)
    summary = read_summary(kept)
    speed, ideal = summary.speed(), None
    if beside != kept and (beside / SUMMARY).exists():
        other = read_summary(beside).speed()
        flops_of_a_token = speed.flops_per_second / speed.tokens_per_second
        ideal = other.slots_per_second if without_padding else other.flops_per_second / flops_of_a_token
    yield Figure("tokens/s", f"{speed.tokens_per_second:,.0f}", ideal and f"{ideal:,.0f}")
    first = summary.speed(summary.stages[0])
    for stage in summary.stages:
        own = summary.speed(stage)
        seconds = first.examples_per_second / own.examples_per_second
        flops = own.flops_per_second / first.flops_per_second * seconds
        share = "" if own.share_of_matmul_peak is None else f", at {own.share_of_matmul_peak:.2f} of the matmul peak"
        yield Figure(f"stage {stage.stage}, of stage 1{share}", f"{seconds:.3f}", f"{flops:.3f}")


def resumed_figures(path: Path) -> Iterator[Figure]:
    if path.exists():
        found = read_json(path)
        yield Figure("log as without the kill", "yes" if found["log_equal"] else "no", "yes")
        yield Figure("weights, greatest difference", f"{found['difference']:g}", "0")


def end_to_end_figures(path: Path) -> Iterator[Figure]:
    rows = {row["run"]: row for row in harness.read_rows(path)}
    for own, base in END_TO_END:
        if own in rows and base in rows:
            faster, ideal = (rows[base][key] / rows[own][key] for key in ("wall_seconds", "flops"))
            yield Figure(f"{own}: times faster than {base}", f"{faster:.2f}", f"{ideal:.2f}")


def study_figures(folder: Path) -> Iterator[Figure]:
    if (folder / "rows.jsonl").exists():
        yield Figure("runs that are done", str(len(harness.read_rows(folder / "rows.jsonl"))))
    if (folder / "compare.json").exists():
        yield Figure(read_json(folder / "compare.json")["advice"], "")


END_TO_END = (
    ("full, bf16", "Trainer, dynamic padding, bf16"),
    ("Progtuning cut + cache, bf16", "Trainer, dynamic padding, bf16"),
)
RUNS = {  # options of train, and the run that it stands beside
    "plain": ("", "plain"),
    "cache in memory": ("--cache memory", "plain"),
    "cache on the device": ("--cache device", "plain"),
    "DPS": ("--dps dense --dps-update-ratio 0.1", "plain"),
    "padded": ("--no-group-by-length", "padded"),
    "unpadded": ("--no-group-by-length --unpadded", "padded"),
    "graphs": ("--cuda-graphs", "plain"),
    "graphs and cache": ("--cuda-graphs --cache device", "plain"),
    "compile": ("--compile", "plain"),
}
STUDIES = {"sts-b": "STS-B", "movie-reviews": None, "mrpc": "MRPC", "sst-2": "SST-2"}  # tasks, and their folders
STUDY = "--epochs 3 --batch-size 16 --budgets 0.5 1 --lrs 5e-5 1e-4 2e-4 --seeds 5"
STUDY += " --schedules full shrinking+cache growing+cache 2+cache 2:2,4:1+cache"
DETERMINISTIC = """import sys, torch
from progtuning.cli.command import main
torch.use_deterministic_algorithms(True)
sys.exit(main())
"""
TINY_STUDY = "--epochs 3 --schedules full shrinking+cache --budgets 1 --lrs 1e-4 --seeds 1"


def steps_of(args: argparse.Namespace, work: Path) -> list[Step]:
    """Return all steps, those of most worth first. `work` is for what is too large to be kept."""
    python, results, tiny = sys.executable, args.output / "results", args.rehearse
    on = ["--device", args.device]
    precision = "fp32" if args.device == "cpu" else "bf16"
    task = "classification" if tiny else "mrpc"
    given = soak.make_inputs(work) if tiny else ["--model", "minilm-l6", "--data", str(args.glue.absolute() / "MRPC")]
    given += ["--task", task]

    def script(name: str, text: str) -> list[str]:
        return [python, f"benchmarks/{name}.py", *text.split(), *on]

    options = f"--epochs 3 --lr 1e-4 --precision {precision} {'--batch-size 8' if tiny else ''}".split()
    options += [*given, *on]
    modules = ("devices",) if tiny else ("devices", "graphs", "unpad", "train", "resume", "compile", "accounting")
    tests = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider", *(f"tests/test_{name}.py" for name in modules)]
    tests += ["-k", args.device]
    if importlib.util.find_spec("xdist") and not tiny:
        tests += ["-n", str(min(8, os.cpu_count()))]
    steps = [Step("tests", 120, tests, lambda: test_figures(args.output / "tests.log"))]
    savings = results / f"backward_savings_{args.device}_{precision}.json"
    for model, length in (("minilm-l6", 16),) if tiny else (("bert-large-uncased", 384), ("bert-base-uncased", 128)):
        rounds = "--rounds 1 --steps 1" if tiny else "--rounds 3 --time-limit 1.5"
        methods = "--methods full" if tiny else "--methods full lora"
        text = f"--models {model} --lengths {length} {methods} --stages-of 3 {rounds} --output {results}"
        step = script("backward_savings", text)
        steps.append(Step(f"backward, {model}", 110, step, lambda model=model: savings_figures(savings, model)))
    if args.device == "cuda":
        recorded = savings.with_name(f"{savings.stem}_compiled_graphs.json")
        text = "--models bert-large-uncased --lengths 384 --methods full --stages-of 3 --rounds 3 --steps 7 --compile"
        step = script("backward_savings", f"{text} --cuda-graphs --output {results}")
        steps.append(Step("backward, recorded", 110, step, lambda: savings_figures(recorded, "bert-large-uncased")))
    text = "--model minilm-l6 --length 16 --rounds 1 --steps 1 --without-lora" if tiny else "--rounds 5 --steps 5"
    peers = results / f"peers_{args.device}_{precision}.json"
    steps.append(Step("peers", 60, script("peers", f"{text} --output {results}"), lambda: peers_figures(peers)))
    models = "minilm-l6 --length 16 --batch-size 4" if tiny else "bert-base-uncased bert-large-uncased"
    text = f"--models {models} --variants plain {'' if tiny else 'cudnn '}unpadded checkpointed --rounds 2"
    text += f" --steps {1 if tiny else 3} --paddings 0 0.1 0.2 0.4 --output {results}"
    steps.append(Step("options", 60, script("step_options", text)))
    for name, (more, beside) in RUNS.items():
        if args.device == "cpu" and "--cuda-graphs" in more:
            continue
        command = [python, "-m", "progtuning", "train", *options, *more.split(), "--output-dir", str(work / name)]
        command += ["--evaluate", "end"]
        folders = (work / name, args.output / "runs" / name, args.output / "runs" / beside, name == "unpadded")
        limit = 120 if name == "compile" else 60
        steps.append(Step(name, limit, command, lambda folders=folders: run_figures(*folders)))
    killed = [python, "benchmarks/gpu.py", "--kill", str(work), "--output", str(args.output), "--", *options]
    killed += ["--save-every", "4" if tiny else "100"]
    steps.append(Step("resumed", 100, killed, lambda: resumed_figures(args.output / "resumed.json")))
    steps.append(
        Step("gather", 30, script("gather", f"{'--rows 640 --batches 20 ' if tiny else ''}--output {results}"))
    )
    text = "--epochs 3 --batch-size 8" if tiny else "--epochs 3"
    end_to_end = [*script("end_to_end", f"{text} --seeds 1 --output {results}"), *given]
    end_to_end += ["--runs", *dict.fromkeys(name for pair in END_TO_END for name in pair)]
    path = results / f"end_to_end_{task}_{args.device}.jsonl"
    steps.append(Step("end to end", 100, end_to_end, lambda: end_to_end_figures(path)))
    for name, folder in {"tiny": None}.items() if tiny else STUDIES.items():
        rows = given if tiny else ["--model", "minilm-l6", "--task", name, "--precision", precision]
        rows += [] if folder is None else ["--data", str(args.glue.absolute() / folder)]
        output = args.output / "compare" / name
        study = [python, "-m", "progtuning", "compare", *rows, *on, *(TINY_STUDY if tiny else STUDY).split()]
        study += ["--output-dir", str(output), "--resume", "--jobs", str(1 if tiny else min(12, os.cpu_count()))]
        steps.append(Step(f"study, {name}", 150, study, lambda output=output: study_figures(output)))
    steps.sort(key=lambda step: step.name == "compile")  # last: it takes minutes where no code is kept yet
    return [step for step in steps if not args.only or step.name in args.only]


def kill_and_resume(options: Sequence[str], work: Path, output: Path) -> None:
    """Kill a run after its first checkpoint, resume it, and write how it differs from one that was not killed.

    Both are under deterministic algorithms: without, a run on CUDA does not equal itself.
    """
    command = [sys.executable, "-c", DETERMINISTIC, "train", *options, "--evaluate", "end"]
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # with which cuBLAS is deterministic
    whole, killed = work / "whole", work / "killed"
    subprocess.run([*command, "--output-dir", str(whole)], check=True)
    process = subprocess.Popen([*command, "--output-dir", str(killed)])
    while not checkpoints_of(killed) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    if process.wait() == 0:
        raise RunError("the run ended before it could be killed")
    subprocess.run([*command, "--output-dir", str(killed), "--resume"], check=True)
    logs = [(folder / LOG).read_bytes() for folder in (whole, killed)]
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    difference = max((theirs[name] - ours[name]).abs().max().item() for name in theirs)
    write_json(output / "resumed.json", {"log_equal": logs[0] == logs[1], "difference": difference})


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="begin and end all within so many (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder of what is kept, taken up where it is there")
    parser.add_argument("--device", help="cpu or cuda; default: CUDA where there is one")
    parser.add_argument("--rehearse", action="store_true", help="at tiny sizes")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    parser.add_argument("--glue", type=Path, default=Path("glue_data"), help="folder of GLUE's folders (%(default)s)")
    parser.add_argument("--cache", type=Path, help="progtuning's cache, with the model")
    parser.add_argument("--kill", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)  # the step "resumed"
    parser.add_argument("options", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.output = args.output.absolute()
    if args.kill:
        kill_and_resume(args.options, args.kill, args.output)
        return
    args.device = choose_device(args.device).type
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if args.cache:
        env["PROGTUNING_CACHE"] = str(args.cache.absolute())
    here = environment(choose_device(args.device))
    print(f"{here['device']} ({here['processor']}), torch {here['versions']['torch']}", flush=True)
    with StopSignals() as signals, tempfile.TemporaryDirectory() as work:
        steps = steps_of(args, Path(work))
        run(steps, args.output, args.minutes, env, signals)
    print(table(steps, args.output))


if __name__ == "__main__":
    harness.run_script(main)
