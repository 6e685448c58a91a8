"""SPAFIT (Arora & Wang 2024, arXiv 2405.00201): the blocks in three groups, each tuned more than the one below it.

    group 1   blocks  0 .. N1-1     frozen, as is E
    group 2   blocks N1 .. N2-1     biases
    group 3   blocks N2 .. L-1      LoRA on the targets, the biases of every other layer

H trains too: its last layers, and of the pooler the bias. Under a schedule, a stage trains what it has in common with
the groups. Two variants are named after their bounds, of the 24 blocks of BERT-large; for other depths the bounds are
in proportion, rounded down.

Of the paper we could read the abstract and summaries, which give the groups; for the bounds, the rank and the pooler's
bias there was no source, nor is there code of the authors. At our defaults 0.21 % of BERT-large's parameters train
(4-14: 0.16 %), where summaries of the paper say 1 to 2 %.
"""

import re

import torch

from progtuning.accounting import spafit_bounds
from progtuning.bert import Model
from progtuning.config import PeftConfig
from progtuning.errors import InputError
from progtuning.model.names import BLOCK_LINEARS
from progtuning.peft.lora import insert_lora, lora_trains

VARIANTS = {"4-9": (4, 9), "4-14": (4, 14)}  # N1, N2 of 24 blocks


def parse_bounds(text: str, num_blocks: int) -> tuple[int, int]:
    """Return N1, N2 from the name of a variant, "4-9" or "4-14", or from two numbers, "N1,N2".

    >>> parse_bounds("4-14", num_blocks=24), parse_bounds("4-14", num_blocks=12), parse_bounds("3,5", num_blocks=12)
    ((4, 14), (2, 7), (3, 5))

    Raises InputError where the text is neither, or the bounds are not 0 <= N1 <= N2 <= num_blocks.
    """
    if text in VARIANTS:
        n1, n2 = VARIANTS[text]
        return n1 * num_blocks // 24, n2 * num_blocks // 24
    if numbers := re.fullmatch(r"\s*(\d{1,9})\s*,\s*(\d{1,9})\s*", text):
        n1, n2 = map(int, numbers.groups())
        if n1 <= n2 <= num_blocks:
            return n1, n2
    names = " or ".join(VARIANTS)
    raise InputError(f"--spafit-bounds must be {names}, or N1,N2 with 0 <= N1 <= N2 <= {num_blocks}, got {text!r}")


def insert_spafit(model: Model, peft: PeftConfig, generator: torch.Generator) -> None:
    """Wrap the LoRA targets of group 3. Raises InputError where the bounds or the rank do not fit the model."""
    _, n2 = spafit_bounds(model.config, peft)
    blocks = range(n2, model.num_blocks)
    insert_lora(model, peft.lora_targets, peft.lora_r, peft.lora_alpha, peft.lora_dropout, generator, blocks)


def spafit_trains(name: str, index: int, bounds: tuple[int, int], lora_targets: tuple[str, ...]) -> bool:
    """Say whether the parameter `name` of block `index` (0-based) trains."""
    n1, n2 = bounds
    if index < n1:
        return False
    if index < n2:
        return name.endswith(".bias")
    with_lora = {f"{BLOCK_LINEARS[target]}.bias" for target in lora_targets}
    return lora_trains(name) or (name.endswith(".bias") and name not in with_lora)
