"""Labelled text: reading files, tokenizing, batching."""
