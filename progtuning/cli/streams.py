"""Standard streams: results are data, UTF-8 or an error; messages are for people, and may be lost."""

import io
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path

from progtuning.base.errors import RunError
from progtuning.base.files import made_folder, own_descriptor, write_text


@contextmanager
def standard_streams() -> Iterator[None]:
    """Make standard output UTF-8 and standard error one that loses what it cannot write.

    What was closed when Python began, of which the stream is None, gets the null device as its descriptor: else the
    next file that is opened would get it, and with it what libraries print there.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)
    if isinstance(sys.stdout, io.TextIOWrapper):  # half surrogate pairs, of file names, become JSON's escapes
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    with redirect_stderr(message_stream()):
        yield


class Messages(io.FileIO):
    """A descriptor for messages. What it does not take is lost: no run should fail for want of somebody who reads."""

    def write(self, data) -> int:
        written = None
        with suppress(OSError):
            written = super().write(data)
        return len(data) if written is None else written


def message_stream() -> io.TextIOBase:
    """Return a stream of Messages in place of standard error, or that itself where it has no descriptor."""
    old = sys.stderr
    try:
        descriptor = 2 if old is None else old.fileno()
    except (OSError, AttributeError):
        return old
    encoding = getattr(old, "encoding", "utf-8")
    buffer = io.BufferedWriter(Messages(descriptor, "w", closefd=False))
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True)


def several_processes() -> bool:
    """Whether the environment says, as torchrun's does, that this process is one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def let_first_speak() -> None:
    """Before an error that all processes of a torchrun meet, wait in all but its first: once that one has ended with
    the error, torchrun ends the others. Elsewhere, as where torchrun's variables are left in a shell, do nothing."""
    if several_processes() and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK") != "0":
        time.sleep(10)


def fail(status: int, error: object) -> int:
    print(f"progtuning: error: {one_line(error) or type(error).__name__}", file=sys.stderr)
    return status


def one_line(error: object) -> str:
    """Return an error's text as one line, without its middle where it is long: what was got may be a whole file."""
    text = " ".join(str(error).split())
    return text if len(text) <= 1500 else f"{text[:1000]} ... {text[-450:]}"


def print_json(value) -> None:
    put_line(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def put_line(text: str) -> None:
    put(text + "\n")


def put(text: str) -> None:
    """Write a result on standard output. Raises RunError where that is closed or full.

    Where its reader has gone, as `head` does, the program ends with status 1.
    """
    if sys.stdout is None:
        raise RunError("standard output is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        discard_output()
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from None
        raise RunError(f"standard output: cannot be written: {error.strerror or error}") from None


def is_standard_output(output: str) -> bool:
    """Say whether the value of --output is standard output, by whatever name."""
    return output == "-" or own_descriptor(output) == 1


def write_result(output: str, text: str) -> None:
    """Write a result into the file that --output names, its folder made, or for - on standard output.

    Raises InputError, and RunError where the disk or standard output refuses.
    """
    if output == "-":
        put(text)
    else:
        made_folder(Path(output).parent, "--output")
        write_text(output, text)


def tell_written(output: str) -> None:
    """Say where a result is, unless it is on standard output, which then holds nothing else."""
    if not is_standard_output(output):
        tell(f"Written: {output}")


def discard_output() -> None:
    """Let what standard output still holds, and what is to come, go nowhere: Python writes it when it ends."""
    with suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def tell(text: str) -> None:
    """Write on standard output what is kept in a file too: where that cannot be, nothing is lost."""
    with suppress(RunError, SystemExit):
        put_line(text)


def say(text: str) -> None:
    """Tell the person what happens, on standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)
