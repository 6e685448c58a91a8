"""The optimizer: torch's AdamW with BERT's parameter groups, and one learning-rate schedule over all stages."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from progtuning.model.names import EMBEDDINGS, HEAD, unit_of


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, lr_decay: float = 1.0) -> list[dict]:
    """Divide the parameters that require a gradient: by learning rate, and with weight decay or, as biases and
    LayerNorms, without.

    With d = `lr_decay` the head and the top block learn at `lr`, each block at d times the rate of the one above, E at
    d times that of the lowest: discriminative fine-tuning (Howard & Ruder 2018, arXiv 1801.06146, Section 3.2). With 1
    any model will do, else it is a `Model`.
    """
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_decayed = not (name.endswith("bias") or "LayerNorm" in name)
            rate = lr if lr_decay == 1 else lr * lr_decay ** blocks_above(unit_of(name), model.num_blocks)
            found.setdefault((rate, is_decayed), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": weight_decay if is_decayed else 0.0}
        for (rate, is_decayed), parameters in sorted(found.items(), key=lambda item: item[0], reverse=True)
    ]


def blocks_above(unit: int | str, num_blocks: int) -> int:
    """Return how many blocks lie above a unit: of the head and the top block none."""
    return {HEAD: 0, EMBEDDINGS: num_blocks}[unit] if isinstance(unit, str) else num_blocks - 1 - unit


def build_optimizer(
    model: nn.Module, lr: float, weight_decay: float = 0.01, epsilon: float = 1e-8, lr_decay: float = 1.0
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), torch's fused kernel, over what requires a gradient in `model` now."""
    return torch.optim.AdamW(parameter_groups(model, lr, weight_decay, lr_decay), eps=epsilon, fused=True)


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
