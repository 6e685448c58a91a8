"""Progtuning (arXiv 2506.21119): fine-tune a Transformer encoder while the set of trained blocks shrinks from below."""

__version__ = "0.1.0"
