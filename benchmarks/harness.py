"""What the benchmarks share: variants of a step timed in turns, FLOPs and saved bytes counted, the account of how.

A variant is one way to do a training step. All of them lie in one process and take turns: in every round each of them,
in an order drawn anew, does one step to warm up and then the timed ones, so that what disturbs the machine disturbs
them alike. The figures are medians; a ratio is taken within each round, and its median is printed.
"""

import gc
import json
import random
import shlex
import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from progtuning.base.errors import InputError, RunError
from progtuning.base.files import read_json
from progtuning.report.summary import Speed
from progtuning.report.tables import PHASES
from progtuning.settings.train import PRECISIONS
from progtuning.step import measure
from progtuning.step.device import choose_device, forward_pass
from progtuning.step.measure import Clock, peak_bytes, reset_peak_bytes

RESULTS = Path(__file__).parent / "results"
MAX_GRAD_NORM = 1.0
_PACKAGES = ("transformers", "accelerate", "peft", "numpy")


@dataclass
class Variant:
    """One way to do a training step of `model`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]  # the forward pass
    enter: Callable[[], None]  # makes the model ready: what trains, in which mode


@dataclass
class Timing:
    """What the rounds of one variant took."""

    rounds: list[dict[str, float]] = field(default_factory=list)  # of each round the median milliseconds of every phase
    peak_bytes: int | None = None  # allocated on CUDA, in the last round
    out_of_memory: bool = False

    def milliseconds(self, *phases: str) -> float | None:
        """Return the median over the rounds of the phases' sum; None where there was no memory for a step."""
        return None if self.out_of_memory else statistics.median(_sum(one, phases) for one in self.rounds)

    def ratio(self, base: "Timing", *phases: str) -> dict[str, float] | None:
        """Return median, lowest and highest over the rounds of this variant's time by `base`'s in the same round."""
        if self.out_of_memory or base.out_of_memory:
            return None
        ratios = [_sum(own, phases) / _sum(other, phases) for own, other in zip(self.rounds, base.rounds, strict=True)]
        return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def _sum(one_round: Mapping[str, float], phases: Sequence[str]) -> float:
    return sum(one_round[phase] for phase in phases)


def take_turns(
    variants: Mapping[str, Variant], rounds: int, steps: int, device: torch.device, precision: str
) -> Iterator[dict[str, Timing]]:
    """Time `steps` steps of every variant in every round; yield the same timings, one round richer, after each.

    A variant for which the memory does not suffice is marked and takes no further turn.
    """
    timings = {name: Timing() for name in variants}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(variants), len(variants)):
            timing = timings[name]
            if timing.out_of_memory:
                continue
            turn = in_memory(variants[name], lambda: time_turn(variants[name], steps, device, precision))
            if turn is None:
                timing.out_of_memory = True
            else:
                timing.rounds.append(turn[0])
                timing.peak_bytes = turn[1]
        yield timings


def time_turn(
    variant: Variant, steps: int, device: torch.device, precision: str
) -> tuple[dict[str, float], int | None]:
    """Return the median milliseconds of every phase over `steps` steps, after one to warm up, and the peak bytes.

    The peak is that of CUDA, None elsewhere. There the steps are queued one after the other, and the host waits for
    the device only at the end.
    """
    variant.enter()
    train_step(variant, Clock(device), device, precision)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        reset_peak_bytes(device)
    clocks = [Clock(device) for _ in range(steps)]
    for clock in clocks:
        train_step(variant, clock, device, precision)
    seconds = [clock.seconds() for clock in clocks]
    medians = {phase: 1000 * statistics.median(one[phase] for one in seconds) for phase in PHASES}
    return medians, peak_bytes(device) if device.type == "cuda" else None


def speed(timing: Timing, batch: int, tokens: int, slots: int, flops: int | None, peak: float) -> dict | None:
    """Return the speed of a whole step on `batch` examples, as `summary.json` has it; None without a measurement."""
    milliseconds = timing.milliseconds(*PHASES)
    if milliseconds is None or flops is None:
        return None
    return asdict(Speed.of(batch, tokens, slots, flops, milliseconds / 1000, peak))


def train_step(variant: Variant, clock: Clock, device: torch.device, precision: str) -> None:
    """One step: forward, backward, and as "optimizer" the clipping, the update and the release of the gradients."""
    with clock.phase("forward"), forward_pass(device, precision):
        loss = variant.loss()
    with clock.phase("backward"):
        loss.backward()
    with clock.phase("optimizer"):
        clip_grad_norm_([p for group in variant.optimizer.param_groups for p in group["params"]], MAX_GRAD_NORM)
        variant.optimizer.step()
        variant.optimizer.zero_grad()


def in_memory(variant: Variant, run: Callable):
    """Return what `run` returns, or None where the memory does not suffice, which is given back."""
    try:
        return run()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
    variant.optimizer.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def count_flops(variant: Variant, device: torch.device, precision: str) -> tuple[int, int]:
    """Return the FLOPs of a forward and of a backward pass by PyTorch's counter, attention as two products ("math")."""
    variant.enter()
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH):
        with forward, forward_pass(device, precision):
            loss = variant.loss()
        with backward:
            loss.backward()
    variant.optimizer.zero_grad()
    return forward.get_total_flops(), backward.get_total_flops()


def saved_for_backward(variant: Variant, device: torch.device, precision: str) -> int:
    """Return the bytes that autograd holds between the passes, parameters left out: distinct storages of any dtype.

    The kernels are those of the timed steps; what autocast casts of the weights is held too, and counts.
    """
    variant.enter()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in variant.model.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # holding it keeps the address from being used again
        return tensor.detach()  # with its node, the graph would hold itself in memory

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), forward_pass(device, precision):
        variant.loss()
    return sum(storage.nbytes() for storage in kept.values())


def attention_backend(variant: Variant, device: torch.device, precision: str) -> str:
    """Name what runs scaled_dot_product_attention in the blocks that train.

    A fused kernel is a node of its own in the graph; without one it is "math", two products and a softmax.
    """
    variant.enter()
    with forward_pass(device, precision):
        loss = variant.loss()
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().startswith("ScaledDotProduct"):
            return node.name().removeprefix("ScaledDotProduct").removesuffix("Backward0")
        stack.extend(following for following, _ in node.next_functions)
    return "math"


def environment(device: torch.device, settings: Mapping) -> dict:
    """Return what a reader must know of figures, and what figures of one table have in common."""
    here = measure.environment(device)
    return here | {"versions": here["versions"] | _versions(), "settings": dict(settings)}


def this_run(script: str, arguments: Sequence[str]) -> dict:
    """Return date and command of the run of a benchmark."""
    command = shlex.join(["python", f"benchmarks/{Path(script).name}", *arguments])
    return {"date": date.today().isoformat(), "command": command}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def open_document(path: Path, made: Mapping, run: Mapping) -> dict:
    """Return the document of earlier runs in the same environment with `run` added, or a new one without rows.

    Raises InputError where the file was measured elsewhere or with other settings.
    """
    document = read_json(path) if path.exists() else {**made, "runs": [], "rows": []}
    for key, value in made.items():
        if document.get(key) != value:
            raise InputError(f"{path} was measured with {key} {document.get(key)}, got {value}: give another --output")
    if run not in document["runs"]:
        document["runs"].append(run)
    return document


def describe(document: Mapping) -> str:
    """Return the lines that stand above a table: environment, settings and runs of the document."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    settings = ", ".join(f"{name} {value}" for name, value in document["settings"].items())
    return "\n".join(
        [
            f"- Device: {document['device']} ({document['processor']})",
            f"- Versions: {versions}",
            f"- Settings: {settings}",
            *(f"- Run: {run['date']}, `{run['command']}`" for run in document["runs"]),
        ]
    )


def add_step_options(parser: ArgumentParser, steps: int) -> None:
    """Add the options that all scripts which time steps have; `parse_steps` fills in what depends on the device."""
    parser.add_argument("--batch-size", type=int, help="default: 32 on CUDA, else 8")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: bf16 on CUDA, else fp32")
    parser.add_argument("--device", help="cpu or cuda; default: CUDA where there is one")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every variant")
    parser.add_argument("--steps", type=int, default=steps, help="timed steps a turn")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")


def parse_steps(parser: ArgumentParser, arguments: Sequence[str], *positive: str) -> Namespace:
    """Parse. Raises InputError where an option of `add_step_options`, or one named in `positive`, is less than 1."""
    args = parser.parse_args(arguments)
    check_positive(args, "batch_size", "rounds", "steps", *positive)
    args.device = choose_device(args.device).type
    cuda = args.device == "cuda"
    args.batch_size = args.batch_size or (32 if cuda else 8)
    args.precision = args.precision or ("bf16" if cuda else "fp32")
    return args


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a file of JSON lines, none where it is not there yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def append_row(path: Path, row: Mapping) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Return mean and standard deviation over the seeds."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def number(value: float | None, form: str) -> str | None:
    """Return the cell of a table: empty where there is no value."""
    return None if value is None else format(value, form)


def check_positive(args: Namespace, *names: str) -> None:
    """Raise InputError that names the option where one of these options, each a number or several, is less than 1."""
    for name in names:
        value = getattr(args, name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {one}")


def run_script(main: Callable) -> None:
    """Run the main function of a script. What was given wrong, or failed, is one line and exit status 2, or 1."""
    try:
        main(sys.argv[1:])
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
