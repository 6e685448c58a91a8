"""The optimizer: torch's AdamW with BERT's parameter groups, and one learning-rate schedule over all stages."""

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Divide the parameters that require a gradient in two: with weight decay, and biases and LayerNorms without."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if name.endswith("bias") or "LayerNorm" in name else decayed).append(parameter)
    groups = ({"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, lr: float, weight_decay: float = 0.01, epsilon: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), torch's fused kernel, over what requires a gradient in `model` now."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, eps=epsilon, fused=True)


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, num_steps: int, warmup_steps: int, shape: str = "linear"
) -> LambdaLR:
    """Rise linearly from 0 over `warmup_steps` optimizer steps; then fall linearly to 0 at step `num_steps`, or stay.

    `shape` is one of config.LR_SCHEDULES: "linear" falls, "constant" stays.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return 1.0 if shape == "constant" else max(0.0, (num_steps - step) / max(1, num_steps - warmup_steps))

    return LambdaLR(optimizer, factor)


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


def keep_only(optimizer: torch.optim.Optimizer, groups: list[list[nn.Parameter]], kept: set[nn.Parameter]) -> None:
    """Make `optimizer` hold exactly the parameters of `groups` (one list a group) that are in `kept`.

    What leaves loses its state, so that its memory returns and no moment or weight decay moves it any more. What stays
    keeps its state. What joins has none, and starts fresh.
    """
    for group, candidates in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [parameter for parameter in candidates if parameter in kept]
    for parameter in [parameter for parameter in optimizer.state if parameter not in kept]:
        del optimizer.state[parameter]
