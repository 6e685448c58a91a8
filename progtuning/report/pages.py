"""Pages of Markdown: the card of a run, and the comparison of several."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

from progtuning.base.files import plain_place
from progtuning.report.pictures import draw_metric, draw_run
from progtuning.report.summary import Summary
from progtuning.report.tables import (
    PHASES,
    SPEED,
    class_table,
    millions,
    speed_cells,
    speed_table,
    stages_table,
    table,
    tera,
)


def card(summary: Summary) -> str:
    """Return the README.md of an output folder."""
    settings = summary.settings
    tokens = settings.get("batch_tokens")
    batch = settings["batch_size"] if tokens is None else f"of {tokens:,} tokens"
    length = f"{settings['epochs']} epochs"
    if budget := settings.get("budget"):
        steps = sum(stage.steps + stage.skipped_steps for stage in summary.stages)
        length = f"{steps:,} steps, {budget:g} of the FLOPs of full fine-tuning for {length}"
    metrics = [[name, f"{value:.4f}"] for name, value in summary.metrics.items()]
    return "\n".join(
        [
            f"# {summary.model} fine-tuned on {summary.task}",
            "",
            f"Schedule {summary.schedule} in {len(summary.stages)} stages over {length}, "
            f"embeddings {settings['embeddings']}, {summary.train_rows:,} training rows, batch {batch}, "
            f"learning rate {settings['lr']:g} ({settings['lr_schedule']}), seed {settings['seed']}, "
            f"{settings['precision']}, "
            f"on {summary.device}.",
            "",
            table(["metric", "value"], metrics),
            "",
            *([class_table(summary.by_class), ""] if summary.by_class else []),
            *best_lines(summary),
            *skipped_lines(summary),
            stages_table(summary),
            "",
            *speed_lines(summary),
            f"Updated parameters (summed over epochs): {millions(summary.updated_parameters)} M, of "
            f"{millions(summary.updated_parameters_full)} M if all of them trained in every epoch.",
            "",
        ]
    )


def skipped_lines(summary: Summary) -> list[str]:
    skipped = sum(stage.skipped_steps or 0 for stage in summary.stages)
    steps = skipped + sum(stage.steps for stage in summary.stages)
    text = f"{skipped:,} of {steps:,} batches were passed over, as their loss or gradient was not finite."
    return [text, ""] if skipped else []


def best_lines(summary: Summary) -> list[str]:
    """Return what is to be said of the evaluations: whose weights were written, and why a run ended early."""
    best, settings = summary.best, summary.settings
    if best is None:
        return []
    when, lines = f"epoch {best['epoch']} (stage {best['stage']})", []
    if settings.get("keep") == "best":
        lines.append(f"The weights are those of {when}, the best evaluation.")
    elif best["epoch"] != summary.epochs:
        values = ", ".join(f"{name} {value:.4f}" for name, value in best["metrics"].items())
        lines.append(f"The best evaluation was after {when}: {values}; `--keep best` writes its weights.")
    was_last = settings.get("budget") is None and summary.epochs == settings["epochs"]
    if (patience := settings.get("patience")) and summary.epochs - best["epoch"] == patience and not was_last:
        lines.append(f"The run ended after epoch {summary.epochs}: `--patience {patience}`.")
    return [*lines, ""] if lines else []


def speed_lines(summary: Summary) -> list[str]:
    """Return the lines on how fast a run was, none where its version did not count it."""
    fast = speed_table(summary)
    if fast is None:
        return []
    peak = summary.matmul_peak
    of = "" if peak is None else f" The peak is {peak / 1e12:,.3g} TFLOP/s, of the device's fastest matrix product."
    said = (
        "Per second of forward, backward and optimizer, tokens without padding. FLOPs and time are those of an example."
    )
    return [fast, "", said + of, ""]


def compare(runs: Sequence[tuple[str, Summary]], path: Path | None) -> str:
    """Return a Markdown page on several runs and, where matplotlib is installed, draw its pictures beside `path`.

    Each run has its name with it.

    Pictures: the staircase of each run; its measured backward seconds a step beside its FLOPs a step, as shares of
    those of the first stage; the main metric against all FLOPs. None are drawn beside a device or a pipe, nor with
    `path` None.
    """
    names = list(dict.fromkeys(name for _, run in runs for name in run.metrics))
    rows = [
        [
            title,
            run.task,
            run.schedule,
            run.settings["peft"]["method"],
            *(f"{run.metrics[name]:.4f}" if name in run.metrics else None for name in names),
            millions(run.updated_parameters),
            tera(run.flops),
            *(f"{run.seconds(phase):.1f}" for phase in PHASES),
            *speed_cells(run.speed()),
        ]
        for title, run in runs
    ]
    header = [
        "run",
        "task",
        "schedule",
        "peft",
        *names,
        "updated, M",
        "TFLOP",
        *(f"{phase}, s" for phase in PHASES),
        *SPEED,
    ]
    parts = ["# Runs", table(header, rows)]
    has_pictures = path is not None and plain_place(path) is not None

    def picture(draw: Callable[..., bool], subject, end: str, text: str) -> list[str]:
        """Draw into a file beside `path`; return its line, none where it is not drawn."""
        if not (has_pictures and draw(subject, place := path.with_name(f"{path.stem}-{end}.png"))):
            return []
        text = re.sub(r"[\[\]\\]", r"\\\g<0>", text)
        return [f"![{text}]({quote(os.fsencode(place.name))})"]

    for i, (title, run) in enumerate(runs):
        parts += [f"## {title}", stages_table(run), *(["\n".join(lines[:-1])] if (lines := speed_lines(run)) else [])]
        parts += picture(draw_run, run, str(i + 1), f"stages of {title}")
    if drawn := picture(draw_metric, runs, "metric", "metric against FLOPs"):
        parts += ["## Metric against work", *drawn]
    return "\n\n".join(parts) + "\n"
