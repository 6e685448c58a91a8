"""What a stage saves of a training step, measured beside what its FLOPs promise.

    python benchmarks/backward_savings.py                                                        # the whole grid
    python benchmarks/backward_savings.py --models bert-base-uncased --lengths 128 --methods full --stages-of 3

For every model (random weights), length and fine-tuning method: each stage of the shrinking schedules of T stages,
under the three embedding policies. A stage is named by how many blocks are frozen and whether E trains, so what two
schedules or policies have in common is measured once. Three forms of it:

    E always     E trains beneath the frozen blocks, so that no graph is cut (the paper)
    cut          E and the frozen blocks run without grad
    cut + cache  their output is there already, and only the blocks above the cut run

With `--compile` and `--cuda-graphs` the blocks are run so; of the latter give `--steps 7`: a turn records in its second
step.

Results go to benchmarks/results/backward_savings_<device>_<precision>.json and .md after every round, and a .png at the
end; those options add their names to the file's. A group (model, length, method) that is whole there is not measured
again, so a run that was stopped is taken up by the same command.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from harness import Timing, Variant, number
from torch import Tensor
from torch.nn import functional as F

from progtuning.base.errors import InputError
from progtuning.base.files import write_json, write_text
from progtuning.cost import closed_form
from progtuning.engine import StageEngine
from progtuning.methods.apply import apply_peft
from progtuning.model.bert import Model, build_model
from progtuning.model.config import ARCHITECTURES, BertConfig
from progtuning.report import pictures, tables
from progtuning.settings.peft import PeftConfig
from progtuning.speed.graphs import graph_blocks
from progtuning.speed.kernels import compile_blocks
from progtuning.stages import EMBEDDING_POLICIES, Stage, make_schedule
from progtuning.step.device import choose_device, forward_pass
from progtuning.step.optim import build_optimizer

METHODS = {
    "full": PeftConfig(),
    "adapter": PeftConfig("adapter"),
    "lora": PeftConfig("lora"),
    "bitfit": PeftConfig("bitfit"),
}
MODELS = ["bert-large-uncased", "bert-base-uncased"]
SEED = 0


@dataclass(frozen=True)
class Form:
    """What trains in a stage, and how its prefix runs."""

    frozen_blocks: int
    embeddings: bool  # whether something of E trains
    cached: bool = False

    @property
    def name(self) -> str:
        if self.embeddings:
            return "E always" if self.frozen_blocks else "E trains"
        return "cut + cache" if self.cached else "cut"


def forms(config: BertConfig, peft: PeftConfig, stages_of: Sequence[int]) -> dict[Form, list[dict]]:
    """Return every form that a stage of the shrinking schedules takes, with the T, the policies and the stages that do.

    `stages_of` has the T of the schedules. The first form is full fine-tuning by the method.
    """
    in_embeddings = bool(closed_form.units(config, peft).embeddings.trainable)
    found: dict[Form, list[dict]] = {}
    for num_stages in stages_of:
        for policy in EMBEDDING_POLICIES:
            for stage in make_schedule("shrinking", config.num_hidden_layers, num_stages, policy).stages:
                form = Form(stage.boundary, stage.embeddings and in_embeddings)
                where = {"stages_of": num_stages, "embeddings": policy, "stage": stage.index + 1}
                found.setdefault(form, []).append(where)
                if stage.boundary and not form.embeddings:
                    found.setdefault(Form(stage.boundary, False, cached=True), []).append(where)
    return dict(sorted(found.items(), key=lambda item: (item[0].frozen_blocks, not item[0].embeddings, item[0].cached)))


class Group:
    """One model under one method, at one length: a variant for each form, all of one model and one optimizer."""

    def __init__(
        self, config: BertConfig, peft: PeftConfig, batch: int, length: int, device: torch.device, precision: str
    ):
        self.config, self.peft, self.batch, self.length = config, peft, batch, length
        self.device, self.precision = device, precision
        model = build_model(config, SEED).to(device).train()
        apply_peft(model, peft, SEED)
        self.optimizer = build_optimizer(model, lr=1e-5)
        self.engine = StageEngine(model, self.optimizer)
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(1, config.vocab_size, (batch, length), generator=generator)
        self.input_ids, self.labels = ids.to(device), (ids[:, 0] % config.num_outputs).to(device)
        self.states: Tensor | None = None  # (B, S, D) what the prefix of the present form gives

    @property
    def model(self) -> Model:
        return self.engine.model

    def variant(self, form: Form) -> Variant:
        return Variant(self.engine, self.optimizer, lambda: self.loss(form), lambda: self.enter(form))

    def stage(self, form: Form) -> Stage:
        return Stage(0, self.model.num_blocks, form.frozen_blocks, form.embeddings)

    def enter(self, form: Form) -> None:
        self.states = None
        self.engine.prefix_dropout = not form.cached
        self.engine.train().enter(self.stage(form))
        if form.cached:
            with forward_pass(self.device, self.precision):
                self.states = self.engine.prefix(self.input_ids)

    def loss(self, form: Form) -> Tensor:
        logits = self.engine.suffix(self.states) if form.cached else self.engine(self.input_ids)
        return F.cross_entropy(logits.float(), self.labels)

    def closed_form(self, form: Form) -> tuple[int, int]:
        """Return the FLOPs of a forward and of a backward pass; a cached prefix has none."""
        active = closed_form.units(self.config, self.peft).during(self.stage(form))
        forward, backward = closed_form.step_flops(self.config, active, self.peft, self.batch, self.length)
        cached = form.frozen_blocks if form.cached else 0
        return forward - closed_form.prefix_flops(self.config, self.peft, cached, self.batch, self.length), backward

    def describe(self, form: Form) -> dict:
        """Return what needs no clock: FLOPs counted and in closed form, bytes; None where the memory fell short."""
        variant = self.variant(form)
        counted = harness.in_memory(variant, lambda: harness.count_flops(variant, self.device, self.precision))
        saved = harness.in_memory(variant, lambda: harness.saved_for_backward(variant, self.device, self.precision))
        forward, backward = self.closed_form(form)
        return {
            "forward_flops": forward,
            "backward_flops": backward,
            "counted_flops": counted,
            "saved_bytes": saved,
            "trainable_parameters": sum(p.numel() for group in self.optimizer.param_groups for p in group["params"]),
        }


def changes(args: argparse.Namespace) -> dict[str, Callable[[Model], None]]:
    """Return what the options do to the model that is timed, by name."""
    asked = {"compiled": (args.compile, compile_blocks), "graphs": (args.cuda_graphs, graph_blocks)}
    return {name: change for name, (is_given, change) in asked.items() if is_given}


def measure(group: Group, names: Mapping, stages: Mapping[Form, list[dict]], args, peak: float) -> Iterator[list[dict]]:
    """Yield the rows of a group after every round."""
    facts = {form: group.describe(form) for form in stages}
    variants = {form: group.variant(form) for form in stages}
    full = next(iter(stages))
    device, precision = group.device, group.precision
    backend = harness.in_memory(variants[full], lambda: harness.attention_backend(variants[full], device, precision))
    for change in changes(args).values():
        change(group.model)
    for timings in harness.take_turns(variants, args.rounds, args.steps, device, precision):
        yield [
            {
                **names,
                "frozen_blocks": form.frozen_blocks,
                "form": form.name,
                "stages": stages[form],
                "attention": backend,
                **facts[form],
                **cost(timings[form], timings[full], facts[form], facts[full], (group.batch, group.length), peak),
            }
            for form in stages
        ]


def cost(
    timing: Timing, full: Timing, facts: Mapping, full_facts: Mapping, shape: tuple[int, int], peak: float
) -> dict:
    """Return the measured part of a row; `shape` is (B, S) of its batch, without padding."""
    flops, milliseconds = facts["forward_flops"] + facts["backward_flops"], timing.milliseconds("forward", "backward")
    reached = None if milliseconds is None else 1000 * flops / milliseconds
    tokens = shape[0] * shape[1]
    return {
        "rounds": len(timing.rounds),
        "out_of_memory": timing.out_of_memory,
        "milliseconds": {phase: timing.milliseconds(phase) for phase in tables.PHASES},
        "backward_ideal": facts["backward_flops"] / full_facts["backward_flops"],
        "backward_measured": timing.ratio(full, "backward"),
        "step_ideal": flops / (full_facts["forward_flops"] + full_facts["backward_flops"]),
        "step_measured": timing.ratio(full, *tables.PHASES),
        "peak_bytes": timing.peak_bytes,
        "flops_per_second": reached,
        "share_of_matmul_peak": reached and reached / peak,
        "speed": harness.speed(timing, shape[0], tokens, tokens, flops, peak),
    }


# Documents


def is_whole(rows: Sequence[dict], stages: Mapping[Form, list[dict]], rounds: int) -> bool:
    """Say whether a group's rows hold every form, for these schedules, and all rounds."""
    found = {(row["frozen_blocks"], row["form"]): row for row in rows}
    wanted = {(form.frozen_blocks, form.name): where for form, where in stages.items()}
    return all(
        key in found
        and all(one in found[key]["stages"] for one in where)
        and (found[key]["out_of_memory"] or found[key]["rounds"] >= rounds)
        for key, where in wanted.items()
    )


def groups_of(rows: Sequence[dict], *keys: str) -> dict[tuple, list[dict]]:
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def markdown(document: dict) -> str:
    rows = document["rows"]
    counted = [row for row in rows if row["counted_flops"] is not None]
    equal = sum(list(row["counted_flops"]) == [row["forward_flops"], row["backward_flops"]] for row in counted)
    attention = ", ".join(sorted({row["attention"] for row in rows if row["attention"]}))
    parts = [
        "# What a stage saves of a training step",
        harness.describe(document),
        f"- Matrix product, the fastest: {document['matmul_peak'] / 1e12:.3g} TFLOP/s",
        f"- Attention in the timed steps: {attention}",
        f"- FLOPs counted by PyTorch equal the closed form in {equal} of {len(counted)} rows.",
        "",
        "Ideal is the ratio of the FLOPs to those of the group's first row, measured that of the times: median over the"
        " rounds of the ratio within a round. T:t names schedules of T stages, and of these the stage, of this form."
        " TFLOP/s and share of the peak are of forward and backward, tokens a second of the whole step.",
    ]
    for (model, length, method), group in groups_of(rows, "model", "length", "method").items():
        parts += ["", f"## {model}, {length} tokens, {method}", "", table(group)]
    return "\n".join(parts) + "\n"


def table(rows: Sequence[dict]) -> str:
    header = ["T:t", "frozen", "form", "backward, ideal", "measured", "step, ideal", "measured"]
    header += [f"{phase}, ms" for phase in tables.PHASES] + [
        "peak, MiB",
        "saved, MiB",
        "TFLOP/s",
        "of peak",
        "tokens/s",
    ]
    return tables.table(header, [_cells(row) for row in rows])


def _cells(row: dict) -> list[str | None]:
    stages = sorted({(where["stages_of"], where["stage"]) for where in row["stages"]})
    times = [number(row["milliseconds"][phase], ".1f") for phase in tables.PHASES]
    if row["out_of_memory"]:
        times[0] = "out of memory"
    ratios = []
    for kind in ("backward", "step"):
        measured = row[f"{kind}_measured"]
        ratios += [f"{row[f'{kind}_ideal']:.3f}", measured and f"{measured['median']:.3f}"]
    speed = row["flops_per_second"]
    return [
        " ".join(f"{num_stages}:{stage}" for num_stages, stage in stages),
        str(row["frozen_blocks"]),
        row["form"],
        *ratios,
        *times,
        number(row["peak_bytes"] and row["peak_bytes"] / 2**20, ",.0f"),
        number(row["saved_bytes"] and row["saved_bytes"] / 2**20, ",.0f"),
        number(speed and speed / 1e12, ".3g"),
        number(row["share_of_matmul_peak"], ".2f"),
        number(row.get("speed") and row["speed"]["tokens_per_second"], ",.0f"),
    ]


def draw(rows: Sequence[dict], path: Path) -> None:
    """Draw, for each model and length, measured over ideal backward ratios, and saved bytes over the frozen blocks."""
    shapes = groups_of(rows, "model", "length")
    figure = pictures.new_figure(1 + 4 * len(shapes), 7.5)
    if figure is None:
        return
    axes = figure.subplots(2, len(shapes), squeeze=False)
    for (ratio, saved), ((model, length), group) in zip(axes.T, shapes.items()):
        ratio.plot([0, 1.05], [0, 1.05], color="lightgray")
        ratio.set(title=f"{model}, {length} tokens", xlabel="backward FLOPs, of full", ylabel="backward time, of full")
        saved.set(xlabel="frozen blocks", ylabel="saved for backward, MiB")
        for color, ((method,), by_method) in zip(("C0", "C1", "C2", "C3"), groups_of(group, "method").items()):
            measured = [row for row in by_method if row["backward_measured"]]
            points = [(row["backward_ideal"], row["backward_measured"]["median"]) for row in measured]
            ratio.scatter(*zip(*points) if points else ([], []), s=14, color=color, label=method)
            for label, style, forms_of in (("E always", "--", ("E trains", "E always")), ("cut", "-", ("cut",))):
                line = [row for row in by_method if row["form"] in forms_of and row["saved_bytes"] is not None]
                sizes = [(row["frozen_blocks"], row["saved_bytes"] / 2**20) for row in line]
                if sizes:
                    saved.plot(*zip(*sizes), style, color=color, label=f"{method}, {label}")
        ratio.legend()
        saved.legend(fontsize="small")
    pictures.save_figure(figure, path)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, default=MODELS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[384, 128], help="tokens")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--stages-of", nargs="+", type=int, default=[3, 12], metavar="T", help="stages a schedule has")
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="begin no round after this")
    parser.add_argument("--compile", action="store_true", help="as `train --compile`")
    parser.add_argument("--cuda-graphs", action="store_true", help="as `train --cuda-graphs`")
    harness.add_step_options(parser, steps=3)
    args = harness.parse_steps(parser, arguments, "lengths", "stages_of")
    if args.cuda_graphs and (args.device == "cpu" or args.steps < 5):
        raise InputError(f"--cuda-graphs needs CUDA and 5 --steps, got {args.device} and {args.steps}")
    return args


def main(arguments: Sequence[str]) -> Path:
    """Measure what is missing of the grid; return the path of the JSON document."""
    args = parse(arguments)
    end = time.monotonic() + 60 * args.time_limit if args.time_limit else float("inf")
    device = choose_device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{'_'.join(['backward_savings', args.device, args.precision, *changes(args)])}.json"
    settings = {key: getattr(args, key) for key in ("batch_size", "precision", "steps")}
    settings |= {
        "optimizer": "AdamW, fused",
        "clip": harness.MAX_GRAD_NORM,
        "dropout": 0.1,
        "prefix": "drops out unless cached",
    }
    document = harness.open_document(path, harness.environment(device, settings), harness.this_run(__file__, arguments))
    if "matmul_peak" not in document:
        document["matmul_peak"] = harness.measure.matmul_peak(device, args.precision)
    for model_name, length, method in itertools.product(args.models, args.lengths, args.methods):
        names = {"model": model_name, "length": length, "method": method}
        if not measure_group(document, path, names, args, end):
            break
    draw(document["rows"], path.with_suffix(".png"))
    return path


def measure_group(document: dict, path: Path, names: dict, args: argparse.Namespace, end: float) -> bool:
    """Measure one group unless it is whole in the document, which is saved after every round.

    Returns False where the time is up.
    """
    config = ARCHITECTURES[names["model"]].with_head("classification", ("no", "yes"))
    others = [row for row in document["rows"] if any(row[key] != value for key, value in names.items())]
    earlier = [row for row in document["rows"] if row not in others]
    there = {where["stages_of"] for row in earlier for where in row["stages"]}  # an earlier run may have had other T
    stages = forms(config, METHODS[names["method"]], sorted(there.union(args.stages_of)))
    if is_whole(earlier, stages, args.rounds):
        return True
    device = choose_device(args.device)
    group = Group(config, METHODS[names["method"]], args.batch_size, names["length"], device, args.precision)
    for rows in measure(group, names, stages, args, document["matmul_peak"]):
        document["rows"] = others + rows
        write_json(path, document)
        write_text(path.with_suffix(".md"), markdown(document))
        print(f"{', '.join(map(str, names.values()))}: round {rows[0]['rounds']} of {args.rounds}", flush=True)
        if time.monotonic() > end:
            return False
    print(table(rows), flush=True)
    return True


if __name__ == "__main__":
    harness.run_script(main)
