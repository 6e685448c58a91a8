"""An encoder that runs without padding on CUDA: the real tokens of a batch, end to end, and attention within each row.

    B  batch    S  sequence, padded    T  real tokens of the batch    D  hidden_size    H  heads

    (B, S, D), mask (B, S)  ->  (1, T, D)  ->  the blocks  ->  (B, S, D), zeros at padding

Attention goes through `torch.nn.attention.varlen` (PyTorch 2.10 and later), whose kernel takes half precision and has
no dropout. So the blocks run unpadded where they are under bf16 autocast and drop no attention out: in evaluation, in
frozen blocks in eval mode, and in training where the model's dropout of attention is 0. Elsewhere they run as they did.
It pays where padding is much: batches that are not grouped by length. Each pass waits once for the device, to learn T.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
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
    """Make the encoder of `model` run unpadded where it can. Names and results (to rounding) stay.

    Raises InputError where `device` or this PyTorch cannot.
    """
    if device.type != "cuda" or varlen_attn is None:
        got = f"{device.type} and {torch.__version__}"
        raise InputError(f"--unpadded needs CUDA and PyTorch 2.10 or later, got {got}")
    replace_attention(model)


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
    offsets, longest = attn_mask
    context = varlen_attn(query, key, value, offsets, offsets, longest, longest)
    return context.transpose(0, 1)[None]  # (T, H, D/H) -> (1, H, T, D/H)


def forward_unpadded(encoder: Encoder, x: Tensor, mask: Tensor | None, blocks: range | None = None) -> Tensor:
    """`Encoder.forward`, on real tokens alone where that can be: x and result (B, S, D), `mask` (B, S) bool or None."""
    blocks = range(len(encoder.layer)) if blocks is None else blocks
    attentions = [encoder.layer[index].attention.self for index in blocks]
    drops_out = any(attention.training and attention.dropout_prob for attention in attentions)
    if mask is None or not blocks or drops_out or not kernel_takes(x):
        return Encoder.forward(encoder, x, mask, blocks)
    real = mask.flatten().nonzero().squeeze(1)  # (T,)
    packing = Packing(F.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0)).int(), mask.shape[1])
    packed = x.flatten(0, 1)[real][None]  # (B, S, D) -> (1, T, D)
    for index in blocks:
        packed = encoder.layer[index](packed, packing)
    padded = packed.new_zeros(mask.numel(), x.shape[-1]).index_copy(0, real, packed[0])
    return padded.unflatten(0, mask.shape)  # (B S, D) -> (B, S, D)


def kernel_takes(x: Tensor) -> bool:
    """Say whether the linear layers give the attention of a block on x bf16."""
    return torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.bfloat16
