"""Accuracy of every method and schedule on real tasks: a grid of task x method x seed, one JSON row a run.

    python benchmarks/accuracy.py --study ablation --glue ../shared/data/glue
    python benchmarks/accuracy.py --table benchmarks/results/ablation.jsonl

A study is a grid (STUDIES below). Its rows are appended to benchmarks/results/<study>.jsonl as the runs end; a run whose row is there
is not repeated, so that a study can be stopped and taken up again. `--table` prints mean and standard deviation over the seeds as
Markdown. The learning rates are stated in METHODS; no run is chosen by its result.
"""

import argparse
import json
import statistics
from datetime import date
from pathlib import Path

import torch

from progtuning import report
from progtuning.config import DPSConfig, PeftConfig, TrainConfig
from progtuning.data.text import limit_train
from progtuning.run import choose_device, fine_tune, load_splits
from progtuning.sources import model_folder

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
_COMMON = {"epochs": 3, "batch_size": 32, "lr": 1e-4, "evaluate": "end"}
STUDIES = {
    "ablation": {"tasks": ["movie-reviews"], "methods": [*_FULL_MODEL, "adaptive"], "seeds": [1, 2, 3], "rows": 1500, **_COMMON},
    "peft": {"tasks": ["mrpc"], "methods": ["full", "progtuning", *_PEFT], "seeds": [1], "rows": 1000, **_COMMON},
    "accuracy": {
        "tasks": ["mrpc", "sts-b", "cola", "sst-2", "movie-reviews"],
        "methods": _FULL_MODEL,
        "seeds": [1, 2, 3],
        "rows": 1500,
        **_COMMON,
    },
    "accuracy-peft": {"tasks": ["mrpc", "sts-b"], "methods": _PEFT, "seeds": [1, 2], "rows": 1000, **_COMMON, "epochs": 8},
}
FOLDERS = {"mrpc": "MRPC", "sts-b": "STS-B", "cola": "CoLA", "sst-2": "SST-2", "rte": "RTE", "qnli": "QNLI", "qqp": "QQP", "mnli": "MNLI"}
MODEL = "minilm-l6"


def run_study(name: str, glue: Path | None, device: torch.device) -> None:
    """Run what is missing of a study and append its rows."""
    study = STUDIES[name]
    path = RESULTS / f"{name}.jsonl"
    done = {(row["task"], row["method"], row["seed"]) for row in read_rows(path)}
    folder = model_folder(MODEL)
    settings = {key: study[key] for key in _COMMON}
    for seed in study["seeds"]:
        for task in study["tasks"]:
            data = None if task == "movie-reviews" else str(glue / FOLDERS[task])
            splits = limit_train(load_splits(task, data), study["rows"], seed=0)
            for method in study["methods"]:
                if (task, method, seed) in done:
                    continue
                config = TrainConfig(**settings | METHODS[method] | {"seed": seed})
                summary = fine_tune(MODEL, folder, splits, config, device)
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row_of(summary, method, seed)) + "\n")


def row_of(summary: dict, method: str, seed: int) -> dict:
    """Return what is kept of a run."""
    return {
        "task": summary["task"],
        "method": method,
        "seed": seed,
        "metrics": summary["metrics"],
        "updated_parameters": summary["updated_parameters"],
        "flops": report.total(summary, "forward_flops") + report.total(summary, "backward_flops"),
        "seconds": sum(report.seconds(summary, phase) for phase in report.PHASES),
        "train_rows": summary["train_rows"],
        "dev_rows": summary["dev_rows"],
        **{key: summary["settings"][key] for key in ("epochs", "batch_size", "lr", "max_length", "precision")},
        "model": summary["model"],
        "device": summary["device"],
        "versions": summary["versions"],
        "date": date.today().isoformat(),
    }


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def table(path: Path) -> str:
    """Return mean and standard deviation by task and method, FLOPs as a share of full fine-tuning's."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in read_rows(path):
        groups.setdefault((row["task"], row["method"]), []).append(row)
    lines = []
    for (task, method), rows in groups.items():
        full = groups.get((task, "full"))
        share = None if full is None else f"{rows[0]['flops'] / full[0]['flops']:.2f}"
        metrics = "; ".join(f"{name} {spread([row['metrics'][name] for row in rows])}" for name in rows[0]["metrics"])
        seconds = f"{statistics.mean(row['seconds'] for row in rows):.0f}"
        lines.append([task, method, len(rows), metrics, report.millions(rows[0]["updated_parameters"]), share, seconds])
    return report.table(["task", "method", "seeds", "metrics", "updated, M", "FLOPs, of full", "seconds"], lines)


def spread(values: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


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
        print(table(args.table))


if __name__ == "__main__":
    main()
