"""Question answering by full fine-tuning and by Progtuning: exact match, F1, seconds; the memory of a full-size file.

    python benchmarks/squad.py --task squad --data ../shared/data/squad --rows 1500 --precision bf16
    python benchmarks/squad.py --memory
    python benchmarks/squad.py --table

Every run appends a row to benchmarks/results/squad.jsonl: settings, versions, environment, date and command. Epochs and
stages are the paper's (3 for v1.1, 2 for v2.0). Training rows are a sample of questions, drawn once (seed 0) and the
same for both schedules; metrics are those of all questions of the dev file. `--memory` makes a file of the size of the
official training file, cuts it in windows, and measures the peak of the whole process.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import append_row, read_rows, this_run

from progtuning.base.sources import model_folder
from progtuning.data.registry import load_splits
from progtuning.data.squad import encode_questions, read_squad
from progtuning.data.task import limit_train
from progtuning.data.tokenization import load_tokenizer
from progtuning.model.config import BertConfig
from progtuning.report import tables
from progtuning.run.finetune import fine_tune
from progtuning.settings.recipes import TASK_DEFAULTS
from progtuning.settings.train import TrainConfig
from progtuning.step.device import choose_device
from progtuning.step.measure import environment

RESULTS = Path(__file__).parent / "results" / "squad.jsonl"
MODEL = "minilm-l6"
FULL_SIZE = 30_288_272  # bytes of the official train-v1.1.json


def run(args: argparse.Namespace) -> None:
    """Fine-tune with each schedule and append a row for each."""
    splits = limit_train(load_splits(args.task, args.data), args.rows, seed=0)
    for schedule in args.schedules.split(","):
        settings = TrainConfig(
            schedule=schedule,
            batch_size=args.batch_size,
            lr=args.lr,
            precision=args.precision,
            attention_probs_dropout_prob=args.attention_dropout,
            seed=args.seed,
            evaluate="end",
            **TASK_DEFAULTS[args.task],
        )
        begin, cpu_begin = time.perf_counter(), time.process_time()
        summary = fine_tune(MODEL, model_folder(MODEL), splits, settings, choose_device(None))
        keys = ("epochs", "batch_size", "lr", "max_length", "precision", "attention_probs_dropout_prob", "seed")
        append(
            {
                "task": args.task,
                "schedule": schedule,
                "metrics": summary.metrics,
                "updated_parameters": summary.updated_parameters,
                "flops": summary.flops,
                "seconds": {phase: round(summary.seconds(phase), 1) for phase in tables.PHASES},
                "wall_seconds": round(time.perf_counter() - begin, 1),
                "cpu_seconds": round(time.process_time() - cpu_begin, 1),  # with evaluation; of all threads
                **{key: getattr(summary, key) for key in ("train_rows", "train_windows", "dev_rows")},
                "stages": len(summary.stages),
                **{key: summary.settings[key] for key in keys},
                **{key: getattr(summary, key) for key in ("model", "device", "processor", "versions")},
            }
        )


def measure_memory() -> None:
    """Make a file of FULL_SIZE bytes, read and cut it, and append the peak of this process."""
    folder = model_folder(MODEL)
    tokenizer = load_tokenizer(folder, BertConfig.from_json(folder / "config.json"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train-v1.1.json"
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # so that what it takes to make is not counted
            pool.apply(make_file, (file, FULL_SIZE))
        size, before, begin = file.stat().st_size, peak_bytes(), time.perf_counter()
        rows = encode_questions(read_squad(file), tokenizer)
    append(
        {
            "measures": "memory",
            "file_bytes": size,
            "questions": len(rows.questions),
            "windows": len(rows),
            "seconds": round(time.perf_counter() - begin, 1),
            "peak_bytes": peak_bytes(),
            "peak_bytes_before": before,
            **environment(torch.device("cpu")),
        }
    )


def make_file(path: Path, num_bytes: int) -> None:
    """Write so many bytes in SQuAD's layout: 4.6 questions a paragraph of 120 words, as in the official file."""
    generator = random.Random(0)
    letters = "abcdefghijklmnoprstuvwé"
    vocabulary = ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(20_000)]
    paragraphs, size = [], 0
    while size < num_bytes:
        context = " ".join(generator.choices(vocabulary, k=120))
        qas = []
        for _ in range(generator.choice((4, 5, 5))):
            start = context.index(" ", generator.randint(0, len(context) // 2)) + 1
            answer = {"text": context[start : start + 20].strip(), "answer_start": start}
            question = " ".join(generator.choices(vocabulary, k=10))
            qas.append({"id": f"{len(paragraphs):022}-{len(qas)}", "question": question, "answers": [answer]})
        paragraphs.append({"context": context, "qas": qas})
        size += len(json.dumps(paragraphs[-1], ensure_ascii=False).encode())
    document = {"data": [{"title": "made", "paragraphs": paragraphs}]}
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux


def append(row: dict) -> None:
    variables = {key: value for key, value in os.environ.items() if key.startswith(("OMP_", "MALLOC_"))}
    row |= {"environment": variables} | this_run(__file__, sys.argv[1:])
    append_row(RESULTS, row)
    print(json.dumps(row))


def table() -> str:
    """Return the rows of the runs as Markdown."""
    rows = read_rows(RESULTS)
    lines = [
        [
            row["task"],
            row["schedule"],
            f"{row['train_rows']:,} x {row['epochs']}",
            *(f"{100 * row['metrics'][name]:.1f}" for name in ("exact", "f1")),
            f"{sum(row['seconds'].values()):.0f}",
            tables.millions(row["updated_parameters"]),
            f"{row['flops'] / 1e12:.0f}",
        ]
        for row in rows
        if "metrics" in row
    ]
    header = ["task", "schedule", "questions x epochs", "EM", "F1", "training, s", "updated, M", "TFLOP"]
    return tables.table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASK_DEFAULTS)
    parser.add_argument("--data", help="folder of SQuAD's files")
    parser.add_argument("--schedules", default="full,shrinking")
    parser.add_argument("--rows", type=int, default=10**6, help="training questions (all)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--attention-dropout", type=float, help="with 0 a CPU takes fused attention (the model's own)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="measure the memory of reading a full-size file")
    parser.add_argument("--table", action="store_true", help="print the table of the rows")
    args = parser.parse_args()
    if args.task:
        run(args)
    if args.memory:
        measure_memory()
    if args.table:
        print(table())


if __name__ == "__main__":
    main()
