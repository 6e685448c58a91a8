"""Stop and resume: a run that goes on from a checkpoint ends as one that never stopped, or says why it cannot."""

import hashlib
import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import progtuning.step.progress
from progtuning.base.errors import InputError, Interrupted, RunError
from progtuning.base.files import MAX_JSON_BYTES, replacing
from progtuning.data.squad import Answer, Question, SquadRows, Window
from progtuning.data.tokenization import Encoding
from progtuning.methods.apply import apply_peft
from progtuning.report.summary import LOG, StageSummary, read_summary
from progtuning.run.best import Best
from progtuning.run.build import build_trainer
from progtuning.run.checkpoint import read_checkpoint, write_checkpoint
from progtuning.run.evaluate import Measured, predict
from progtuning.run.folder import RunFolder, checkpoints_of, step_of
from progtuning.run.log import CHECKPOINTS, RunLog, warn
from progtuning.run.signals import StopSignals
from progtuning.run.state import random_states, set_random_states
from progtuning.settings.peft import PeftConfig
from progtuning.settings.train import CheckpointConfig, DPSConfig
from progtuning.train import Trainer
from tests.models import tiny_model
from tests.test_cli import call, refused
from tests.test_train import CPU, SETTINGS, poison, rows, weights

EVERY = CheckpointConfig(save_every=1, keep=1000)
# 24 rows in batches of 8: 3 steps an epoch, 9 in all.
VARIANTS = {
    "shrinking": {},
    "growing": {"schedule": "growing"},
    "without-low-blocks": {"schedule": "without-low-blocks"},
    "full": {"schedule": "full"},
    "adaptive": {"schedule": "adaptive", "stages": 4},
    "stages within epochs": {"stages": 4, "embeddings": "always"},
    "pieces": {"accumulation_steps": 3, "group_by_length": False},
    "no prefix dropout": {"prefix_dropout": False, "embeddings": "never"},
    "lora": {"peft": PeftConfig("lora", lora_r=2, lora_dropout=0.1)},
    "adapter, growing": {"peft": PeftConfig("adapter", adapter_size=4), "schedule": "growing"},
    "bitfit": {"peft": PeftConfig("bitfit")},
    "dps dense": {"dps": DPSConfig("dense", update_ratio=0.23)},
    "dps mix, adaptive": {"dps": DPSConfig("mix", update_ratio=0.23), "schedule": "adaptive", "stages": 4},
    "dps mix, growing": {"dps": DPSConfig("mix", update_ratio=0.23), "schedule": "growing"},
    "bf16": {"precision": "bf16"},
    "constant rate": {"lr_schedule": "constant", "warmup": 0.5, "adam_epsilon": 1e-4},
    "keep best": {"keep": "best", "evaluate": "epoch"},
    "rates by block": {"lr_decay": 0.5},
    "cache": {"cache": "memory"},
    "cache, growing": {"cache": "memory", "schedule": "growing"},
    "cache, adaptive": {"cache": "disk", "cache_dtype": "bf16", "schedule": "adaptive", "stages": 4},
}
UNSEEN = Best(SETTINGS, "sum")


def build(**changes) -> Trainer:
    settings = replace(SETTINGS, lr=1e-2, **changes)
    model = tiny_model(hidden_dropout_prob=0.1)
    apply_peft(model, settings.peft, seed=1)
    return build_trainer(model, rows(24), settings, CPU)


def train(folder: Path | None, options: CheckpointConfig, **changes) -> Trainer:
    """Run as `fine_tune` does, with an evaluation after each epoch."""
    run = build(**changes)
    with RunFolder(folder, options, lambda: {"settings": {"n": 1}}, warn) as held:
        best = Best(replace(SETTINGS, **changes), "sum")
        held.restore(run, best)
        run.progress.log = held.log

        def evaluate(epoch: int) -> None:
            metrics = {"sum": float(predict(run.engine.model, rows(8, seed=1), 8, CPU).sum())}
            held.log({"epoch": epoch + 1, "metrics": metrics})
            best.see(epoch, Measured(metrics), run.engine)

        def save(stage_ends: bool) -> None:
            if options.save_every and (stage_ends or run.step % options.save_every == 0):
                held.save(run, best)

        run.fit(evaluate, save)
        best.put_back(run.engine)
    return run


def unmeasured(stages: list[StageSummary]) -> list[StageSummary]:
    """The account of each stage without what a clock or the system measured."""
    return [replace(stage, seconds={}, peak_bytes=None) for stage in stages]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_resumed_after_any_step_ends_bit_for_bit_as_if_it_had_not_stopped(variant, tmp_path, monkeypatch):
    monkeypatch.setattr(progtuning.step.progress, "LOG_EVERY", 4)  # so that losses wait for their row at a checkpoint
    changes = VARIANTS[variant]
    whole = train(tmp_path / "whole", EVERY, **changes)
    log = (tmp_path / "whole" / LOG).read_bytes()
    checkpoints = sorted((tmp_path / "whole" / CHECKPOINTS).iterdir())
    assert [path.name for path in checkpoints] == [f"step-{step:08d}" for step in range(1, 10)]
    assert len(whole.ledger.costs) > 1 or changes.get("schedule") == "full"
    for checkpoint in checkpoints:
        folder = tmp_path / checkpoint.name
        shutil.copytree(tmp_path / "whole", folder, ignore=shutil.ignore_patterns("step-*"))
        shutil.copytree(checkpoint, folder / CHECKPOINTS / checkpoint.name)
        torch.manual_seed(random.randrange(2**31))
        resumed = train(folder, CheckpointConfig(resume=True), **changes)
        assert (folder / LOG).read_bytes() == log
        for name, expected in weights(whole.engine.model).items():
            assert torch.equal(weights(resumed.engine.model)[name], expected), (checkpoint.name, name)
        assert unmeasured(resumed.ledger.account()["stages"]) == unmeasured(whole.ledger.account()["stages"])
        assert resumed.ledger.account().get("decisions") == whole.ledger.account().get("decisions")


def test_checkpoints_are_written_every_n_steps_and_at_each_stages_end_and_the_last_k_are_kept(tmp_path):
    steps = []

    class Watched(RunFolder):
        def save(self, trainer, best):
            super().save(trainer, best)
            steps.append(sorted(int(path.name[5:]) for path in (self.path / CHECKPOINTS).iterdir()))

    run = build()
    with Watched(tmp_path / "run", CheckpointConfig(save_every=2, keep=3), dict) as held:
        run.fit(after_step=lambda ends: held.save(run, UNSEEN) if ends or run.step % 2 == 0 else None)
    assert steps == [[2], [2, 3], [2, 3, 4], [3, 4, 6], [3, 4, 6], [4, 6, 8], [6, 8, 9]]


def test_a_checkpoint_holds_what_has_changed_and_the_moments_of_what_trains(tmp_path):
    train(tmp_path / "run", EVERY, schedule="growing", peft=PeftConfig("lora", lora_r=2))
    state = read_checkpoint(tmp_path / "run" / CHECKPOINTS / "step-00000004")["trainer"]
    blocks = {name.split(".")[2] for name in state["weights"] if name.startswith("encoder")}
    assert blocks == {"1", "2", "3"}  # the top two of four blocks in stage 1 (Eq. 2: 0, 1, 2, 4), one more in stage 2
    assert set(state["weights"]) == set(state["optimizer"])
    assert all("lora_" in name or name.startswith("classifier") for name in state["weights"])
    names = {path.name for path in (tmp_path / "run" / CHECKPOINTS / "step-00000004").iterdir()}
    assert names == {"state.safetensors", "state.json", "manifest.json"}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "a bit of the tensors": lambda folder: flip(folder / "state.safetensors"),
    "a bit of the values": lambda folder: flip(folder / "state.json"),
    "a bit of the manifest": lambda folder: flip(folder / "manifest.json"),
    "half the tensors": lambda folder: os.truncate(folder / "state.safetensors", 100),
    "no values": lambda folder: (folder / "state.json").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text(""),
    "another manifest": lambda folder: (folder / "manifest.json").write_text('{"format": 1, "state.json": []}'),
    "nothing": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_last_good_one_with_a_warning(kind, tmp_path, capsys):
    whole = train(tmp_path / "run", EVERY)
    log = (tmp_path / "run" / LOG).read_bytes()
    for step in (8, 9):
        DAMAGE[kind](tmp_path / "run" / CHECKPOINTS / f"step-{step:08d}")
    capsys.readouterr()
    resumed = train(tmp_path / "run", replace(EVERY, resume=True))
    err = capsys.readouterr().err
    assert err.count("warning: checkpoint passed over: ") == 2 and "step-00000009" in err and "step-00000008" in err
    assert f"Resumed from {tmp_path / 'run' / CHECKPOINTS / 'step-00000007'}: step 7 of 9" in err
    assert all(
        torch.equal(weights(resumed.engine.model)[name], tensor) for name, tensor in weights(whole.engine.model).items()
    )
    assert (tmp_path / "run" / LOG).read_bytes() == log
    assert all(read_checkpoint(path) for path in (tmp_path / "run" / CHECKPOINTS).iterdir())  # the damaged ones anew


def test_where_all_checkpoints_are_damaged_the_run_does_not_start_over(tmp_path):
    train(tmp_path / "run", CheckpointConfig(save_every=3))
    for path in (tmp_path / "run" / CHECKPOINTS).iterdir():
        flip(path / "state.json")
    log = (tmp_path / "run" / LOG).read_bytes()
    with pytest.raises(InputError, match="checkpoints: none of its 2 checkpoints is good"):
        train(tmp_path / "run", CheckpointConfig(resume=True))
    assert (tmp_path / "run" / LOG).read_bytes() == log


def test_a_checkpoint_of_another_run_or_beyond_the_log_is_passed_over(tmp_path, capsys):
    train(tmp_path / "run", EVERY)
    os.truncate(tmp_path / "run" / LOG, 0)
    train(tmp_path / "run", replace(EVERY, resume=True))
    err = capsys.readouterr().err
    assert err.count("metrics.jsonl: got 0 bytes, expected at least") == 6 and "step-00000003: step 3 of 9" in err
    with RunFolder(tmp_path / "other", EVERY, lambda: {"settings": {"n": 2}}):
        pass
    shutil.copytree(tmp_path / "run" / CHECKPOINTS, tmp_path / "other" / CHECKPOINTS)
    with RunFolder(tmp_path / "other", replace(EVERY, resume=True), lambda: {"settings": {"n": 2}}) as held:
        with pytest.raises(InputError, match="none of its 9 checkpoints is good"):
            held.restore(build(), UNSEEN)
    assert "step-00000009: written by another run" in capsys.readouterr().err


def test_what_a_killed_write_leaves_is_no_checkpoint_and_is_cleared_away(tmp_path):
    train(tmp_path / "run", EVERY)
    half = tmp_path / "run" / CHECKPOINTS / ".step-00000010.tmp"
    shutil.copytree(tmp_path / "run" / CHECKPOINTS / "step-00000009", half)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "run" / "model.safetensors") as temporary:
        temporary.write_bytes(b"half")
        temporary.rename(tmp_path / "kept")  # so that it is not removed, as where the process is killed
        raise KeyboardInterrupt
    (tmp_path / "kept").rename(temporary)
    train(tmp_path / "run", replace(EVERY, resume=True))
    assert not half.exists() and not list((tmp_path / "run").glob(".*"))


# Names that a person may give to a copy of a checkpoint; the product writes none of them.
COPIES = ("best", "00000004-good", "9", "000000004", "00000004.bak", "00000004.tmp", "0000000\u0664", "-0000004", "")


def test_a_persons_copies_of_checkpoints_are_neither_resumed_from_nor_counted_nor_deleted(tmp_path, capsys):
    whole = train(tmp_path / "run", EVERY)
    checkpoints = tmp_path / "run" / CHECKPOINTS
    copies = {f"step-{name}" for name in COPIES} | {".step-best.tmp", ".step-9.tmp", ".notes.tmp"}
    for name in copies:
        shutil.copytree(checkpoints / "step-00000004", checkpoints / name)
    (checkpoints / "step-00000099").write_text("notes on step 99")
    for step in (8, 9):
        shutil.rmtree(checkpoints / f"step-{step:08d}")
    resumed = train(tmp_path / "run", CheckpointConfig(save_every=1, keep=2, resume=True))
    err = capsys.readouterr().err
    assert f"Resumed from {checkpoints / 'step-00000007'}: step 7 of 9" in err and "passed over" not in err
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000008", "step-00000009", "step-00000099", *copies}
    assert all(read_checkpoint(checkpoints / name) for name in copies)
    assert all(
        torch.equal(weights(resumed.engine.model)[name], tensor) for name, tensor in weights(whole.engine.model).items()
    )


def test_a_newer_checkpoint_put_among_them_costs_none_of_the_runs_own(tmp_path):
    run = build()
    with RunFolder(tmp_path / "run", CheckpointConfig(save_every=1, keep=1), dict) as held:
        (tmp_path / "run" / CHECKPOINTS / "step-00000099").mkdir(parents=True)
        run.fit(after_step=lambda ends: held.save(run, UNSEEN))
    assert sorted(path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir()) == [
        "step-00000009",
        "step-00000099",
    ]


def test_checkpoints_stand_in_the_order_of_their_steps_also_where_these_have_more_digits(tmp_path):
    for step in (99_999_999, 100_000_000, 7, 1_000_000_000):
        (tmp_path / CHECKPOINTS / f"step-{step:08d}").mkdir(parents=True)
    assert [step_of(path.name) for path in checkpoints_of(tmp_path)] == [7, 99_999_999, 100_000_000, 1_000_000_000]


def test_hidden_files_that_the_run_did_not_write_are_left_alone(tmp_path):
    train(tmp_path / "run", EVERY)
    names = (".notes.tmp", ".model.tmp", ".model.safetensors.123.tmp", ".progtuning.tmp", ".run.json.progtuning.tmp")
    for name in names:
        (tmp_path / "run" / name).write_text("precious")
    (tmp_path / "run" / ".run.json.7.progtuning.tmp").mkdir()
    train(tmp_path / "run", replace(EVERY, resume=True))
    assert all((tmp_path / "run" / name).read_text() == "precious" for name in names)
    assert (tmp_path / "run" / ".run.json.7.progtuning.tmp").is_dir()


def test_what_a_run_left_that_was_killed_at_its_very_start_is_no_obstacle_and_a_persons_file_is(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOG).touch()
    (tmp_path / "run" / ".run.json.7.progtuning.tmp").touch()
    with RunFolder(tmp_path / "run", CheckpointConfig(resume=True), dict):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".run.json.bak").touch()
    with pytest.raises(InputError, match="with files in it and no run.json"):
        RunFolder(tmp_path / "other", CheckpointConfig(resume=True), dict)


def test_a_checkpoint_gives_back_every_kind_of_value(tmp_path):
    tensors = {
        "float": torch.tensor([1.5, float("nan"), float("inf")]),
        "bool": torch.tensor([[True], [False]]),
        "int": torch.tensor(2**40),
        "bytes": torch.arange(256).to(torch.uint8),
        "empty": torch.empty(0),
        "strided": torch.arange(6.0).view(2, 3).t(),
        "shared": torch.arange(6.0)[:3],
    }
    values = {"none": None, "list": [1, [2.5, {"a": None}]], "float": 0.1 + 0.2, "text": "ä/b", "no": {}}
    values["deep"] = {"er": {"x": 1}}
    write_checkpoint(tmp_path / "a" / "b", {"tensors": {"encoder.layer.0": tensors}, "values": values})
    state = read_checkpoint(tmp_path / "a" / "b")
    assert state["values"] == values
    for name, tensor in state["tensors"]["encoder.layer.0"].items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=0, equal_nan=True)


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, so no generator of one")


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_the_global_generators_go_on_where_they_were(name, tmp_path):
    device = torch.device(name)

    def draw() -> list[float]:
        tensors = torch.randn(3), torch.randn(3, device=device)
        return [random.gauss(0, 1), random.random(), *np.random.randn(3), *(x for t in tensors for x in t.tolist())]

    random.gauss(0, 1), np.random.randn()  # both keep a second draw
    write_checkpoint(tmp_path / "states", random_states(device))
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    set_random_states(read_checkpoint(tmp_path / "states"), device)
    assert draw() == expected


def test_a_checkpoint_of_many_processes_is_read_although_its_json_is_long(tmp_path):
    states = {str(rank): random_states(CPU) for rank in range(300)}
    write_checkpoint(tmp_path / "states", {"processes": states})
    assert max(path.stat().st_size for path in (tmp_path / "states").glob("*.json")) > MAX_JSON_BYTES
    assert read_checkpoint(tmp_path / "states") == {"processes": states}


def test_a_step_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path):
    run = build()
    poison(run, 5)
    with RunFolder(tmp_path / "run", EVERY, dict) as held, pytest.raises(RunError, match=r"^step 6 \(stage 2"):
        run.fit(after_step=lambda ends: held.save(run, UNSEEN))
    assert sorted(path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir())[-1] == "step-00000005"


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path):
    with RunFolder(tmp_path / "run", EVERY, dict):
        with pytest.raises(InputError, match=f"--output-dir {tmp_path / 'run'}: another run writes into it"):
            RunFolder(tmp_path / "run", CheckpointConfig(resume=True), dict)
        with pytest.raises(InputError, match="--output-dir must be a new or empty folder"):
            RunFolder(tmp_path / "run", EVERY, dict)
    with RunFolder(tmp_path / "run", CheckpointConfig(resume=True), dict):
        pass


def test_a_folder_that_a_run_was_in_since_the_check_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("progtuning.run.folder.check_output_folder", lambda path, resume: None)
    (tmp_path / LOG).write_text('{"step": 10}\n')
    with pytest.raises(InputError, match="--output-dir must be a new or empty folder"):
        RunFolder(tmp_path, EVERY, dict)
    assert (tmp_path / LOG).read_text() == '{"step": 10}\n'


def test_the_log_is_cut_to_whole_rows_and_goes_on(tmp_path):
    log = RunLog(tmp_path)
    log({"step": 1}), log({"step": 2})
    size = log.sync()
    log({"step": 3})
    log.close()
    with open(tmp_path / LOG, "a") as file:
        file.write('{"step": 4, "lo')  # a write that was cut off
    log = RunLog(tmp_path)
    log.rewind(size)
    assert log.rows == [{"step": 1}, {"step": 2}]
    log({"step": 5})
    log.close()
    assert (tmp_path / LOG).read_text() == '{"step": 1}\n{"step": 2}\n{"step": 5}\n'


def test_signals_wait_while_they_are_held_and_pass_where_they_are_let_through():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for number, name in ((signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")):
        done = []
        with StopSignals() as signals, pytest.raises(Interrupted, match=f"^stopped by {name}$") as caught:
            with signals.held():
                os.kill(os.getpid(), number)
                done.append("held")
                with signals.held(False):
                    done.append("let through")
        assert done == ["held"] and caught.value.signal == number
        with StopSignals(), pytest.raises(Interrupted):
            os.kill(os.getpid(), number)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def arguments(tiny_folder, tiny_task, output: Path, *options) -> list:
    """A run of 6 steps in 3 stages that is saved after each."""
    fixed = "--task classification --epochs 3 --batch-size 32 --max-train-rows 64 --lr 5e-3 --max-length 16"
    places = ["--model", tiny_folder, "--data", tiny_task, "--output-dir", output]
    return [*places, *fixed.split(), "--device", "cpu", "--save-every", "1", *options]


@pytest.fixture(scope="session")
def stopped(tiny_folder, tiny_task, tmp_path_factory) -> Path:
    """The output folder of a finished run, taken back to step 3: as if it had been killed there."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    status, _, err = call("train", *arguments(tiny_folder, tiny_task, folder, "--keep-checkpoints", 9))
    assert status == 0, err
    shutil.copytree(folder, folder.parent / "whole")
    for path in [*folder.glob("*.safetensors"), folder / "summary.json", folder / "README.md"]:
        path.unlink()
    for path in (folder / CHECKPOINTS).iterdir():
        if path.name > "step-00000003":
            shutil.rmtree(path)
    return folder


def test_train_resume_ends_as_the_run_that_was_not_stopped(stopped, tiny_folder, tiny_task, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    status, _, err = call("train", *arguments(tiny_folder, tiny_task, tmp_path / "run", "--resume"))
    assert status == 0 and err.count("Resumed from") == 1 and "step-00000003: step 3 of 6" in err
    for name in ("model.safetensors", LOG, "run.json", "config.json", "vocab.txt"):
        assert (tmp_path / "run" / name).read_bytes() == (stopped.parent / "whole" / name).read_bytes(), name
    ours, theirs = (read_summary(path) for path in (tmp_path / "run", stopped.parent / "whole"))
    assert ours.metrics == theirs.metrics
    assert unmeasured(ours.stages) == unmeasured(theirs.stages)


def test_every_reader_of_a_run_says_of_one_that_has_not_finished_that_it_goes_on_with_resume(
    stopped, tiny_task, tmp_path
):
    task, page = ["--task", "classification", "--data", tiny_task], tmp_path / "page"
    new = tmp_path / "new"
    new.mkdir()
    for name in ("run.json", LOG):
        shutil.copy(stopped / name, new)
    for run in (stopped, new):
        readers = [
            ["evaluate", "--checkpoint", run, *task],
            ["predict", "--checkpoint", run, "--input", "-", "--output", page],
            ["report", run, "-o", page],
            ["explain", "--run", run, "-o", page],
        ]
        for reader in readers:
            line = refused(*call(*reader))
            assert f"{run} is of a run that has not finished: go on with train --resume" in line
    assert not page.exists()
    shutil.copytree(stopped.parent / "whole", tmp_path / "whole")
    (tmp_path / "whole" / "summary.json").unlink()
    assert call("evaluate", "--checkpoint", tmp_path / "whole", *task)[0] == 0
    shutil.copy(stopped / "run.json", tmp_path)  # of compare: it has rows.jsonl for a log
    assert "summary.json: cannot be read" in refused(*call("report", tmp_path, "-o", page))


def test_a_finished_run_resumed_says_so_and_changes_nothing(stopped, tiny_folder, tiny_task, tmp_path):
    shutil.copytree(stopped.parent / "whole", tmp_path / "run")
    with open(tmp_path / "run" / "README.md", "a") as card:
        card.write("\nWhat its reader has added.\n")

    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    before = files()
    status, out, err = call("train", *arguments(tiny_folder, tiny_task, tmp_path / "run", "--resume", "--json"))
    assert status == 0 and f"The run in {tmp_path / 'run'} is finished already." in err
    assert files() == before and json.loads(out) == json.loads((tmp_path / "run" / "summary.json").read_text())


def test_a_finished_run_that_was_not_merged_is_not_resumed_with_merge(tiny_folder, tiny_task, tmp_path):
    lora = arguments(tiny_folder, tiny_task, tmp_path / "run", "--peft", "lora", "--lora-r", "2", "--epochs", "1")
    assert call("train", *lora)[0] == 0
    line = refused(*call("train", *lora, "--resume", "--merge"))
    finished = f"--merge: the run in {tmp_path / 'run'} is finished and holds what it trained alone"
    assert line.endswith(f"{finished}: give another --output-dir")
    assert call("train", *lora, "--resume")[0] == 0


def test_without_resume_the_folder_of_a_stopped_run_is_refused_and_left_alone(stopped, tiny_folder, tiny_task):
    before = sorted(stopped.rglob("*"))
    line = refused(*call("train", *arguments(tiny_folder, tiny_task, stopped)))
    assert "--output-dir must be a new or empty folder" in line
    assert sorted(stopped.rglob("*")) == before


OTHERS = {
    "a setting": (["--lr", "0.25"], "--lr was 0.005, now 0.25"),
    "settings": (["--lr", "0.25", "--peft", "lora"], "--lr was 0.005, now 0.25; --peft was none, now lora"),
    "the rate's line": (["--lr-schedule", "constant"], "--lr-schedule was linear, now constant"),
    "a method's": (
        ["--dps", "dense", "--dps-update-ratio", "0.5"],
        "--dps was off, now dense; --dps-update-ratio was 0.05, now 0.5",
    ),
    "rows": (["--max-train-rows", "65"], "the training rows differ"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_to_resume_with_other_options_is_an_error_that_names_them(kind, stopped, tiny_folder, tiny_task):
    options, message = OTHERS[kind]
    before = sorted(stopped.rglob("*"))
    line = refused(*call("train", *arguments(tiny_folder, tiny_task, stopped, "--resume", *options)))
    assert f"--resume: {stopped} is of another run: {message}" in line
    assert sorted(stopped.rglob("*")) == before


def test_to_resume_on_other_data_is_an_error_that_names_them(stopped, tiny_folder, tiny_task, tmp_path):
    shutil.copytree(tiny_task, tmp_path / tiny_task.name)
    dev = tmp_path / tiny_task.name / "dev.jsonl"
    dev.write_text(dev.read_text().replace("good", "fine"))
    line = refused(*call("train", *arguments(tiny_folder, tmp_path / tiny_task.name, stopped, "--resume")))
    assert line.endswith("is of another run: the held-out rows dev differ")
    train_file = tmp_path / tiny_task.name / "train.tsv"
    text = train_file.read_text().replace("\tlike", "\tLIKE")
    train_file.write_text(text.replace("\tdislike", "\tlike").replace("LIKE", "dislike"))
    dev.write_text((tiny_task / "dev.jsonl").read_text())
    line = refused(*call("train", *arguments(tiny_folder, tmp_path / tiny_task.name, stopped, "--resume")))
    assert line.endswith("is of another run: the training rows differ")


def test_another_gold_answer_makes_other_rows():
    encoding = Encoding(np.array([1, 2], np.int32), np.zeros(2, np.int32))
    window = Window(0, encoding, 1, np.array([[0, 1]]), (1, 1))
    first, *others = (
        SquadRows([Question("q", "why", "a b", answers)], [window], 0).digest()
        for answers in ((Answer("a", 0),), (Answer("a", 0), Answer("b", 2)), (Answer("b", 2),), None)
    )
    again = SquadRows([Question("q", "why", "a b", (Answer("a", 0),))], [window], 0)
    assert again.digest() == first and len({first, *others}) == 4


def test_to_resume_with_another_model_is_an_error_that_names_what_differs(stopped, tiny_folder, tiny_task, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    flip(tmp_path / "model" / "model.safetensors")
    line = refused(*call("train", *arguments(tmp_path / "model", tiny_task, stopped, "--resume")))
    assert line.endswith("is of another run: the weights differ")
    shutil.copytree(tiny_folder, tmp_path / "words")
    vocabulary = (tmp_path / "words" / "vocab.txt").read_text().replace("good\nfine", "fine\ngood")
    (tmp_path / "words" / "vocab.txt").write_text(vocabulary)
    line = refused(*call("train", *arguments(tmp_path / "words", tiny_task, stopped, "--resume")))
    assert line.endswith("the training rows differ; the held-out rows dev differ; the tokenizer differs")


def test_resume_starts_a_run_where_there_is_none_yet_and_refuses_other_folders(tiny_folder, tiny_task, tmp_path):
    status, _, err = call("train", *arguments(tiny_folder, tiny_task, tmp_path / "new", "--resume"))
    assert status == 0 and (tmp_path / "new" / "model.safetensors").is_file()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("x")
    line = refused(*call("train", *arguments(tiny_folder, tiny_task, tmp_path / "other", "--resume")))
    assert f"--resume needs the output folder of a run, got {tmp_path / 'other'} with files in it and no run" in line
    line = refused(*call("train", *arguments(tiny_folder, tiny_task, tmp_path / "other" / "precious", "--resume")))
    assert "got the file" in line and [path.name for path in (tmp_path / "other").iterdir()] == ["precious"]


@pytest.mark.parametrize(
    "option, message",
    [
        (["--save-every", "0"], "--save-every must be an integer of at least 1, got 0"),
        (["--keep-checkpoints", "0"], "--keep-checkpoints must be an integer of at least 1, got 0"),
    ],
)
def test_a_wrong_option_of_checkpoints_is_refused(option, message, tiny_folder, tiny_task, tmp_path):
    assert message in refused(*call("train", *arguments(tiny_folder, tiny_task, tmp_path / "run", *option)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"format": 1, "identity": 3}', "\x00"])
def test_a_damaged_run_json_is_refused_by_name(content, stopped, tiny_folder, tiny_task, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(content)
    line = refused(*call("train", *arguments(tiny_folder, tiny_task, tmp_path / "run", "--resume")))
    assert f"{tmp_path / 'run' / 'run.json'}: " in line


@pytest.fixture(scope="module")
def older(stopped, tmp_path_factory) -> Path:
    """The stopped run as it would be had it been begun before there were some of the options."""
    folder = tmp_path_factory.mktemp("older") / "run"
    shutil.copytree(stopped, folder)
    run = json.loads((folder / "run.json").read_text())
    settings = run["identity"]["settings"]
    del settings["lr_schedule"], settings["seed"], settings["dps"], settings["peft"]["lora_targets"]
    (folder / "run.json").write_text(json.dumps(run))
    digest = hashlib.sha256(json.dumps(run["identity"], sort_keys=True).encode()).hexdigest()
    for checkpoint in (folder / CHECKPOINTS).iterdir():
        state = read_checkpoint(checkpoint) | {"run": digest}
        for cost in state["trainer"]["processes"]["0"]["costs"]:
            del cost["gradient_sum_bytes"]  # a count that is newer too
        write_checkpoint(checkpoint, state)
    return folder


def test_a_run_begun_before_there_was_an_option_goes_on_with_the_options_default(
    older, stopped, tiny_folder, tiny_task, tmp_path
):
    shutil.copytree(older, tmp_path / "run")
    status, _, err = call("train", *arguments(tiny_folder, tiny_task, tmp_path / "run", "--resume"))
    assert status == 0 and "step-00000003: step 3 of 6" in err and "warning" not in err
    for name in ("model.safetensors", LOG):
        assert (tmp_path / "run" / name).read_bytes() == (stopped.parent / "whole" / name).read_bytes(), name
    assert (tmp_path / "run" / "run.json").read_bytes() == (older / "run.json").read_bytes()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lr-schedule", "constant"], "--lr-schedule was linear, now constant"),
        (["--seed", "7"], "--seed was 42, now 7"),
        (
            ["--dps", "mix", "--dps-update-ratio", "0.5"],
            "--dps was off, now mix; --dps-update-ratio was 0.05, now 0.5",
        ),
        (
            ["--peft", "lora", "--lora-targets", "key"],
            "--peft was none, now lora; --lora-targets was ['query', 'value'], now ['key']",
        ),
    ],
)
def test_an_option_that_is_newer_than_the_run_is_refused_where_it_is_not_its_default(
    options, message, older, tiny_folder, tiny_task
):
    line = refused(*call("train", *arguments(tiny_folder, tiny_task, older, "--resume", *options)))
    assert f"{older} is of another run: {message}" in line


def test_a_checkpoint_that_lacks_what_a_run_has_now_is_an_error_that_names_it(tmp_path):
    train(tmp_path / "run", EVERY)
    last = max((tmp_path / "run" / CHECKPOINTS).iterdir())
    state = read_checkpoint(last)
    del state["trainer"]["lr_schedule"]
    write_checkpoint(last, state)
    with pytest.raises(InputError, match=f"^--resume: {last} lacks 'lr_schedule', expected a checkpoint of progtuning"):
        train(tmp_path / "run", replace(EVERY, resume=True))


def test_other_versions_are_a_warning(tmp_path, capsys):
    train(tmp_path / "run", EVERY)
    path = tmp_path / "run" / "run.json"
    path.write_text(path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    train(tmp_path / "run", replace(EVERY, resume=True))
    assert f"warning: {tmp_path / 'run'} was begun with " in capsys.readouterr().err


def test_resuming_what_was_never_begun_begins_it_and_says_so(tiny_folder, tiny_task, tmp_path):
    status, _, error = call("train", *arguments(tiny_folder, tiny_task, tmp_path / "run", "--resume"))
    assert status == 0 and f"{tmp_path / 'run'} has no run to go on with: one begins." in error


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "relu"}, "the model's hidden_act was gelu, now relu"),
        ({"layer_norm_eps": 0.1}, "the model's layer_norm_eps was 1e-12, now 0.1"),
        ({"num_attention_heads": 4}, "the model's num_attention_heads was 2, now 4"),
        ({"hidden_dropout_prob": 0.5}, "the model's hidden_dropout_prob was 0.1, now 0.5"),
    ],
)
def test_a_model_whose_config_has_changed_is_another(change, message, stopped, tiny_folder, tiny_task, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    line = refused(*call("train", *arguments(model, tiny_task, stopped, "--resume")))
    assert line.endswith(f"{stopped} is of another run: {message}")
    (model / "config.json").write_text(json.dumps(config))
    assert call("train", *arguments(model, tiny_task, stopped, "--resume", "--dry-run"))[0] == 0


def test_a_run_begun_before_the_architecture_was_taken_note_of_goes_on(stopped, tiny_folder, tiny_task, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    del run["identity"]["architecture"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    assert call("train", *arguments(tiny_folder, tiny_task, tmp_path / "run", "--resume", "--dry-run"))[0] == 0
