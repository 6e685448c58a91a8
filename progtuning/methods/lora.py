"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen linear layer learns an update of low rank.

    h = W x + b + (alpha / r) B A x                                                               Eq. 3

    W  (n_out, n_in), frozen    A  lora_A (r, n_in)    B  lora_B (n_out, r)    alpha / r  scaling

A starts from Kaiming's uniform distribution and B at zero, so that the start is the frozen layer. `merge` adds the
update to W, after which the layer costs what it did before; `unmerge` gives W back bit for bit.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from progtuning.model.bert import Model
from progtuning.model.names import BLOCK_LINEARS
from progtuning.settings.peft import PeftConfig


class LoRALinear(nn.Module):
    """A linear layer with an update of rank `r`: (..., n_in) -> (..., n_out).

    `weight` and `bias` are those of `linear`. Once merged, A and B have no part in the forward pass and no gradient.
    """

    def __init__(self, linear: nn.Linear, r: int, alpha: float, dropout: float, generator: torch.Generator):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = skip_init(nn.Linear, linear.in_features, r, bias=False)
        self.lora_B = skip_init(nn.Linear, r, linear.out_features, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / r
        self.base_weight: Tensor | None = None  # W while merged
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_B.weight)
        self.to(self.weight.device, self.weight.dtype)

    @property
    def merged(self) -> bool:
        return self.base_weight is not None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.merged:
            return y
        return y + self.lora_B(self.lora_A(self.dropout(x))) * self.scaling  # Eq. 3

    @torch.no_grad()
    def merge(self) -> None:
        """W <- W + (alpha / r) B A, unless it is merged. Keeps a copy of W, since the sum's rounding has no inverse."""
        if not self.merged:
            self.base_weight = self.weight.clone()
            self.weight += self.lora_B.weight @ self.lora_A.weight * self.scaling

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give W back, bit for bit, if it is merged."""
        if self.merged:
            self.weight.copy_(self.base_weight)
            self.base_weight = None


def insert_lora(model: Model, peft: PeftConfig, generator: torch.Generator) -> None:
    """Wrap every layer to which `peft` adds an A and a B. Raises InputError, before anything is wrapped, as it does."""
    wrapped = []
    for index, block in enumerate(model.encoder.layer):
        for target, layer in BLOCK_LINEARS.items():
            n_out, n_in = block.get_submodule(layer).weight.shape
            if f"{layer}.lora_A.weight" in peft.adds(target, n_out, n_in, index, model.num_blocks):
                wrapped.append((block, layer))
    for block, layer in wrapped:
        parent, _, name = layer.rpartition(".")
        parent = block.get_submodule(parent)
        linear = LoRALinear(getattr(parent, name), peft.lora_r, peft.lora_alpha, peft.lora_dropout, generator)
        setattr(parent, name, linear)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Give the name and the module of every layer with LoRA."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear))


def merge(model: nn.Module) -> None:
    """Merge every layer with LoRA. A second call changes nothing."""
    for _, layer in lora_layers(model):
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: every base weight is again what it was, bit for bit."""
    for _, layer in lora_layers(model):
        layer.unmerge()


def unwrap(model: nn.Module) -> None:
    """Merge, and put plain linear layers back: the model has the parameters and names of one that never had LoRA."""
    for name, layer in list(lora_layers(model)):
        layer.merge()
        linear = nn.Linear(*reversed(layer.weight.shape), device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        model.set_submodule(name, linear.train(layer.training))
