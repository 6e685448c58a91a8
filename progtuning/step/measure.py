"""What a run costs, measured: seconds of each phase on the device, and peak memory."""

import platform
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch.nn.attention import SDPBackend

from progtuning import __version__
from progtuning.model.config import BertConfig
from progtuning.step.device import forward_pass


class Clock:
    """Adds up the seconds that a device spends in named phases, from `seconds` on.

    On CUDA the phases are marked by events on the current stream, which cost no synchronisation while the work is
    queued; `seconds` waits for them. On a CPU they are read from the process's clock.
    """

    def __init__(self, device: torch.device, seconds: Mapping[str, float] | None = None):
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float, seconds or {})
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the `with` block as `name`'s."""
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._pending.append((name, begin, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begin

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every phase so far."""
        if self._pending:
            self._pending[-1][2].synchronize()
            for name, begin, end in self._pending:
                self._seconds[name] += begin.elapsed_time(end) / 1000  # milliseconds
            self._pending.clear()
        return dict(self._seconds)


def reset_peak_bytes(device: torch.device) -> None:
    """Begin a new measurement of the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: set VmHWM back to the present resident set
        except OSError:
            pass


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak since `reset_peak_bytes`: on CUDA PyTorch's allocations, else the process's resident set (Linux).

    None where the system does not tell. On a CPU memory that was freed may still be resident: this is an upper bound.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(line.split()[1]) * 1024 if line else None


def matmul_peak(device: torch.device, precision: str, size: int | None = None, repeats: int = 10) -> float:
    """Return the FLOP/s of the fastest of `repeats` products of two square matrices, in the precision of a run.

    It takes less than a second of a GPU, and draws nothing from the global generators.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    clocks = [Clock(device) for _ in range(repeats + 1)]
    for clock in clocks:
        with clock.phase("matmul"):
            a @ b
    return 2 * size**3 / min(clock.seconds()["matmul"] for clock in clocks[1:])  # the first warms up


def environment(device: torch.device) -> dict:
    """Return what a reader must know of figures that were taken here: device, processor and versions.

    The device is for example "NVIDIA H100 80GB HBM3" or "CPU, 2 threads".
    """
    cpu = f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "processor": _processor(),
        "versions": {"progtuning": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _processor() -> str:
    """Name the CPU: by /proc/cpuinfo on Linux, else as Python knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def attention_backends(config: BertConfig, device: torch.device, precision: str) -> dict[str, dict[str, str]]:
    """Return which kernel PyTorch's scaled_dot_product_attention takes on `device`: "math", "flash_attention", ...

    "training" is with gradients and the model's dropout of attention, "eval" without both, as in evaluation and in
    frozen blocks that do not drop out; each for batches with padding ("padded") and without ("unpadded"). PyTorch is
    asked by the function with which it chooses. On a CPU dropout of attention leaves only math, which keeps the
    probabilities in memory.
    """
    width = config.hidden_size // config.num_attention_heads
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    padding = torch.arange(64, device=device) < 48
    backends = {}
    for mode, dropout_prob in (("training", config.attention_probs_dropout_prob), ("eval", 0.0)):
        states = torch.zeros(2, config.num_attention_heads, 64, width, dtype=dtype, device=device)
        states.requires_grad_(mode == "training")
        with forward_pass(device, precision):
            backends[mode] = {
                batch: SDPBackend(torch._fused_sdp_choice(states, states, states, mask, dropout_prob)).name.lower()
                for batch, mask in (("padded", padding.expand(2, 1, 1, 64)), ("unpadded", None))
            }
    return backends


def free_memory(device: torch.device = torch.device("cpu")) -> int | None:
    """Return the bytes of memory that this process may still take, None where the system does not tell.

    Of a GPU that is what CUDA calls free. Of the host Linux tells: what is available, or what a control group leaves
    where that is less, the process's own or one above it, as SLURM, systemd and containers limit a job.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return max(0, min([available, *(left for group in _memory_groups() for left in group.left())]))


@dataclass(frozen=True)
class _MemoryGroup:
    """A control group of Linux: a folder, and the names under which its version keeps limits and use there, in bytes.

    See the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """

    folder: Path
    limits: tuple[str, ...]
    used: str
    cached: str  # files kept in memory, which make room when it is needed; a line of memory.stat

    def left(self) -> Iterator[int]:
        """Yield what each limit leaves; nothing where the group has none, or is hidden from this process."""
        statistics = dict(line.split(maxsplit=1) for line in self._read("memory.stat").splitlines())
        used, cached = self._read(self.used), statistics.get(self.cached, "0")
        limits = [self._read(name) for name in self.limits]
        limits.append(statistics.get("hierarchical_memory_limit", ""))  # version 1: the least of those above, too
        for limit in limits:
            if limit.isdecimal() and used.isdecimal():  # "max" is none
                yield int(limit) - int(used) + int(cached)

    def _read(self, name: str) -> str:
        try:
            return (self.folder / name).read_text().strip()
        except OSError:
            return ""


def _memory_groups() -> Iterator[_MemoryGroup]:
    """Yield the control groups that may limit this process's memory: its own, and those above it up to the root.

    A container may show its own group as the root while the path is that of the whole machine: a folder of the path
    is missing then, and the root has the limit.
    """
    v1 = (Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
    v2 = (Path("/sys/fs/cgroup"), ("memory.max", "memory.high"), "memory.current", "inactive_file")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:  # such as 9:memory:/docker/12ab of version 1, and 0::/user.slice of version 2
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            root, *names = v1 if controllers else v2
            group = PurePosixPath(path)
            for above in (group, *group.parents):
                yield _MemoryGroup(root / above.relative_to("/"), *names)


def free_disk(folder: str | Path) -> int:
    """Return the bytes that are free on the disk of `folder`."""
    return shutil.disk_usage(folder).free
