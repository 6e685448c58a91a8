"""Stop and resume: a run's output folder, its log, and the checkpoints from which it goes on, bit for bit on a CPU.

    output folder/
      run.json           what makes the run what it is: settings, and digests of data, tokenizer and weights
      metrics.jsonl      the log; the process that trains holds a lock on it
      checkpoints/
        step-00000120/   what changes while it trains: the state of the run, and the length of the log
          state.safetensors, state.json    the tensors, and the rest
          manifest.json                    bytes and SHA-256 of both

A checkpoint is written under a temporary name, synced to the disk and renamed, so that a folder with its final name is
whole unless the disk damages it later, which the manifest shows. Nothing here reads or writes a pickle.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from progtuning import __version__
from progtuning.base.errors import InputError
from progtuning.base.files import check_new_folder, new_folder, read_json, temporary_of, write_json
from progtuning.report.summary import LOG, RUN
from progtuning.run.best import Best
from progtuning.run.checkpoint import FORMAT, read_checkpoint, write_checkpoint
from progtuning.run.identity import check_same
from progtuning.run.log import CHECKPOINTS, RunLog, warn
from progtuning.run.state import load_state_dict, state_dict
from progtuning.settings.train import CheckpointConfig
from progtuning.step.processes import World


class RunFolder:
    """The output folder of a run while it is on, which one run at a time may hold; with `path` None nothing is written.

    The processes of `world` call all of its methods together; rank 0 alone writes, and its log alone has a file.

    A new run makes the folder and `run.json`; one that resumes must find its own. `identity` returns what `identify`
    does. Raises InputError where the folder holds anything else, where another process trains into it, or where its run
    is another: the message says in what. Raises RunError where the disk refuses.
    """

    def __init__(
        self,
        path: str | Path | None,
        options: CheckpointConfig,
        identity: Callable[[], Mapping],
        say: Callable[[str], None] = lambda text: None,
        world: World = World(),
    ):
        self.path = None if path is None else Path(path)
        self.options = options
        self.say = say
        self.world = world
        self.log = RunLog(None)
        self.is_resumed = False
        self._saved_step = None
        if self.path is None:
            return
        with world.agreed():
            if world.is_main:
                self._open(identity)
        self.is_resumed = world.first(self.is_resumed)

    def _open(self, identity: Callable[[], Mapping]) -> None:
        options = self.options
        check_output_folder(self.path, options.resume)
        if not self.path.is_dir():
            new_folder(self.path)
        self.log = RunLog(self.path)
        try:
            self.is_resumed = options.resume and is_run(self.path)
            if not self.is_resumed and not _is_blank(self.path):  # another run has been in it since the check
                check_new_folder(self.path)
            run = described(identity())
            if self.is_resumed:
                begun = read_json(self.path / RUN)
                check_same(begun, run, self.path)
                run = begun  # its checkpoints name it as it was begun, before an option that is newer
                self._clear()
            else:
                self.log.rewind(0)
                write_json(self.path / RUN, run)
            self._digest = hashlib.sha256(json.dumps(run["identity"], sort_keys=True).encode()).hexdigest()
        except BaseException:
            self.log.close()
            raise

    def save(self, trainer, best: Best) -> None:
        """Write a checkpoint of `trainer` (a `train.Trainer` between two steps) and of the best evaluation so far, and
        remove those that are too many.

        Raises RunError where the disk refuses, and what `run.state.state_dict` raises;
        earlier checkpoints are left alone then.
        """
        if self.path is None or trainer.step == self._saved_step:
            return
        state = state_dict(trainer)
        with self.world.agreed():
            if self.world.is_main:
                self._write(trainer.step, state, best)
        self._saved_step = trainer.step

    def _write(self, step: int, state: Mapping, best: Best) -> None:
        state = {"run": self._digest, "trainer": state, "best": best.state_dict(), "log_bytes": self.log.sync()}
        write_checkpoint(self.path / CHECKPOINTS / _checkpoint_name(step), state)
        for old in [path for path in checkpoints_of(self.path) if step_of(path.name) <= step][: -self.options.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(self, trainer, best: Best) -> None:
        """Bring a new `trainer`, `best` and the log to the last good checkpoint; where there is none they stay at the
        start.

        Checkpoints that are damaged are passed over, with a warning, and removed once a good one is found. Raises
        InputError where there are checkpoints and all are damaged, or where the last good one, of an older version,
        lacks what a run has now.
        """
        if self.path is None:
            return
        if not self.is_resumed:
            if self.options.resume:
                self.say(f"{self.path} has no run to go on with: one begins.")
            return
        checkpoint, state = None, None
        with self.world.agreed():
            if self.world.is_main:
                checkpoint, state = self._last_good()
        checkpoint = self.world.first(checkpoint and str(checkpoint))
        if checkpoint is None:
            self.say(f"{self.path} has no checkpoint yet: the run starts from the beginning.")
            return
        with self.world.agreed():
            state = state or read_checkpoint(Path(checkpoint))  # the folder is one that all processes can read
            try:
                load_state_dict(trainer, state["trainer"])
                best.load_state_dict(state["best"])
            except KeyError as error:
                message = f"--resume: {checkpoint} lacks {error}, expected a checkpoint of progtuning as it is now"
                raise InputError(message) from None
        self._saved_step = trainer.step
        self.say(f"Resumed from {checkpoint}: step {trainer.step} of {trainer.num_steps}.")

    def _last_good(self) -> tuple[Path | None, dict | None]:
        """Return the last good checkpoint and what is in it, None where there is none.

        The log is brought to it, and what is damaged removed.
        """
        found = checkpoints_of(self.path)
        for checkpoint in reversed(found):
            try:
                state = self._read(checkpoint)
                break
            except InputError as error:
                warn(f"checkpoint passed over: {error}")
        else:
            if found:
                raise InputError(f"--resume: {self.path / CHECKPOINTS}: none of its {len(found)} checkpoints is good")
            self.log.rewind(0)
            return None, None
        self.log.rewind(state["log_bytes"])
        for damaged in found[found.index(checkpoint) + 1 :]:
            shutil.rmtree(damaged, ignore_errors=True)
        return checkpoint, state

    def _clear(self) -> None:
        """Remove what a process that was killed had not finished writing."""
        for folder in unfinished_checkpoints_of(self.path):
            shutil.rmtree(folder, ignore_errors=True)
        for file in self.path.glob(".*.tmp"):
            if temporary_of(file.name) and file.is_file():
                file.unlink(missing_ok=True)

    def _read(self, checkpoint: Path) -> dict:
        state = read_checkpoint(checkpoint)
        if state.get("run") != self._digest:
            raise InputError(f"{checkpoint}: written by another run")
        if state["log_bytes"] > self.log.size():
            raise InputError(f"{self.path / LOG}: got {self.log.size()} bytes, expected at least {state['log_bytes']}")
        return state

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error) -> None:
        self.log.close()


def described(identity: Mapping) -> dict:
    """Return what `run.json` holds of a run that is what `identify` says."""
    versions = {"progtuning": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    run = {"format": FORMAT, "identity": identity, "versions": versions}
    return json.loads(json.dumps(run))  # tuples become lists, as they are in the file


def _checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of the checkpoint that is called exactly so; None for other names, as of a person's copy."""
    match = re.fullmatch("step-([0-9]{8,})", name)
    return int(match[1]) if match and name == _checkpoint_name(int(match[1])) else None


def checkpoints_of(run: Path) -> list[Path]:
    """Return the checkpoints in the output folder of a run, in the order of their steps."""
    found = [path for path in run.glob(f"{CHECKPOINTS}/step-*") if step_of(path.name) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path.name))


def unfinished_checkpoints_of(run: Path) -> list[Path]:
    """Return the folders in which `write_checkpoint` was writing when it was killed, or is writing now."""
    found = run.glob(f"{CHECKPOINTS}/.step-*.tmp")
    return [path for path in found if step_of(path.name[1:].removesuffix(".tmp")) is not None and path.is_dir()]


def is_run(path: str | Path) -> bool:
    """Say whether a folder is the output folder of a run, begun or finished."""
    return (Path(path) / RUN).is_file()


def check_output_folder(path: str | Path, resume: bool) -> None:
    """Raise InputError where `path` is neither new nor empty, nor, to resume, the folder of a run."""
    if not os.fspath(path) or not resume or not os.path.lexists(path):
        check_new_folder(path)
        return
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"--resume needs the output folder of a run, got the file {path}")
    elif not is_run(path) and not _is_blank(path):
        raise InputError(f"--resume needs the output folder of a run, got {path} with files in it and no {RUN}")


def _is_blank(path: Path) -> bool:
    """Say whether a folder is absent, or has at most what a run leaves that was killed before its `run.json`."""
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    log = path / LOG
    is_empty = not log.exists() or log.stat().st_size == 0
    return is_empty and all(name == LOG or temporary_of(name) == RUN for name in names)
