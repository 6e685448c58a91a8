"""The stage engine: it makes a model train exactly one stage's parameters, and cuts the autograd graph below them.

Progtuning (arXiv 2506.21119), Section 3. With block b the lowest active one:

                       forward                 saved for backward   gradient   optimizer state
    H                  with grad               yes                  yes        yes
    block L-1          with grad               yes                  yes        yes
    ...
    block b            with grad               yes                  yes        yes
    - - - - - - - - - - - - - - the cut: no gradient passes below - - - - - - - - - - - - - - -
    block b-1          under torch.no_grad     no                   None       none
    ...
    block 0            under torch.no_grad     no                   None       none
    E                  under torch.no_grad     no                   None       none

Where E trains while low blocks are frozen (embeddings "always"), its gradient crosses every block, so there is no cut.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from progtuning.model.bert import Model
from progtuning.model.names import EMBEDDINGS, HEAD, unit_of
from progtuning.stages import Stage


class StagedModel(nn.Module):
    """What trains: a model, and an optimizer over it, of whose parameters `enter(stage)` leaves just the stage's.

    The candidates for training are the parameters of `model` that require a gradient when this is built: all of them
    in full fine-tuning, those that a PEFT method selected or added otherwise (Algorithm 1). A stage trains the
    candidates that sit in its blocks, in E if it trains E, and in H; `unit_of` says by its name where each sits.

    `optimizer` (any torch optimizer over the candidates, or None) is kept in step: on entering a stage, parameters that
    leave lose their gradient and optimizer state, those that stay keep their moments, those that join start fresh.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, num_blocks: int, unit_of: Callable[[str], int | str]
    ):
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.num_blocks = num_blocks
        self.unit_of = unit_of
        self.candidates = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.groups = [list(group["params"]) for group in optimizer.param_groups] if optimizer else []
        self.stage: Stage | None = None
        self.cut: int | None = None  # E and the blocks below it run without grad; None: E runs with grad, no cut

    def trainable_names(self, stage: Stage) -> set[str]:
        """Return the names of the parameters that train in `stage`."""
        active = {HEAD, *stage.blocks, *([EMBEDDINGS] if stage.embeddings else [])}
        return {name for name in self.candidates if self.unit_of(name) in active}

    def cut_of(self, stage: Stage) -> int | None:
        """Return the index below which E and the blocks run without grad in `stage`; None where E trains: no cut."""
        units = {self.unit_of(name) for name in self.trainable_names(stage)}
        lowest = min((unit for unit in units if isinstance(unit, int)), default=self.num_blocks)
        return None if EMBEDDINGS in units else lowest

    def enter(self, stage: Stage) -> None:
        """Make exactly the parameters of `stage` trainable, and the optimizer hold exactly them.

        Raises ValueError where the stage was built for another number of blocks.
        """
        if stage.num_blocks != self.num_blocks:
            raise ValueError(f"stage must be of {self.num_blocks} blocks, got one of {stage.num_blocks}")
        active = self.trainable_names(stage)
        for name, parameter in self.candidates.items():
            parameter.requires_grad_(name in active)
            if name not in active:
                parameter.grad = None
        if self.optimizer is not None:
            keep_only(self.optimizer, self.groups, {self.candidates[name] for name in active})
        self.cut = self.cut_of(stage)
        self.stage = stage


class StageEngine(StagedModel):
    """A model under stages: `enter(stage)`, then call it as one would call the model.

    With `prefix_dropout=False` everything below the cut runs in eval mode: faster, and its output depends on the
    example alone.
    """

    def __init__(self, model: Model, optimizer: Optimizer | None = None, prefix_dropout: bool = True):
        super().__init__(model, optimizer, model.num_blocks, unit_of)
        self.prefix_dropout = prefix_dropout

    def enter(self, stage: Stage) -> None:
        super().enter(stage)
        self.train(self.training)

    def train(self, mode: bool = True) -> "StageEngine":
        super().train(mode)
        if mode and not self.prefix_dropout and self.cut is not None:
            for module in (self.model.embeddings, *self.model.encoder.layer[: self.cut]):
                module.eval()
        return self

    def prefix(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start: int = 0,
        x: Tensor | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """Run E and the blocks below the cut without grad: the arguments of `Model.forward` -> (B, S, D).

        With x (B, S, D), which enters block `start`, only the blocks from there on run; with `stop` only those below.
        """
        with torch.no_grad():
            if x is None:
                x = self.model.embeddings(input_ids, token_type_ids)
            return self.model.encoder(x, attention_mask, range(start, self.cut if stop is None else stop))

    def suffix(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the blocks from the cut on and the head: (B, S, D) -> what `Model.head` returns."""
        return self.model.head(self.model.encoder(x, attention_mask, range(self.cut, self.model.num_blocks)))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """Run the model, cut for the current stage. Arguments and result are those of `Model.forward`.

        `rows` are the numbers of the batch's examples, for an engine that keeps what it makes of them.
        """
        if self.cut is None:
            return self.model(input_ids, attention_mask, token_type_ids)
        return self.suffix(self.prefix(input_ids, attention_mask, token_type_ids), attention_mask)


def keep_only(optimizer: Optimizer, groups: list[list[nn.Parameter]], kept: set[nn.Parameter]) -> None:
    """Make `optimizer` hold exactly the parameters of `groups` (one list a group) that are in `kept`.

    What leaves loses its state, so that its memory returns and no moment or weight decay moves it any more. What stays
    keeps its state. What joins has none, and starts fresh.
    """
    for group, candidates in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [parameter for parameter in candidates if parameter in kept]
    for parameter in [parameter for parameter in optimizer.state if parameter not in kept]:
        del optimizer.state[parameter]
