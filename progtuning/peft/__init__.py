"""Fine-tuning methods that train few parameters, put into a built model from outside (Algorithm 1 of Progtuning).

A method inserts modules, and says of every parameter whether it trains. Parameters of the base keep their names, which
are those of Hugging Face checkpoints; what is inserted stands in its block, as in
`encoder.layer.3.output.adapter.down.weight`, so that the stage engine partitions it with the block.

    method    E                  a block                                                   H
    none      all                all                                                       all
    adapter   LN by option       two adapters, the LayerNorms by option                    all but the pooler
    lora      -                  A and B of the targets                                    all, the pooler by option
    bitfit    LayerNorm's bias   biases                                                    all but the pooler's weight
    spafit    -                  by group: nothing; biases; A and B, and other biases      all but the pooler's weight

The pooler is BERT's, and pre-trained. RoBERTa's classification head has none and trains whole.
"""

import torch

from progtuning.accounting import spafit_bounds
from progtuning.bert import Model
from progtuning.config import PeftConfig
from progtuning.peft.adapter import AdaptedOutput, adapter_trains, insert_adapters
from progtuning.peft.bitfit import bitfit_trains
from progtuning.peft.lora import LoRALinear, insert_lora, lora_trains
from progtuning.peft.spafit import insert_spafit, spafit_trains


def apply_peft(model: Model, peft: PeftConfig, seed: int = 0) -> None:
    """Insert the modules of `peft.method` and make exactly what it trains require a gradient.

    What is drawn depends on `seed` alone; the global random state is left as it was. Raises InputError where the method
    does not fit the model, which is then as it was, and ValueError where the model has inserted modules already.
    """
    if any(isinstance(module, (AdaptedOutput, LoRALinear)) for module in model.modules()):
        raise ValueError("the model has adapters or LoRA already")
    generator = torch.Generator().manual_seed(seed)
    if peft.method == "adapter":
        insert_adapters(model, peft, generator)
    elif peft.method == "lora":
        insert_lora(model, peft.lora_targets, peft.lora_r, peft.lora_alpha, peft.lora_dropout, generator)
    elif peft.method == "spafit":
        insert_spafit(model, peft, generator)
    model.train(model.training)  # what was inserted follows the model's mode
    names = trainable_names(model, peft)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def trainable_names(model: Model, peft: PeftConfig) -> set[str]:
    """Return the names of all parameters that `peft` trains in `model`, to which it has been applied."""
    if peft.method == "none":
        return {name for name, _ in model.named_parameters()}
    names = {name for name, _ in model.named_parameters() if _outside_blocks_trains(name, peft)}
    for index, block in enumerate(model.encoder.layer):
        trained = (name for name, _ in block.named_parameters() if _in_block_trains(name, index, model, peft))
        names |= {f"encoder.layer.{index}.{name}" for name in trained}
    return names


def _in_block_trains(name: str, index: int, model: Model, peft: PeftConfig) -> bool:
    """Say whether the parameter `name` of block `index` trains."""
    if peft.method == "adapter":
        return adapter_trains(name, peft.adapter_layer_norms)
    if peft.method == "bitfit":
        return bitfit_trains(name, peft.bitfit_biases)
    if peft.method == "lora":
        return lora_trains(name)
    return spafit_trains(name, index, spafit_bounds(model.config, peft), peft.lora_targets)


def _outside_blocks_trains(name: str, peft: PeftConfig) -> bool:
    """Say whether the parameter `name` of E or H trains under a method other than "none"."""
    if name.startswith("encoder."):
        return False
    if name.startswith("embeddings."):
        layer_norm = peft.method == "adapter" and peft.adapter_embedding_layer_norm
        return (layer_norm and ".LayerNorm." in name) or (
            peft.method == "bitfit" and bitfit_trains(name, peft.bitfit_biases)
        )
    if name.startswith("pooler."):
        if peft.method == "lora":
            return peft.lora_pooler
        return peft.method in ("bitfit", "spafit") and bitfit_trains(name, "all")
    return True
