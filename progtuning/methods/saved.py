"""What a method with few parameters trained, on disk: as the library peft has LoRA, other methods in our own format."""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from progtuning.base.errors import InputError
from progtuning.base.files import write_json
from progtuning.cost.closed_form import units
from progtuning.methods.apply import apply_peft
from progtuning.methods.lora import lora_layers
from progtuning.model.bert import Model
from progtuning.model.config import HEADS, BertConfig, sequence_head
from progtuning.model.names import BLOCK_LINEARS
from progtuning.model.weights import (
    CONFIG,
    TensorFile,
    internal_names,
    key_of,
    load_model,
    open_file,
    read_object,
    read_tensor,
    save_parameters,
)
from progtuning.settings.peft import PeftConfig

LORA_WEIGHTS, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # the names that peft gives them
LORA_PICKLE = "adapter_model.bin"
TRAINED_WEIGHTS, TRAINED_CONFIG = "trained.safetensors", "trained.json"
_DIGEST = "base_sha256"
_LORA_PREFIX = "base_model.model."
_POOLER = "pooler.dense.weight"  # the one part of a head that may be frozen, and that a base may lack
_NO_HEAD = "FEATURE_EXTRACTION"

# How adapter_config.json says which head a model has: by task, or where there is none by the class that was adapted.
# Where several heads share a name it is that of the first, which then tells them apart by its outputs and its base.
_HEADS_OF_PEFT = {
    **{row.peft_task: name for name, row in reversed(HEADS.items())},
    _NO_HEAD: None,
    **{row.architecture: name for name, row in reversed(HEADS.items())},
    "Model": None,
}
_MAX_OUTPUTS = 100_000

# Keys of an adapter_config.json that are read elsewhere, or with which a trained LoRA computes the same whatever their
# value: what is wrapped is read from the tensors.
_LORA_WITHOUT_EFFECT = frozenset(
    """
    auto_mapping base_model_name_or_path eva_config exclude_modules inference_mode layers_pattern lora_alpha
    lora_dropout megatron_core modules_to_save peft_type peft_version qalora_group_size r revision target_modules
    task_type use_rslora
    """.split()
)

# Values other than None, false and empty with which a key changes nothing. Any other setting may be another model.
_LORA_NEUTRAL = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}


def save_peft(
    model: Model,
    folder: str | Path,
    peft: PeftConfig,
    base_model: str,
    fresh: Iterable[str] = (),
    revision: str | None = None,
) -> None:
    """Write what `peft` trained in `model` into an existing folder, with the name of the base model that it belongs to.

    `revision` is that of the base model, where it is one of the Hub.
    LoRA is written as the library peft reads it, other methods in our own format. Merged layers are written as if they
    were not. `fresh` names parameters that the base lacks (`LoadReport.fresh`): they are written too, trained or not.
    Raises ValueError for method "none", which trains whole models, and RunError where the disk refuses.
    """
    if peft.method == "none":
        raise ValueError("peft.method must not be none: save_pretrained writes whole models")
    folder, held = Path(folder), _held_shapes(model.config, peft, fresh)
    digest = base_digest(model, held)
    if peft.method == "lora":
        save_parameters(model, held, folder / LORA_WEIGHTS, prefix=_LORA_PREFIX, **{_DIGEST: digest})
        values = {"base_model_name_or_path": base_model, "revision": revision}
        write_json(folder / LORA_CONFIG, values | _lora_config(model.config, peft, with_pooler=_POOLER in held))
    else:
        save_parameters(model, held, folder / TRAINED_WEIGHTS)
        names = sorted(key_of(name, model.config) for name in held)
        values = {"base_model": base_model, "revision": revision, _DIGEST: digest}
        values |= {"peft": asdict(peft), "tensors": names}
        write_json(folder / TRAINED_CONFIG, values)
    write_json(folder / CONFIG, model.config.to_dict())


class BaseName(NamedTuple):
    """What a folder calls its base model, and the file and its key that say so."""

    name: str
    revision: str | None  # on the Hub
    path: Path
    key: str


def peft_file(folder: str | Path) -> Path | None:
    """Return the file that describes a folder of `save_peft` or of the library peft; None for any other folder."""
    paths = (Path(folder) / name for name in (LORA_CONFIG, TRAINED_CONFIG))
    return next((path for path in paths if path.is_file()), None)


def base_model_name(folder: str | Path) -> BaseName | None:
    """Return the base model of a folder that `save_peft` or the library peft wrote; None for any other folder.

    Raises InputError where the folder's file is damaged, names none, or has settings that are not supported.
    """
    path = peft_file(folder)
    if path is None:
        return None
    values, key = read_object(path), "base_model"
    if path.name == LORA_CONFIG:
        _check_lora_settings(values, path)
        key = "base_model_name_or_path"
    name, revision = values.get(key), values.get("revision")
    if not isinstance(name, str) or not name:
        raise InputError(f"{path}: key {key!r} must name the base model, got {name!r}")
    if not isinstance(revision, str | None):
        raise InputError(f"{path}: key 'revision' must be a revision of the base model, got {revision!r}")
    return BaseName(name, revision, path, key)


def tuned_config(folder: str | Path, base: str | Path) -> BertConfig:
    """Return the architecture of a folder that `save_peft` or the library peft wrote, on a base in the folder `base`.

    It is that of the folder's `config.json`. peft writes none: the architecture is then the base's, and so are the
    names of the classes, where they are as many as the head that the folder holds has outputs (else LABEL_0 ..).
    Raises InputError.
    """
    folder, path = Path(folder), Path(folder) / CONFIG
    if peft_file(folder).name != LORA_CONFIG:
        return BertConfig.from_json(path)
    values = read_object(folder / LORA_CONFIG)
    _check_lora_settings(values, folder / LORA_CONFIG)
    with ExitStack() as stack:
        file = _open_lora(folder / LORA_WEIGHTS, stack)
        own = path.exists() or _DIGEST in (file.tensors.metadata() or {})  # save_peft wrote the file, and a config.json
        config = BertConfig.from_json(path if own else Path(base) / CONFIG)
        if own and config.head:
            return config
        head = _head_of_peft(values, folder / LORA_CONFIG, config.head)
        if head != "classification":
            return config if head == config.head else config.with_head(head)
        count = _saved_outputs(file, config) or len(config.labels)
    labels = config.labels if count == len(config.labels) else tuple(f"LABEL_{index}" for index in range(count))
    return config.with_head(sequence_head(count, config.head), labels)


def load_tuned(folder: str | Path, base: str | Path, config: BertConfig) -> Model:
    """Load the model of a folder that `save_peft` or the library peft wrote, whose base model's folder is `base`.

    `config` is that of `tuned_config`. Raises InputError as `load_model` and `load_peft` do, and where neither of the
    two folders has a tensor of the head.
    """
    model, loaded = load_model(base, config)
    load_peft(model, folder, absent=loaded.fresh)
    return model


def load_peft(model: Model, folder: str | Path, absent: Iterable[str] = ()) -> PeftConfig:
    """Apply to a base model what a folder of `save_peft`, or of the library peft with LoRA, holds; return the method.

    `model` is the base model under the head of `tuned_config`, and `absent` names its parameters that the base lacks
    (`LoadReport.fresh`). Raises InputError where a file is missing or damaged, where a setting is not supported, where
    the folder was written for another base, or where it lacks a parameter that is absent; the model is then as it was.
    """
    folder = Path(folder)
    if (folder / LORA_CONFIG).is_file():
        return _load_lora(model, folder / LORA_CONFIG, folder / LORA_WEIGHTS, absent)
    path = folder / TRAINED_CONFIG
    values = read_object(path)
    with ExitStack() as stack:
        file = open_file(folder / TRAINED_WEIGHTS, stack)
        keys = internal_names(file.tensors.keys(), model.config, file.path)
        peft, held = _method(values.get("peft"), model.config, keys, path)
        _check_whole(absent, held, file.path)
        _check_base(model, held, values.get(_DIGEST), folder)
        tensors = _read_held(file, keys, held)
    _apply(model, peft, tensors)
    return peft


def base_digest(model: Model, held: Iterable[str]) -> str:
    """Return the SHA-256, in hexadecimal, of the model's base without the parameters `held`, which a file holds.

    Hashed are, in the order of their names in `bert.Model`, of every other
    parameter the line "name dtype shape" and its bytes. Wrapping and merging change nothing, nor does training.
    """
    merged = {f"{name}.weight": layer.base_weight for name, layer in lora_layers(model) if layer.merged}
    base = {name: merged.get(name, parameter) for name, parameter in model.named_parameters()}
    digest = hashlib.sha256()
    for name in sorted(base.keys() - set(held)):
        tensor = base[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


def _lora_config(config: BertConfig, peft: PeftConfig, with_pooler: bool) -> dict:
    """Return the adapter_config.json with which peft rebuilds the model, but for the base model's name."""
    head = HEADS[config.head] if config.head else None
    names = [key_of(name, config) for name in units(config).head.shapes if not name.startswith("pooler.")]
    modules = sorted({name.partition(".")[0] for name in names})
    targets = []
    for target in sorted(peft.lora_targets):
        # peft adapts every layer whose name ends with one of these
        name = key_of(f"encoder.layer.0.{BLOCK_LINEARS[target]}", config).partition(".layer.0.")[2]
        if target == "output":  # as attention.output.dense does
            targets += [f"layer.{index}.{name}" for index in range(config.num_hidden_layers)]
        else:
            targets.append(name.removeprefix("attention.self."))
    return {
        "peft_type": "LORA",
        "task_type": head.peft_task if head else _NO_HEAD,
        "r": peft.lora_r,
        "lora_alpha": peft.lora_alpha,
        "lora_dropout": peft.lora_dropout,
        "target_modules": targets,
        "modules_to_save": [*modules, *(["pooler"] if with_pooler else [])] if head else None,
        "bias": "none",
        "inference_mode": True,
    }


def _load_lora(model: Model, config_path: Path, path: Path, absent: Iterable[str]) -> PeftConfig:
    values = read_object(config_path)
    _check_lora_settings(values, config_path)
    with ExitStack() as stack:
        file = _open_lora(path, stack)
        keys = internal_names(file.tensors.keys(), model.config, path, prefix=_LORA_PREFIX)
        settings = {key: values.get(key) for key in ("lora_alpha", "lora_dropout")}
        settings |= {"method": "lora", "lora_r": values.get("r"), "lora_targets": _lora_targets(keys, path)}
        settings["lora_pooler"] = _POOLER in keys  # peft trains what it saves
        peft, held = _method(settings, model.config, keys, config_path)
        if values.get("use_rslora"):  # alpha / sqrt(r) is (alpha sqrt(r)) / r
            peft = replace(peft, lora_alpha=peft.lora_alpha * math.sqrt(peft.lora_r))
        held = {name: shape for name, shape in held.items() if ".lora_" in name}
        held |= _saved_head(model.config, keys, values.get("modules_to_save"))
        _check_whole(absent, held, path)
        if digest := (file.tensors.metadata() or {}).get(_DIGEST):  # peft writes none
            _check_base(model, held, digest, path.parent)
        tensors = _read_held(file, keys, held)
    _apply(model, peft, tensors)
    return peft


def _open_lora(path: Path, stack: ExitStack) -> "TensorFile":
    if not path.exists() and path.with_name(LORA_PICKLE).exists():
        hint = f"{LORA_PICKLE} is a pickle, which is never read: convert it to safetensors"
        raise InputError(f"{path.parent}: no {path.name} ({hint})")
    return open_file(path, stack)


def _head_of_peft(values: Mapping, path: Path, otherwise: str | None) -> str | None:
    """Return the head that an adapter_config.json says the model has; `otherwise` where it says nothing."""
    key, said = "task_type", values.get("task_type")
    if said is None and isinstance(mapping := values.get("auto_mapping"), dict):
        key, said = "auto_mapping", mapping.get("base_model_class")
    if said is None:
        return otherwise
    for ending, head in _HEADS_OF_PEFT.items():
        if isinstance(said, str) and said.endswith(ending):
            return head
    raise InputError(f"{path}: key {key!r} must be one of {', '.join(_HEADS_OF_PEFT)}, got {said!r}")


def _saved_outputs(file: "TensorFile", config: BertConfig) -> int | None:
    """Return how many outputs the classifier has that a file of peft holds; None where it holds none."""
    keys = internal_names(file.tensors.keys(), config, file.path, prefix=_LORA_PREFIX)
    key = keys.get("classifier.weight" if config.family.has_pooler else "classifier.out_proj.weight")
    if key is None:
        return None
    shape = file.tensors.get_slice(key).get_shape()
    if len(shape) != 2 or not 1 <= shape[0] <= _MAX_OUTPUTS:
        raise InputError(f"{file.path}: tensor {key!r} has shape {shape}, expected [classes, {config.hidden_size}]")
    return shape[0]


def _saved_head(config: BertConfig, names: Iterable[str], modules: object) -> dict[str, tuple[int, ...]]:
    """Return which of the head's parameters a file of peft must hold, for the rest is the base's.

    They are the whole of each layer of which it has a tensor, and of each module that `modules_to_save` names.
    """
    layers = {name.rpartition(".")[0] for name in names}
    modules = {module for module in modules if isinstance(module, str)} if isinstance(modules, list) else set()
    return {
        name: shape
        for name, shape in units(config).head.shapes.items()
        if name.rpartition(".")[0] in layers or modules & set(key_of(name, config).split("."))
    }


def _check_whole(absent: Iterable[str], held: Iterable[str], path: Path) -> None:
    """Raise InputError where a parameter that the base lacks is not in the file either."""
    if missing := [name for name in absent if name not in held]:
        raise InputError(f"{path}: tensor {missing[0]!r} is missing, here and in the base model")


def _check_lora_settings(values: Mapping, path: Path) -> None:
    if values.get("peft_type") != "LORA":
        raise InputError(f"{path}: key 'peft_type' must be 'LORA', got {values.get('peft_type')!r}")
    _head_of_peft(values, path, None)
    for key, value in values.items():
        off = value is None or value is False or value in ("", [], {}, *_LORA_NEUTRAL.get(key, ()))
        if key not in _LORA_WITHOUT_EFFECT and not off:
            raise InputError(f"{path}: key {key!r} changes what LoRA computes and is not supported, got {value!r}")


def _lora_targets(names: Iterable[str], path: Path) -> tuple[str, ...]:
    """Return which layers have LoRA, as keys of BLOCK_LINEARS, from the names of their tensors."""
    targets = {layer: target for target, layer in BLOCK_LINEARS.items()}
    found = set()
    for name in names:
        if ".lora_" not in name:
            continue
        match = re.fullmatch(r"encoder\.layer\.\d+\.(.+)\.lora_[AB]\.weight", name)
        if match is None or match[1] not in targets:
            raise InputError(f"{path}: tensor {name!r}: LoRA is supported on {', '.join(targets)} of a block")
        found.add(targets[match[1]])
    if not found:
        raise InputError(f"{path}: no tensor of LoRA (lora_A, lora_B) in the file")
    return tuple(target for target in BLOCK_LINEARS if target in found)


def _held_shapes(config: BertConfig, peft: PeftConfig, fresh: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of what a file holds: the parameters that a method trains, over all stages, and `fresh`."""
    model = units(config, peft)
    held = model.trainable | set(fresh)
    return {
        unit.prefix + name: shape for unit in model for name, shape in unit.shapes.items() if unit.prefix + name in held
    }


def _check_base(model: Model, held: Iterable[str], expected: object, folder: Path) -> None:
    found = base_digest(model, held)
    if found != expected:
        raise InputError(
            f"{folder}: trained on another base model: the weights that it leaves alone have SHA-256 {expected}, "
            f"those of the given base {found}"
        )


def _read_held(file: "TensorFile", keys: Mapping[str, str], held: Mapping) -> dict[str, Tensor]:
    """Read exactly the tensors `held`. Raises InputError where the file has fewer or more, or of other shapes."""
    for name in sorted(held.keys() ^ keys.keys()):
        kind = "missing" if name in held else "unexpected: the method trains no such parameter"
        raise InputError(f"{file.path}: tensor {keys.get(name, name)!r} is {kind}")
    return {name: read_tensor(file, keys[name], held[name]) for name in sorted(held)}


def _apply(model: Model, peft: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    apply_peft(model, peft)
    model.load_state_dict(tensors, strict=False)


def _method(
    values: object, config: BertConfig, names: Iterable[str], path: Path
) -> tuple[PeftConfig, dict[str, tuple[int, ...]]]:
    """Return the method whose settings `path` gives, and name and shape of what a file with `names` must hold."""
    if not isinstance(values, dict):
        raise InputError(f"{path}: key 'peft' must be an object, got {values!r}")
    try:
        peft = PeftConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
        return peft, _held_shapes(config, peft, fresh=(name for name in names if name.startswith("pooler.")))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
