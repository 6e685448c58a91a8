"""What options that change no result do to a training step: time and memory, by the share of padding.

    python benchmarks/step_options.py                                                    # CUDA: all of it
    python benchmarks/step_options.py --variants plain checkpointed --models bert-base-uncased --device cpu

    plain           rows padded to the longest of the batch
    unpadded        --unpadded: real tokens alone, but in attention
    compiled        --compile
    both            --compile --unpadded
    graphs          --cuda-graphs; give --rounds 3: the first is recorded in
    recorded        --compile --cuda-graphs
    checkpointed    --checkpoint-activations
    cudnn           plain, with cuDNN's kernel of attention, which a run does not take

A batch has rows of evenly spread lengths, so that `--paddings` is its share of padding. Full fine-tuning, all blocks.
The table has each variant's time and the memory that a step adds, of plain, and the ideal: FLOPs in closed form, of
real tokens where unpadded; bytes of activations, gradients and what a block works with. On a CPU the memory is the
resident set, which does not tell one variant from those before it: it is there where one is given alone.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import harness
import torch
from harness import Timing, Variant
from torch import Tensor
from torch.nn import functional as F

from progtuning.base.errors import InputError
from progtuning.base.files import write_json, write_text
from progtuning.cost import closed_form
from progtuning.cost.closed_form import ON_CPU, ON_CUDA, Kernels
from progtuning.engine import StageEngine
from progtuning.model.bert import Model, build_model
from progtuning.model.config import ARCHITECTURES, BertConfig
from progtuning.report import tables
from progtuning.settings.peft import PeftConfig
from progtuning.speed.checkpointing import checkpoint_blocks
from progtuning.speed.graphs import graph_blocks
from progtuning.speed.kernels import compile_blocks
from progtuning.speed.unpad import unpad
from progtuning.stages import Stage
from progtuning.step.device import choose_device
from progtuning.step.measure import peak_bytes, reset_peak_bytes
from progtuning.step.optim import build_optimizer

SHAPES = {"bert-base-uncased": 128, "bert-large-uncased": 384, "minilm-l6": 128}  # tokens
PARTS: dict[str, list[Callable[[Model], None]]] = {
    "plain": [],
    "unpadded": [unpad],
    "compiled": [compile_blocks],
    "both": [unpad, compile_blocks],
    "graphs": [graph_blocks],
    "recorded": [compile_blocks, graph_blocks],
    "checkpointed": [checkpoint_blocks],
    "cudnn": [],
}


ON_CUDA_ALONE = ("cudnn", "graphs", "recorded")


@lru_cache(maxsize=1)
def built(config: BertConfig, device: torch.device) -> Model:
    return build_model(config).to(device)


class Step:
    """A model of its own with one variant's options, and a batch."""

    def __init__(self, name: str, config: BertConfig, batch: int, length: int, padding: float, device: torch.device):
        self.name, self.device = name, device
        model = copy.deepcopy(built(config, device)).train()
        for change in PARTS[name]:
            change(model)
        self.optimizer = build_optimizer(model, lr=1e-5)
        self.engine = StageEngine(model, self.optimizer)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, config.vocab_size, (batch, length), generator=generator)
        lengths = torch.linspace(length * (1 - 2 * padding), length, batch).round().clamp(min=1)
        self.tokens = int(lengths.sum())
        self.ids, self.labels = ids.to(device), (ids[:, 0] % config.num_outputs).to(device)
        self.mask = (torch.arange(length) < lengths[:, None]).to(device) if padding else None
        self.before = 0  # bytes that are held between two steps

    @property
    def is_unpadded(self) -> bool:
        return unpad in PARTS[self.name]

    @property
    def is_recorded(self) -> bool:
        """Whether its steps work in a pool of memory that PyTorch does not count while they are replayed."""
        return graph_blocks in PARTS[self.name]

    def variant(self) -> Variant:
        return Variant(self.engine, self.optimizer, self.loss, self.enter)

    def enter(self) -> None:
        blocks = self.engine.num_blocks
        self.engine.train().enter(Stage(0, blocks, 0, True))
        self.before = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def loss(self) -> Tensor:
        torch.backends.cuda.enable_cudnn_sdp(self.name == "cudnn")
        return F.cross_entropy(self.engine(self.ids, self.mask).float(), self.labels)


def row(
    step: Step, timing: Timing, plain: Timing | None, sizes: Callable[[bool], dict], slots: int, resident: int | None
) -> dict:
    """Return a variant's measured ratios to plain, where that took its turns too, and the ideal beside each.

    `resident` is the resident set before the first step, None where it tells no memory of a step.
    """
    added = None if timing.peak_bytes is None or step.is_recorded else timing.peak_bytes - step.before
    if resident is not None:
        added = peak_bytes(step.device) - resident
    found = sizes(step.name == "checkpointed")
    return {
        "variant": step.name,
        "milliseconds": timing.milliseconds(*tables.PHASES),
        "step_measured": plain and timing.ratio(plain, *tables.PHASES),
        "step_ideal": found["flops"] / sizes(False)["flops"] * (step.tokens / slots if step.is_unpadded else 1),
        "tokens_per_second": 1000 * step.tokens / timing.milliseconds(*tables.PHASES),
        "share_of_tokens": step.tokens / slots,
        "added_bytes": added,
        "closed_form_bytes": found["bytes"],
    }


def sizes_of(config: BertConfig, batch: int, length: int, kernels: Kernels, on_cpu: bool, checkpointed: bool) -> dict:
    """Return the FLOPs of a step, and the bytes that it adds to parameters and moments (on a CPU: with them)."""
    kernels = replace(kernels, checkpointed=checkpointed)
    stage = Stage(0, config.num_hidden_layers, 0, True)
    found = closed_form.stage_bytes(config, stage, PeftConfig(), batch, length, kernels)
    active = closed_form.units(config).during(stage)
    held = 0 if on_cpu else found["parameter_bytes"] + found["optimizer_bytes"]
    flops = sum(closed_form.step_flops(config, active, PeftConfig(), batch, length, checkpointed))
    return {"flops": flops, "bytes": sum(found.values()) - held}


def measure(name: str, padding: float, dropout: float, args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Return the rows of a model at one share of padding."""
    length = args.length or SHAPES[name]
    config = BertConfig.from_dict(ARCHITECTURES[name].to_dict() | {"attention_probs_dropout_prob": dropout})
    config = config.with_head("classification", ("no", "yes"))
    built(config, device)
    wanted = [one for one in args.variants if padding or one not in ("unpadded", "both")]
    wanted = [one for one in wanted if device.type == "cuda" or one not in ON_CUDA_ALONE]
    reset_peak_bytes(device)
    resident = peak_bytes(device) if device.type == "cpu" and len(wanted) == 1 else None
    steps = {one: Step(one, config, args.batch_size, length, padding, device) for one in wanted}
    variants = {one: step.variant() for one, step in steps.items()}
    *_, timings = harness.take_turns(variants, args.rounds, args.steps, device, args.precision)
    kernels = ON_CPU if device.type == "cpu" else ON_CUDA[args.precision]
    sizes = partial(sizes_of, config, args.batch_size, length, kernels, device.type == "cpu")
    plain = timings.get("plain")
    common = {"model": name, "length": length, "padding": padding, "attention_dropout": dropout}
    slots = args.batch_size * length
    return [common | row(steps[one], timings[one], plain, sizes, slots, resident) for one in wanted]


def table(rows: Sequence[dict]) -> str:
    header = ["model", "tokens", "padding", "attention dropout", "variant", "step, ms", "of plain", "FLOPs, of plain"]
    header += ["tokens/s", "a step adds, MiB", "closed form, MiB"]
    cells = [
        [row["model"], row["length"], f"{row['padding']:.2f}", f"{row['attention_dropout']:g}", row["variant"]]
        + [f"{row['milliseconds']:.1f}", harness.number((row["step_measured"] or {}).get("median"), ".2f")]
        + [f"{row['step_ideal']:.2f}"]
        + [f"{row['tokens_per_second']:,.0f}"]
        + [
            harness.number(row[key] and row[key] / 2**20, ",.0f") if row["variant"] in ("plain", "checkpointed") else ""
            for key in ("added_bytes", "closed_form_bytes")
        ]
        for row in rows
    ]
    return tables.table(header, cells)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["bert-base-uncased", "bert-large-uncased"])
    parser.add_argument("--length", type=int, help="tokens (128, of bert-large 384)")
    parser.add_argument("--paddings", nargs="+", type=float, default=[0, 0.1, 0.2, 0.4], help="shares of padding")
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.1, 0], help="of attention")
    parser.add_argument("--variants", nargs="+", choices=PARTS, default=list(PARTS))
    harness.add_step_options(parser, steps=3)
    args = harness.parse_steps(parser, arguments, "length")
    device = choose_device(args.device)
    if device.type == "cpu" and set(args.variants) <= set(ON_CUDA_ALONE):
        raise InputError(f"--variants {' '.join(args.variants)}: needs a CUDA device, got cpu")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"step_options_{args.device}_{args.precision}.json"
    settings = {key: getattr(args, key) for key in ("batch_size", "precision", "steps", "rounds")}
    document = harness.open_document(path, harness.environment(device, settings), harness.this_run(__file__, arguments))
    for name in args.models:
        for dropout in args.dropouts:
            for padding in args.paddings:
                document["rows"] += measure(name, padding, dropout, args, device)
                torch._dynamo.reset()
                write_json(path, document)
                text = f"# Options of a training step\n{harness.describe(document)}\n\n{table(document['rows'])}\n"
                write_text(path.with_suffix(".md"), text)
    print(table(document["rows"]))


if __name__ == "__main__":
    harness.run_script(main)
