"""What is seen of a run while it trains: a bar on standard error, and rows of the log."""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:  # what it is given, it does not import
    from progtuning.step.ledger import Ledger

LOG_EVERY = 10  # optimizer steps; the loss is read from the device only then


class Progress:
    """Takes the loss of each step, and every LOG_EVERY steps writes their mean; only then does the host wait for it.

    `log` takes a row of `metrics.jsonl`. Where `quiet` there is no bar. Of `ledger` the bar has how fast this process
    was in the stage so far.
    """

    def __init__(self, log: Callable[[Mapping], None], ledger: "Ledger", quiet: bool):
        self.log = log
        self.ledger = ledger
        self.quiet = quiet
        self.losses: list[Tensor] = []  # of the steps since the last row of the log
        self._bar: tqdm | None = None

    @contextmanager
    def bar(self, step: int, num_steps: int) -> Iterator[None]:
        """Show a bar of `num_steps`, of which `step` are done, for the length of the block."""
        disable = True if self.quiet else None  # None: where standard error is no terminal
        with tqdm(total=num_steps, initial=step, unit="step", disable=disable) as self._bar:
            yield

    def is_due(self, step: int, num_steps: int) -> bool:
        """Take note that `step` of `num_steps` are done; say whether a row of the log is due."""
        self._bar.update()
        return step % LOG_EVERY == 0 or step == num_steps

    def write(self, step: int, epoch: int, stage: int, lr: float) -> None:
        """Log the mean loss since the last row; nothing where all batches were skipped. All count from 1."""
        if not self.losses:
            return
        loss = torch.stack(self.losses).mean().item()
        self.log({"step": step, "epoch": epoch, "stage": stage, "loss": loss, "lr": lr})
        if not self._bar.disable:
            self._bar.set_postfix({"stage": stage, "loss": f"{loss:.3f}"} | self._speed())
        self.losses.clear()

    def _speed(self) -> dict[str, str]:
        speed = self.ledger.speed()
        if speed is None:
            return {}
        shown = {
            "tokens/s": f"{speed.tokens_per_second:,.0f}",
            "padding": f"{speed.padding:.0%}",
            "TFLOP/s": f"{speed.flops_per_second / 1e12:.3g}",
        }
        share = speed.share_of_matmul_peak
        return shown if share is None else shown | {"of peak": f"{share:.2f}"}
