"""How a forward pass runs on a device."""

from contextlib import nullcontext

import torch


def autocast(device: torch.device, precision: str):
    """The context of a forward pass: bf16 autocast, or none for fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
