"""Tables and pictures of runs, from the documents that `summary.json` holds."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from progtuning.files import replacing


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
    header = ["stage", "trains", "steps", "updated, M", "forward, TFLOP", "backward, TFLOP", "forward, s", "backward, s"]
    return table([*header, "optimizer, s", "peak, MiB"], rows)


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
    """Return stage by stage the measured backward seconds over those of full fine-tuning, beside the ratio of the FLOPs."""
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
    header = ["stage", "epochs", "trains", "trainable, M", "updated, M", "forward FLOPs a step", "backward FLOPs a step"]
    updated, full = document["updated_parameters"], document["updated_parameters_full"]
    return "\n".join(
        [
            table([*header, "of full", "optimizer, MiB", "cache a batch, MiB"], rows),
            "",
            f"Updated parameters: {millions(updated)} M, {updated / full:.2f} of full fine-tuning ({millions(full)} M).",
            f"Backward FLOPs: {document['backward_share_of_full']:.2f} of full fine-tuning, on average over the stages.",
        ]
    )


def paper_table(rows: Iterable[dict]) -> str:
    """Return the rows of `accounting.paper_rows` as a table: millions of updated parameters, ours and the paper's."""
    rows = list(rows)
    words = {True: "yes", False: "no", None: "not printed"}
    cells = [
        [row["table"], row["row"], row["task"], row["epochs"], f"{row['ours']:.2f}", row["paper"], words[row["agrees"]]]
        for row in rows
    ]
    notes = dict.fromkeys(f"{row['row']}: {row['note']}." for row in rows if "note" in row)
    header = ["where", "row", "task", "epochs", "ours, M", "paper, M", "agrees"]
    return "\n".join([table(header, cells), *(["", *notes] if notes else [])])


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def card(summary: dict) -> str:
    """Return the README.md of an output folder."""
    settings = summary["settings"]
    metrics = [[name, f"{value:.4f}"] for name, value in summary["metrics"].items()]
    return "\n".join(
        [
            f"# {summary['model']} fine-tuned on {summary['task']}",
            "",
            f"Schedule {settings['schedule']} in {len(summary['stages'])} stages over {settings['epochs']} epochs, embeddings "
            f"{settings['embeddings']}, {summary['train_rows']:,} training rows, batch {settings['batch_size']}, learning rate "
            f"{settings['lr']:g}, seed {settings['seed']}, {settings['precision']}, on {summary['device']}.",
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


def draw_savings(full: dict, other: dict, path: str | Path) -> bool:
    """Draw the staircase of stages and blocks, and measured beside analytic backward cost, into a PNG.

    Return False where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    stairs, bars = figure.subplots(1, 2)
    draw_staircase(stairs, other)
    places = range(1, len(other["stages"]) + 1)
    ideal = [s["backward_flops"] / b["backward_flops"] for s, b in zip(other["stages"], full["stages"])]
    measured = [s["seconds"]["backward"] / b["seconds"]["backward"] for s, b in zip(other["stages"], full["stages"])]
    bars.bar([place - 0.2 for place in places], ideal, width=0.38, label="FLOPs", color="lightgray")
    bars.bar([place + 0.2 for place in places], measured, width=0.38, label="measured seconds", color="tab:blue")
    bars.set(title="backward pass, of full fine-tuning", xlabel="stage", xticks=list(places))
    bars.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return True


def draw_staircase(axes, summary: dict) -> None:
    """Draw which of E, B1 .. BL and H train in which stage."""
    num_blocks, stages = summary["num_blocks"], summary["stages"]
    for stage in stages:
        first, last = stage["active_blocks"] or (1, 0)
        active = {*range(first, last + 1), num_blocks + 1, *([0] if stage["embeddings"] else [])}
        for unit in range(num_blocks + 2):
            color = "tab:blue" if unit in active else "whitesmoke"
            axes.add_patch(_square(stage["stage"] - 0.5, unit - 0.5, color))
    axes.set(title="what trains", xlabel="stage", xticks=range(1, len(stages) + 1), yticks=range(num_blocks + 2))
    axes.set_yticklabels(["E", *range(1, num_blocks + 1), "H"])
    axes.set_xlim(0.5, len(stages) + 0.5)
    axes.set_ylim(-0.5, num_blocks + 1.5)


def _square(x: float, y: float, color: str):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white")
