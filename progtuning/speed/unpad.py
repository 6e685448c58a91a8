"""An encoder that runs without padding on CUDA: the real tokens of a batch, end to end, and attention within each row.

    B  batch    S  sequence, padded    T  real tokens of the batch    D  hidden_size    H  heads

    (B, S, D), mask (B, S)  ->  (1, T, D)  ->  the blocks  ->  (B, S, D), zeros at padding

Attention within rows of different lengths has two kernels in PyTorch. `torch.nn.attention.varlen` (PyTorch 2.10 and
later) takes half precision and drops nothing out. Nested tensors take the rest: fp32, and dropout of attention.
It pays where padding is much: batches that are not grouped by length. Each pass waits once for the device, to learn T.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nested import nested_tensor_from_jagged
from torch.nn import functional as F

from progtuning.base.errors import InputError
from progtuning.model.bert import Encoder, Model

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch before 2.10
    varlen_attn = None


class Packing(NamedTuple):
    """Where the rows of a packed batch begin, in place of a mask."""

    offsets: Tensor  # (B + 1,) int32: row i is tokens offsets[i] .. offsets[i + 1] - 1
    longest: int  # no row is longer


def unpad(model: Model, device: torch.device) -> None:
    """Make the encoder of `model` run unpadded. Names and results (to rounding) stay.

    Raises InputError as `check_unpadded` does.
    """
    check_unpadded(device)
    replace_attention(model)


def check_unpadded(device: torch.device) -> None:
    """Raise InputError where `device` cannot: on a CPU the rows would run one by one."""
    if device.type != "cuda":
        raise InputError(f"--unpadded needs CUDA, got {device.type}")


def replace_attention(model: Model) -> None:
    """Put `attend` into every block of `model`, and `forward_unpadded` into its encoder."""
    for block in model.encoder.layer:
        block.attention.self.attend = attend
    model.encoder.forward = partial(forward_unpadded, model.encoder)


def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | Packing | None, dropout_p: float) -> Tensor:
    """Attention of a padded batch, (B, H, S, D/H), by its mask, or of a packed one, (1, H, T, D/H), within each row."""
    if not isinstance(attn_mask, Packing):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (1, H, T, D/H) -> (T, H, D/H)
    context = attend_rows(query, key, value, *attn_mask, dropout_p)
    return context.transpose(0, 1)[None]  # (T, H, D/H) -> (1, H, T, D/H)


@torch.compiler.disable  # the kernels are compiled already; what is before and after them makes a graph each
def attend_rows(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, dropout_p: float) -> Tensor:
    """Attention within each row of a packed batch: (T, H, D/H) -> (T, H, D/H)."""
    if takes_varlen(query, dropout_p):
        return varlen_attn(query, key, value, offsets, offsets, longest, longest)
    rows = (  # (B, H, row, D/H)
        nested_tensor_from_jagged(x, offsets, min_seqlen=1, max_seqlen=longest).transpose(1, 2)
        for x in (query, key, value)
    )
    return F.scaled_dot_product_attention(*rows, dropout_p=dropout_p).transpose(1, 2).values()


def takes_varlen(query: Tensor, dropout_p: float) -> bool:
    """Say whether varlen_attn is here and computes this."""
    return varlen_attn is not None and not dropout_p and query.is_cuda and query.dtype == torch.bfloat16


def forward_unpadded(encoder: Encoder, x: Tensor, mask: Tensor | None, blocks: range | None = None) -> Tensor:
    """`Encoder.forward`, on real tokens alone: x and result (B, S, D), `mask` (B, S) bool or None."""
    blocks = range(len(encoder.layer)) if blocks is None else blocks
    if mask is None or not blocks:
        return Encoder.forward(encoder, x, mask, blocks)
    real = mask.flatten().nonzero().squeeze(1)  # (T,)
    packing = Packing(F.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0)).int(), mask.shape[1])
    packed = x.flatten(0, 1)[real][None]  # (B, S, D) -> (1, T, D)
    for index in blocks:
        packed = encoder.layer[index](packed, packing)
    padded = packed.new_zeros(mask.numel(), x.shape[-1]).index_copy(0, real, packed[0])
    return padded.unflatten(0, mask.shape)  # (B S, D) -> (B, S, D)
