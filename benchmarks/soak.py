"""Runs of `progtuning train` that are killed at random moments and resumed, beside runs that are not.

    python benchmarks/soak.py --kills 500

Each run is a process of its own with the command's arguments. It is killed with SIGKILL after a random time, which may
fall into the loading, a step, a checkpoint's writing, an evaluation or the writing of the model, and started again with
--resume; after --kills-a-run kills it is let through to its end. Then its files are compared with those of a run that
was not killed: the weights bit for bit, the log byte for byte, the summary but for what a clock or the system measured.

A checkpoint is written every --save-every steps, so a kill costs at most as many, and the steps done while it was
written. One JSON row goes to benchmarks/results/soak.jsonl: kills, how many hit the writing of a checkpoint, runs, how
many ended equal, and the steps that were lost at each kill.

The package is imported once, by a process that forks one for each run.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import harness
import torch
from safetensors import safe_open

from progtuning import train
from progtuning.base.errors import RunError
from progtuning.cli import command
from progtuning.model.bert import build_model
from progtuning.model.config import BertConfig
from progtuning.model.weights import save_pretrained
from progtuning.report.summary import LOG, SUMMARY, read_summary
from progtuning.run.folder import checkpoints_of, step_of, unfinished_checkpoints_of

WORDS = "good fine great nice bad poor awful sad film story cast plot the a was is and very not".split()
SAVE_EVERY, EPOCHS, ROWS, BATCH_SIZE = 4, 4, 96, 8  # 12 steps an epoch
COMMON = (
    f"--task classification --epochs {EPOCHS} --batch-size {BATCH_SIZE} --lr 5e-3 --max-length 16 --device cpu "
    f"--save-every {SAVE_EVERY} --resume"
).split()
LORA = "--peft lora --lora-r 2 --lora-dropout 0.1"
VARIANTS = {
    "shrinking": [],
    "growing, LoRA, pieces": f"--schedule growing {LORA} --accumulation-steps 3".split(),
    "without-low-blocks, cache": "--schedule without-low-blocks --cache memory".split(),
    "adaptive, DPS mix": "--schedule adaptive --stages 12 --dps mix --dps-update-ratio 0.1".split(),
    "full, BitFit, stages within epochs": "--schedule full --peft bitfit --stages 7".split(),
}
DEADLINE = 120  # seconds, within which a run must end


def make_inputs(folder: Path) -> list[str]:
    """Write a random model of 4 blocks and rows to train it on; return the arguments that name them."""
    model_folder, data_folder = folder / "model", folder / "opinions"
    model_folder.mkdir(parents=True)
    data_folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = BertConfig(len(vocabulary), 16, 4, 2, 24, 128, head="classification", initializer_range=0.1)
    save_pretrained(build_model(config, seed=1), model_folder)
    (model_folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    generator = random.Random(0)
    for name, count in (("train", ROWS), ("dev", 32)):
        rows = []
        for i in range(count):
            label, words = [("like", WORDS[:4]), ("dislike", WORDS[4:8])][i % 2]
            text = [*generator.choices(WORDS[8:], k=generator.randint(1, 9)), generator.choice(words)]
            rows.append(f"{' '.join(text)}\t{label}\n")
        (data_folder / f"{name}.tsv").write_text("text\tlabel\n" + "".join(rows))
    return ["--model", str(model_folder), "--data", str(data_folder)]


class Processes:
    """Starts `progtuning` processes, quickly: they are forked from one that has imported the package.

    In them every step has a row in the log, so that it shows how far a run that was killed had come.
    """

    def __enter__(self) -> "Processes":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, __file__, "--serve"]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *error) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def start(self, arguments: Sequence, stderr: Path, file_size: int | None = None) -> int:
        """Start `progtuning` with these arguments; return its process id. `file_size` limits the bytes of a file."""
        arguments = [str(argument) for argument in arguments]
        return self._ask({"arguments": arguments, "stderr": str(stderr), "size": file_size})

    def poll(self, pid: int) -> int | None:
        """Return the exit status of a process that was started, negative for a signal; None while it runs."""
        return self._ask({"poll": pid})

    def wait(self, pid: int) -> int:
        """Return the exit status when the process has ended. Raises RunError where it does not."""
        end = time.monotonic() + DEADLINE
        while (status := self.poll(pid)) is None:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                raise RunError(f"a run did not end within {DEADLINE} seconds")
            time.sleep(0.005)
        return status

    def run(self, arguments: Sequence, stderr: Path, file_size: int | None = None) -> int:
        return self.wait(self.start(arguments, stderr, file_size))

    def _ask(self, request: dict):
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def serve() -> None:
    """Answer the requests of `Processes`, a line of JSON each, until the input ends."""
    train.LOG_EVERY = 1
    importlib.import_module("torch._dynamo")  # as PyTorch does, for seconds, when a first model has no memory yet
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _become(request)
        print(json.dumps(answer), flush=True)


def _become(request: dict) -> None:
    """Run the command line in this process and end it."""
    with open(os.devnull) as null, open(request["stderr"], "ab") as log:
        os.dup2(null.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if request["size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["size"], request["size"]))
    status = 70
    try:
        status = command.main(request["arguments"])
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(status)


def steps_done(folder: Path) -> int:
    """Return the last step that the log of a run has; it has a row of the loss every LOG_EVERY steps."""
    log = folder / LOG
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    rows = [json.loads(line) for line in lines if b'"loss"' in line and line.endswith(b"\n")]
    return max((row["step"] for row in rows), default=0)


def steps_saved(folder: Path) -> int:
    """Return the step of the newest checkpoint, 0 where there is none."""
    return max((step_of(path.name) for path in checkpoints_of(folder)), default=0)


def outcome(folder: Path) -> dict:
    """Return what a run came to: its files, without checkpoints, card, and what a clock or the system measured."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "README.md"}
    summary = read_summary(folder)
    stages = [replace(stage, seconds={}, peak_bytes=None) for stage in summary.stages]
    weights = {path.name: _weights(path) for path in folder.glob("*.safetensors")}
    return files | weights | {SUMMARY: replace(summary, stages=stages)}


def _weights(path: Path) -> dict:
    """Return the bytes of each tensor and the metadata, whose order in the file is the library's, and random."""
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()} | {"": file.metadata()}


def soak(processes: Processes, folder: Path, kills: int, seed: int, kills_a_run: int) -> dict:
    """Kill and resume runs until `kills` have been killed; return the row of figures. Raises RunError where one fails.

    The folder of a run that ends otherwise than the one that was not killed is left in `folder`.
    """
    generator, inputs = random.Random(seed), make_inputs(folder)
    expected, seconds, lost, saving, ends = {}, {}, [], 0, []
    for variant in VARIANTS:
        begin, reference = time.monotonic(), folder / "whole" / variant
        _check(processes.run(_command(inputs, variant, reference), folder / "log"), folder / "log")
        seconds[variant] = time.monotonic() - begin
        expected[variant] = outcome(reference)
    for number, variant in enumerate(cycle(VARIANTS)):
        if len(lost) >= kills:
            break
        output = folder / f"run-{number}"
        for kill in range(kills_a_run + 1):
            pid = processes.start(_command(inputs, variant, output), folder / "log")
            if kill < kills_a_run and len(lost) < kills:
                time.sleep(generator.uniform(0, 0.6 * seconds[variant]))  # what is left to do is less each time
                os.kill(pid, signal.SIGKILL)  # without effect on one that has ended: it keeps its id until polled
            status = processes.wait(pid)
            if status != -signal.SIGKILL:
                break
            lost.append(max(0, steps_done(output) - steps_saved(output)))  # of those in the log
            saving += bool(unfinished_checkpoints_of(output))
        _check(status, folder / "log")
        found = outcome(output)
        ends.append(found == expected[variant])
        if ends[-1]:
            shutil.rmtree(output)
        else:
            names = sorted({**expected[variant], **found})
            differing = [name for name in names if found.get(name) != expected[variant].get(name)]
            print(f"{variant}: {', '.join(differing)} differ in {output}", file=sys.stderr)
    return {
        "seed": seed,
        "kills": len(lost),
        "kills_while_saving": saving,
        "runs": len(ends),
        "runs_equal": sum(ends),
        "save_every": SAVE_EVERY,
        "steps_lost": {"min": min(lost), "median": statistics.median(lost), "max": max(lost)},
    }


def _command(inputs: Sequence[str], variant: str, output: Path) -> list[str]:
    return ["train", *inputs, "--output-dir", str(output), *COMMON, *VARIANTS[variant]]


def _check(status: int, log: Path) -> None:
    if status != 0:
        lines = log.read_text(errors="replace").splitlines()
        raise RunError(f"a run ended with status {status}: {lines[-1] if lines else ''}")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--kills-a-run", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "soak.jsonl")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve()
        return
    harness.check_positive(args, "kills", "kills_a_run")
    with tempfile.TemporaryDirectory() as folder, Processes() as processes:
        row = soak(processes, Path(folder), args.kills, args.seed, args.kills_a_run)
    made = harness.environment(torch.device("cpu"), {}) | harness.this_run(__file__, argv)
    harness.append_row(args.output, made | row)
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    harness.run_script(main)
