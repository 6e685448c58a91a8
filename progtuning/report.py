"""Tables and pictures of runs, from the documents that `summary.json` holds."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from progtuning.errors import InputError
from progtuning.files import plain_place, read_json, replacing


_NUMBER = re.compile(r"[-+]?[\d.,]*(e[-+]?\d+)?")
PHASES = ("forward", "backward", "optimizer")


def table(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Return an aligned Markdown table: columns of numbers to the right, others to the left; None is an empty cell."""
    body = [[str("" if cell is None else cell) for cell in row] for row in rows]
    columns = list(zip(*body)) or [()] * len(header)
    numeric = [all(_NUMBER.fullmatch(cell) for cell in column) for column in columns]
    widths = [max(map(len, (name, *column))) for name, column in zip(header, columns)]
    lines = [
        "| " + " | ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric)) + " |"
        for row in (header, *body)
    ]
    rule = "|" + "|".join("-" * (width + 1) + (":" if right else "-") for width, right in zip(widths, numeric)) + "|"
    return "\n".join([lines[0].rstrip(), rule, *lines[1:]])


def blocks_text(stage: dict) -> str:
    """Name what trains in a stage: "E, 1-12, H"."""
    low_high = stage["active_blocks"]
    blocks = [] if low_high is None else [str(low_high[0]) if low_high[0] == low_high[1] else "{}-{}".format(*low_high)]
    return ", ".join([*(["E"] if stage["embeddings"] else []), *blocks, "H"])


def stages_table(summary: dict) -> str:
    """Return the table of a run's stages: what trained, and what it cost."""
    rows = []
    for stage in summary["stages"]:
        seconds = stage["seconds"]
        rows.append(
            [
                stage["stage"],
                blocks_text(stage),
                stage["steps"],
                millions(stage["updated_parameters"]),
                tera(stage["forward_flops"]),
                tera(stage["backward_flops"]),
                *(f"{seconds.get(phase, 0):.1f}" for phase in ("forward", "backward", "optimizer")),
                None if stage["peak_bytes"] is None else f"{stage['peak_bytes'] / 2**20:,.0f}",
            ]
        )
    header = ["stage", "trains", "steps", "updated, M", "forward, TFLOP", "backward, TFLOP"]
    return table([*header, "forward, s", "backward, s", "optimizer, s", "peak, MiB"], rows)


def comparison_table(full: dict, other: dict) -> str:
    """Return two runs side by side, the second as a share of the first too."""
    rows = [[name, f"{value:.4f}", f"{other['metrics'][name]:.4f}", None] for name, value in full["metrics"].items()]
    for name, count, text in (
        ("updated parameters, M", lambda run: run["updated_parameters"], millions),
        ("forward, TFLOP", lambda run: total(run, "forward_flops"), tera),
        ("backward, TFLOP", lambda run: total(run, "backward_flops"), tera),
        *((f"{phase}, s", lambda run, p=phase: seconds(run, p), "{:.1f}".format) for phase in PHASES),
    ):
        rows.append([name, text(count(full)), text(count(other)), f"{count(other) / count(full):.2f}"])
    return table(["", full["settings"]["schedule"], other["settings"]["schedule"], "ratio"], rows)


def savings_table(full: dict, other: dict) -> str:
    """Return by stage the measured backward seconds over those of full fine-tuning, beside the ratio of the FLOPs."""
    rows = []
    for base, stage in zip(full["stages"], other["stages"], strict=True):
        measured = stage["seconds"]["backward"] / base["seconds"]["backward"]
        ideal = stage["backward_flops"] / base["backward_flops"]
        rows.append([stage["stage"], blocks_text(stage), f"{ideal:.2f}", f"{measured:.2f}"])
    return table(["stage", "trains", "backward FLOPs, of full", "backward seconds, of full"], rows)


def total(summary: dict, key: str) -> int:
    return sum(stage[key] for stage in summary["stages"])


def seconds(summary: dict, phase: str) -> float:
    return sum(stage["seconds"].get(phase, 0.0) for stage in summary["stages"])


def millions(count: int) -> str:
    return f"{count / 1e6:,.2f}"


def tera(flops: int) -> str:
    return f"{flops / 1e12:,.3f}"


def plan_table(document: dict) -> str:
    """Return the document of `accounting.plan` as a table."""
    rows = [
        [
            stage["stage"],
            f"{stage['epochs']:g}",
            blocks_text(stage),
            millions(stage["trainable_parameters"]),
            millions(stage["updated_parameters"]),
            f"{stage['forward_flops']:,}",
            f"{stage['backward_flops']:,}",
            f"{stage['share_of_full']:.2f}",
            mebibytes(stage["optimizer_bytes"]),
            mebibytes(stage["cache_bytes"]),
        ]
        for stage in document["stages"]
    ]
    header = ["stage", "epochs", "trains", "trainable, M", "updated, M", "forward FLOPs a step"]
    header += ["backward FLOPs a step", "of full", "optimizer, MiB", "cache a batch, MiB"]
    updated, full = document["updated_parameters"], document["updated_parameters_full"]
    parameters = f"{millions(updated)} M, {updated / full:.2f} of full fine-tuning ({millions(full)} M)"
    backward = f"{document['backward_share_of_full']:.2f} of full fine-tuning, on average over the stages"
    lines = [f"Updated parameters: {parameters}.", f"Backward FLOPs: {backward}."]
    if sums := max(stage["gradient_sum_bytes"] for stage in document["stages"]):
        lines.append(
            f"Gradient sums: {mebibytes(sums)} MiB. adaptive decides while it trains: this is the most it costs."
        )
    return "\n".join([table(header, rows), "", *lines])


def paper_table(rows: Iterable[dict]) -> str:
    """Return the rows of `accounting.paper_rows` as a table: millions of updated parameters, ours and the paper's."""
    rows = list(rows)
    words = {True: "yes", False: "no", None: "not printed"}
    cells = [
        [*(row[key] for key in ("table", "row", "model", "task", "epochs")), f"{row['ours']:.2f}", row["paper"]]
        + [words[row["agrees"]]]
        for row in rows
    ]
    notes = dict.fromkeys(f"{row['row']}: {row['note']}." for row in rows if "note" in row)
    header = ["where", "row", "model", "task", "epochs", "ours, M", "paper, M", "agrees"]
    return "\n".join([table(header, cells), *(["", *notes] if notes else [])])


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def card(summary: dict) -> str:
    """Return the README.md of an output folder."""
    settings = summary["settings"]
    tokens = settings.get("batch_tokens")
    batch = settings["batch_size"] if tokens is None else f"of {tokens:,} tokens"
    metrics = [[name, f"{value:.4f}"] for name, value in summary["metrics"].items()]
    return "\n".join(
        [
            f"# {summary['model']} fine-tuned on {summary['task']}",
            "",
            f"Schedule {settings['schedule']} in {len(summary['stages'])} stages over {settings['epochs']} epochs, "
            f"embeddings {settings['embeddings']}, {summary['train_rows']:,} training rows, batch {batch}, "
            f"learning rate {settings['lr']:g} ({settings['lr_schedule']}), seed {settings['seed']}, "
            f"{settings['precision']}, "
            f"on {summary['device']}.",
            "",
            table(["metric", "value"], metrics),
            "",
            stages_table(summary),
            "",
            f"Updated parameters (summed over epochs): {millions(summary['updated_parameters'])} M, of "
            f"{millions(summary['updated_parameters_full'])} M in full fine-tuning.",
            "",
        ]
    )


def probe_table(document: dict) -> str:
    """Return the rows of a probe: the metrics by the block that trained."""
    names = list(document["rows"][0]["metrics"])
    rows = [[row["block"], *(f"{row['metrics'][name]:.4f}" for name in names)] for row in document["rows"]]
    return table(["block", *names], rows)


def read_summary(folder: Path) -> dict:
    """Read the `summary.json` of an output folder of `train`. Raises InputError where it is none."""
    path = folder / "summary.json"
    summary = read_json(path)
    expected = {"model", "task", "metrics", "stages", "settings", "num_blocks", "updated_parameters"}
    if not isinstance(summary, dict) or not expected <= set(summary):
        raise InputError(f"{path}: expected the summary of a run of train, with {', '.join(sorted(expected))}")
    if wrong := _wrong_value(summary):
        raise InputError(f"{path}: {wrong} is not what train writes there")
    return summary | {"name": folder.name or str(folder)}


def _wrong_value(summary: dict) -> str | None:
    """Return the name of the first value that a report cannot use, None where there is none."""
    settings, metrics, stages = summary["settings"], summary["metrics"], summary["stages"]
    if not isinstance(settings, dict) or not isinstance(settings.get("peft"), dict):
        return "settings"
    names = (summary["task"], settings.get("schedule"), settings["peft"].get("method"))
    if not all(isinstance(name, str) for name in names):
        return "task, settings.schedule or settings.peft.method"
    if not isinstance(metrics, dict) or not metrics or not all(_is_number(value, -1e9) for value in metrics.values()):
        return "metrics"
    num_blocks = summary["num_blocks"]
    if not _is_count(num_blocks, 1, 1000) or not _is_number(summary["updated_parameters"]):
        return "num_blocks or updated_parameters"
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        return "stages"
    for i, stage in enumerate(stages):
        blocks, spent, peak = stage.get("active_blocks", ()), stage.get("seconds"), stage.get("peak_bytes", "")
        if blocks is not None and not (
            isinstance(blocks, list) and len(blocks) == 2 and all(_is_count(block, 1, num_blocks) for block in blocks)
        ):
            return f"stages[{i}].active_blocks"
        if not isinstance(stage.get("embeddings"), bool) or not _is_count(stage.get("steps")):
            return f"stages[{i}].embeddings or .steps"
        for key in ("stage", "updated_parameters", "forward_flops", "backward_flops"):
            if not _is_number(stage.get(key)):
                return f"stages[{i}].{key}"
        if not isinstance(spent, dict) or not all(_is_number(value) for value in spent.values()):
            return f"stages[{i}].seconds"
        if peak is not None and not _is_number(peak):
            return f"stages[{i}].peak_bytes"
    return None if any(stage["steps"] and stage["backward_flops"] for stage in stages) else "stages"


def _is_number(value, low: float = 0, high: float = 1e30) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_count(value, low: int = 0, high: int = 10**12) -> bool:
    return isinstance(value, int) and _is_number(value, low, high)


def compare(runs: Sequence[dict], path: Path) -> str:
    """Return a Markdown page on several runs and, where matplotlib is installed, draw its pictures beside `path`.

    Pictures: the staircase of each run; its measured backward seconds a step beside its FLOPs a step, as shares of
    those of the first stage; the main metric against all FLOPs. Beside a device or a pipe none are drawn.
    """
    names = list(dict.fromkeys(name for run in runs for name in run["metrics"]))
    rows = [
        [
            run["name"],
            run["task"],
            run["settings"]["schedule"],
            run["settings"]["peft"]["method"],
            *(f"{run['metrics'][name]:.4f}" if name in run["metrics"] else None for name in names),
            millions(run["updated_parameters"]),
            tera(total(run, "forward_flops") + total(run, "backward_flops")),
            *(f"{seconds(run, phase):.1f}" for phase in PHASES),
        ]
        for run in runs
    ]
    header = ["run", "task", "schedule", "peft", *names, "updated, M", "TFLOP", *(f"{phase}, s" for phase in PHASES)]
    parts = ["# Runs", table(header, rows)]
    pictures = {f"{path.stem}-{i + 1}.png": (draw_run, run) for i, run in enumerate(runs)}
    pictures[f"{path.stem}-metric.png"] = (draw_metric, runs)
    is_plain = plain_place(path) is not None
    drawn = {name: is_plain and draw(subject, path.with_name(name)) for name, (draw, subject) in pictures.items()}
    for i, run in enumerate(runs):
        parts += [f"## {run['name']}", stages_table(run)]
        name = f"{path.stem}-{i + 1}.png"
        parts += [f"![stages of {run['name']}]({name})"] if drawn[name] else []
    name = f"{path.stem}-metric.png"
    parts += ["## Metric against work", f"![metric against FLOPs]({name})"] if drawn[name] else []
    return "\n\n".join(parts) + "\n"


def draw_run(run: dict, path: Path) -> bool:
    """Draw a run's staircase, and its backward seconds and FLOPs a step by stage. False without matplotlib."""
    stages = [stage for stage in run["stages"] if stage["steps"]]
    figure = new_figure(10, 4)
    if figure is None:
        return False
    stairs, bars = figure.subplots(1, 2)
    draw_staircase(stairs, run)
    ideal = [stage["backward_flops"] / stage["steps"] for stage in stages]
    measured = [stage["seconds"].get("backward", 0.0) / stage["steps"] for stage in stages]
    shares = ([value / (values[0] or 1) for value in values] for values in (ideal, measured))
    draw_bars(bars, [stage["stage"] for stage in stages], *shares)
    bars.set_title("backward pass a step, of the first stage")
    save_figure(figure, path)
    return True


def draw_metric(runs: Sequence[dict], path: Path) -> bool:
    """Draw the main metric of each run against the FLOPs it took. False without matplotlib, or where metrics differ."""
    metric, *others = dict.fromkeys(next(iter(run["metrics"])) for run in runs)
    figure = None if others else new_figure(6, 4)
    if figure is None:
        return False
    axes = figure.subplots()
    for run in runs:
        work = (total(run, "forward_flops") + total(run, "backward_flops")) / 1e12
        axes.plot([work], [run["metrics"][metric]], "o", label=run["name"])
    axes.set(xlabel="forward and backward, TFLOP", ylabel=metric)
    axes.legend()
    save_figure(figure, path)
    return True


def draw_probe(document: dict, path: Path) -> bool:
    """Draw the metrics of a probe by block. False without matplotlib."""
    figure = new_figure(6, 4)
    if figure is None:
        return False
    axes = figure.subplots()
    blocks = [row["block"] for row in document["rows"]]
    for name in document["rows"][0]["metrics"]:
        axes.plot(blocks, [row["metrics"][name] for row in document["rows"]], "o-", label=name)
    title = f"{document['model']} on {document['task']}"
    axes.set(title=title, xlabel="block that trains, with the head", xticks=blocks)
    axes.legend()
    save_figure(figure, path)
    return True


def draw_savings(full: dict, other: dict, path: str | Path) -> bool:
    """Draw the staircase of stages and blocks, and measured beside analytic backward cost. False without matplotlib."""
    figure = new_figure(10, 4)
    if figure is None:
        return False
    stairs, bars = figure.subplots(1, 2)
    draw_staircase(stairs, other)
    pairs = list(zip(other["stages"], full["stages"], strict=True))
    ideal = [stage["backward_flops"] / base["backward_flops"] for stage, base in pairs]
    measured = [stage["seconds"]["backward"] / base["seconds"]["backward"] for stage, base in pairs]
    draw_bars(bars, [stage["stage"] for stage, _ in pairs], ideal, measured)
    bars.set_title("backward pass, of full fine-tuning")
    save_figure(figure, path)
    return True


def new_figure(width: float, height: float):
    """Return a figure that needs no display, or None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure, path: str | Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_bars(axes, stages: Sequence[int], ideal: Sequence[float], measured: Sequence[float]) -> None:
    """Draw analytic and measured shares side by side, by stage."""
    axes.bar([stage - 0.2 for stage in stages], ideal, width=0.38, label="FLOPs", color="lightgray")
    axes.bar([stage + 0.2 for stage in stages], measured, width=0.38, label="measured seconds", color="tab:blue")
    axes.set(xlabel="stage", xticks=list(stages))
    axes.legend()


def draw_staircase(axes, summary: dict) -> None:
    """Draw which of E, B1 .. BL and H train in which stage."""
    num_blocks, stages = summary["num_blocks"], summary["stages"]
    trains = np.zeros((num_blocks + 2, len(stages)))
    for column, stage in enumerate(stages):
        first, last = stage["active_blocks"] or (1, 0)
        trains[[0] * stage["embeddings"] + [*range(first, last + 1), num_blocks + 1], column] = 1
    edges = dict(edgecolors="white", linewidth=1, cmap="Blues", vmin=0, vmax=1.5)
    axes.pcolormesh(trains, **edges)
    axes.set(title="what trains", xlabel="stage")
    axes.set_xticks([i + 0.5 for i in range(len(stages))], [stage["stage"] for stage in stages])
    axes.set_yticks([i + 0.5 for i in range(num_blocks + 2)], ["E", *range(1, num_blocks + 1), "H"])
