"""An encoder that runs without padding: all but attention on the real tokens of a batch, attention on its padded rows.

    B  batch    S  sequence, padded    T  real tokens of the batch    D  hidden_size    H  heads

    (B, S, D), mask (B, S)  ->  (1, T, D)  ->  the blocks  ->  (B, S, D), zeros at padding
    in a block: queries, keys, values (1, H, T, D/H)  ->  (B, H, S, D/H)  ->  attention by the mask  ->  (1, H, T, D/H)

Attention is a small part of a block's FLOPs at usual lengths (S / (6 D + S), S = 128 of BERT-base: 3 %), and on padded
rows any kernel of PyTorch computes it, with dropout too. Each pass waits once for the device, to learn T.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from progtuning.model.bert import Encoder, Model


class Packing(NamedTuple):
    """Where the tokens of a packed batch stand in the padded one, in place of a mask."""

    real: Tensor  # (T,) int64, distinct: places among the B S slots
    mask: Tensor  # (B, S) bool: True at real tokens


def unpad(model: Model) -> None:
    """Make the encoder of `model` run unpadded, in place. Names and results (to rounding) stay."""
    for block in model.encoder.layer:
        block.attention.self.attend = attend
    model.encoder.forward = partial(forward_unpadded, model.encoder)


def pad(x: Tensor, real: Tensor, slots: int) -> Tensor:
    """Rows (T, ...) at their places among `slots` rows of zeros."""
    return x.new_zeros(slots, *x.shape[1:]).index_copy(0, real, x)


def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | Packing | None, dropout_p: float) -> Tensor:
    """Attention of a padded batch, (B, H, S, D/H), by its mask, or of a packed one, (1, H, T, D/H), by its rows."""
    if not isinstance(attn_mask, Packing):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p)
    real, mask = attn_mask
    packed = torch.stack((query[0], key[0], value[0])).permute(2, 0, 1, 3)  # (T, 3, H, D/H)
    padded = pad(packed, real, mask.numel()).unflatten(0, mask.shape)  # (B, S, 3, H, D/H)
    query, key, value = padded.permute(2, 0, 3, 1, 4)  # each (B, H, S, D/H)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None], dropout_p=dropout_p)
    context = context.transpose(1, 2).flatten(0, 1).index_select(0, real)  # (B S, H, D/H) -> (T, H, D/H)
    return context.transpose(0, 1)[None]


def forward_unpadded(encoder: Encoder, x: Tensor, mask: Tensor | None, blocks: range | None = None) -> Tensor:
    """`Encoder.forward`, on real tokens alone: x and result (B, S, D), `mask` (B, S) bool or None."""
    blocks = range(len(encoder.layer)) if blocks is None else blocks
    if mask is None or not blocks:
        return Encoder.forward(encoder, x, mask, blocks)
    packing = Packing(mask.flatten().nonzero().squeeze(1), mask)
    packed = x.flatten(0, 1).index_select(0, packing.real)[None]  # (B, S, D) -> (1, T, D)
    for index in blocks:
        packed = encoder.layer[index](packed, packing)
    return pad(packed[0], packing.real, mask.numel()).unflatten(0, mask.shape)  # (1, T, D) -> (B, S, D)
