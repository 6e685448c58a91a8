"""Weights on disk: Hugging Face safetensors in and out. Nothing here reads or writes a pickle.

A model folder is `config.json` and `model.safetensors`, or shards listed by `model.safetensors.index.json`. The tensors of embeddings,
encoder and pooler stand under the prefix `bert.` or `roberta.`, or under none (a bare encoder); the head's stand under none.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from progtuning.bert import Model
from progtuning.config import BertConfig
from progtuning.errors import InputError
from progtuning.files import read_json, replacing, write_json

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_BACKBONE = ("embeddings.", "encoder.", "pooler.")  # under the prefix in a file; the rest is the head's last layers
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class LoadReport:
    """What a load did that is not one to one: parameters that were drawn afresh, and tensors of the file that were not used."""

    fresh: tuple[str, ...]
    unused: tuple[str, ...]


def load_model(
    folder: str | Path, config: BertConfig | None = None, seed: int = 0, fresh_head: bool = True
) -> tuple[Model, LoadReport]:
    """Load the model of a Hugging Face folder, in fp32 and eval mode.

    `config` (None: the folder's own) may give the architecture another head. Head tensors that the file lacks, or whose last layer
    is for another number of outputs, are drawn afresh from `seed` and reported; with `fresh_head=False` they are an error too.
    Raises InputError where a file is missing or damaged, or where an encoder tensor is missing or of the wrong shape or type.
    """
    folder = Path(folder)
    config = config or BertConfig.from_json(folder / CONFIG)
    with torch.device("meta"):  # shapes without memory: a damaged config must not allocate
        model = Model(config)
    generator = torch.Generator().manual_seed(seed)
    state, fresh, used = {}, [], set()
    with ExitStack() as stack:
        files = _open_tensors(folder, stack)
        keys = {_internal_name(key, config): key for key in files}
        for name, parameter in model.named_parameters():
            head = not name.startswith(("embeddings.", "encoder."))
            key = keys.get(name)
            if key is None and not (head and fresh_head):
                some = ", ".join(sorted(files)[:2]) or "none"
                raise InputError(f"{folder}: tensor {name!r} is missing (of {len(files)} in the file; the first: {some})")
            if key is None or (head and fresh_head and _other_outputs(files[key], key, parameter)):
                state[name] = _draw(name, parameter.shape, config.initializer_range, generator)
                fresh.append(name)
            else:
                state[name] = _read(files[key], key, parameter.shape)
                used.add(key)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).eval(), LoadReport(tuple(fresh), tuple(sorted(set(files) - used)))


def save_pretrained(model: Model, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` (fp32) into an existing folder, as transformers' AutoModels read them.

    Raises RunError where the disk refuses; a file is written whole or not at all.
    """
    prefix = f"{model.config.model_type}." if model.config.head else ""
    state = {
        (prefix if name.startswith(_BACKBONE) else "") + name: tensor.detach().float().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    with replacing(Path(folder) / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    write_json(Path(folder) / CONFIG, model.config.to_dict())


def _internal_name(key: str, config: BertConfig) -> str:
    """Map a file's key to our parameter's name: without prefix, and with the LayerNorm names that BERT's first release had other."""
    name = key.removeprefix(f"{config.model_type}.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


class _TensorFile(NamedTuple):
    path: Path
    tensors: safe_open


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, _TensorFile]:
    """Open the safetensors of a model folder and return, for every tensor, the file it stands in."""
    if (folder / WEIGHTS).is_file():
        file = _open(folder / WEIGHTS, stack)
        return dict.fromkeys(file.tensors.keys(), file)
    index = folder / INDEX
    if not index.is_file():
        found = next((path.name for path in sorted(folder.glob("pytorch_model*.bin"))), None)
        hint = f" ({found} is a pickle, which is never read: convert it to safetensors)" if found else ""
        raise InputError(f"{folder}: no {WEIGHTS} and no {INDEX}{hint}")
    values = read_json(index)
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise InputError(f"{index}: expected an object 'weight_map' from tensor to file name")
    files = {}
    for place in sorted(set(places.values())):
        if not place or Path(place).name != place:
            raise InputError(f"{index}: shard {place!r} must be the name of a file in the same folder")
        file = _open(folder / place, stack)
        expected = {key for key, where in places.items() if where == place}
        if absent := sorted(expected - set(file.tensors.keys())):
            raise InputError(f"{file.path}: tensor {absent[0]!r}, which {INDEX} places here, is missing")
        files |= dict.fromkeys(expected, file)
    return files


def _open(path: Path, stack: ExitStack) -> _TensorFile:
    try:
        return _TensorFile(path, stack.enter_context(safe_open(path, framework="pt")))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}") from None


def _other_outputs(file: _TensorFile, key: str, parameter: Tensor) -> bool:
    """Say whether a head tensor differs from ours in its rows alone: it is for another number of outputs."""
    shape = tuple(file.tensors.get_slice(key).get_shape())
    return shape[:1] != parameter.shape[:1] and shape[1:] == parameter.shape[1:]


def _read(file: _TensorFile, key: str, shape: torch.Size) -> Tensor:
    """Read a floating-point tensor as fp32. Raises InputError where its shape or type is not the expected one."""
    tensor = file.tensors.get_slice(key)
    if tuple(tensor.get_shape()) != tuple(shape):
        raise InputError(f"{file.path}: tensor {key!r} has shape {tensor.get_shape()}, expected {list(shape)}")
    if tensor.get_dtype() not in _FLOATS:
        raise InputError(f"{file.path}: tensor {key!r} has dtype {tensor.get_dtype()}, expected one of {', '.join(_FLOATS)}")
    return file.tensors.get_tensor(key).to(torch.float32, copy=True)  # a copy, lest the model live in the mapped file


def _draw(name: str, shape: torch.Size, initializer_range: float, generator: torch.Generator) -> Tensor:
    """Draw a head tensor as BERT does: weights normal(0, initializer_range), biases zero."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    return torch.empty(shape).normal_(std=initializer_range, generator=generator)
