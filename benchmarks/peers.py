"""The same training step by this package, by transformers and by peft, in turns in one process.

    python benchmarks/peers.py                  # BERT-base, 8 x 128, on a CPU in fp32; 32 x 128 on CUDA in bf16
    python benchmarks/peers.py --padding 32     # rows of 96 to 128 real tokens, and a mask, on both sides

Both sides have random weights of one architecture, the same tokens, dropout 0.1 everywhere, attention by PyTorch's
scaled_dot_product_attention, AdamW in its fused kernel with the same two parameter groups, clipping to norm 1. What
differs is stated by the name of the variant:

    requires_grad   transformers or peft in train mode, requires_grad=False on E and the frozen blocks
    cut, eval       this package, the frozen blocks under no_grad and in eval mode (--no-prefix-dropout)
    cached          this package, the output of the frozen blocks is there already

Stages are those of three (--stages-of) shrinking stages. FLOPs are counted by PyTorch on both sides. Results go to
benchmarks/results/peers_<device>_<precision>.json and .md, after every round.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import peft
import torch
import transformers
from harness import Timing, Variant, number
from torch import Tensor, nn
from torch.nn import functional as F

from progtuning.base.files import write_json, write_text
from progtuning.engine import StageEngine
from progtuning.methods.apply import apply_peft
from progtuning.model.bert import build_model
from progtuning.model.config import ARCHITECTURES, BertConfig
from progtuning.model.names import BLOCK_LINEARS, EMBEDDINGS, HEAD, unit_of
from progtuning.report import tables
from progtuning.report.summary import Speed
from progtuning.settings.peft import PeftConfig
from progtuning.stages import Stage, make_schedule
from progtuning.step.device import choose_device, forward_pass
from progtuning.step.optim import build_optimizer

SETTINGS = ("model", "batch_size", "length", "padding", "precision", "stages_of", "steps")  # options
SEED, LR = 0, 1e-5
LORA = PeftConfig("lora")  # r = 8 on query and value
THEIRS_FULL, OURS_FULL = "transformers, full", "ours, full"


@dataclass(frozen=True)
class Batch:
    """Tokens (B, S) int64, their mask (B, S) bool or None where nothing is padded, and labels (B,) int64."""

    input_ids: Tensor
    mask: Tensor | None
    labels: Tensor

    @classmethod
    def random(cls, config: BertConfig, rows: int, length: int, padding: int, device: torch.device) -> "Batch":
        """Rows of length - padding to length tokens, evenly; the first is the longest."""
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(1, config.vocab_size, (rows, length), generator=generator)
        lengths = length - torch.linspace(0, padding, rows).round()
        mask = torch.arange(length) < lengths[:, None]
        ids, labels = ids.masked_fill(~mask, config.pad_token_id), ids[:, 0] % 2
        return cls(ids.to(device), mask.to(device) if padding else None, labels.to(device))


@dataclass(frozen=True)
class Entry:
    """A variant and what it is compared with: `peer` trains the same elsewhere, `full` all blocks on its side."""

    variant: Variant
    peer: str | None
    full: str


# This package


def ours(
    config: BertConfig, method: PeftConfig, stages: Sequence[Stage], batch: Batch, precision: str
) -> dict[str, Variant]:
    """Return full fine-tuning and every later stage, cut and cached, of one model; each stage has its own optimizer."""
    device = batch.input_ids.device
    model = build_model(config, SEED).to(device)
    apply_peft(model, method, SEED)
    full = StageEngine(model, build_optimizer(model, LR))
    engines = [StageEngine(model, build_optimizer(model, LR), prefix_dropout=False) for _ in stages[1:]]
    variants = {"full": _uncut(full, stages[0], batch)}
    for engine, stage in zip(engines, stages[1:]):
        variants[f"stage {stage.index + 1}, cut, eval"] = _uncut(engine, stage, batch)
        variants[f"stage {stage.index + 1}, cached"] = _cached(engine, stage, batch, precision)
    return variants


def _uncut(engine: StageEngine, stage: Stage, batch: Batch) -> Variant:
    return Variant(
        engine,
        engine.optimizer,
        loss=lambda: F.cross_entropy(engine(batch.input_ids, batch.mask).float(), batch.labels),
        enter=lambda: engine.train().enter(stage),
    )


def _cached(engine: StageEngine, stage: Stage, batch: Batch, precision: str) -> Variant:
    kept: list[Tensor] = []  # (B, S, D)

    def enter() -> None:
        engine.train().enter(stage)
        with forward_pass(batch.input_ids.device, precision):
            kept[:] = [engine.prefix(batch.input_ids, batch.mask)]

    def loss() -> Tensor:
        return F.cross_entropy(engine.suffix(kept[0], batch.mask).float(), batch.labels)

    return Variant(engine, engine.optimizer, loss, enter)


# transformers and peft


def theirs(config: BertConfig, with_lora: bool, stages: Sequence[Stage], batch: Batch) -> dict[str, Variant]:
    """Return full fine-tuning and every later stage by requires_grad, of one model; each has its own optimizer."""
    values = config.to_dict()
    del values["architectures"]
    model = transformers.BertForSequenceClassification._from_config(
        transformers.BertConfig(**values), attn_implementation="sdpa"
    ).to(batch.input_ids.device)
    if with_lora:
        targets = [BLOCK_LINEARS[target] for target in LORA.lora_targets]
        settings = {"r": LORA.lora_r, "lora_alpha": LORA.lora_alpha, "lora_dropout": LORA.lora_dropout}
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets, **settings))
    model.train()
    candidates = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = ["full", *(f"stage {stage.index + 1}, requires_grad" for stage in stages[1:])]
    return {name: _by_requires_grad(model, candidates, stage, batch) for name, stage in zip(names, stages)}


def _by_requires_grad(model: nn.Module, candidates: Mapping[str, nn.Parameter], stage: Stage, batch: Batch) -> Variant:
    def enter() -> None:
        for name, parameter in candidates.items():
            # bert.encoder.layer.0..., and under peft base_model.model.bert.encoder.layer.0...
            unit = unit_of(name.removeprefix("base_model.model.").removeprefix("bert."))
            trains = stage.embeddings if unit == EMBEDDINGS else unit == HEAD or unit in stage.blocks
            parameter.requires_grad_(trains)

    mask = torch.ones_like(batch.input_ids) if batch.mask is None else batch.mask.long()  # as their collator gives it
    enter()
    return Variant(
        model,
        build_optimizer(model, LR),
        loss=lambda: model(input_ids=batch.input_ids, attention_mask=mask, labels=batch.labels).loss,
        enter=enter,
    )


# The comparison


def entries(config: BertConfig, num_stages: int, batch: Batch, precision: str, lora: bool = True) -> dict[str, Entry]:
    """Return every variant by its name; those of LoRA only with `lora`."""
    stages = make_schedule("shrinking", config.num_hidden_layers, num_stages).stages
    found: dict[str, Entry] = {}
    sides = [(False, "ours", "transformers"), (True, "our LoRA", "peft LoRA")]
    for with_lora, our_name, their_name in sides if lora else sides[:1]:
        for name, variant in theirs(config, with_lora, stages, batch).items():
            found[f"{their_name}, {name}"] = Entry(variant, None, f"{their_name}, full")
        method = LORA if with_lora else PeftConfig()
        for name, variant in ours(config, method, stages, batch, precision).items():
            stage = name.partition(",")[0]
            peer = f"{their_name}, {name if name == 'full' else f'{stage}, requires_grad'}"
            found[f"{our_name}, {name}"] = Entry(variant, peer, f"{our_name}, full")
    return found


def rows_of(
    entries: Mapping[str, Entry], facts: Mapping[str, dict], timings: Mapping[str, Timing], batch: Batch, peak: float
) -> list[dict]:
    """Return a row for each variant: times, and their ratios beside those of the FLOPs; and its speed."""
    rows, slots = [], batch.input_ids.numel()
    counts = (len(batch.labels), slots if batch.mask is None else int(batch.mask.sum()), slots)
    for name, entry in entries.items():
        timing, full = timings[name], timings[entry.full]
        flops, full_flops = facts[name]["counted_flops"], facts[entry.full]["counted_flops"]
        rows.append(
            {
                "variant": name,
                **facts[name],
                "rounds": len(timing.rounds),
                "out_of_memory": timing.out_of_memory,
                "milliseconds": {phase: timing.milliseconds(phase) for phase in tables.PHASES},
                "peak_bytes": timing.peak_bytes,
                "peer": entry.peer,
                "step_of_peer": entry.peer and timing.ratio(timings[entry.peer], *tables.PHASES),
                "full": entry.full,
                "step_of_full": timing.ratio(full, *tables.PHASES),
                "backward_of_full": timing.ratio(full, "backward"),
                "backward_ideal": flops[1] / full_flops[1] if flops and full_flops else None,
                "step_of_transformers": timing.ratio(timings[THEIRS_FULL], *tables.PHASES),
                "speed": harness.speed(timing, *counts, flops and sum(flops), peak),
            }
        )
    return rows


def facts_of(entry: Entry, device: torch.device, precision: str) -> dict:
    """Return what trains, the FLOPs, and what the backward pass needs."""
    variant = entry.variant
    flops = harness.in_memory(variant, lambda: harness.count_flops(variant, device, precision))
    trained = [parameter.numel() for parameter in variant.model.parameters() if parameter.requires_grad]
    return {
        "trainable_parameters": sum(trained),
        "counted_flops": flops,
        "saved_bytes": harness.in_memory(variant, lambda: harness.saved_for_backward(variant, device, precision)),
        "attention": harness.in_memory(variant, lambda: harness.attention_backend(variant, device, precision)),
    }


# What the step must reach on a CPU with BERT-base, 8 x 128, fp32, T = 3: (variant, ratio in a row, at most).
TARGETS = (
    (OURS_FULL, "step_of_peer", 1.00),
    ("ours, stage 2, cut, eval", "step_of_full", 0.70),
    ("ours, stage 3, cut, eval", "step_of_full", 0.50),
    ("ours, stage 3, cached", "step_of_full", 0.42),
)
BACKWARD_TOLERANCE = 0.03  # between measured and ideal backward ratio of our stages
_TARGETS_HOLD_FOR = {"model": "bert-base-uncased", "batch_size": 8, "length": 128, "precision": "fp32", "stages_of": 3}


def targets_table(document: dict) -> str | None:
    """Return the targets beside what was measured; None for other settings, or where the memory did not suffice."""
    rows = {row["variant"]: row for row in document["rows"]}
    settings = {key: document["settings"][key] for key in _TARGETS_HOLD_FOR}
    short = any(row["out_of_memory"] for row in rows.values())
    if short or not document["device"].startswith("CPU") or settings != _TARGETS_HOLD_FOR:
        return None
    lines = []
    for name, key, limit in TARGETS:
        measured = rows[name][key]["median"]
        compared = rows[name]["peer" if key == "step_of_peer" else "full"]
        lines.append([f"step of {name}, of {compared}", limit, measured])
    for name, row in rows.items():
        if name.startswith("ours, stage"):
            off = abs(row["backward_of_full"]["median"] - row["backward_ideal"])
            lines.append([f"backward of {name}: measured off the ideal ratio by", BACKWARD_TOLERANCE, off])
    reached = {True: "yes", False: "no"}
    cells = [[text, f"{limit:.2f}", f"{value:.3f}", reached[value <= limit]] for text, limit, value in lines]
    return tables.table(["figure", "at most", "measured", "reached"], cells)


def markdown(document: dict) -> str:
    attention = sorted({row["attention"] for row in document["rows"] if row["attention"]})
    targets = targets_table(document)
    parts = [
        "# One training step beside transformers and peft",
        harness.describe(document),
        f"- Attention in the blocks that train: {', '.join(attention)}",
        f"- Rounds: {document['rows'][0]['rounds']}",
        f"- Matrix product, the fastest: {document['matmul_peak'] / 1e12:.3g} TFLOP/s",
        "",
        "Times are medians; a ratio is the median over the rounds of the ratio within a round. Peer: the same"
        " parameters train, by transformers or peft with requires_grad. Full: all blocks train, on the same side.",
        "",
        table(document["rows"]),
        *(["", targets] if targets else []),
    ]
    return "\n".join(parts) + "\n"


def table(rows: Sequence[dict]) -> str:
    header = ["variant", "trainable, M", *(f"{phase}, ms" for phase in tables.PHASES), "step, of peer", "step, of full"]
    header += ["step, of transformers", "backward, of full", "ideal", "peak, MiB", "saved, MiB", *tables.SPEED]
    lines = []
    for row in rows:
        times = [number(row["milliseconds"][phase], ".1f") for phase in tables.PHASES]
        if row["out_of_memory"]:
            times[0] = "out of memory"
        ratios = ("step_of_peer", "step_of_full", "step_of_transformers", "backward_of_full")
        lines.append(
            [
                row["variant"],
                tables.millions(row["trainable_parameters"]),
                *times,
                *(row[key] and f"{row[key]['median']:.3f}" for key in ratios),
                number(row["backward_ideal"], ".3f"),
                number(row["peak_bytes"] and row["peak_bytes"] / 2**20, ",.0f"),
                number(row["saved_bytes"] and row["saved_bytes"] / 2**20, ",.0f"),
                *tables.speed_cells(row["speed"] and Speed(**row["speed"])),
            ]
        )
    return tables.table(header, lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    berts = [name for name, config in ARCHITECTURES.items() if config.model_type == "bert"]
    parser.add_argument("--model", choices=berts, default="bert-base-uncased")
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest row")
    parser.add_argument("--padding", type=int, default=0, help="tokens that the shortest row lacks")
    parser.add_argument("--stages-of", type=int, default=3, metavar="T")
    parser.add_argument("--without-lora", action="store_true", help="leave out LoRA and peft: half the time")
    harness.add_step_options(parser, steps=2)
    args = harness.parse_steps(parser, arguments, "length", "stages_of")
    if not 0 <= args.padding < args.length:
        raise harness.InputError(f"--padding must be in 0..{args.length - 1}, got {args.padding}")
    return args


def main(arguments: Sequence[str]) -> Path:
    """Measure every variant; return the path of the JSON document."""
    args = parse(arguments)
    device = choose_device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"peers_{args.device}_{args.precision}{'_padded' if args.padding else ''}.json"
    config = ARCHITECTURES[args.model].with_head("classification", ("no", "yes"))
    settings = {key: getattr(args, key) for key in SETTINGS} | {
        "optimizer": "AdamW, fused",
        "clip": harness.MAX_GRAD_NORM,
        "dropout": config.hidden_dropout_prob,
        "attention": "sdpa",
    }
    document = {**harness.environment(device, settings), "runs": [harness.this_run(__file__, arguments)]}
    document["matmul_peak"] = harness.measure.matmul_peak(device, args.precision)
    torch.manual_seed(SEED)
    batch = Batch.random(config, args.batch_size, args.length, args.padding, device)
    compared = entries(config, args.stages_of, batch, args.precision, lora=not args.without_lora)
    facts = {name: facts_of(entry, device, args.precision) for name, entry in compared.items()}
    variants = {name: entry.variant for name, entry in compared.items()}
    for timings in harness.take_turns(variants, args.rounds, args.steps, device, args.precision):
        document["rows"] = rows_of(compared, facts, timings, batch, document["matmul_peak"])
        write_json(path, document)
        write_text(path.with_suffix(".md"), markdown(document))
        print(f"round {document['rows'][0]['rounds']} of {args.rounds}", flush=True)
    print(markdown(document))
    return path


if __name__ == "__main__":
    harness.run_script(main)
