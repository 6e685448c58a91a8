"""The document of a run, `summary.json`."""

from pathlib import Path

from progtuning.errors import InputError
from progtuning.files import read_json


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
