"""Activation checkpointing of the blocks: less memory for another forward pass (Chen et al. 2016, arXiv 1604.06174)."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch.utils.checkpoint import checkpoint

from progtuning.model.bert import Model
from progtuning.step.device import attention_of_any_length


def checkpoint_blocks(model: Model) -> None:
    """Let autograd keep of each block its input alone; the backward pass runs the block again, with the same dropout.

    A frozen prefix runs without grad: it keeps nothing and is not run again. Names and gradients stay.
    """
    for block in model.encoder.layer:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Where a block runs first, that of the forward pass is on; where it runs again, in the backward pass, it is not.

    checkpoint itself brings autocast and the state of the generators back.
    """
    return nullcontext(), attention_of_any_length()
