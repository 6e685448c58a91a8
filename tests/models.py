"""Small models and batches that several test modules use."""

import re
from collections.abc import Iterable
from dataclasses import replace

import torch

from progtuning.model.bert import Model, build_model
from progtuning.model.config import FAMILIES, BertConfig
from progtuning.model.names import BLOCK_LINEARS
from progtuning.model.weights import key_of

TINY = BertConfig(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=24,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    classifier_dropout=0.0,
    qa_dropout=0.0,
    head="classification",
    labels=("no", "yes", "maybe"),
    initializer_range=0.3,  # far from zero, so that every gradient counts
)


def tiny_model(**changes) -> Model:
    """Return a small model in train mode whose biases and LayerNorms are not at their initial values either."""
    model = build_model(replace(TINY, **changes), seed=1).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        for layer in model.modules():
            if isinstance(layer, torch.nn.Embedding) and layer.padding_idx is not None:
                layer.weight[layer.padding_idx].zero_()
    return model


def config_of(model_type: str, **values) -> BertConfig:
    """Return a configuration of a family, from which the fields are left out that the family does not have."""
    fixed = FAMILIES[model_type].fixed
    return BertConfig(model_type=model_type, **{name: value for name, value in values.items() if name not in fixed})


def linear_pattern(targets: Iterable[str], config: BertConfig) -> str:
    """Return the expression by which peft finds the layers `targets` of every block in a model of transformers."""
    names = [key_of(f"encoder.layer.N.{BLOCK_LINEARS[target]}", config) for target in targets]
    return "|".join(re.escape(name).replace("N", r"\d+") for name in names)


def tiny_batch(config: BertConfig, rows: int = 5, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random inputs with padding: row i is i tokens shorter than row 0, but keeps at least one."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.clamp(length - torch.arange(rows), min=1)
    mask = torch.arange(length)[None, :] < lengths[:, None]
    ids = torch.randint(config.pad_token_id + 1, config.vocab_size, (rows, length), generator=generator)
    types = torch.randint(0, max(1, config.type_vocab_size), (rows, length), generator=generator)
    return {
        "input_ids": ids.masked_fill(~mask, config.pad_token_id),
        "attention_mask": mask,
        "token_type_ids": types.masked_fill(~mask, 0),
    }


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reachable(tensor: torch.Tensor) -> tuple[set[torch.Tensor], list[str]]:
    """Walk the autograd graph from `tensor`: return the parameters it reaches and the names of its nodes."""
    parameters, nodes, seen, stack = set(), [], set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.append(node.name())
        if hasattr(node, "variable"):
            parameters.add(node.variable)
        stack.extend(next_node for next_node, _ in node.next_functions)
    return parameters, nodes
