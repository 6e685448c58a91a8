"""Small files, read with errors that name them and written whole or not at all."""

import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from progtuning.base.errors import InputError, RunError

# Larger than any settings, index or summary; what JSON holds takes up to 30 times its bytes in memory.
MAX_JSON_BYTES = 1 << 23

# Why a file can be written, but none made beside it or put in its place: rights, and files that are mounted.
_NO_NEW_FILE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)
_MAX_DEPTH = 100  # of lists and objects within each other, well within what Python can compare, print and write again

# What `replacing` calls its temporary files: a name of nobody else's, since a run removes those that it finds.
_TEMPORARY = ".{name}.{process}.progtuning.tmp"


class RepeatedKey(ValueError):
    """A JSON object has a key twice. Readers differ in which of the two they take."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give the path of an empty temporary file, for what is to be written to `path`.

    Where the block ends well its bytes go to what `path` names, behind any symbolic links: as a plain file, at once,
    synced to disk, with the mode and where that may be the owner of the file that it replaces, or the umask's; into a
    device, a pipe or a descriptor of this process, as they come. Of a file with several hard links the other names keep
    what they have. A file whose folder takes no new one is overwritten. Otherwise nothing is written. Raises RunError
    where the disk refuses (full, read-only).
    """
    temporary = None
    try:
        place = plain_place(path)
        temporary = _new_file(place)
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, stat.S_IMODE(mode))  # a library may have put a file of its own there
        if not (place and temporary.parent == place.parent and _replace(temporary, place)):
            with open(temporary, "rb") as source, _open_into(path) as sink:
                shutil.copyfileobj(source, sink)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def plain_place(path: str | Path) -> Path | None:
    """Return where the plain file is that `path` names, or will be; None for anything else than a plain file."""
    place = Path(os.path.realpath(path))
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return place
    if not stat.S_ISREG(status.st_mode):
        return None
    os.close(os.open(path, os.O_WRONLY))  # lest a file that is read-only be replaced, for which its folder's rights do
    is_there = place.exists() and os.path.samestat(status, place.stat())  # not so behind /proc
    return place if is_there and own_descriptor(path) is None else None


def _new_file(place: Path | None) -> Path:
    """Create an empty file beside `place`, or in the folder for temporary files where that takes none."""
    if place:
        name = place.name[:50]  # a name has its limit
        path = place.with_name(_TEMPORARY.format(name=name, process=os.getpid()))
        try:
            path.unlink(missing_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            return path
        except OSError as error:
            if error.errno not in _NO_NEW_FILE or not place.exists():
                raise
    descriptor, path = tempfile.mkstemp()
    os.close(descriptor)
    return Path(path)


def _replace(temporary: Path, place: Path) -> bool:
    """Let a file take the place of another, whose owner and mode it gets. False where no other can stand there."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    with suppress(OSError):  # there is none, or the system does not allow it
        status = place.stat()
        for owner in ((-1, status.st_gid), (status.st_uid, -1)):
            with suppress(OSError):
                os.chown(temporary, *owner)
        os.chmod(temporary, stat.S_IMODE(status.st_mode))
    try:
        os.replace(temporary, place)
    except OSError as error:
        if error.errno not in _NO_NEW_FILE or not place.exists():
            raise
        return False
    return True


def _open_into(path: str | Path) -> BinaryIO:
    descriptor = own_descriptor(path)
    return open(os.open(path, os.O_WRONLY | os.O_TRUNC) if descriptor is None else os.dup(descriptor), "wb")


def own_descriptor(path: str | Path) -> int | None:
    """Return the descriptor of this process that a path as /dev/stdout or /dev/fd/3 names, None for any other."""
    path = os.path.abspath(path)
    for _ in range(40):  # as many links as Linux follows
        folder, name = os.path.split(path)
        if name.isdecimal() and os.path.realpath(folder) in (os.path.realpath("/proc/self/fd"), "/dev/fd"):
            return int(name)
        if not os.path.islink(path):
            return None
        path = os.path.join(os.path.realpath(folder), os.readlink(path))
    return None


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
    """Raise InputError that names the option where `path` exists and is no empty folder, or cannot be made one."""
    if not os.fspath(path):
        raise InputError(f"{option} must be a new or empty folder, got no name")
    path = Path(path)
    try:
        if path.is_dir() and any(path.iterdir()):
            raise InputError(f"{option} must be a new or empty folder, got {path} with files in it")
        if path.exists() and not path.is_dir():
            raise InputError(f"{option} must be a new or empty folder, got the file {path}")
        nearest = _nearest(path)
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        _check_writable(nearest)
    except OSError as error:
        raise InputError(f"{option} {path} cannot be made a folder: {error.strerror or error}") from None


def _nearest(path: Path) -> Path:
    """Return what exists of a path and the folders above it, the lowest."""
    while True:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
            return path
        path = path.parent


def check_output_file(path: str | Path, option: str = "--output") -> None:
    """Raise InputError that names the option where `path` cannot be written; its folder need not exist yet.

    - is standard output.
    """
    if os.fspath(path) == "-":
        return
    if not os.fspath(path):
        raise InputError(f"{option} must be a file, got no name")
    try:
        place = plain_place(path)
        if os.path.isdir(path) or os.fspath(path).endswith(os.sep):
            raise InputError(f"{option} {path} is a folder, expected the name of a file")
        if place is None and stat.S_ISSOCK(os.stat(path).st_mode):
            raise InputError(f"{option} {path} is a socket, expected a file, a pipe or a device")
        if place is None or place.exists():
            return
        folder = place.parent
        while not folder.exists() and not os.path.islink(path):  # where a link leads to no folder is made
            folder = folder.parent
        if not folder.is_dir():
            raise InputError(f"{option} {path}: {folder} is not a folder")
        _check_writable(folder)
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written: {error.strerror or error}") from None


def check_no_input(path: str | Path, inputs: Iterable[str | Path], option: str = "--output") -> None:
    """Raise InputError where `path` is a file among `inputs`, by any name or link; - is standard input or output."""
    with suppress(OSError):
        output = _status(path, 1)
        if not (stat.S_ISREG(output.st_mode) or stat.S_ISFIFO(output.st_mode)):  # a terminal may be both
            return
        for file in inputs:
            with suppress(OSError):
                if os.path.samestat(output, _status(file, 0)):
                    raise InputError(f"{option} {path} is the same file as the input {file}, which would be lost")


def _status(path: str | Path, descriptor: int) -> os.stat_result:
    return os.fstat(descriptor) if os.fspath(path) == "-" else os.stat(path)


def _check_writable(folder: Path) -> None:
    """Raise OSError where a folder takes no new file."""
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def new_folder(path: str | Path, option: str = "--output-dir") -> Path:
    """Create an empty folder, its parents too; one that exists and is empty will do.

    Raises InputError that names the option.
    """
    check_new_folder(path, option)
    return made_folder(path, option)


def made_folder(path: str | Path, option: str) -> Path:
    """Create a folder, its parents too, unless it exists. Raises InputError that names the option.

    One that takes no new file is an error too.
    """
    if not os.fspath(path):
        raise InputError(f"{option} must be a folder, got no name")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        _check_writable(Path(path))
    except OSError as error:
        raise InputError(f"{option} {path} cannot be made a folder: {error.strerror or error}") from None
    return Path(path)
