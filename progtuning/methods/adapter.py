"""Adapters (Houlsby et al. 2019, arXiv 1902.00751): two trained bottlenecks in every block, which itself stays frozen.

    D  hidden_size    A  adapter size    f  nonlinearity

Each half of a block ends with dense -> dropout -> residual sum -> LayerNorm. The adapter stands before the residual sum
(their Figure 2):

    x -> dense -> dropout -> x + up(f(down(x))) -> + residual -> LayerNorm
                             down: D -> A    up: A -> D

The authors' code (google-research/adapter-bert, modeling.py) computes the same, with f GELU by tanh and a start of
deviation 1e-3. It trains every LayerNorm, E's too, which lies beneath all blocks, so that no backward pass can be cut.
Here E's is frozen unless an option says otherwise, and then trains in the stages that train E.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from progtuning.model.bert import ACTIVATIONS, Model, Output
from progtuning.settings.peft import PeftConfig


class Adapter(nn.Module):
    """x + up(f(down(x))): (..., D) -> (..., D). Near the identity at the start: both projections are near zero.

    They are drawn from a Gaussian of deviation `init_std`, truncated to two deviations (Section 3.6).
    """

    def __init__(self, hidden_size: int, size: int, activation: str, init_std: float, generator: torch.Generator):
        super().__init__()
        self.down = skip_init(nn.Linear, hidden_size, size)
        self.activation = ACTIVATIONS[activation]
        self.up = skip_init(nn.Linear, size, hidden_size)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=init_std, a=-2 * init_std, b=2 * init_std, generator=generator)
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


def insert_adapters(model: Model, peft: PeftConfig, generator: torch.Generator) -> None:
    """Put an adapter in both halves of every block."""
    settings = (peft.adapter_size, peft.adapter_activation, peft.adapter_init_std)
    for block in model.encoder.layer:
        for half in (block.attention, block):
            weight = half.output.dense.weight
            adapter = Adapter(model.config.hidden_size, *settings, generator)
            half.output = AdaptedOutput(half.output, adapter.to(weight.device, weight.dtype))
