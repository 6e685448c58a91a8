"""Fine-tuning methods that train few parameters, put into a built model from outside (Algorithm 1 of Progtuning).

`PeftConfig` says what a method adds and which parameters train; here that is done to a model. Parameters of the base
keep their names, which are those of Hugging Face checkpoints; what is inserted stands in its block, as in
`encoder.layer.3.output.adapter.down.weight`, so that the stage engine partitions it with the block. BitFit inserts
nothing, and SPAFIT in some blocks what LoRA inserts.
"""

import torch

from progtuning.methods.adapter import AdaptedOutput, insert_adapters
from progtuning.methods.lora import LoRALinear, insert_lora
from progtuning.model.bert import Model
from progtuning.settings.peft import PeftConfig


def apply_peft(model: Model, peft: PeftConfig, seed: int = 0) -> None:
    """Insert the modules of `peft.method` and make exactly what it trains require a gradient.

    What is drawn depends on `seed` alone; the global random state is left as it was. Raises InputError where the method
    does not fit the model, which is then as it was, and ValueError where the model has inserted modules already.
    """
    if any(isinstance(module, (AdaptedOutput, LoRALinear)) for module in model.modules()):
        raise ValueError("the model has adapters or LoRA already")
    trainable_names(model, peft)  # raises, where it must, before anything is inserted
    generator = torch.Generator().manual_seed(seed)
    if peft.method == "adapter":
        insert_adapters(model, peft, generator)
    insert_lora(model, peft, generator)  # of LoRA and SPAFIT; other methods add no A and B
    model.train(model.training)  # what was inserted follows the model's mode
    names = trainable_names(model, peft)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def trainable_names(model: Model, peft: PeftConfig) -> set[str]:
    """Return the names of all parameters that `peft` trains in `model`, to which it has been applied."""
    return {name for name, _ in model.named_parameters() if peft.trains(name, model.num_blocks)}
