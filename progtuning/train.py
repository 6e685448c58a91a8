"""Algorithm 1 of Progtuning (arXiv 2506.21119): the loop. It is given its parts, and calls each where it acts.

    schedule    says in which stage a step is                               stages.py
    engine      makes the model train just that stage, and cuts below it    engine.py
    loader      gives the batches of an epoch, in pieces                    step/loader.py
    replica     calls the engine, and sums gradients over processes         step/processes.py
    optimizer   AdamW, with one learning-rate line over all stages          step/optim.py
    masks       leaves entries of what trains out of a step, or none        step/masks.py
    guard       does not let a step be taken that is not finite             step/guard.py
    ledger      writes down what each stage does and costs                  step/ledger.py
    progress    shows and logs the loss                                     step/progress.py

`run/build.py` makes the parts from the settings of a run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from progtuning.engine import StageEngine
from progtuning.stages import Schedule, Stage
from progtuning.step.device import forward_pass
from progtuning.step.loader import Loader, Piece, to_device

if TYPE_CHECKING:  # what the loop is given, it does not import
    from progtuning.step.guard import Guard
    from progtuning.step.ledger import Ledger
    from progtuning.step.masks import NoMasks
    from progtuning.step.processes import Replica
    from progtuning.step.progress import Progress


@dataclass
class Trainer:
    """The parts of a run, and where it is: `epoch` epochs and `batch` batches of the next are done."""

    schedule: Schedule
    engine: StageEngine
    loader: Loader
    replica: "Replica"
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # outputs, labels, mask of real tokens -> a mean, ()
    optimizer: torch.optim.Optimizer
    lr_schedule: torch.optim.lr_scheduler.LRScheduler
    masks: "NoMasks"
    guard: "Guard"
    ledger: "Ledger"
    progress: "Progress"
    num_steps: int  # of T epochs, or as many as a budget pays
    precision: str  # "fp32", or "bf16": autocast
    max_grad_norm: float  # 0: no clipping
    seed: int  # of dropout
    epoch: int = 0
    batch: int = 0

    @property
    def step(self) -> int:
        """Batches done: optimizer steps, and batches that were skipped."""
        return self.epoch * len(self.loader) + self.batch

    @property
    def epochs(self) -> int:  # T; the last may be a part of one
        return math.ceil(self.num_steps / len(self.loader))

    def fit(
        self,
        after_epoch: Callable[[int], None] = lambda epoch: None,
        after_step: Callable[[bool], None] = lambda stage_ends: None,
    ) -> None:
        """Algorithm 1, whose lines are numbered where they act. Lines 3 to 8 are done when the parts are made: PEFT
        selects or adds parameters (3-5), Eq. 2 divides the blocks into parts (7), Eq. 3 arranges these in stages (8).
        Plain fine-tuning (12-15) is the schedule "full".

        `after_step` is called between two steps, and told where a stage ends. Raises RunError where the loss or the
        gradient's norm is not finite.
        """
        if self.step == 0:
            torch.manual_seed(self.seed)
        with self.progress.bar(self.step, self.num_steps):
            for epoch in range(self.epoch, self.epochs):  # 9: for i = 1 to T do
                self.engine.train()
                for pieces in islice(self.loader.epoch(epoch, self.batch), self.num_steps - self.step):
                    stage = self.schedule.at_step(self.step, self.num_steps)
                    if stage != self.engine.stage:
                        if self.ledger.costs:
                            after_step(True)
                        self.enter(stage)
                    self.update(self.backward(pieces))  # 10: update parameters of the i-th stage
                    self.batch += 1
                    if self.progress.is_due(self.step, self.num_steps):
                        self.guard.check()
                        self.progress.write(self.step, epoch + 1, stage.index + 1, self.optimizer.param_groups[0]["lr"])
                    after_step(self.step == self.num_steps)
                self.ledger.measure_peak()
                self.guard.check()
                after_epoch(epoch)
                if self.batch == len(self.loader):
                    self.epoch, self.batch = epoch + 1, 0  # 11: end for

    def enter(self, stage: Stage) -> None:
        """Begin a stage: what trains, what the optimizer holds, where the graph is cut; and its account."""
        self.ledger.enter(stage)
        self.engine.enter(stage)
        self.ledger.reset_peak()

    def backward(self, pieces: Sequence[Piece]) -> Tensor:
        """Run forward and backward over a batch; return its mean loss, (), on the device.

        Loss and gradients are summed over all processes.
        """
        device, clock = self.loader.device, self.ledger.clock
        total = torch.zeros((), device=device)
        self.masks.before_step()
        for number, (rows, weight, tensors) in enumerate(pieces, 1):
            inputs, labels = to_device(tensors, device)
            self.ledger.count(rows, inputs["input_ids"].shape[1], weight)
            with self.replica.reducing(last=number == len(pieces)):
                with clock.phase("forward"), forward_pass(device, self.precision):
                    outputs = self.replica(**inputs, rows=rows)
                    loss = self.loss(outputs, labels, inputs.get("attention_mask")) * weight
                with clock.phase("backward"):
                    loss.backward()  # the graph ends at the lowest active block
            total += loss.detach()
        self.ledger.now.allreduced_bytes += self.replica.take_bytes()
        return self.replica.world.sum(total)

    def update(self, loss: Tensor) -> None:
        """Take the optimizer's step, or none where loss or gradient is not finite and such batches are skipped."""
        with self.ledger.clock.phase("optimizer"):
            norm = self.gradient_norm()
            if self.guard.accepts(self.step, loss, norm):
                self.schedule.after_backward(self.step, self.num_steps)
                if self.masks.after_backward():
                    norm = self.gradient_norm()  # of what trains alone
                clip_grads_with_norm_(self.active_parameters(), self.max_grad_norm or math.inf, norm)
                self.optimizer.step()
                self.masks.after_step()
                self.progress.losses.append(loss)
                self.ledger.now.steps += 1
            else:
                self.masks.skip_step()
                self.optimizer.zero_grad()
                self.optimizer.step()  # moves nothing without a gradient; the schedule warns where no step was taken
                self.ledger.now.skipped_steps += 1
            self.lr_schedule.step()
            self.optimizer.zero_grad()

    def active_parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients together, a tensor of one element."""
        return get_total_norm([p.grad for p in self.active_parameters() if p.grad is not None])
