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

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from progtuning import __version__
from progtuning.bert import Model
from progtuning.checkpoint import base_digest, save_tensors
from progtuning.config import CheckpointConfig, TrainConfig
from progtuning.data.batching import EncodedRows
from progtuning.data.task import Task
from progtuning.data.tokenization import Tokenizer
from progtuning.distributed import World
from progtuning.errors import InputError, Interrupted, RunError
from progtuning.files import check_new_folder, new_folder, read_json, temporary_of, write_json
from progtuning.settings.options import option_name
from progtuning.state import load_state_dict, state_dict

RUN, LOG, CHECKPOINTS = "run.json", "metrics.jsonl", "checkpoints"
_TENSORS, _VALUES, _MANIFEST = "state.safetensors", "state.json", "manifest.json"
FORMAT = 1


def identify(
    settings: TrainConfig,
    task: Task,
    train_rows: EncodedRows,
    dev_rows: Mapping[str, EncodedRows],
    tokenizer: Tokenizer,
    model: Model,
    device: torch.device,
    processes: int = 1,
) -> dict:
    """Return what two runs must share for one to go on from the other's checkpoint. `model` is as it starts."""
    values = asdict(settings)
    del values["cache_limit"]  # changes no result
    return {
        "settings": values,
        "task": {"name": task.name, "labels": list(task.labels)},
        "training rows": train_rows.digest(),
        "held-out rows": {name: rows.digest() for name, rows in dev_rows.items()},
        "tokenizer": tokenizer.digest(),
        "weights": base_digest(model, held=()),
        "device": device.type,
        "processes": processes,
    }


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
            run = {
                "format": FORMAT,
                "identity": identity(),
                "versions": {"progtuning": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()},
            }
            run = json.loads(json.dumps(run))  # tuples become lists, as they are in the file
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

    def save(self, trainer) -> None:
        """Write a checkpoint of `trainer` (a `train.Trainer` between two steps) and remove those that are too many.

        Raises RunError where the disk refuses, and what `state.state_dict` raises;
        earlier checkpoints are left alone then.
        """
        if self.path is None or trainer.step == self._saved_step:
            return
        state = state_dict(trainer)
        with self.world.agreed():
            if self.world.is_main:
                self._write(trainer.step, state)
        self._saved_step = trainer.step

    def _write(self, step: int, state: Mapping) -> None:
        state = {"run": self._digest, "trainer": state, "log_bytes": self.log.sync()}
        write_checkpoint(self.path / CHECKPOINTS / _checkpoint_name(step), state)
        for old in [path for path in checkpoints_of(self.path) if step_of(path.name) <= step][: -self.options.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(self, trainer) -> None:
        """Bring a new `trainer` and the log to the last good checkpoint; where there is none they stay at the start.

        Checkpoints that are damaged are passed over, with a warning, and removed once a good one is found. Raises
        InputError where there are checkpoints and all are damaged, or where the last good one, of an older version,
        lacks what a run has now.
        """
        if self.path is None or not self.is_resumed:
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
    if not os.fspath(path) or not resume:
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


def check_same(found: object, ours: Mapping, folder: Path) -> None:
    """Raise InputError that names what differs between the identity in a `run.json` and ours.

    A setting that it lacks, of a run begun before there was the option, counts as the option's default.
    """
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("identity"), dict):
        raise InputError(f"{folder / RUN}: expected a file of format {FORMAT} with the key 'identity'")
    defaults = flatten(json.loads(json.dumps({"settings": asdict(TrainConfig())})))
    theirs, mine = dict(flatten(found["identity"])), dict(flatten(ours["identity"]))
    theirs = {key: value for key, value in defaults if key in mine} | theirs
    differing = [key for key in {**mine, **theirs} if theirs.get(key) != mine.get(key)]
    if differing:
        differences = "; ".join(_difference(key, theirs.get(key), mine.get(key)) for key in differing)
        raise InputError(f"--resume: {folder} is of another run: {differences}")
    before = found.get("versions")
    if before != ours["versions"]:
        warn(f"{folder} was begun with {before}, here is {ours['versions']}: it goes on, but perhaps not bit for bit")


def _difference(key: str, theirs: object, mine: object) -> str:
    kind, _, name = key.partition("/")
    if kind == "settings":
        return f"{option_name(TrainConfig, name)} was {theirs}, now {mine}"
    if kind == "processes":
        return f"it had {theirs} processes (torchrun), now {mine}"
    if kind in ("task", "device"):
        return f"{key.replace('/', ' ')} was {theirs}, now {mine}"
    return f"the {key.replace('/', ' ')} {'differ' if kind.endswith('s') else 'differs'}"


def write_checkpoint(path: Path, state: Mapping) -> None:
    """Write a nested dict of tensors and JSON values as the folder `path`, whole or not at all. Raises RunError."""
    leaves = dict(flatten(state))
    tensors = {key: value.cpu().contiguous() for key, value in leaves.items() if isinstance(value, Tensor)}
    values = {key: value for key, value in leaves.items() if key not in tensors}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_tensors(tensors, temporary / _TENSORS)
        (temporary / _VALUES).write_text(json.dumps(values, allow_nan=False), encoding="utf-8")
        files = {name: _describe(temporary / name) for name in (_TENSORS, _VALUES)}
        manifest = json.dumps({"format": FORMAT, **files}, indent=2)
        (temporary / _MANIFEST).write_text(manifest, encoding="utf-8")
        for place in (*temporary.iterdir(), temporary):
            _sync(place)
        if path.exists():  # damaged, or of the same step
            shutil.rmtree(path)
        os.rename(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_checkpoint(path: Path) -> dict:
    """Read what `write_checkpoint` wrote; the tensors are on the CPU. Raises InputError where it is damaged."""
    manifest = read_json(path / _MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path / _MANIFEST}: expected a manifest of format {FORMAT}")
    for name in (_TENSORS, _VALUES):
        try:
            found = _describe(path / name)
        except OSError as error:
            raise InputError(f"{path / name}: cannot be read: {error.strerror}") from None
        if manifest.get(name) != found:
            raise InputError(f"{path / name}: got {found}, expected {manifest.get(name)}: the file is damaged")
    values = read_json(path / _VALUES, max_bytes=manifest[_VALUES]["bytes"])  # grows with the processes
    return unflatten({**values, **load_file(path / _TENSORS)})


def _describe(path: Path) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def flatten(state: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Give the leaves of a nested dict under the keys on the way to them, joined by "/". An empty dict is a leaf."""
    for key, value in state.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def unflatten(leaves: Mapping) -> dict:
    state = {}
    for path, value in leaves.items():
        *parents, key = path.split("/")
        place = state
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
    return state


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunLog:
    """The rows of `metrics.jsonl`, kept and, where there is a folder, appended to the file at once.

    While it is open the file is locked; the system ends the lock with the process. Raises InputError where another
    process has it.
    """

    def __init__(self, folder: Path | None):
        self.rows: list[dict] = []
        self._file = None
        if folder is None:
            return
        self._file = open(folder / LOG, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            message = f"--output-dir {folder}: another run writes into it, expected a folder of its own"
            raise InputError(message) from None
        except OSError as error:
            warn(f"{folder / LOG} cannot be locked ({error.strerror}): let no other run write into {folder}")

    def __call__(self, row: dict) -> None:
        self.rows.append(row)
        if self._file:
            with self._writing():
                self._file.write((json.dumps(row, allow_nan=False) + "\n").encode())
                self._file.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"{self._file.name}: cannot be written: {error.strerror or error}") from None

    def size(self) -> int:
        """Return the length of the file in bytes."""
        return os.fstat(self._file.fileno()).st_size

    def sync(self) -> int:
        """Wait until the file is on the disk; return its length in bytes."""
        with self._writing():
            os.fsync(self._file.fileno())
        return self.size()

    def rewind(self, size: int) -> None:
        """Cut the file to its first `size` bytes, and read their rows. Raises InputError where they are none."""
        self._file.seek(0)
        lines = self._file.read(size).splitlines()
        try:
            self.rows = [json.loads(line) for line in lines]
        except ValueError:
            name = self._file.name
            raise InputError(f"{name}: changed since the checkpoint: expected a JSON document a line") from None
        self._file.truncate(size)

    def close(self) -> None:
        if self._file:
            with suppress(OSError):  # what could not be written has been told of
                self._file.close()


class StopSignals:
    """SIGINT and SIGTERM, in a `with` block of the main thread, as the exception Interrupted.

    It is raised where the signal hits, except inside `with signals.held()`: there it is noted, and `check` raises.
    Further signals while one is noted change nothing. In another thread than the main one signals do what they did.
    Where `world` has several processes, `check` raises in all of them what one has received.
    """

    def __init__(self, world: World = World()):
        self._world = world
        self._received: int | None = None
        self._is_held = False
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        self._received = number
        if not self._is_held:
            self._raise(number)

    def check(self) -> None:
        """Raise Interrupted where a signal has come."""
        received = self._world.max(self._received or 0)
        if received:
            self._raise(received)

    @staticmethod
    def _raise(number: int) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}", number)

    @contextmanager
    def held(self, held: bool = True) -> Iterator[None]:
        """Hold the signals back inside the block; with `held` False, let them through inside one that holds them."""
        before, self._is_held = self._is_held, held
        try:
            if not held:
                self.check()
            yield
        finally:
            self._is_held = before


def warn(text: str) -> None:
    """Tell the person, on standard error, what is not as it should be although the run goes on."""
    print(f"progtuning: warning: {text}", file=sys.stderr, flush=True)
