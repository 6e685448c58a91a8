"""Outputs of a model for rows, and the metrics of a task's held-out rows."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tqdm import tqdm

from progtuning import metrics
from progtuning.bert import Model
from progtuning.config import SquadConfig
from progtuning.data.answers import Prediction, decode
from progtuning.data.batching import EncodedRows, evaluation_batches
from progtuning.data.squad import SquadRows, SquadTask
from progtuning.data.text import Task
from progtuning.distributed import World
from progtuning.errors import RunError
from progtuning.step.device import autocast
from progtuning.step.loader import load


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
    process. Raises RunError where one is not finite: the weights are not.
    """
    model.to(device).eval()
    per_token = (int(data.lengths.max()),) if model.config.head == "question-answering" else ()
    outputs = np.zeros((len(data), *per_token, model.config.num_outputs), dtype=np.float32)
    batches = evaluation_batches(data.lengths, batch_size)[world.rank :: world.size]
    for rows in tqdm(batches, unit="batch", leave=False, disable=None if world.is_main else True):
        with autocast(device, precision):
            logits = model(**load(data, rows, device)[0])
        outputs[rows, : logits.shape[1]] = logits.float().cpu().numpy()
    world.sum(torch.from_numpy(outputs))  # to what one process put in a row the others add 0
    if not np.isfinite(outputs).all():
        row = int(np.flatnonzero(~np.isfinite(outputs.reshape(len(data), -1)).all(axis=1))[0])
        found = f"the model's output for row {row + 1} is not finite"
        raise world.once(RunError(f"{found}: its weights are damaged or its training diverged"))
    return outputs


def answer(
    model: Model,
    data: SquadRows,
    null_answers: bool,
    batch_size: int,
    device: torch.device,
    precision: str = "fp32",
    squad: SquadConfig = SquadConfig(),
    world: World = World(),
) -> list[Prediction]:
    """Return what a question-answering model answers to each question of `data`. Raises RunError as `predict` does."""
    outputs = predict(model, data, batch_size, device, precision, world)
    return decode(data, outputs, null_answers, squad.n_best, squad.max_answer_length)


def score_answers(
    predictions: Sequence[Prediction], data: SquadRows, task: SquadTask, squad: SquadConfig = SquadConfig()
) -> dict[str, float]:
    """Return the metrics of SQuAD v1.1 or v2.0, by the task, of predictions for the questions of `data`."""
    golds = [[gold.text for gold in question.answers] for question in data.questions]
    best = [prediction.spans[0].text for prediction in predictions]
    if not task.null_answers:
        return metrics.squad(best, golds)
    null_odds = [prediction.null_odds for prediction in predictions]
    return metrics.squad_v2(best, null_odds, golds, squad.null_threshold or 0.0)


def measure_splits(
    model: Model,
    splits: Mapping[str, EncodedRows],
    task: Task,
    batch_size: int,
    device: torch.device,
    precision: str,
    squad: SquadConfig = SquadConfig(),
    world: World = World(),
) -> dict[str, float]:
    """Return the task's metrics on every held-out split, under "metric", or "split/metric" where splits are several."""
    values = {}
    for name, data in splits.items():
        if isinstance(task, SquadTask):
            predictions = answer(model, data, task.null_answers, batch_size, device, precision, squad, world)
            measured = score_answers(predictions, data, task, squad)
        else:
            outputs = predict(model, data, batch_size, device, precision, world)
            predictions = outputs[:, 0] if task.is_regression else outputs.argmax(axis=1)
            measured = metrics.compute(task.metrics, predictions, data.labels.numpy())
        values |= measured if len(splits) == 1 else {f"{name}/{metric}": value for metric, value in measured.items()}
    return values
