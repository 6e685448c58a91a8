"""The names of parameters: in which unit of M = E . B1 ... BL . H each is, and how the layers of a block are called.

They are the names of Hugging Face checkpoints of BERT and RoBERTa, without the prefix, as `bert.`:

    E          embeddings.word_embeddings.weight
    a block    encoder.layer.3.attention.self.query.weight; what a method adds too: encoder.layer.3.output.adapter...
    H          pooler.dense.weight, classifier.weight, qa_outputs.weight

A name that is none of these is an error. To take it for one of the head's would train it in every stage.
"""

import re

EMBEDDINGS, HEAD = "embeddings", "head"
HEAD_MODULES = ("pooler", "classifier", "qa_outputs")
# The six linear layers of a block, in the order in which it runs them.
BLOCK_LINEARS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention-output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
_IN_BLOCK = re.compile(r"encoder\.layer\.([0-9]+)\..+")


def unit_of(name: str) -> int | str:
    """Say in which unit parameter (or layer) `name` sits: EMBEDDINGS, a 0-based block index, or HEAD.

    Raises ValueError for a name that is none of the model's.
    """
    module, _, rest = name.partition(".")
    if module == "embeddings" and rest:
        return EMBEDDINGS
    if module in HEAD_MODULES:
        return HEAD
    block = _IN_BLOCK.fullmatch(name)
    if block is None:
        expected = f"embeddings., encoder.layer.<block>., {'., '.join(HEAD_MODULES)}."
        raise ValueError(f"parameter {name!r} is none of the model's, whose names begin with {expected}")
    return int(block[1])


def prefix_of(unit: int | str) -> str:
    """Return what stands before the names of a unit, as `unit_of` says it, in the whole model: of H nothing."""
    return {EMBEDDINGS: "embeddings.", HEAD: ""}.get(unit, f"encoder.layer.{unit}.")
