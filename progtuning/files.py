"""Small files, read with errors that name them and written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from progtuning.errors import InputError, RunError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it is synced to disk and takes `path`'s place, on failure it is removed.

    Raises RunError where the disk refuses (full, read-only).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file with LF line ends, whole or not at all. Raises RunError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value) -> None:
    """Write `value` as indented UTF-8 JSON. NaN and infinity, which JSON lacks, are a ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path):
    """Read a UTF-8 JSON file. Raises InputError that names the file where it is missing, not UTF-8 or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    except (RecursionError, ValueError):  # ValueError: an integer of more digits than Python converts
        raise InputError(f"{path}: not JSON: nested too deeply, or a number too long") from None


def check_new_folder(path: str | Path, option: str = "--output-dir") -> None:
    """Raise InputError that names the option where `path` exists and is no empty folder."""
    path = Path(path)
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{option} must be a new or empty folder, got {path} with files in it")
    if path.exists() and not path.is_dir():
        raise InputError(f"{option} must be a new or empty folder, got the file {path}")


def new_folder(path: str | Path, option: str = "--output-dir") -> Path:
    """Create an empty folder, its parents too; one that exists and is empty will do. Raises InputError that names the option."""
    check_new_folder(path, option)
    return made_folder(path, option)


def made_folder(path: str | Path, option: str) -> Path:
    """Create a folder, its parents too, unless it exists. Raises InputError that names the option."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {path} cannot be made a folder: {error.strerror or error}") from None
    return Path(path)
