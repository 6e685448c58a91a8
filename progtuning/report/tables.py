"""Tables of runs, plans, probes and the paper's figures, in Markdown."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from progtuning.report.summary import Speed, Summary

_NUMBER = re.compile(r"[-+]?[\d.,]*(e[-+]?\d+)?")
PHASES = ("forward", "backward", "optimizer")
SPEED = ("examples/s", "tokens/s", "padding", "TFLOP/s", "of peak")


def table(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Return an aligned Markdown table: columns of numbers to the right, others to the left; None is an empty cell."""
    body = [[str("" if cell is None else cell).replace("|", "\\|") for cell in row] for row in rows]
    columns = list(zip(*body)) or [()] * len(header)
    numeric = [all(_NUMBER.fullmatch(cell) for cell in column) for column in columns]
    widths = [max(map(len, (name, *column))) for name, column in zip(header, columns)]
    lines = [
        "| " + " | ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric)) + " |"
        for row in (header, *body)
    ]
    rule = "|" + "|".join("-" * (width + 1) + (":" if right else "-") for width, right in zip(widths, numeric)) + "|"
    return "\n".join([lines[0].rstrip(), rule, *lines[1:]])


def blocks_text(low_high: Sequence[int] | None, embeddings: bool) -> str:
    """Name what trains in a stage: "E, 1-12, H"."""
    blocks = [] if low_high is None else [str(low_high[0]) if low_high[0] == low_high[1] else "{}-{}".format(*low_high)]
    return ", ".join([*(["E"] if embeddings else []), *blocks, "H"])


def stages_table(summary: Summary) -> str:
    """Return the table of a run's stages: what trained, and what it cost."""
    rows = []
    for stage in summary.stages:
        rows.append(
            [
                stage.stage,
                blocks_text(stage.active_blocks, stage.embeddings),
                stage.steps,
                millions(stage.updated_parameters),
                tera(stage.forward_flops),
                tera(stage.backward_flops),
                *(f"{stage.seconds.get(phase, 0):.1f}" for phase in PHASES),
                None if stage.peak_bytes is None else f"{stage.peak_bytes / 2**20:,.0f}",
            ]
        )
    header = ["stage", "trains", "steps", "updated, M", "forward, TFLOP", "backward, TFLOP"]
    return table([*header, "forward, s", "backward, s", "optimizer, s", "peak, MiB"], rows)


def speed_table(summary: Summary) -> str | None:
    """Return how fast each stage was, and what an example of it took of one of stage 1, by FLOPs and by the clock.

    None where the run's version did not count it.
    """
    found = [(stage.stage, summary.speed(stage)) for stage in summary.stages] + [("all", summary.speed())]
    if None in (speed for _, speed in found):
        return None
    first, rows = found[0][1], []
    for name, speed in found:
        seconds = first.examples_per_second / speed.examples_per_second
        flops = speed.flops_per_second / first.flops_per_second * seconds
        rows.append([name, *speed_cells(speed), f"{flops:.2f}", f"{seconds:.2f}"])
    return table(["stage", *SPEED, "FLOPs, of stage 1", "time, of stage 1"], rows)


def speed_cells(speed: Speed | None) -> list[str | None]:
    """Return the cells of the columns SPEED."""
    if speed is None:
        return [None] * len(SPEED)
    share = speed.share_of_matmul_peak
    return [
        f"{speed.examples_per_second:,.1f}",
        f"{speed.tokens_per_second:,.0f}",
        f"{speed.padding:.2f}",
        f"{speed.flops_per_second / 1e12:,.3g}",
        None if share is None else f"{share:.2f}",
    ]


def comparison_table(full: Summary, other: Summary) -> str:
    """Return two runs side by side, the second as a share of the first too."""
    rows = [[name, f"{value:.4f}", f"{other.metrics[name]:.4f}", None] for name, value in full.metrics.items()]
    for name, count, text in (
        ("updated parameters, M", lambda run: run.updated_parameters, millions),
        ("forward, TFLOP", lambda run: run.forward_flops, tera),
        ("backward, TFLOP", lambda run: run.backward_flops, tera),
        *((f"{phase}, s", lambda run, p=phase: run.seconds(p), "{:.1f}".format) for phase in PHASES),
    ):
        rows.append([name, text(count(full)), text(count(other)), f"{count(other) / count(full):.2f}"])
    return table(["", full.schedule, other.schedule, "ratio"], rows)


def savings_table(full: Summary, other: Summary) -> str:
    """Return by stage the measured backward seconds over those of full fine-tuning, beside the ratio of the FLOPs."""
    rows = []
    for base, stage in zip(full.stages, other.stages, strict=True):
        measured = stage.seconds["backward"] / base.seconds["backward"]
        ideal = stage.backward_flops / base.backward_flops
        rows.append(
            [stage.stage, blocks_text(stage.active_blocks, stage.embeddings), f"{ideal:.2f}", f"{measured:.2f}"]
        )
    return table(["stage", "trains", "backward FLOPs, of full", "backward seconds, of full"], rows)


def millions(count: int) -> str:
    return f"{count / 1e6:,.2f}"


def tera(flops: int) -> str:
    return f"{flops / 1e12:,.3f}"


def class_table(by_class: Mapping[str, Mapping[str, float]]) -> str:
    """Return what `metrics.by_class` gives as a table."""
    rows = [
        [name, *(f"{one[key]:.4f}" for key in ("precision", "recall", "f1")), f"{one['support']:,}"]
        for name, one in by_class.items()
    ]
    return table(["class", "precision", "recall", "f1", "rows"], rows)


def plan_table(document: dict) -> str:
    """Return the document of `cost.plan.plan` as a table."""
    rows = [
        [
            stage["stage"],
            f"{stage['epochs']:g}",
            blocks_text(stage["active_blocks"], stage["embeddings"]),
            millions(stage["trainable_parameters"]),
            millions(stage["updated_parameters"]),
            f"{stage['forward_flops']:,}",
            f"{stage['backward_flops']:,}",
            f"{stage['share_of_full']:.2f}",
            mebibytes(stage["optimizer_bytes"]),
            mebibytes(stage["step_bytes"]),
            mebibytes(stage["cache_bytes"]),
        ]
        for stage in document["stages"]
    ]
    header = ["stage", "epochs", "trains", "trainable, M", "updated, M", "forward FLOPs a step"]
    header += ["backward FLOPs a step", "of full", "optimizer, MiB", "a step at most, MiB", "cache a batch, MiB"]
    backward = f"{document['backward_share_of_full']:.2f} of full fine-tuning, on average over the stages"
    lines = [updated_line(document), f"Backward FLOPs: {backward}.", *sums_lines(document)]
    if "memory" in document:
        fits = ", ".join(f"{stage['largest_batch']:,}" for stage in document["stages"])
        lines.append(
            f"Largest batch in {document['memory'] / 1e9:g} GB: {document['largest_batch']:,} (by stage: {fits})."
        )
    if "run" in document:
        lines.append(run_line(document["run"]))
    parts = ["\n".join([table(header, rows), "", *lines])]
    if calendars := document.get("calendars"):
        parts.append(calendars_table(calendars))
    return "\n\n".join(parts)


def updated_line(document: dict) -> str:
    updated, full = document["updated_parameters"], document["updated_parameters_full"]
    share = f"{updated / full:.2f} of full fine-tuning ({millions(full)} M)"
    return f"Updated parameters: {millions(updated)} M, {share}."


def sums_lines(document: dict) -> list[str]:
    sums = max(stage["gradient_sum_bytes"] for stage in document["stages"])
    text = f"Gradient sums: {mebibytes(sums)} MiB. adaptive decides while it trains: this is the most it costs."
    return [text] if sums else []


def run_line(run: dict) -> str:
    steps = f"{run['steps']:,} steps, {run['epochs']:.2f} epochs of {run['rows']:,} rows"
    share = f"{run['flops_share_of_full']:.3f} of full fine-tuning ({tera(run['flops_full'])} TFLOP)"
    return f"The run: {steps}; {tera(run['flops'])} TFLOP, {share}."


def batches_table(document: dict) -> str:
    """Return the document of `cost.plan.plan_batches` as a table, and its "notes"."""
    rows = [
        [
            stage["stage"],
            stage["steps"],
            blocks_text(stage["active_blocks"], stage["embeddings"]),
            millions(stage["trainable_parameters"]),
            millions(stage["updated_parameters"]),
            tera(stage["forward_flops"]),
            tera(stage["backward_flops"]),
            mebibytes(stage["optimizer_bytes"]),
            None if stage["step_bytes"] is None else mebibytes(stage["step_bytes"]),
            mebibytes(stage["cache_bytes"]),
        ]
        for stage in document["stages"]
    ]
    header = ["stage", "steps", "trains", "trainable, M", "updated, M", "forward, TFLOP", "backward, TFLOP"]
    header += ["optimizer, MiB", "a step at most, MiB", "cache, MiB"]
    lines = [updated_line(document), *sums_lines(document), run_line(document["run"]), *document["notes"]]
    return "\n".join([table(header, rows), "", *lines])


def calendars_table(calendars: Iterable[dict]) -> str:
    """Return the rows of `cost.plan.plan_calendars` as a table."""
    rows = [
        [row["schedule"], row["num_stages"], f"{row['share_of_full']:.3f}", "yes" if row["within_budget"] else "no"]
        + [f"{row['steps']:,}", f"{row['epochs']:.2f}", f"{row['flops_share_of_full']:.4f}"]
        for row in calendars
    ]
    header = ["schedule", "stages", "all epochs, of full", "within the budget", "steps that it pays", "epochs"]
    return table([*header, "their FLOPs, of full"], rows)


def paper_table(rows: Iterable[dict]) -> str:
    """Return the rows of `cost.paper.paper_rows` as a table: millions of updated parameters, ours and the paper's."""
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


def metric_tables(cells: Iterable[dict]) -> str:
    """Return the cells of `cost.paper.metric_cells` as the tables that they stand in: the paper's figures alone."""
    parts = []
    for name, of_table in groupby(cells, key=lambda cell: cell["table"]):
        of_table = list(of_table)
        rows = {
            row: [cell["paper"] for cell in group] for row, group in groupby(of_table, key=lambda cell: cell["row"])
        }
        columns = dict.fromkeys(cell["task"] for cell in of_table)
        notes = dict.fromkeys(f"{cell['row']}, {cell['task']}: {cell['note']}." for cell in of_table if "note" in cell)
        printed = table([name, *columns], [[row, *figures] for row, figures in rows.items()])
        parts.append("\n".join([printed, *(["", *notes] if notes else [])]))
    return "\n\n".join(parts)


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def probe_table(document: dict) -> str:
    """Return the rows of a probe: the metrics by the block that trained."""
    names = list(document["rows"][0]["metrics"])
    rows = [[row["block"], *(f"{row['metrics'][name]:.4f}" for name in names)] for row in document["rows"]]
    return table(["block", *names], rows)
