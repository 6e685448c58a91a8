"""What makes a run what it is: settings, architecture, and digests of rows, tokenizer and weights, as `run.json` has
them."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from progtuning.base.errors import InputError
from progtuning.data.batching import EncodedRows
from progtuning.data.task import Task
from progtuning.data.tokenization import Tokenizer
from progtuning.methods.saved import base_digest
from progtuning.model.bert import Model
from progtuning.report.summary import RUN
from progtuning.run.checkpoint import FORMAT, flatten
from progtuning.run.log import warn
from progtuning.settings.options import option_name
from progtuning.settings.train import TrainConfig

NEWER, OLDER = {"architecture", "weights"}, {"model"}  # what a `run.json` of before lacks, and has besides


def identify(
    settings: TrainConfig,
    task: Task,
    train_rows: EncodedRows,
    dev_rows: Mapping[str, EncodedRows],
    tokenizer: Tokenizer,
    model: Model,
    device: torch.device,
    processes: int = 1,
) -> dict:
    """Return what two runs must share for one to go on from the other's checkpoint. `model` is as it starts."""
    values = asdict(settings)
    del values["cache_limit"], values["matmul_peak"]  # they change no result
    return {
        "settings": values,
        "task": {"name": task.name, "labels": list(task.labels)},
        "training rows": train_rows.digest(),
        "held-out rows": {name: rows.digest() for name, rows in dev_rows.items()},
        "tokenizer": tokenizer.digest(),
        "weights": base_digest(model, held=()),
        "architecture": model.config.to_dict(),
        "device": device.type,
        "processes": processes,
    }


def check_same(found: object, ours: Mapping, folder: Path) -> None:
    """Raise InputError that names what differs between the identity in a `run.json` and ours.

    A setting that it lacks, of a run begun before there was the option, counts as the option's default. What was taken
    note of later (NEWER) is passed over where it lacks it. Where a setting differs, so may the architecture that it
    makes: that is told of by itself alone.
    """
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("identity"), dict):
        raise InputError(f"{folder / RUN}: expected a file of format {FORMAT} with the key 'identity'")
    defaults = flatten(json.loads(json.dumps({"settings": asdict(TrainConfig())})))
    theirs, mine = dict(flatten(found["identity"])), dict(flatten(ours["identity"]))
    theirs = {key: value for key, value in defaults if key in mine} | theirs
    lacking = {kind for kind in NEWER if kind not in found["identity"]}
    for key in [key for key in {**mine, **theirs} if key.partition("/")[0] in lacking or key in OLDER - mine.keys()]:
        mine.pop(key, None), theirs.pop(key, None)
    differing = [key for key in {**mine, **theirs} if theirs.get(key) != mine.get(key)]
    differing = [key for key in differing if not key.startswith("architecture/")] or differing
    if differing:
        differences = "; ".join(_difference(key, theirs.get(key), mine.get(key)) for key in differing)
        raise InputError(f"--resume: {folder} is of another run: {differences}")
    before = found.get("versions")
    if before != ours["versions"]:
        warn(f"{folder} was begun with {before}, here is {ours['versions']}: it goes on, but perhaps not bit for bit")


def _difference(key: str, theirs: object, mine: object) -> str:
    kind, _, name = key.partition("/")
    if kind == "options":  # in place of a recipe's
        theirs, mine = ("the recipe's" if value is None else value for value in (theirs, mine))
    if kind in ("settings", "options"):
        return f"{option_name(TrainConfig, name)} was {theirs}, now {mine}"
    if kind == "processes":
        return f"it had {theirs} processes (torchrun), now {mine}"
    if kind == "architecture":
        return f"the model's {name} was {theirs}, now {mine}"
    if kind in ("task", "device"):
        return f"{key.replace('/', ' ')} was {theirs}, now {mine}"
    return f"the {key.replace('/', ' ')} {'differ' if kind.endswith('s') else 'differs'}"
