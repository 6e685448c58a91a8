"""Adapters (Houlsby et al. 2019, arXiv 1902.00751): two trained bottlenecks in every block, which itself stays frozen.

    D  hidden_size    A  adapter size    f  nonlinearity

Each half of a block ends with dense -> dropout -> residual sum -> LayerNorm. The adapter stands before the residual sum
(their Figure 2):

    x -> dense -> dropout -> x + up(f(down(x))) -> + residual -> LayerNorm
                             down: D -> A    up: A -> D
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from progtuning.bert import ACTIVATIONS, Model, Output

INIT_STD = 1e-2  # Section 3.6: a zero-mean Gaussian of this deviation, truncated to two deviations


class Adapter(nn.Module):
    """x + up(f(down(x))): (..., D) -> (..., D). Near the identity at the start: both projections are near zero."""

    def __init__(self, hidden_size: int, size: int, activation: str, generator: torch.Generator):
        super().__init__()
        self.down = skip_init(nn.Linear, hidden_size, size)
        self.activation = ACTIVATIONS[activation]
        self.up = skip_init(nn.Linear, size, hidden_size)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.activation(self.down(x)))


class AdaptedOutput(nn.Module):
    """The end of half a block, with an adapter in it. The layers of `output` keep their names."""

    def __init__(self, output: Output, adapter: Adapter):
        super().__init__()
        self.dense, self.dropout, self.LayerNorm = output.dense, output.dropout, output.LayerNorm
        self.adapter = adapter

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.adapter(self.dropout(self.dense(x))) + residual)


def insert_adapters(model: Model, size: int, activation: str, generator: torch.Generator) -> None:
    """Put an adapter of bottleneck `size` and nonlinearity `activation` in both halves of every block."""
    for block in model.encoder.layer:
        for half in (block.attention, block):
            weight = half.output.dense.weight
            adapter = Adapter(model.config.hidden_size, size, activation, generator)
            half.output = AdaptedOutput(half.output, adapter.to(weight.device, weight.dtype))


def adapter_trains(name: str, layer_norms: bool) -> bool:
    """Say whether a block's parameter `name` trains: the adapters and, as in Section 2.1, the LayerNorms."""
    return ".adapter." in name or (layer_norms and ".LayerNorm." in name)
