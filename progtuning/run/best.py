"""The best evaluation of a run so far: which weights are written, and when a run has waited long enough for a better.

The last stage of a schedule need not be its best.
"""

from collections.abc import Mapping

import torch

from progtuning.engine import StageEngine
from progtuning.run.evaluate import Measured
from progtuning.settings.train import TrainConfig


class EnoughEvaluations(Exception):
    """`--patience` evaluations in a row were no better than the best: the run ends."""


class Best:
    """What `see` has seen of most in the task's main metric; of equal ones the first.

    With `--keep best` it holds the weights then, of the parameters that train in the run, on the CPU.
    """

    def __init__(self, settings: TrainConfig, metric: str):
        self.keeps_weights, self.patience, self.metric = settings.keep == "best", settings.patience, metric
        self.found: dict | None = None  # "epoch" and "stage", counted from 1, and "metrics"
        self.written: Measured | None = None  # of the weights to write: the best, or the last
        self.weights: dict[str, torch.Tensor] = {}
        self.waited = 0  # evaluations since then

    def see(self, epoch: int, measured: Measured, engine: StageEngine) -> None:
        """Take note of an evaluation after 0-based `epoch`. Raises EnoughEvaluations."""
        is_better = self.found is None or self._value(measured.metrics) > self._value(self.found["metrics"])
        if is_better or not self.keeps_weights:
            self.written = measured
        if is_better:
            self.found = {"epoch": epoch + 1, "stage": engine.stage.index + 1, "metrics": dict(measured.metrics)}
            self.waited = 0
            if self.keeps_weights:
                self.weights = {name: p.detach().to("cpu", copy=True) for name, p in engine.candidates.items()}
            return
        self.waited += 1
        if self.waited == self.patience:
            raise EnoughEvaluations

    def _value(self, metrics: Mapping[str, float]) -> float:
        return metrics.get(self.metric, next(iter(metrics.values())))  # of several held-out sets the first

    def put_back(self, engine: StageEngine) -> None:
        """Give the model the weights that are held, where any are."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                engine.candidates[name].copy_(weight)

    def state_dict(self) -> dict:
        """Return what is seen. Names, which may be anything, are in lists: a checkpoint joins keys by "/"."""
        found = self.found and self.found | {"metrics": list(self.found["metrics"].items())}
        written = self.written and [list(part.items()) for part in self.written]
        return {"found": found, "written": written, "weights": self.weights, "waited": self.waited}

    def load_state_dict(self, state: Mapping) -> None:
        found = state["found"]
        self.found = found and {**found, "metrics": dict(found["metrics"])}
        self.written = state["written"] and Measured(*map(dict, state["written"]))
        self.weights, self.waited = dict(state["weights"]), state["waited"]
