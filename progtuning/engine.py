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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from progtuning.bert import Model
from progtuning.cache import PrefixCache
from progtuning.errors import InputError, RunError
from progtuning.model.names import EMBEDDINGS, HEAD, unit_of
from progtuning.optim import keep_only
from progtuning.stages import Stage


@lru_cache
def check_compiler(device: torch.device) -> None:
    """Raise InputError where torch.compile makes no code for `device`: it needs a C++ compiler, on CUDA Triton."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # of PyTorch, its backend, the compiler, or the folder where the code is kept
        raise InputError(f"--compile: torch.compile does not work here: {_reason(error)}") from None


@contextmanager
def reporting_compiler() -> Iterator[None]:
    """Raise RunError, of one line, where torch.compile fails within the block."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise RunError(f"--compile: torch.compile failed: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Return the line of an error of torch.compile that says what is wrong: of a compiler's output its first error."""
    error = getattr(error, "inner_exception", error)  # that of the backend
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error: " in line), lines[0] if lines else type(error).__name__)


def compile_blocks(model: Model, backend: str = "inductor") -> None:
    """Compile every block of `model`, in place, by torch.compile; names, parameters and results (to rounding) stay.

    Blocks that are alike share their graphs. One is made for each kind of block that a run meets: with a gradient for
    its input (above the lowest active block), without (the lowest), frozen, in evaluation; lengths and batch sizes are
    dynamic. A stage change therefore recompiles by itself: a graph is chosen by what requires a gradient.
    Raises InputError where there is no compiler; what fails later, in the run, is for `reporting_compiler`.
    """
    if backend == "inductor":
        check_compiler(next(model.parameters()).device)
    config = torch._dynamo.config
    # cache_size_limit is the name until PyTorch 2.6.
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(32, getattr(config, limit)))  # SPAFIT's three kinds of blocks exceed the default, 8
    for block in model.encoder.layer:
        block.compile(dynamic=True, backend=backend)


class StageEngine(nn.Module):
    """A model under stages: `enter(stage)`, then call it as one would call the model.

    The candidates for training are the parameters of `model` that require a gradient when the engine is built: all of
    them in full fine-tuning, those that a PEFT method selected or added otherwise (Algorithm 1). A stage trains the
    candidates that sit in its blocks, in E if it trains E, and in H.

    `optimizer` (any torch optimizer over the candidates, or None) is kept in step: on entering a stage, parameters that
    leave lose their gradient and optimizer state, those that stay keep their moments, those that join start fresh.

    With `prefix_dropout=False` everything below the cut runs in eval mode: faster, and its output depends on the
    example alone. Then a `cache` may keep that output, for stages whose cut never falls: pass the examples' numbers as
    `rows` with each batch.
    """

    def __init__(
        self,
        model: Model,
        optimizer: torch.optim.Optimizer | None = None,
        prefix_dropout: bool = True,
        cache: PrefixCache | None = None,
    ):
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.prefix_dropout = prefix_dropout
        self.cache = cache
        self.candidates = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.groups = [list(group["params"]) for group in optimizer.param_groups] if optimizer else []
        self.stage: Stage | None = None
        # E and the blocks below this index run without grad; None: E runs with grad, no cut.
        self.cut: int | None = None

    def trainable_names(self, stage: Stage) -> set[str]:
        """Return the names of the parameters that train in `stage`."""
        active = {HEAD, *stage.blocks, *([EMBEDDINGS] if stage.embeddings else [])}
        return {name for name in self.candidates if unit_of(name) in active}

    def units(self, stage: Stage) -> set[int | str]:
        """Return the units (as `unit_of` says) that have a parameter which trains in `stage`."""
        return {unit_of(name) for name in self.trainable_names(stage)}

    def cut_of(self, stage: Stage) -> int | None:
        """Return the index below which E and the blocks run without grad in `stage`; None where E trains: no cut."""
        units = self.units(stage)
        lowest = min((unit for unit in units if isinstance(unit, int)), default=self.model.num_blocks)
        return None if EMBEDDINGS in units else lowest

    def enter(self, stage: Stage) -> None:
        """Make exactly the parameters of `stage` trainable, and the optimizer hold exactly them.

        Raises ValueError where the stage was built for another number of blocks.
        """
        if stage.num_blocks != self.model.num_blocks:
            raise ValueError(f"stage must be of {self.model.num_blocks} blocks, got one of {stage.num_blocks}")
        active = self.trainable_names(stage)
        for name, parameter in self.candidates.items():
            parameter.requires_grad_(name in active)
            if name not in active:
                parameter.grad = None
        if self.optimizer is not None:
            keep_only(self.optimizer, self.groups, {self.candidates[name] for name in active})
        self.cut = self.cut_of(stage)
        self.stage = stage
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
    ) -> Tensor:
        """Run E and the blocks below the cut without grad: the arguments of `Model.forward` -> (B, S, D).

        With x (B, S, D), which enters block `start`, only the blocks from there on run.
        """
        with torch.no_grad():
            if x is None:
                x = self.model.embeddings(input_ids, token_type_ids)
            return self.model.encoder(x, attention_mask, range(start, self.cut))

    def cached_prefix(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        rows: Sequence[int] = (),
    ) -> Tensor:
        """Return what `prefix` does for the examples `rows`, running only the blocks that the cache has not kept.

        Raises ValueError where the prefix drops out, or the cut has fallen.
        """
        if self.prefix_dropout:
            raise ValueError("a prefix cache needs prefix_dropout=False, got True")

        def run(chosen: np.ndarray | None, level: int, x: Tensor | None) -> Tensor:
            inputs = (input_ids, attention_mask, token_type_ids)
            if chosen is not None:
                index = torch.from_numpy(chosen).to(input_ids.device, non_blocking=True)
                inputs = (None if value is None else value[index] for value in inputs)
            return self.prefix(*inputs, start=level, x=x)

        return self.cache.fetch(rows, self.cut, input_ids.shape[1], input_ids.device, run)

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

        `rows` are the numbers that the batch's examples have in the cache; None goes past the cache.
        """
        if self.cut is None:
            return self.model(input_ids, attention_mask, token_type_ids)
        if self.cache is None or rows is None or self.cut == 0:  # E alone is too cheap to keep
            x = self.prefix(input_ids, attention_mask, token_type_ids)
        else:
            x = self.cached_prefix(input_ids, attention_mask, token_type_ids, rows)
        return self.suffix(x, attention_mask)


class GradientSums:
    """The sums of gradients over an interval of steps, by which AutoFreeze decides (see `stages.AdaptiveSchedule`).

    `candidates` are parameters by name. Those of E and H have no part in it. What is summed takes one tensor, of the
    gradient's shape and dtype, for each parameter of a block that has a gradient; what froze leaves with the interval.
    """

    def __init__(self, candidates: Mapping[str, Tensor]):
        self.parameters = {name: p for name, p in candidates.items() if isinstance(unit_of(name), int)}
        self.sums: dict[str, Tensor] = {}

    def nbytes(self) -> int:
        """Return the bytes of the sums for what trains now, in fp32."""
        return 4 * sum(p.numel() for p in self.parameters.values() if p.requires_grad)

    @torch.no_grad()
    def add(self) -> None:
        """Add the gradients of a step."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            if name in self.sums:
                self.sums[name] += parameter.grad
            else:
                self.sums[name] = parameter.grad.clone()

    def take(self) -> dict[int, Tensor]:
        """Return by block the L1 norms of its sums, added up, as float64 tensors of one element; begin a new interval.

        Nothing here waits for the device.
        """
        norms: dict[int, list[Tensor]] = {}
        for name, total in self.sums.items():
            norms.setdefault(unit_of(name), []).append(torch.linalg.vector_norm(total, 1))
        self.sums.clear()
        return {block: torch.stack(of_block).double().sum() for block, of_block in norms.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs: the sums so far. The next step changes them."""
        return dict(self.sums)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.sums = {name: total.to(self.parameters[name].device, copy=True) for name, total in state.items()}
