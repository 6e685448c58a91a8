"""The optimizer: torch's AdamW with BERT's parameter groups, and one learning-rate schedule over all stages."""

import torch
from torch import nn
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

    `shape` is one of settings.train.LR_SCHEDULES: "linear" falls, "constant" stays.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return 1.0 if shape == "constant" else max(0.0, (num_steps - step) / max(1, num_steps - warmup_steps))

    return LambdaLR(optimizer, factor)
