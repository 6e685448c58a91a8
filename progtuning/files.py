"""Small files, read with errors that name them and written whole or not at all."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from progtuning.errors import InputError, RunError

# Larger than any settings, index or summary; what JSON holds takes up to 30 times its bytes in memory.
MAX_JSON_BYTES = 1 << 23
_MAX_DEPTH = 100  # of lists and objects within each other, well within what Python can compare, print and write again
# What `replacing` calls its temporary files: a name of nobody else's, since a run removes those that it finds.
_TEMPORARY = ".{name}.{process}.progtuning.tmp"


class RepeatedKey(ValueError):
    """A JSON object has a key twice. Readers differ in which of the two they take."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, for what is to be written to `path`.

    On success it is synced to disk and takes `path`'s place, on failure it is removed. Raises RunError where the disk
    refuses (full, read-only).
    """
    path = Path(path)
    temporary = path.with_name(_TEMPORARY.format(name=path.name, process=os.getpid()))
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def temporary_of(name: str) -> str | None:
    """Return the name of the file that a temporary file of `replacing` was to become; None for every other file."""
    match = re.fullmatch(r"\.(.+)\.[0-9]+\.progtuning\.tmp", name, re.DOTALL)
    return match and match[1]


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file with LF line ends, whole or not at all. Raises RunError.

    The bytes of a path that are not UTF-8, which Python holds as half surrogate pairs,
    are written as JSON escapes them.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: str | Path, value) -> None:
    """Write `value` as indented UTF-8 JSON. NaN and infinity, which JSON lacks, are a ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path, max_bytes: int = MAX_JSON_BYTES):
    """Read a JSON file in UTF-8, with or without a byte-order mark. Raises InputError that names the file where it is
    missing, no plain file, longer than `max_bytes`, not UTF-8 or not JSON, or where an object has a key twice."""
    try:
        if Path(path).exists() and not Path(path).is_file():  # to open a pipe would wait for its writer
            raise InputError(f"{path}: not a file")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > max_bytes:
                raise InputError(f"{path}: got more than {max_bytes} bytes, expected JSON of at most that")
            content = file.read()
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        byte = len(content) - len(error.object) + error.start  # the object lacks the mark
        raise InputError(f"{path}: not UTF-8 (byte {byte})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    except RepeatedKey as error:
        raise InputError(f"{path}: {error}") from None
    except InputError:
        raise
    except (RecursionError, ValueError):  # ValueError: an integer of more digits than Python converts
        raise InputError(f"{path}: not JSON: nested too deeply, or a number too long") from None
    level = _containers([value])
    for _ in range(_MAX_DEPTH):
        level = [item for node in level for item in _containers(node.values() if isinstance(node, dict) else node)]
    if level:
        raise InputError(f"{path}: not JSON: nested too deeply, or a number too long")
    return value


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """Return the object of these members, as `object_pairs_hook` of the json module. Raises RepeatedKey."""
    values = dict(pairs)
    if len(values) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise RepeatedKey(f"key {key!r} stands twice in an object")
    return values


def _containers(values: Iterable) -> list:
    return [value for value in values if isinstance(value, (dict, list))]


def check_new_folder(path: str | Path, option: str = "--output-dir") -> None:
    """Raise InputError that names the option where `path` exists and is no empty folder."""
    if not os.fspath(path):
        raise InputError(f"{option} must be a new or empty folder, got no name")
    path = Path(path)
    try:
        if path.is_dir() and any(path.iterdir()):
            raise InputError(f"{option} must be a new or empty folder, got {path} with files in it")
        if path.exists() and not path.is_dir():
            raise InputError(f"{option} must be a new or empty folder, got the file {path}")
    except OSError as error:
        raise InputError(f"{option} {path} cannot be made a folder: {error.strerror or error}") from None


def new_folder(path: str | Path, option: str = "--output-dir") -> Path:
    """Create an empty folder, its parents too; one that exists and is empty will do.

    Raises InputError that names the option.
    """
    check_new_folder(path, option)
    return made_folder(path, option)


def made_folder(path: str | Path, option: str) -> Path:
    """Create a folder, its parents too, unless it exists. Raises InputError that names the option."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {path} cannot be made a folder: {error.strerror or error}") from None
    return Path(path)
