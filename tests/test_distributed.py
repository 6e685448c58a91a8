"""Several processes: the weights of one, no byte more than the stage's gradients, and an end where one of them dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from progtuning.base.errors import InputError, RunError
from progtuning.cli.command import main
from progtuning.data.batching import TrainBatches
from progtuning.speed.cache import PrefixCache
from progtuning.step.device import choose_device
from progtuning.step.processes import TIMEOUT, World, join, shares
from tests import distributed_worker
from tests.distributed_worker import CASES, NUM_ROWS, make_trainer, rows

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "localhost:0"]  # any free port
PROGRAM = ["-m", "progtuning"]
# A process that dies is noticed by its closed connection; nothing here may need the timeout of one that is silent.
SOON = 120  # seconds, with a machine that is busy
assert SOON < TIMEOUT.total_seconds() / 2


def start(arguments: Sequence[str], size: int = 2, program: Sequence[str] = PROGRAM) -> list[subprocess.Popen]:
    """Start a program in `size` processes as torchrun would, but with nobody to end the rest after one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(size):
        variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = ENVIRONMENT | {name: str(value) for name, value in variables.items()}
        command = [sys.executable, *program, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, text=True, env=environment, **pipes))
    return processes


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Wait for processes; return of each its status, standard output and standard error."""
    try:
        return [(process.returncode, *texts) for process in processes for texts in [process.communicate(timeout=SOON)]]
    finally:
        for process in processes:
            process.kill()


def train_command(tiny_folder: Path, tiny_task: Path, output: Path, *more: str) -> list[str]:
    command = ["train", "--model", tiny_folder, "--task", "classification", "--data", tiny_task, "--device", "cpu"]
    return [str(part) for part in (*command, "--output-dir", output, *more)]


@pytest.fixture(scope="module")
def launched(tmp_path_factory, tiny_folder, tiny_task) -> Path:
    """The folder with what two processes under torchrun made of every case."""
    folder = tmp_path_factory.mktemp("launched")
    command = [*TORCHRUN, "-m", "tests.distributed_worker", *map(str, (folder, tiny_folder, tiny_task))]
    ran = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.fixture(scope="module")
def alone():
    """What a process alone makes of a case, each run once."""
    return lru_cache(maxsize=None)(distributed_worker.train)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_weights_the_losses_and_the_outputs_of_one(case, launched, alone):
    weights, expected = alone(case)
    found = load_file(launched / f"{case}.safetensors")
    first, second = json.loads((launched / f"{case}.json").read_text())
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["digest"] == second["digest"]  # bit for bit
    tolerance = 1e-9 if next(iter(weights.values())).dtype == torch.float64 else 1e-6
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=tolerance)
    for ours, alone_row in zip(first["log"], expected["log"], strict=True):
        assert ours == alone_row | {"loss": pytest.approx(alone_row["loss"], abs=1e-6)}
    np.testing.assert_allclose(first["outputs"], expected["outputs"], atol=1e-5)
    assert first["outputs"] == second["outputs"]
    decisions = [result["account"].get("decisions", []) for result in (first, second, expected)]
    assert decisions[0] == decisions[1]
    frozen = [[decision["frozen_blocks"] for decision in of_run] for of_run in decisions]
    assert frozen[0] == frozen[2] and bool(frozen[0]) == ("adaptive" in case)


def test_the_cases_would_notice_a_wrong_weight_of_a_short_batch(alone, monkeypatch):
    weights, _ = alone("Progtuning")
    monkeypatch.setattr(World, "pieces", lambda self, batch, *_: [(batch, len(batch) / 8)])
    wrong, _ = distributed_worker.train("Progtuning")
    assert max((weights[name] - wrong[name]).abs().max() for name in weights) > 1e-6


@pytest.mark.parametrize("case", CASES)
def test_a_stage_sends_the_bytes_of_its_gradients_once_a_step_and_no_more(case, launched, alone):
    weights, alone_results = alone(case)
    size = next(iter(weights.values())).itemsize
    results = json.loads((launched / f"{case}.json").read_text())
    for result in results:
        assert result["account"]["processes"] == 2
        for stage in result["account"]["stages"]:
            assert stage["gradient_bytes"] == 4 * stage["trainable_parameters"]
            assert stage["allreduced_bytes_per_step"] == size * stage["trainable_parameters"]
            assert stage["allreduced_bytes"] == stage["steps"] * stage["allreduced_bytes_per_step"]
    assert {stage["allreduced_bytes"] for stage in alone_results["account"]["stages"]} == {0}
    sent = [stage["allreduced_bytes_per_step"] for stage in results[0]["account"]["stages"]]
    growing, fixed = "growing" in case, case in ("full, in pieces", "SPAFIT")  # SPAFIT's strata freeze E and block 1
    assert fixed or (sent == sorted(sent, reverse=not growing) and len(set(sent)) == len(sent))


@pytest.mark.parametrize("case", [case for case in CASES if "cache" in case])
def test_caches_divide_the_rows_and_no_block_runs_twice_for_a_row_where_it_belongs(case, launched, alone):
    results = json.loads((launched / f"{case}.json").read_text())
    assert [result["owned_runs"] for result in results] == [1, 1]
    assert sum(result["cache_rows"] for result in results) == alone(case)[1]["cache_rows"] == rows().lengths.sum()
    stages, expected = (result["account"]["stages"] for result in (results[0], alone(case)[1]))
    assert [s["cache_bytes"] for s in stages] == [s["cache_bytes"] for s in expected]
    if case == "cache":  # two epochs a stage: the second finds what is at home
        assert all(stage["cache_hits"] > NUM_ROWS / 2 for stage in stages[1:])


def test_the_processes_draw_different_dropout_and_rank_0_that_of_a_process_alone(launched, alone):
    first, second = json.loads((launched / "Progtuning.json").read_text())
    assert first["drawn"] == alone("Progtuning")[1]["drawn"] != second["drawn"]
    seeds = {World(rank, 64).seed(seed) for rank in range(64) for seed in range(64)}
    assert len(seeds) == 64 * 64 and World(0, 64).seed(42) == 42


@given(st.lists(st.integers(0, 10_000), unique=True, min_size=1, max_size=80), st.integers(1, 20))
def test_shares_hold_every_row_once_differ_by_at_most_one_and_keep_the_order(batch, size):
    dealt = shares(batch, size)
    assert sorted(row for share in dealt for row in share) == sorted(batch)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    for rank, share in enumerate(dealt):
        assert share == [row for row in batch if row in set(share)]
        own = sum(row % size == rank for row in batch)
        at_home = sum(row % size == rank for row in share)
        assert at_home == min(own, len(share))  # no row is away while there is room for it at home
        assert share or not own


@given(st.lists(st.integers(0, 10_000), unique=True, min_size=1, max_size=80), st.integers(1, 20), st.integers(1, 8))
def test_the_weights_of_all_pieces_sum_to_the_mean_and_an_empty_share_has_a_row_of_weight_0(batch, size, count):
    pieces = [World(rank, size).pieces(batch, count) for rank in range(size)]
    losses = {row: float(row % 97) for row in batch}
    weighted = sum(w * sum(losses[row] for row in piece) / len(piece) for of_rank in pieces for piece, w in of_rank)
    assert weighted == pytest.approx(sum(losses.values()) / len(batch))
    for of_rank in pieces:
        assert 1 <= len(of_rank) <= count
        assert all(len(piece) for piece, _ in of_rank)
    assert sum(of_rank == [(batch[:1], 0.0)] for of_rank in pieces) == max(0, size - len(batch))


@pytest.mark.parametrize("size, away", [(2, 0.07), (4, 0.12), (8, 0.18)])
def test_the_share_of_rows_away_from_home_is_what_the_docstring_says(size, away):
    lengths = np.random.default_rng(0).integers(5, 60, 6400)
    batches = [batch for epoch in range(5) for batch in TrainBatches(lengths, 32, seed=1).epoch(epoch)]
    dealt = [(rank, row) for batch in batches for rank, share in enumerate(shares(batch, size)) for row in share]
    found = sum(row % size != rank for rank, row in dealt)
    assert found / 32_000 == pytest.approx(away, abs=0.01)
    assert f"{100 * away:.0f} %" in " ".join(sys.modules["progtuning.step.processes"].__doc__.split())


def test_a_cache_keeps_only_its_own_rows_and_gives_all_of_them():
    kept = np.array([True, False, True, False])
    cache, calls = PrefixCache([2, 1, 3, 2], 2, kept=kept), []

    def run(chosen, level, x):
        calls.append((None if chosen is None else chosen.tolist(), level))
        count = 4 if chosen is None else len(chosen)
        return torch.arange(1.0, count + 1)[:, None, None].expand(count, 3, 2)

    for _ in range(2):
        x = cache.fetch([0, 1, 2, 3], 1, 3, torch.device("cpu"), run)
        assert x.shape == (4, 3, 2)
    assert calls == [(None, 0), ([1, 3], 0)]
    assert x[:, 0, 0].tolist() == [1, 1, 3, 2]
    assert cache.num_tokens == 5 and cache.nbytes == 5 * 2 * 4 and cache.levels.tolist() == [1, 0, 1, 0]
    assert not cache.lacks([0, 1], 1) and cache.lacks([0, 1], 2)


def test_the_limit_of_a_cache_is_that_of_the_processes_of_a_machine_together():
    PrefixCache([10], 4, limit=320, num_sharing=2)
    with pytest.raises(InputError, match="expected at most"):
        PrefixCache([10], 4, limit=319, num_sharing=2)


def test_a_process_alone_communicates_nothing(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with join() as world:
        assert world == World() and not torch.distributed.is_initialized()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join() as world:
        assert world == World() and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"RANK": "x"}, "RANK to a number, got 'x'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE to a number, got '-2'"),
        ({"RANK": "2"}, "RANK to less than WORLD_SIZE, got 2 and 2"),
        ({}, "RANK=1 and WORLD_SIZE=2 are set, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT, as torchrun sets them"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}, "but not LOCAL_RANK, as .+: unset them to train in one"),
        ({"LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ""}, "MASTER_PORT to a number, got ''"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_refused(variables, message, monkeypatch):
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"RANK": "1", "WORLD_SIZE": "2"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        with join():
            pass


def test_more_processes_than_examples_in_a_batch_are_refused():
    with pytest.raises(InputError, match="--batch-size must be at least the 9 processes, got 8"):
        make_trainer("Progtuning", World(0, 9))


def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert choose_device(None, World(3, 4, 1, 2)) == torch.device("cuda", 1) and taken == [1]
    assert choose_device("cpu", World(3, 4, 1, 2)) == torch.device("cpu")
    assert choose_device(None) == torch.device("cuda")
    with pytest.raises(InputError, match="--nproc-per-node must be at most the 2 CUDA devices here, got 3"):
        choose_device("cuda", World(1, 3, 1, 3))


def test_torchrun_writes_one_folder_with_the_model_of_one_process(tiny_folder, tiny_task, tmp_path, capsys):
    more = ["--epochs", "3", "--batch-size", "30", "--accumulation-steps", "2", "--lr", "1e-3", "--cache", "memory"]
    more += ["--hidden-dropout-prob", "0", "--attention-probs-dropout-prob", "0", "--max-train-rows", "91"]
    assert main(train_command(tiny_folder, tiny_task, tmp_path / "one", *more)) == 0
    card = capsys.readouterr().out
    command = [*TORCHRUN, "-m", "progtuning", *train_command(tiny_folder, tiny_task, tmp_path / "two", *more)]
    ran = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("Written:") == card.count("Written:") == 1
    assert ran.stderr.count("Each of the 2 processes' prefix caches takes") == 1
    names = [sorted(path.name for path in (tmp_path / run).iterdir()) for run in ("one", "two")]
    assert names[0] == names[1]
    one, two = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["metrics"] == one["metrics"] and two["dev_rows"] == {"dev": 40}
    weights = [load_file(tmp_path / run / "model.safetensors") for run in ("one", "two")]
    for name, weight in weights[0].items():
        if not name.endswith("key.bias"):  # its gradient is rounding error, which AdamW divides by its own size
            torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-4)
    logs = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("one", "two")]
    for ours, expected in zip(map(json.loads, logs[1]), map(json.loads, logs[0]), strict=True):
        loss = {"loss": pytest.approx(expected["loss"], abs=1e-4)} if "loss" in expected else {}
        assert ours == expected | loss


def test_wrong_use_is_said_once_and_every_process_ends_with_2(tiny_folder, tiny_task, tmp_path):
    command = train_command(tiny_folder, tiny_task, tmp_path / "run", "--cache", "memory", "--schedule", "full")
    (status, out, error), *others = finish(start(command))
    assert (status, out) == (2, "")
    assert re.fullmatch(r"progtuning: error: --cache memory has nothing to keep.+\n", error), error
    assert others == [(2, "", "")]
    assert not list(tmp_path.iterdir())


# Each with what is said of it where RANK and WORLD_SIZE are those of several processes.
WRONG = {
    "paper --json": "RANK and WORLD_SIZE are set, .+ train alone .+ without torchrun, or unset them",
    "plan --model bert-base": "train alone",
    "predict --checkpoint nowhere --input x --output -": "train alone",
    "evaluate --checkpoint nowhere --task mrpc": "train alone",
    "report nowhere -o x": "train alone",
    "demo": "train alone",
    "train --bach-size 8": "required: --model",
    "train --model x --task mrpc --data y --output-dir z": "but not LOCAL_RANK",
    "": "required: COMMAND",
}


@pytest.fixture
def left_over(monkeypatch) -> pytest.MonkeyPatch:
    """The environment of a shell beside a job of several processes; to speak to another process is a failure."""
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: pytest.fail("waits"))
    return monkeypatch


@pytest.mark.parametrize("command", WRONG)
def test_where_variables_of_several_processes_are_left_in_the_shell_one_line_says_so_at_once(
    command, left_over, tmp_path, capsys
):
    left_over.chdir(tmp_path)
    left_over.setattr("time.sleep", lambda seconds: pytest.fail("waits"))
    try:
        status = main(command.split())
    except SystemExit as stop:  # of argparse
        status = stop.code
    assert status == 2 and not list(tmp_path.iterdir())
    assert re.fullmatch(rf"progtuning.*: error: .*{WRONG[command]}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("command", ["paper", "train --bach-size 8"])
def test_under_torchrun_the_first_process_speaks_at_once_and_the_others_wait_to_be_ended(command, left_over, capsys):
    left_over.setenv("TORCHELASTIC_RUN_ID", "none")
    for local_rank, expected in (("0", []), ("1", [10])):
        waited = []
        left_over.setattr("time.sleep", waited.append)
        left_over.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit) if "--" in command else nullcontext():
            assert main(command.split()) == 2
        assert waited == expected
    assert capsys.readouterr().err.count("error: ") == 2


def test_torchrun_of_another_command_says_once_that_train_alone_takes_it(tmp_path):
    begin = time.monotonic()
    ran = subprocess.run([*TORCHRUN, "-m", "progtuning", "paper"], env=ENVIRONMENT, cwd=tmp_path, capture_output=True)
    print(f"torchrun ended {time.monotonic() - begin:.1f} s after its start")
    assert ran.returncode == 1 and ran.stderr.count(b"progtuning: error: RANK and WORLD_SIZE") == 1


def test_a_wait_for_processes_that_nobody_starts_can_be_interrupted():
    code = "from progtuning.step import processes\nprocesses.PATIENCE = 0.5\nwith processes.join(print): pass"
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = ENVIRONMENT | variables | {"PYTHONUNBUFFERED": "1"}
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's job in the background ignores it
    pipes = {"stdout": subprocess.PIPE, "text": True, "preexec_fn": heeds}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)
    try:
        assert process.stdout.readline().startswith("Rank 0 waits at 127.0.0.1:0")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=SOON) == -signal.SIGINT
    finally:
        process.kill()
        process.communicate()


def test_a_process_whose_fellows_nobody_starts_says_that_it_waits(monkeypatch):
    said = []
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("progtuning.step.processes.PATIENCE", 0.1)
    monkeypatch.setattr("progtuning.step.processes.TIMEOUT", timedelta(seconds=2))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(RunError, match="rank 0 of 2: another process has ended or does not answer"):
            with join(said.append):
                pass
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)
    text = "Rank 0 waits at 127.0.0.1:0 for the other processes of 2, at most 0:00:02. "
    assert said == [text + "To train in one process unset RANK and WORLD_SIZE."]


def test_an_error_of_any_process_is_raised_by_the_first_and_ends_the_others_in_silence(launched):
    first, second = json.loads((launched / "failures.json").read_text())
    assert first["none"] == second["none"] == []
    for case, kind, message in (
        ("the second", "InputError", "only there"),
        ("a disk", "RunError", "no space left"),
        ("the first", "RunError", "only here"),
        ("a loss", "NotFinite", "step 2 (stage 1, rows "),
        ("an output", "NotFinite", "the model's output for row 1 is not finite"),
    ):
        assert first[case][0] == kind and first[case][1].startswith(message), case
        assert second[case] == ["SystemExit", "2" if kind == "InputError" else "1"], case
    assert (first["fetched"], second["fetched"]) == ("by 0", "by 1")


def test_a_run_that_a_signal_to_one_process_stops_goes_on_bit_for_bit(launched):
    first, second = json.loads((launched / "failures.json").read_text())
    assert first["stopped"][0] == "Interrupted" and "SIGTERM at step 17 of 33" in first["stopped"][1]
    assert second["stopped"] == ["SystemExit", "143"]
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (launched / "stopped" / name).read_bytes() == (launched / "through" / name).read_bytes()
    summaries = [json.loads((launched / run / "summary.json").read_text()) for run in ("through", "stopped")]
    for summary in summaries:
        del summary["speed"]
        for stage in summary["stages"]:
            del stage["seconds"], stage["peak_bytes"], stage["speed"]
    assert summaries[0] == summaries[1]


def test_a_run_of_two_processes_is_not_resumed_by_one(launched, tiny_folder, tiny_task):
    with pytest.raises(InputError, match=r"--resume: .+ is of another run: it had 2 processes \(torchrun\), now 1$"):
        distributed_worker.tune(tiny_folder, tiny_task, launched / "stopped", World(), save_every=4, resume=True)


def wait_for_first_row(log: Path, processes: list[subprocess.Popen]) -> None:
    """Wait until a run has trained some steps."""
    deadline = time.monotonic() + SOON
    while not (log.is_file() and log.read_text()):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.1)


LONG = ("--epochs", "100000", "--evaluate", "end")


def test_a_process_whose_fellow_is_killed_ends_with_an_error_by_itself(tiny_folder, tiny_task, tmp_path):
    processes = start(train_command(tiny_folder, tiny_task, tmp_path / "run", *LONG))
    wait_for_first_row(tmp_path / "run" / "metrics.jsonl", processes)
    processes[0].kill()
    killed = time.monotonic()
    _, (status, _, error) = finish(processes)
    print(f"rank 1 ended {time.monotonic() - killed:.1f} s after rank 0 was killed")
    assert status == 1, error
    last = error.splitlines()[-1]
    assert last.startswith("progtuning: error: rank 1 of 2: another process has ended or does not answer: ")
    assert "Traceback" not in error


BUSY_THREAD = """
import sys, threading, time
import torch
import torch.distributed as dist
from progtuning.base.errors import Interrupted
from progtuning.cli import command
from progtuning.step.processes import join

def take_the_lock_again_and_again(future):
    while threading.current_thread() is not threading.main_thread():
        time.sleep(0.001)

def train(args):
    with join() as world:
        time.sleep(1 - world.rank)  # rank 1 must be waiting, else no thread of gloo calls it back
        future = dist.all_reduce(torch.ones(1), async_op=True).get_future()
        future.wait() if world.is_main else future.then(take_the_lock_again_and_again)
        time.sleep(1 + world.rank)
        print("before the error")
        raise errors[sys.argv[1]]

if sys.argv[1] == "NCCL":  # where there is a GPU, gloo is part of a group that is left standing
    torch.cuda.is_available = dist.is_nccl_available = lambda: True
    begin = dist.init_process_group
    dist.init_process_group = lambda backends, **more: begin("gloo", **more)

errors = {"gloo": RuntimeError("gloo: reset by peer"), "stop": Interrupted("SIGTERM", 15), "bug": KeyError("x")}
errors["NCCL"] = SystemExit(2)  # what rank 1 is given for wrong use that every process meets
command.run_train = train
sys.exit(command.main(["train", "--model", "m", "--task", "cola", "--data", "d", "--output-dir", "o"]))
"""


@pytest.mark.parametrize("case, status, last", [
    ("gloo", 1, "progtuning: error: rank 1 of 2: another process has ended or does not answer: gloo: reset by peer"),
    ("stop", 143, ""),  # rank 0 speaks
    ("bug", 1, "KeyError: 'x'"),
    ("NCCL", 2, ""),
])  # fmt: skip
def test_a_thread_of_gloo_that_is_still_at_work_does_not_abort_a_process_that_ends(case, status, last):
    _, (got, output, error) = finish(start([case], program=["-c", BUSY_THREAD]))
    assert (got, output) == (status, "before the error\n"), error
    assert "terminate" not in error and (error.splitlines() or [""])[-1].endswith(last)


def test_torchrun_ends_with_an_error_when_a_process_is_killed_and_leaves_none_behind(tiny_folder, tiny_task, tmp_path):
    command = [*TORCHRUN, "-m", "progtuning", *train_command(tiny_folder, tiny_task, tmp_path / "run", *LONG)]
    launcher = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for_first_row(tmp_path / "run" / "metrics.jsonl", [launcher])
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    environments = {int(child): Path(f"/proc/{child}/environ").read_bytes() for child in children}
    ranks = {int(re.search(rb"\0RANK=(\d+)", text)[1]): child for child, text in environments.items()}
    assert set(ranks) == {0, 1}
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    [(status, _, error)] = finish([launcher])
    print(f"torchrun ended {time.monotonic() - killed:.1f} s after rank 1 was killed")
    assert status == 1 and "SIGKILL" in error
    assert not Path(f"/proc/{ranks[0]}").exists()
