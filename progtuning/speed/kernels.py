"""The same results sooner: the blocks of a model by torch.compile."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

from progtuning.base.errors import InputError, RunError
from progtuning.model.bert import Model


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
