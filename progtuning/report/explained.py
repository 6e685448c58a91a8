"""The page of `progtuning explain`: one HTML file, with the document in it and a script that shows it."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import accumulate

from progtuning.report.summary import Summary
from progtuning.report.tables import blocks_text

MAX_POINTS = 400  # of the loss; more are thinned by their means


def explained_page(document: dict) -> str:
    """Return the page, which fetches nothing. Its numbers are the document's; the script rounds and places them."""
    template = files("progtuning.report").joinpath("explained.html").read_text(encoding="utf-8")
    text = json.dumps(document, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace("{{document}}", text)


def run_document(name: str, summary: Summary, log: Sequence[Mapping], planned: Sequence[Mapping]) -> dict:
    """Return what the page has of a run: its loss, and for each stage what was measured beside its ideal.

    `name` is what it is called, `log` are the rows with a loss, `planned` the stages of its plan. A step's ideal is
    that of stage 1 times the ratio of their FLOPs; the ideal of the bytes is the plan's, of a step of the mean length,
    and None where the run decided its stages itself.
    """
    stages = [stage for stage in summary.stages if stage.steps]
    taken = [stage.steps + (stage.skipped_steps or 0) for stage in stages]
    speeds = [summary.speed(stage) for stage in stages]
    seconds = [sum(stage.seconds.values()) / stage.steps for stage in stages]
    flops = [stage.flops / stage.steps for stage in stages]
    fits = len(planned) == len(summary.stages)
    rows = []
    for stage, end, speed, second, work in zip(stages, accumulate(taken), speeds, seconds, flops):
        of_plan = planned[stage.stage - 1] if fits else None
        rows.append(
            {
                "stage": stage.stage,
                "trains": blocks_text(stage.active_blocks, stage.embeddings),
                "end": end,
                "steps": stage.steps,
                "seconds": second,
                "ideal_seconds": seconds[0] * work / flops[0],
                "phases": [[phase, value / stage.steps] for phase, value in stage.seconds.items()],
                "tokens_per_second": speed and speed.tokens_per_second,
                "ideal_tokens_per_second": speeds[0] and speeds[0].tokens_per_second * flops[0] / work,
                "share_of_peak": speed and speed.share_of_matmul_peak,
                "peak_bytes": stage.peak_bytes,
                "planned_bytes": of_plan and of_plan["step_bytes"] + of_plan["gradient_sum_bytes"],
            }
        )
    return {
        "name": name,
        "task": summary.task,
        "schedule": summary.schedule,
        "device": summary.device or "",
        "metrics": list(summary.metrics.items()),
        "updated_parameters": summary.updated_parameters,
        "flops": summary.flops,
        "seconds": sum(sum(stage.seconds.values()) for stage in summary.stages),
        "losses": thinned([(row["step"], row["loss"]) for row in log]),
        "stages": rows,
    }


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most MAX_POINTS points: of each run of them the last step, and the mean of the losses."""
    size = -(-len(points) // MAX_POINTS)
    groups = (points[begin : begin + size] for begin in range(0, len(points), size))
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]
