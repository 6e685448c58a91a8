"""The document of a run, `summary.json`: what it is, written and read."""

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

from progtuning.base.errors import InputError
from progtuning.base.files import read_json, write_json

SUMMARY = "summary.json"  # written last
RUN, LOG = "run.json", "metrics.jsonl"  # of the run's identity, and of its steps: there from the start
_NAMES = "task, settings.schedule or settings.peft.method"
_SIZES = "num_blocks or updated_parameters"
_COUNTS = "embeddings or .steps"


def _key(low: float = 0, high: float = 1e30, called: str | None = None):
    """A key that each summary has: the range of its numbers, and what a message calls it where not by its name."""
    return field(metadata={"low": low, "high": high, "called": called})


def _maybe(checked: bool = False, low: float = 0):
    """A key that some runs, or versions that wrote less, leave out: then it is None.

    Where it is there, its type and that it is at least `low` is checked if `checked`.
    """
    return field(default=None, metadata={"checked": checked, "low": low})


@dataclass(frozen=True)
class Speed:
    """What a second of forward, backward and optimizer does; loading, evaluating and saving have no part in it."""

    examples_per_second: float
    tokens_per_second: float  # real ones
    slots_per_second: float  # tokens and padding
    flops_per_second: float
    share_of_matmul_peak: float | None  # None where the peak is not known

    @classmethod
    def of(
        cls, examples: int, tokens: int, slots: int, flops: int, seconds: float, peak: float | None
    ) -> "Speed | None":
        """Return the speed of so much work; `peak` in FLOP/s. None where there was none."""
        if not seconds or not slots:
            return None
        share = flops / seconds / peak if peak else None
        return cls(examples / seconds, tokens / seconds, slots / seconds, flops / seconds, share)

    @property
    def padding(self) -> float:
        """The share of the slots that hold no token."""
        return 1 - self.tokens_per_second / self.slots_per_second


@dataclass(frozen=True, kw_only=True)
class StageSummary:
    """What a stage did and cost: of all processes together, but for the seconds and the two of `allreduced`."""

    stage: int  # from 1
    steps: int = _key(high=10**12, called=_COUNTS)
    skipped_steps: int | None = _maybe()
    active_blocks: list[int] | None  # the first and the last that train, from 1
    embeddings: bool = _key(called=_COUNTS)  # whether a part of E trains
    trainable_parameters: int | None = _maybe()
    updated_parameters: int
    forward_flops: int
    backward_flops: int
    seconds: dict[str, float]  # by phase
    gradient_sum_bytes: int | None = _maybe()
    peak_bytes: int | None
    cache_bytes: int | None = _maybe()
    cache_hits: int | None = _maybe()
    cache_misses: int | None = _maybe()
    allreduced_bytes: int | None = _maybe()
    allreduced_bytes_per_step: float | None = _maybe()
    gradient_bytes: int | None = _maybe()
    examples: int | None = _maybe(checked=True)
    tokens: int | None = _maybe(checked=True)  # real ones
    slots: int | None = _maybe(checked=True)  # tokens and padding

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops

    def to_json(self) -> dict:
        return _written(self)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run was, gave and cost. `settings` are those of TrainConfig, as a dict."""

    model: str = _key()
    task: str = _key(called=_NAMES)
    num_blocks: int = _key(1, 1000, _SIZES)
    train_rows: int | None = _maybe(checked=True, low=1)
    dev_rows: dict[str, int] | None = _maybe()
    train_windows: int | None = _maybe()  # of questions
    pairs: bool | None = _maybe()  # of labelled texts: whether a row has two
    division: dict | None = _maybe()  # of one's own file: the options by which its rows were divided
    metrics: dict[str, float] = _key(low=-1e9)
    by_class: dict[str, dict] | None = _maybe()  # precision, recall, f1 and support of each class
    epochs: int | None = _maybe()  # until the last evaluation
    best: dict | None = _maybe()  # the best evaluation: "epoch", "stage", "metrics"
    processes: int | None = _maybe()
    stages: list[StageSummary]
    decisions: list[dict] | None = _maybe()  # of the schedule "adaptive"
    updated_parameters: int = _key(called=_SIZES)
    updated_parameters_full: int | None = _maybe()
    fresh_parameters: Sequence[str] | None = _maybe()
    unused_tensors: Sequence[str] | None = _maybe()
    settings: dict
    device: str | None = _maybe()
    processor: str | None = _maybe()
    versions: dict[str, str] | None = _maybe()
    attention_backends: dict[str, dict[str, str]] | None = _maybe()
    matmul_peak: float | None = _maybe(checked=True)  # FLOP/s of a device's fastest product of matrices

    @property
    def forward_flops(self) -> int:
        return sum(stage.forward_flops for stage in self.stages)

    @property
    def backward_flops(self) -> int:
        return sum(stage.backward_flops for stage in self.stages)

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops

    @property
    def schedule(self) -> str:
        """The name of the schedule, or the calendar."""
        return self.settings.get("calendar") or self.settings["schedule"]

    def seconds(self, phase: str) -> float:
        return sum(stage.seconds.get(phase, 0.0) for stage in self.stages)

    def speed(self, *stages: StageSummary) -> Speed | None:
        """Return the speed of these stages together, of the run where none is given; None where it is not known."""
        stages = stages or tuple(self.stages)
        if any(None in (stage.examples, stage.tokens, stage.slots) for stage in stages):
            return None
        counts = (sum(getattr(one, name) for one in stages) for name in ("examples", "tokens", "slots", "flops"))
        seconds = sum(sum(stage.seconds.values()) for stage in stages)
        return Speed.of(*counts, seconds, self.matmul_peak and self.matmul_peak * (self.processes or 1))

    def to_json(self) -> dict:
        """Return the document; "speed", of the run and of each stage, follows from the rest and is not read again."""
        stages = [stage.to_json() | _speed(self.speed(stage)) for stage in self.stages]
        return _written(self) | {"stages": stages} | _speed(self.speed())


@dataclass(frozen=True)
class Training:
    """Of a run's summary what its predictions need."""

    task: str
    settings: dict
    pairs: bool | None  # None: not known, or of questions
    division: dict | None  # of one file's rows; None: they were not divided


def write_summary(folder: Path, summary: Summary) -> None:
    """Write the summary of the run of `folder`."""
    write_json(folder / SUMMARY, summary.to_json())


def check_finished(folder: Path) -> None:
    """Raise InputError where `folder` is of a run of train that was begun and has no summary."""
    if (folder / RUN).is_file() and (folder / LOG).is_file() and not (folder / SUMMARY).exists():
        raise InputError(f"{folder} is of a run that has not finished: go on with train --resume")


def read_summary(folder: Path) -> Summary:
    """Read the summary of an output folder of `train`. Raises InputError where it is none.

    Keys that have no default must be there, with values of their types; of the others nothing is checked.
    """
    check_finished(folder)
    path = folder / SUMMARY
    values = read_json(path)
    expected = {one.name for one in fields(Summary) if one.default is MISSING}
    if not isinstance(values, dict) or not expected <= set(values):
        raise InputError(f"{path}: expected the summary of a run of train, with {', '.join(sorted(expected))}")
    if wrong := _wrong_value(values):
        raise _not_written(path, wrong)
    stages = [StageSummary(**_known(StageSummary, stage)) for stage in values["stages"]]
    return Summary(**_known(Summary, values) | {"stages": stages})


def read_worked_summary(folder: Path) -> Summary:
    """Read a summary as `read_summary` does, of a run that took a step: else InputError too."""
    summary = read_summary(folder)
    if not any(stage.steps and stage.backward_flops for stage in summary.stages):
        raise _not_written(folder / SUMMARY, "stages")
    return summary


def read_training(folder: Path) -> Training | None:
    """Read what predictions need of a summary, None where the folder has none. What stands in its settings is not
    checked. Raises InputError where it is no summary."""
    path = folder / SUMMARY
    if not path.exists():
        return None
    values = read_json(path)
    if not isinstance(values, dict) or not {"task", "settings"} <= set(values):
        raise no_training(folder)
    training = Training(values["task"], values["settings"], values.get("pairs"), values.get("division"))
    division = {"dev_share": 0.0, "split_seed": 0} if training.division is None else training.division
    is_known = isinstance(division, dict) and set(division) == {"dev_share", "split_seed"}
    is_known = is_known and _fits(division["dev_share"], float) and _fits(division["split_seed"], int)
    if not isinstance(training.settings, dict) or not _fits(training.pairs, bool | None) or not is_known:
        raise no_training(folder)
    return training


def no_training(folder: Path) -> InputError:
    return InputError(f"{folder / SUMMARY}: expected the summary of a run of train, with its task and settings")


def _not_written(path: Path, name: str) -> InputError:
    return InputError(f"{path}: {name} is not what train writes there")


def _written(document: Summary | StageSummary) -> dict:
    """Return the keys and values of a document, without those that it leaves out."""
    values = ((one, getattr(document, one.name)) for one in fields(document))
    return {one.name: value for one, value in values if value is not one.default}


def _speed(speed: Speed | None) -> dict:
    return {} if speed is None else {"speed": asdict(speed)}


def _known(kind: type, values: dict) -> dict:
    return {one.name: values[one.name] for one in fields(kind) if one.name in values}


def _wrong_value(values: dict) -> str | None:
    """Return the name of the first value of a summary that is not of its type, None where there is none."""
    if wrong := _wrong_key(Summary, values):
        return wrong
    peft = values["settings"].get("peft")
    if not isinstance(peft, dict):
        return "settings"
    if not all(isinstance(name, str) for name in (values["settings"].get("schedule"), peft.get("method"))):
        return _NAMES
    for i, stage in enumerate(values["stages"]):
        blocks = stage.get("active_blocks", ())
        fits = blocks is None or _fits(blocks, list[int], 1, values["num_blocks"]) and len(blocks) == 2
        if not (fits and (blocks is None or blocks[0] <= blocks[1])):
            return f"stages[{i}].active_blocks"
        if wrong := _wrong_key(StageSummary, stage):
            return f"stages[{i}].{wrong}"
        worked = [stage["forward_flops"], stage["backward_flops"], *map(stage.get, ("examples", "tokens", "slots"))]
        if stage["steps"] and 0 in worked:  # every step has some of each
            return f"stages[{i}]"
    return None if values["metrics"] else "metrics"


def _wrong_key(kind: type, values: dict) -> str | None:
    """Return the name of the first key that is not of its type, or missing without a default; None where all fit."""
    for one in fields(kind):
        low, high = one.metadata.get("low", 0), one.metadata.get("high", 1e30)
        is_due = one.default is MISSING or one.name in values and one.metadata["checked"]
        if is_due and not (one.name in values and _fits(values[one.name], one.type, low, high)):
            return one.metadata.get("called") or one.name
    return None


def _fits(value, kind, low: float = 0, high: float = 1e30) -> bool:
    """Say whether a value of JSON is of a type, and its numbers in low .. high."""
    inner = get_args(kind)
    if get_origin(kind) is UnionType:
        return any(_fits(value, one, low, high) for one in inner)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, inner[0], low, high) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1], low, high) for item in value.values())
    if kind in (int, float):
        numbers = int if kind is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool) and low <= value <= high
    return isinstance(value, dict if is_dataclass(kind) else kind)
