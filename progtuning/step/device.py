"""Which device a run takes, and how a forward pass runs on it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from progtuning.base.errors import InputError
from progtuning.step.processes import World


def choose_device(name: str | None, world: World = World()) -> torch.device:
    """Return the device of that name; None takes CUDA where there is one.

    Of several processes on a machine each gets the GPU of its local rank. Raises InputError where it cannot be used.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA device here")
    if name == "cpu" or world.size == 1:
        return torch.device(name)
    if world.local_size > torch.cuda.device_count():
        raise InputError(
            f"torchrun --nproc-per-node must be at most the {torch.cuda.device_count()} CUDA devices here, "
            f"got {world.local_size}; --device cpu takes any number"
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


@contextmanager
def forward_pass(device: torch.device, precision: str) -> Iterator[None]:
    """The context of a forward pass: bf16 autocast, or none for fp32, and `attention_of_any_length`."""
    with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
        with attention_of_any_length():
            yield


@contextmanager
def attention_of_any_length() -> Iterator[None]:
    """Leave cuDNN's kernel of attention out.

    It builds a graph for every shape of a batch that it has not seen (pytorch/pytorch, pull request 155958), and
    batches of like lengths have dozens: that took longer than the training. The other kernels take any length.
    """
    took_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(took_cudnn)
