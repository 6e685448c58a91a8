"""What a fine-tuning method with few parameters adds to a model and trains of it, said once. No torch."""

import re
from dataclasses import dataclass
from functools import partial

from progtuning.base.checks import check_number
from progtuning.base.errors import InputError
from progtuning.model.config import ACTIVATIONS
from progtuning.model.names import BLOCK_LINEARS, EMBEDDINGS, HEAD, prefix_of, unit_of
from progtuning.settings.options import Options, option

PEFT_METHODS = ("none", "adapter", "bitfit", "lora", "spafit")
MERGEABLE = ("lora", "bitfit", "spafit")  # what they do to a model fits in its own layers
_of_adapter, _of_lora, _of_lora_alone, _of_bitfit, _of_spafit = (
    partial(option, beside=("method", methods))
    for methods in (("adapter",), ("lora", "spafit"), ("lora",), ("bitfit",), ("spafit",))
)


@dataclass(frozen=True)
class PeftConfig(Options):
    """Which parameters a fine-tuning method adds and trains, before they are partitioned by block (Algorithm 1).

    `adds` and `trains` are the rule, for the closed forms and for what is done to a built model. Raises InputError that
    names the option where a value is out of range.
    """

    method: str = option("none", "{choices}", name="peft", choices=PEFT_METHODS)  # "none" trains every parameter
    adapter_size: int = _of_adapter(64, "width of the bottleneck", at_least=1, at_most=2**16)
    adapter_activation: str = _of_adapter("gelu", "{choices}", choices=ACTIVATIONS)
    # Houlsby et al. (2019) train the LayerNorms of the blocks with the adapters,
    adapter_layer_norms: bool = _of_adapter(True, "train the blocks' LayerNorms with the adapters")
    # and in their code E's, beneath which no backward pass can be cut.
    adapter_embedding_layer_norm: bool = _of_adapter(False, "train E's too, in the stages that train E")
    # Their Section 3.6 has this deviation, their code 1e-3.
    adapter_init_std: float = _of_adapter(
        1e-2, "deviation of the adapters' weights at the start", at_least=1e-8, at_most=1
    )
    lora_r: int = _of_lora(8, "rank", at_least=1)
    lora_alpha: float = _of_lora(16.0, "the update is scaled by alpha / r", at_least=0)
    lora_dropout: float = _of_lora(0.0, "dropout before A", at_least=0, at_most=1)
    lora_targets: tuple[str, ...] = _of_lora(
        ("query", "value"), f"comma-separated, of {', '.join(BLOCK_LINEARS)}", choices=tuple(BLOCK_LINEARS)
    )
    # RoBERTa's head has a dense layer for it.
    lora_pooler: bool = _of_lora_alone(False, "train BERT's pooler with the head")
    # "query,intermediate" is the half-size variant of Zaken et al. (2021).
    bitfit_biases: str = _of_bitfit("all", "all, or query,intermediate", choices=("all", "query,intermediate"))
    # N1 <= N2: blocks below N1 frozen, below N2 biases only, the rest LoRA
    spafit_bounds: tuple[int, int] | None = _of_spafit(None, "N1,N2, or 4-9 or 4-14 (of 24 blocks) (4-9)", is_text=True)

    def __post_init__(self):
        super().__post_init__()
        if self.spafit_bounds is not None:
            n1, n2 = self.spafit_bounds
            check_number("--spafit-bounds", n1, int, low=0)
            check_number("--spafit-bounds", n2, int, low=0)
            _check_bounds(n1, n2)

    def adds(self, target: str, n_out: int, n_in: int, block: int, num_blocks: int) -> dict[str, tuple[int, ...]]:
        """Return what stands beside or behind the layer `target` (a key of BLOCK_LINEARS) of block `block`, 0-based.

        It is {name in the block: shape}, where the layer's weight is (n_out, n_in). Raises InputError where LoRA's rank
        does not fit the layer, or SPAFIT's bounds the number of blocks.
        """
        layer = BLOCK_LINEARS[target]
        if layer in self.lora_layers(block, num_blocks):
            r, limit = self.lora_r, min(n_out, n_in)
            if r > limit:
                raise InputError(f"--lora-r must be in 1..{limit} for {target} ({n_out} x {n_in}), got {r}")
            return {f"{layer}.lora_A.weight": (r, n_in), f"{layer}.lora_B.weight": (n_out, r)}
        if self.method == "adapter" and target in ("attention-output", "output"):  # either ends a half of the block
            adapter, size = layer.removesuffix("dense") + "adapter", self.adapter_size
            down = {f"{adapter}.down.weight": (size, n_out), f"{adapter}.down.bias": (size,)}
            return down | {f"{adapter}.up.weight": (n_out, size), f"{adapter}.up.bias": (n_out,)}
        return {}

    def lora_layers(self, block: int, num_blocks: int) -> tuple[str, ...]:
        """Return the layers of a block (values of BLOCK_LINEARS, in its order) that have an A and a B."""
        if self.method == "lora" or (self.method == "spafit" and block >= self.bounds(num_blocks)[1]):
            return tuple(layer for target, layer in BLOCK_LINEARS.items() if target in self.lora_targets)
        return ()

    def trains(self, name: str, num_blocks: int) -> bool:
        """Say whether the parameter `name`, of the base or added, trains in a model of `num_blocks` blocks.

        method    E                  a block                                              H
        none      all                all                                                  all
        adapter   LN by option       two adapters, the LayerNorms by option               all but the pooler
        lora      -                  A and B of the targets                               all, the pooler by option
        bitfit    biases             biases                                               all but the pooler's weight
        spafit    -                  by group: nothing; biases; A and B, other biases     all but the pooler's weight

        The pooler is BERT's, and pre-trained. The classification heads of other families have none and train whole.
        BitFit's variant "query,intermediate" is the half of the biases that its authors find to do nearly as well
        (Section 4, "Fewer bias parameters"): b_q and b_m2 of every block, and none of E. Their code trains the pooler's
        bias with either.

        Raises ValueError for a name that is none of the model's, InputError as `bounds` does.
        """
        unit = unit_of(name)
        layer, _, kind = name.removeprefix(prefix_of(unit)).rpartition(".")
        if self.method == "none" or (unit == HEAD and not name.startswith("pooler.")):
            return True
        if self.method == "adapter":  # Houlsby et al. 2019 train the LayerNorms too
            layer_norms = self.adapter_embedding_layer_norm if unit == EMBEDDINGS else self.adapter_layer_norms
            return ".adapter." in name or (layer_norms and layer.endswith("LayerNorm"))
        if self.method == "lora":
            return ".lora_" in name or (unit == HEAD and self.lora_pooler)
        if self.method == "bitfit":  # of the pooler the bias in either variant, as in the authors' code
            every = self.bitfit_biases == "all" or unit == HEAD
            return kind == "bias" and (every or layer in {BLOCK_LINEARS[key] for key in self.bitfit_biases.split(",")})
        if isinstance(unit, int):  # SPAFIT's groups: nothing; biases; A and B, and the biases of layers without
            tuned = unit >= self.bounds(num_blocks)[0]
            return tuned and (".lora_" in name or (kind == "bias" and layer not in self.lora_layers(unit, num_blocks)))
        return unit == HEAD and kind == "bias"

    def bounds(self, num_blocks: int) -> tuple[int, int]:
        """Return N1, N2 of SPAFIT (Arora & Wang 2024, arXiv 2405.00201): the blocks in three groups, each tuned more
        than the one below it.

        group 1   blocks  0 .. N1-1     frozen, as is E
        group 2   blocks N1 .. N2-1     biases
        group 3   blocks N2 .. L-1      LoRA on the targets, the biases of every other layer

        H trains too: its last layers, and of the pooler the bias. Under a schedule, a stage trains what it has in
        common with the groups. Two variants are named after their bounds, of the 24 blocks of BERT-large; for other
        depths the bounds are in proportion, rounded down. Where none are given they are those of "4-9".

        Of the paper we could read the abstract and summaries, which give the groups; for the bounds, the rank and the
        pooler's bias there was no source, nor is there code of the authors. At our defaults 0.21 % of BERT-large's
        parameters train (4-14: 0.16 %), where summaries of the paper say 1 to 2 %.

        Raises InputError where the bounds exceed the number of blocks.
        """
        if self.spafit_bounds is None:
            return parse_bounds("4-9", num_blocks)
        _check_bounds(*self.spafit_bounds, num_blocks)
        return self.spafit_bounds


def _check_bounds(n1: int, n2: int, num_blocks: int | None = None) -> None:
    if n1 > n2 or (num_blocks is not None and n2 > num_blocks):
        limit = "" if num_blocks is None else f" <= {num_blocks}"
        raise InputError(f"--spafit-bounds must be two numbers 0 <= N1 <= N2{limit}, got {n1},{n2}")


SPAFIT_VARIANTS = {"4-9": (4, 9), "4-14": (4, 14)}  # N1, N2 of 24 blocks


def parse_bounds(text: str, num_blocks: int) -> tuple[int, int]:
    """Return N1, N2 from the name of a variant, "4-9" or "4-14", or from two numbers, "N1,N2".

    >>> parse_bounds("4-14", num_blocks=24), parse_bounds("4-14", num_blocks=12), parse_bounds("3,5", num_blocks=12)
    ((4, 14), (2, 7), (3, 5))

    Raises InputError where the text is neither, or the bounds are not 0 <= N1 <= N2 <= num_blocks.
    """
    if text in SPAFIT_VARIANTS:
        n1, n2 = SPAFIT_VARIANTS[text]
        return n1 * num_blocks // 24, n2 * num_blocks // 24
    if numbers := re.fullmatch(r"\s*(\d{1,9})\s*,\s*(\d{1,9})\s*", text):
        n1, n2 = map(int, numbers.groups())
        if n1 <= n2 <= num_blocks:
            return n1, n2
    names = " or ".join(SPAFIT_VARIANTS)
    raise InputError(f"--spafit-bounds must be {names}, or N1,N2 with 0 <= N1 <= N2 <= {num_blocks}, got {text!r}")
