"""Real processes of `progtuning train`, killed, interrupted, short of disk and two at a time."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from progtuning.report.summary import LOG
from progtuning.run.checkpoint import read_checkpoint
from progtuning.run.log import CHECKPOINTS
from tests.test_benchmarks import BENCHMARKS

assert str(BENCHMARKS) in sys.path  # put there by test_benchmarks
import soak  # noqa: E402

LONG = "--epochs 12 --schedule growing".split()  # 144 steps: time enough to be stopped


@pytest.fixture(scope="module")
def processes():
    with soak.Processes() as processes:
        yield processes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    return soak.make_inputs(tmp_path_factory.mktemp("inputs"))


def command(inputs, output: Path, *options) -> list[str]:
    return ["train", *inputs, "--output-dir", str(output), *soak.COMMON, *LONG, *options]


@pytest.fixture(scope="module")
def whole(processes, inputs, tmp_path_factory) -> Path:
    """The output folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert processes.run(command(inputs, folder), folder.parent / "log") == 0
    return folder


def wait_for_steps(folder: Path, count: int) -> None:
    end = time.monotonic() + soak.DEADLINE
    while soak.steps_done(folder) < count:
        assert time.monotonic() < end, f"no step {count} in {folder}"
        time.sleep(0.005)


def test_runs_killed_at_random_moments_end_as_if_they_had_not_been(processes, tmp_path):
    row = soak.soak(processes, tmp_path, kills=12, seed=1, kills_a_run=6)
    print(row)
    assert row["kills"] == 12 and row["runs"] == row["runs_equal"] >= 2
    assert row["steps_lost"]["max"] <= soak.SAVE_EVERY


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_run_and_says_how_to_go_on(number, status, processes, inputs, whole, tmp_path):
    arguments = [argument for argument in command(inputs, tmp_path / "run") if argument != "--resume"]
    at = arguments.index("--save-every")
    del arguments[at : at + 2]  # a signal saves without it
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen([sys.executable, "-m", "progtuning", *arguments], env=environment, **pipes)
    wait_for_steps(tmp_path / "run", 1)  # of its log, which has a row every ten steps
    run.send_signal(number)
    run.send_signal(number)  # as a supervisor may: to the process, and to its group
    err = run.communicate(timeout=soak.DEADLINE)[1]
    assert run.returncode == status
    stopped = rf"progtuning: error: stopped by {signal.Signals(number).name} at step (\d+) of 144; to go on: "
    found = re.fullmatch(stopped + r"the same command with --resume \(saved in .*\)", err.splitlines()[-1])
    assert found, err
    assert soak.steps_saved(tmp_path / "run") == int(found[1])
    assert processes.run(command(inputs, tmp_path / "run"), tmp_path / "log") == 0
    ours, theirs = (
        [row for row in (folder / LOG).read_text().splitlines() if "metrics" in row]
        for folder in (tmp_path / "run", whole)
    )
    assert ours == theirs
    for name in ("model.safetensors", "summary.json"):
        assert soak.outcome(tmp_path / "run")[name] == soak.outcome(whole)[name]


def test_a_signal_before_the_first_step_ends_the_run_with_its_status(processes, inputs, tmp_path):
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        output = tmp_path / str(status)
        pid = processes.start(command(inputs, output), tmp_path / "log")
        while not (output / LOG).exists():
            time.sleep(0.001)
        os.kill(pid, number)
        assert processes.wait(pid) == status
        assert f"stopped by {signal.Signals(number).name}" in (tmp_path / "log").read_text().splitlines()[-1]


def test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoint(processes, inputs, whole, tmp_path):
    run = tmp_path / "run"
    sizes = [path.stat().st_size for path in whole.glob(f"{CHECKPOINTS}/*/state.safetensors")]
    limit = max(sizes) - 1  # growing: the last stage has the most moments
    status = processes.run(command(inputs, run), tmp_path / "log", file_size=limit)
    lines = (tmp_path / "log").read_text().splitlines()
    failed = r"progtuning: error: .*/\.step-\d{8}\.tmp/state\.safetensors: cannot be written: .*File too large.*"
    assert status == 1 and re.fullmatch(failed, lines[-1]), lines
    assert not any("Traceback" in line for line in lines)
    assert not list(run.glob(f"{CHECKPOINTS}/.*"))
    last = sorted(run.glob(f"{CHECKPOINTS}/step-*"))[-1]
    assert soak.steps_saved(run) > 0 and read_checkpoint(last)["trainer"]["weights"]
    assert processes.run(command(inputs, run), tmp_path / "log") == 0
    assert soak.outcome(run) == soak.outcome(whole)


def test_a_second_run_with_the_same_output_folder_is_refused_and_the_first_goes_on(processes, inputs, whole, tmp_path):
    run = tmp_path / "run"
    first = processes.start(command(inputs, run), tmp_path / "first")
    wait_for_steps(run, 1)
    assert processes.run(command(inputs, run), tmp_path / "second") == 2
    assert (tmp_path / "second").read_text() == (
        f"progtuning: error: --output-dir {run}: another run writes into it, expected a folder of its own\n"
    )
    assert processes.wait(first) == 0
    assert soak.outcome(run) == soak.outcome(whole)
