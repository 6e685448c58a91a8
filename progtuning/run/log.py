"""The log of a run: the rows of `metrics.jsonl`, and warnings."""

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from progtuning.base.checks import INFINITY, check_number
from progtuning.base.errors import InputError, RunError
from progtuning.report.summary import LOG

CHECKPOINTS = "checkpoints"


class RunLog:
    """The rows of `metrics.jsonl`, or of another file, kept and, where there is a folder, appended to the file at once.

    While it is open the file is locked; the system ends the lock with the process. Raises InputError where another
    process has it.
    """

    def __init__(self, folder: Path | None, name: str = LOG):
        self.rows: list[dict] = []
        self._file = None
        if folder is None:
            return
        self._file = open(folder / name, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            message = f"--output-dir {folder}: another run writes into it, expected a folder of its own"
            raise InputError(message) from None
        except OSError as error:
            warn(f"{folder / name} cannot be locked ({error.strerror}): let no other run write into {folder}")

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


def read_log(folder: Path) -> list[dict]:
    """Return the rows of a run's log that have a loss. Raises InputError that names the file where there are none."""
    path = folder / LOG
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError:
        rows = [None]
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected a JSON object a line")
    rows = [row for row in rows if "loss" in row]
    for row in rows:
        check_number(f"{path}: step", row.get("step"), int, low=1)
        check_number(f"{path}: loss", row["loss"], float, low=-INFINITY)
    if not rows:
        raise InputError(f"{path}: no row has a loss, expected the log of a run of train")
    return rows


def warn(text: str) -> None:
    """Tell the person, on standard error, what is not as it should be although the run goes on."""
    print(f"progtuning: warning: {text}", file=sys.stderr, flush=True)
