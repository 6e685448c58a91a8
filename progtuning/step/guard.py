"""Losses and gradients that are not finite: they end the run, or their batch is passed over."""

from dataclasses import dataclass

import torch
from torch import Tensor

from progtuning.base.errors import NotFinite
from progtuning.step.ledger import Ledger
from progtuning.step.loader import Loader
from progtuning.step.processes import World
from progtuning.step.progress import Progress

MAX_SKIPS = 10  # batches in a row that are not finite, after which `skip_nonfinite` gives up


class FiniteCheck:
    """Remembers the first step whose loss or gradient norm was not finite, on the device: `add` never waits for it."""

    def __init__(self, device: torch.device):
        self._first = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64, device=device)  # step, loss, norm

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Look at the loss and the norm, tensors of one element, of 0-based optimizer step `step`."""
        seen = torch.stack([torch.full_like(self._first[0], step), loss.double(), norm.double()])
        first = (self._first[0] < 0) & ~seen.isfinite().all()
        self._first = torch.where(first, seen, self._first)

    def read(self) -> tuple[int, float, float] | None:
        """Return step, loss and norm of the first such step, or None; wait for the device, and begin anew."""
        step, loss, norm = self._first.tolist()
        if step < 0:
            return None
        self._first = torch.full_like(self._first, -1)
        return int(step), loss, norm


@dataclass
class Guard:
    """What is done about a loss or a gradient norm that is not finite.

    With `skips_nonfinite` such a batch is passed over and a row of the log says so, up to MAX_SKIPS in a row; else it
    ends the run. A GPU is asked for what was not finite when the loss is read, unless `at_once`; until then nothing may
    be saved, so ask `check` before. Messages have the step, its stage and its rows.
    """

    check_of: FiniteCheck
    skips_nonfinite: bool
    at_once: bool
    loader: Loader
    ledger: Ledger
    progress: Progress
    world: World
    skips: int = 0  # batches in a row that were not finite

    def accepts(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        """Say whether to take 0-based optimizer step `step`: loss and norm are finite, or that is not known yet."""
        self.check_of.add(step, loss, norm)
        if not self.at_once:
            return True
        if not self.skips_nonfinite:
            self.check()
            return True
        found = self.check_of.read()
        self.skips = self.skips + 1 if found else 0
        if found:
            stage, rows = self.ledger.now.stage.index + 1, self.loader.rows_of(step)
            epoch = step // len(self.loader) + 1
            self.progress.log({"step": step + 1, "epoch": epoch, "stage": stage, "skipped_rows": rows})
        if self.skips > MAX_SKIPS:
            raise self.world.once(NotFinite(f"{self.describe(*found)}, as in {MAX_SKIPS} batches before it"))
        return not found

    def check(self) -> None:
        """Raise NotFinite, with step, stage and rows, where loss or gradient norm of a step so far was not finite."""
        if found := self.check_of.read():
            raise self.world.once(NotFinite(f"{self.describe(*found)}: try a lower --lr, or --skip-nonfinite"))

    def describe(self, step: int, loss: float, norm: float) -> str:
        """Say of a 0-based step that was not finite which it was, and in what."""
        rows = ", ".join(self.loader.rows_of(step))
        where = f"step {step + 1} (stage {self.ledger.stage_of(step)}, rows {rows})"
        return f"{where}: the loss is {loss:g}, the norm of the gradient {norm:g}"
