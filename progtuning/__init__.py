"""Progtuning (arXiv 2506.21119) in plain PyTorch. Read partition.py, stages.py, engine.py and train.py, in this order.

What a training loop of one's own needs can be imported from here. Each name is loaded when it is asked for.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "BertConfig": "model.config",
    "Example": "data.tables",
    "StageEngine": "engine",
    "TrainBatches": "data.batching",
    "encode_examples": "data.batching",
    "load_model": "model.weights",
    "load_tokenizer": "data.tokenization",
    "make_schedule": "stages",
    "model_folder": "base.sources",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """Load one of the names above (PEP 562), so that `import progtuning` loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'progtuning' has no attribute {name!r}")
    return getattr(import_module(f"progtuning.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
