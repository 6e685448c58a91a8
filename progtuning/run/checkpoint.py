"""A nested dict of tensors and JSON values as a folder, written whole or not at all, with digests. No pickle."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from progtuning.base.errors import InputError, RunError
from progtuning.base.files import read_json
from progtuning.model.weights import save_tensors

_TENSORS, _VALUES, _MANIFEST = "state.safetensors", "state.json", "manifest.json"
FORMAT = 1


def write_checkpoint(path: Path, state: Mapping) -> None:
    """Write a nested dict of tensors and JSON values as the folder `path`, whole or not at all. Raises RunError."""
    leaves = dict(flatten(state))
    tensors = {key: value.cpu().contiguous() for key, value in leaves.items() if isinstance(value, Tensor)}
    values = {key: value for key, value in leaves.items() if key not in tensors}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_tensors(tensors, temporary / _TENSORS)
        (temporary / _VALUES).write_text(json.dumps(values, allow_nan=False), encoding="utf-8")
        files = {name: _describe(temporary / name) for name in (_TENSORS, _VALUES)}
        manifest = json.dumps({"format": FORMAT, **files}, indent=2)
        (temporary / _MANIFEST).write_text(manifest, encoding="utf-8")
        for place in (*temporary.iterdir(), temporary):
            _sync(place)
        if path.exists():  # damaged, or of the same step
            shutil.rmtree(path)
        os.rename(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_checkpoint(path: Path) -> dict:
    """Read what `write_checkpoint` wrote; the tensors are on the CPU. Raises InputError where it is damaged."""
    manifest = read_json(path / _MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path / _MANIFEST}: expected a manifest of format {FORMAT}")
    for name in (_TENSORS, _VALUES):
        try:
            found = _describe(path / name)
        except OSError as error:
            raise InputError(f"{path / name}: cannot be read: {error.strerror}") from None
        if manifest.get(name) != found:
            raise InputError(f"{path / name}: got {found}, expected {manifest.get(name)}: the file is damaged")
    values = read_json(path / _VALUES, max_bytes=manifest[_VALUES]["bytes"])  # grows with the processes
    return unflatten({**values, **load_file(path / _TENSORS)})


def _describe(path: Path) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def flatten(state: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Give the leaves of a nested dict under the keys on the way to them, joined by "/". An empty dict is a leaf."""
    for key, value in state.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def unflatten(leaves: Mapping) -> dict:
    state = {}
    for path, value in leaves.items():
        *parents, key = path.split("/")
        place = state
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
    return state


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
