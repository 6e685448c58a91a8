"""Outputs of a model for rows, and the metrics of a task's held-out rows."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from progtuning.base.errors import NotFinite
from progtuning.data.batching import EncodedRows, evaluation_batches
from progtuning.data.task import Limits, Task
from progtuning.model.bert import Model
from progtuning.model.config import HEADS
from progtuning.settings.train import TrainConfig
from progtuning.step.device import forward_pass
from progtuning.step.loader import load
from progtuning.step.processes import World


@torch.no_grad()
def predict(
    model: Model,
    data: EncodedRows,
    batch_size: int,
    device: torch.device,
    precision: str = "fp32",
    world: World = World(),
) -> np.ndarray:
    """Return the head's outputs for the N rows of `data` in their order. The model is left in eval mode.

    They are (N, C) float32, or for question answering (N, S, 2), S the length of the longest row, 0 beyond a row's
    batch. The batches are dealt to the processes of `world`, whole; each gets all outputs, and they are those of one
    process. Raises NotFinite where one is not finite: the weights are not.
    """
    model.to(device).eval()
    per_token = (int(data.lengths.max()),) if HEADS[model.config.head].per_token else ()
    outputs = np.zeros((len(data), *per_token, model.config.num_outputs), dtype=np.float32)
    batches = evaluation_batches(data.lengths, batch_size)[world.rank :: world.size]
    for rows in tqdm(batches, unit="batch", leave=False, disable=None if world.is_main else True):
        with forward_pass(device, precision):
            logits = model(**load(data, rows, device)[0])
        outputs[rows, : logits.shape[1]] = logits.float().cpu().numpy()
    world.sum(torch.from_numpy(outputs))  # to what one process put in a row the others add 0
    if not np.isfinite(outputs).all():
        row = int(np.flatnonzero(~np.isfinite(outputs.reshape(len(data), -1)).all(axis=1))[0])
        found = f"the model's output for row {row + 1} is not finite"
        raise world.once(NotFinite(f"{found}: its weights are damaged or its training diverged"))
    return outputs


class Measured(NamedTuple):
    """The metrics of held-out rows, and those of each class, by its name; {} where the task has none.

    Where splits are several the names begin with theirs: "split/metric", "split/class".
    """

    metrics: dict[str, float]
    by_class: dict[str, dict[str, float]] = {}


def measure_splits(
    model: Model,
    splits: Mapping[str, EncodedRows],
    task: Task,
    batch_size: int,
    device: torch.device,
    precision: str,
    limits: Limits = TrainConfig(),
    world: World = World(),
) -> Measured:
    """Return the task's metrics on every held-out split."""
    values, classes = {}, {}
    for name, data in splits.items():
        decisions = task.decide(predict(model, data, batch_size, device, precision, world), data, limits)
        before = "" if len(splits) == 1 else f"{name}/"
        values |= {before + metric: value for metric, value in task.score(decisions, data, limits).items()}
        classes |= {before + one: found for one, found in task.score_by_class(decisions, data).items()}
    return Measured(values, classes)
