"""Pictures of runs and probes, where matplotlib is installed."""

from collections.abc import Sequence
from pathlib import Path

from progtuning.base.files import replacing
from progtuning.report.summary import Summary


def draw_run(run: Summary, path: Path) -> bool:
    """Draw a run's staircase, and its backward seconds and FLOPs a step by stage. False without matplotlib."""
    stages = [stage for stage in run.stages if stage.steps]
    figure = new_figure(10, 4)
    if figure is None:
        return False
    stairs, bars = figure.subplots(1, 2)
    draw_staircase(stairs, run)
    ideal = [stage.backward_flops / stage.steps for stage in stages]
    measured = [stage.seconds.get("backward", 0.0) / stage.steps for stage in stages]
    shares = ([value / (values[0] or 1) for value in values] for values in (ideal, measured))
    draw_bars(bars, [stage.stage for stage in stages], *shares)
    bars.set_title("backward pass a step, of the first stage")
    save_figure(figure, path)
    return True


def draw_metric(runs: Sequence[tuple[str, Summary]], path: Path) -> bool:
    """Draw the main metric of each run against the FLOPs it took. False without matplotlib, or where metrics differ."""
    metric, *others = dict.fromkeys(next(iter(run.metrics)) for _, run in runs)
    figure = None if others else new_figure(6, 4)
    if figure is None:
        return False
    axes = figure.subplots()
    for name, run in runs:
        axes.plot([run.flops / 1e12], [run.metrics[metric]], "o", label=name)
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


def draw_savings(full: Summary, other: Summary, path: str | Path) -> bool:
    """Draw the staircase of stages and blocks, and measured beside analytic backward cost. False without matplotlib."""
    figure = new_figure(10, 4)
    if figure is None:
        return False
    stairs, bars = figure.subplots(1, 2)
    draw_staircase(stairs, other)
    pairs = list(zip(other.stages, full.stages, strict=True))
    ideal = [stage.backward_flops / base.backward_flops for stage, base in pairs]
    measured = [stage.seconds["backward"] / base.seconds["backward"] for stage, base in pairs]
    draw_bars(bars, [stage.stage for stage, _ in pairs], ideal, measured)
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


def draw_staircase(axes, summary: Summary) -> None:
    """Draw which of E, B1 .. BL and H train in which stage."""
    num_blocks, stages = summary.num_blocks, summary.stages
    trains = [[0.0] * len(stages) for _ in range(num_blocks + 2)]  # a row for E, each block and H
    for column, stage in enumerate(stages):
        first, last = stage.active_blocks or (1, 0)
        for row in [0] * stage.embeddings + [*range(first, last + 1), num_blocks + 1]:
            trains[row][column] = 1.0
    edges = dict(edgecolors="white", linewidth=1, cmap="Blues", vmin=0, vmax=1.5)
    axes.pcolormesh(trains, **edges)
    axes.set(title="what trains", xlabel="stage")
    axes.set_xticks([i + 0.5 for i in range(len(stages))], [stage.stage for stage in stages])
    axes.set_yticks([i + 0.5 for i in range(num_blocks + 2)], ["E", *range(1, num_blocks + 1), "H"])
