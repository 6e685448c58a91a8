"""Weights on disk: Hugging Face and PEFT safetensors in and out. Nothing here reads or writes a pickle.

A model folder is `config.json` and `model.safetensors`, or shards listed by `model.safetensors.index.json`. The tensors
of embeddings, encoder and pooler stand under the prefix `bert.` or `roberta.`, or under none (a bare encoder); the
head's stand under none. The names that wrappers add (`module.`, `_orig_mod.` and such) are passed over wherever they
stand.

The folder of a model that a PEFT method trained has `config.json` and only what was trained: LoRA in the format of the
library peft (`adapter_config.json`, `adapter_model.safetensors`), any other method in `trained.json` and
`trained.safetensors`. Both name the base model, and its revision on the Hub, and carry a digest of every base tensor
that the method leaves alone, so that what is loaded is what was saved, or an error. peft itself writes no digest and no
`config.json`.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from progtuning.accounting import units
from progtuning.bert import Model
from progtuning.config import HEADS, BertConfig, PeftConfig, passed_over, read_head, sequence_head
from progtuning.errors import InputError, RunError
from progtuning.files import read_json, replacing, write_json
from progtuning.model.names import BLOCK_LINEARS
from progtuning.peft import apply_peft
from progtuning.peft.lora import lora_layers

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
LORA_WEIGHTS, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # the names that peft gives them
LORA_PICKLE = "adapter_model.bin"
TRAINED_WEIGHTS, TRAINED_CONFIG = "trained.safetensors", "trained.json"
_BACKBONE = ("embeddings.", "encoder.", "pooler.")  # under the prefix in a file; the rest is the head's last layers
_LAYERS = "|".join(sorted({head.layer for head in HEADS.values()}))
_LAST_LAYER = re.compile(rf"({_LAYERS})(\.out_proj)?\.(weight|bias)")  # a row for each output
_FLOATS = ("F64", "F32", "F16", "BF16")
# Names that no parameter of ours has, and that data parallelism, torch.compile, FSDP, recomputation and Lightning put
# before or between those of a model that they wrap.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model"}
# Tensors of other families, of whose encoders some bear BERT's names.
_OTHER_FAMILIES = {
    "DistilBERT": re.compile(r"(.*\.)?transformer\.layer\..*"),
    "ELECTRA": re.compile(r"(electra|embeddings_project|discriminator_predictions|generator_predictions)\..*"),
    "ALBERT": re.compile(r"(.*\.)?encoder\.albert_layer_groups\..*"),
}
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # 0, 1, 2 ... and zeros, by old transformers


@dataclass(frozen=True)
class LoadReport:
    """What a load did that is not one to one: parameters drawn afresh, whole or some of their rows, tensors of the file
    and keys of its config.json that were not used, and why a head that the file has was not taken whole."""

    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    passed_over: tuple[str, ...] = ()
    head: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person who trains or measures the model should know, a line each."""
        keys = f"Passed over in {CONFIG}, as no part of the model: {', '.join(self.passed_over)}."
        return (*([keys] if self.passed_over else []), *([self.head] if self.head else []))


def load_model(
    folder: str | Path, config: BertConfig | None = None, seed: int = 0, fresh_head: bool = True
) -> tuple[Model, LoadReport]:
    """Load the model of a Hugging Face folder, in fp32 and eval mode.

    `config` (None: the folder's own) may give the architecture another head. The rows of its last layer are taken by
    class name, in whatever order the file has them. Rows of classes that the file's head lacks, the whole layer where
    that head is of another kind, and head tensors that the file lacks are drawn afresh from `seed` and reported; with
    `fresh_head=False` they are an error. The folder's config.json says what the file's rows are; without one they are
    those of `config`. Raises InputError where a file is missing or damaged, or where an encoder tensor is missing, of
    the wrong shape or type, or of another architecture.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if config is None or path.is_file():
        own, found = read_object(path), BertConfig.from_json(path, keep_head=config is None)
    else:
        own, found = config.to_dict(), config
    config = config or found
    with torch.device("meta"):  # shapes without memory: a damaged config must not allocate
        model = Model(config)
    generator = torch.Generator().manual_seed(seed)
    state, fresh, used, note = {}, [], set(), None
    with ExitStack() as stack:
        files = _open_tensors(folder, stack)
        keys = internal_names(files, config, folder)
        _check_family(keys, model, folder)
        for name, parameter in model.named_parameters():
            key = keys.get(name)
            if key is None and (not fresh_head or name.startswith(("embeddings.", "encoder."))):
                raise InputError(f"{folder}: tensor {name!r} is missing ({_what_is_there(name, files)})")
            if key is not None and not _LAST_LAYER.fullmatch(name):
                state[name] = read_tensor(files[key], key, parameter.shape)
                used.add(key)
                continue
            rows, lacks = ({}, None) if key is None else _rows_by_name(own, config, _num_rows(files[key], key))
            if lacks and not fresh_head:
                raise InputError(f"{files[key].path}: tensor {key!r} lacks {lacks}")
            note = f"Drawn afresh: {lacks}." if lacks else None
            state[name] = _draw(name, parameter.shape, config.initializer_range, generator)
            if len(rows) < len(parameter):
                fresh.append(name)
            if rows:
                shape = (_num_rows(files[key], key), *parameter.shape[1:])
                state[name][list(rows)] = read_tensor(files[key], key, shape)[list(rows.values())]
                used.add(key)
    model.load_state_dict(state, assign=True)
    _check_encoder(keys, model, folder)
    report = LoadReport(tuple(fresh), tuple(sorted(set(files) - used)), passed_over(own), note)
    return model.requires_grad_(True).eval(), report


def reorder_classes(model: Model, labels: tuple[str, ...]) -> None:
    """Put a model's classes in the order of `labels`, the same names, in place: the rows of its last layer move."""
    rows = [model.config.labels.index(label) for label in labels]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if _LAST_LAYER.fullmatch(name):
                parameter.copy_(parameter[rows])
    model.config = replace(model.config, labels=labels)


def _rows_by_name(own: Mapping, config: BertConfig, count: int) -> tuple[dict[int, int], str | None]:
    """Return {row of our head's last layer: row of a file's, which has `count`}, and in words what of ours is not there
    and why. `own` is the file's config.json, which says what its rows are."""
    layer, wanted = "the head's last layer", HEADS[config.head]
    if not (wanted.has_labels or wanted.problem_type):  # the layer's name alone says what the rows are
        outputs = wanted.num_outputs
        lacks = f"{layer} (that of the model has {count} outputs, not {outputs})"
        return ({row: row for row in range(outputs)}, None) if count == outputs else ({}, lacks)
    try:
        head, labels = read_head(own)
    except InputError as error:
        return {}, f"{layer} ({CONFIG}: {error})"
    if head != config.head:
        kind = head or (own.get("architectures") or ["a task that it does not name"])[0]
        return {}, f"{layer} (that of the model is for {kind}, not for {config.head})"
    if count != len(labels):
        return {}, f"{layer} (that of the model has {count} rows, for {len(labels)} names in {CONFIG})"
    if not wanted.has_labels:
        return {0: 0}, None
    rows = {i: labels.index(label) for i, label in enumerate(config.labels) if label in labels}
    lacking = [label for label in config.labels if label not in labels]
    part = f"the rows of {_names(lacking)} in {layer}" if rows else layer
    why = f"{part} (the classes of the model are {_names(labels)}; wanted are {_names(config.labels)})"
    return rows, why if lacking else None


def _names(labels: Sequence[str]) -> str:
    return ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")


def _check_family(keys: Mapping[str, str], model: Model, folder: Path) -> None:
    for family, pattern in _OTHER_FAMILIES.items():
        if found := next(filter(pattern.fullmatch, sorted(keys.values())), None):
            raise InputError(f"{folder}: tensor {found!r} is one of {family}, expected a {model.config.model_type}")


def _check_encoder(keys: Mapping[str, str], model: Model, folder: Path) -> None:
    """Raise InputError where a file's tensors are of another encoder: it would compute something else.

    It has tensors that the model's encoder has not (but blocks above the model's, which can be cut to fewer), or, under
    BERT's names, the positions of RoBERTa and its kin, which begin above the padding's id, 1, whose row is zero.
    """
    for name in sorted(keys.keys() - {*_BUFFERS, *dict(model.named_parameters())}):
        block = re.match(r"encoder\.layer\.(\d+)\.", name)
        if name.startswith(("embeddings.", "encoder.")) and not (block and int(block[1]) >= model.num_blocks):
            kind = f"is none of a {model.config.model_type} encoder, which computes without it"
            raise InputError(f"{folder}: tensor {keys[name]!r} {kind}")
    row = model.embeddings.position_embeddings.weight[1:2]
    if model.config.model_type == "bert" and len(row) and not row.any():
        raise InputError(f"{folder}: position 1 has a zero embedding, as in a RoBERTa, expected a BERT by its {CONFIG}")


def _what_is_there(name: str, files: Mapping) -> str:
    """Say of a file that lacks a tensor what it has instead."""
    some = ", ".join(sorted(files)[:2]) or "none"
    elsewhere = next((key.removesuffix(name) for key in sorted(files) if key.endswith(f".{name}")), None)
    under = f"; one stands under {elsewhere!r}" if elsewhere else ""
    return f"of {len(files)} in the file; the first: {some}{under}"


def save_pretrained(model: Model, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` (fp32) into an existing folder as transformers' AutoModels read them.

    Raises RunError where the disk refuses; a file is written whole or not at all.
    """
    save_parameters(model, model.state_dict(), Path(folder) / WEIGHTS)
    write_json(Path(folder) / CONFIG, model.config.to_dict())


def save_parameters(model: Model, names: Iterable[str], path: Path, prefix: str = "", **metadata: str) -> None:
    """Write the tensors `names` of a model, in fp32, under the keys of Hugging Face with `prefix` before them."""
    state = model.state_dict()
    tensors = {prefix + key_of(name, model.config): state[name].float().cpu().contiguous() for name in sorted(names)}
    save_tensors(tensors, path, {"format": "pt", **metadata})


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous tensors of the CPU as safetensors, whole or not at all. Raises RunError."""
    with replacing(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=metadata)
        except SafetensorError as error:
            reason = re.search('message: "(.+)"', str(error))  # of an error of the system's, as Rust prints it
            raise RunError(f"{path}: cannot be written: {reason[1] if reason else error}") from None


def key_of(name: str, config: BertConfig) -> str:
    """Map our parameter's name to the key that it has in a file; `_internal_name` is the way back."""
    return f"{config.model_type}.{name}" if config.head and name.startswith(_BACKBONE) else name


_DIGEST = "base_sha256"
_LORA_PREFIX = "base_model.model."
_POOLER = "pooler.dense.weight"  # the one part of a head that may be frozen, and that a base may lack
_NO_HEAD = "FEATURE_EXTRACTION"
# How adapter_config.json says which head a model has: by task, or where there is none by the class that was adapted.
# That of one class or many is told apart by its outputs.
_HEADS_OF_PEFT = {
    **{row.peft_task: name for name, row in HEADS.items() if name != "regression"},
    _NO_HEAD: None,
    **{row.architecture: name for name, row in HEADS.items() if name != "regression"},
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
    return config.with_head(sequence_head(count), labels)


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

    Hashed are, in the order of their Hugging Face names (without the prefix of the model's type), of every other
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
    targets = []
    for target in sorted(peft.lora_targets):
        name = BLOCK_LINEARS[target]  # peft adapts every layer whose name ends with one of these
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
        "modules_to_save": [head.layer, *(["pooler"] if with_pooler else [])] if head else None,
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
        held |= _saved_head(units(model.config, peft).head.shapes, keys, values.get("modules_to_save"))
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
    key = keys.get("classifier.weight" if config.model_type == "bert" else "classifier.out_proj.weight")
    if key is None:
        return None
    shape = file.tensors.get_slice(key).get_shape()
    if len(shape) != 2 or not 1 <= shape[0] <= _MAX_OUTPUTS:
        raise InputError(f"{file.path}: tensor {key!r} has shape {shape}, expected [classes, {config.hidden_size}]")
    return shape[0]


def _saved_head(
    shapes: Mapping[str, tuple[int, ...]], names: Iterable[str], modules: object
) -> dict[str, tuple[int, ...]]:
    """Return which of the head's parameters a file of peft must hold, for the rest is the base's.

    They are the whole of each layer of which it has a tensor, and of each module that `modules_to_save` names.
    """
    layers = {name.rpartition(".")[0] for name in names}
    modules = {module for module in modules if isinstance(module, str)} if isinstance(modules, list) else set()
    return {
        name: shape
        for name, shape in shapes.items()
        if name.rpartition(".")[0] in layers or modules & set(name.split("."))
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


def read_object(path: Path) -> dict:
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _internal_name(key: str, config: BertConfig) -> str:
    """Map a file's key to our parameter's name, which has no prefix.

    BERT's first release had other names for LayerNorm's parameters; they are mapped too.
    """
    name = ".".join(part for part in key.split(".") if part not in _WRAPPERS).removeprefix(f"{config.model_type}.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def internal_names(keys: Iterable[str], config: BertConfig, path: Path, prefix: str = "") -> dict[str, str]:
    """Return {our parameter's name: key} for the keys of a file. Raises InputError where two are the same parameter."""
    names = {}
    for key in keys:
        name = _internal_name(key.removeprefix(prefix), config)
        if name in names:
            raise InputError(f"{path}: tensors {names[name]!r} and {key!r} are the same parameter")
        names[name] = key
    return names


class TensorFile(NamedTuple):
    path: Path
    tensors: safe_open


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, TensorFile]:
    """Open the safetensors of a model folder and return, for every tensor, the file it stands in."""
    if (folder / WEIGHTS).is_file():
        file = open_file(folder / WEIGHTS, stack)
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
        if not place or not place.isprintable() or Path(place).name != place or place == "..":
            raise InputError(f"{index}: shard {place!r} must be the name of a file in the same folder")
        file = open_file(folder / place, stack)
        expected = {key for key, where in places.items() if where == place}
        if absent := sorted(expected - set(file.tensors.keys())):
            raise InputError(f"{file.path}: tensor {absent[0]!r}, which {INDEX} places here, is missing")
        files |= dict.fromkeys(expected, file)
    return files


def open_file(path: Path, stack: ExitStack) -> TensorFile:
    if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
        raise InputError(f"{path}: not a file, expected safetensors")
    try:
        open(path, "rb").close()  # safe_open says of every failure that there is no such file
        return TensorFile(path, stack.enter_context(safe_open(path, framework="pt")))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}") from None


def _num_rows(file: TensorFile, key: str) -> int:
    shape = file.tensors.get_slice(key).get_shape()
    return shape[0] if shape else 0


def read_tensor(file: TensorFile, key: str, shape: torch.Size) -> Tensor:
    """Read a floating-point tensor as fp32. Raises InputError where it has another shape or type, or is not finite."""
    tensor = file.tensors.get_slice(key)
    if tuple(tensor.get_shape()) != tuple(shape):
        raise InputError(f"{file.path}: tensor {key!r} has shape {tensor.get_shape()}, expected {list(shape)}")
    dtype = tensor.get_dtype()
    if dtype not in _FLOATS:
        raise InputError(f"{file.path}: tensor {key!r} has dtype {dtype}, expected one of {', '.join(_FLOATS)}")
    values = file.tensors.get_tensor(key).to(torch.float32, copy=True)  # a copy, lest the model live in the mapped file
    if not all(torch.isfinite(bound) for bound in torch.aminmax(values)):
        raise InputError(f"{file.path}: tensor {key!r} has a value that is not finite in fp32")
    return values


def _draw(name: str, shape: torch.Size, initializer_range: float, generator: torch.Generator) -> Tensor:
    """Draw a head tensor as BERT does: weights normal(0, initializer_range), biases zero."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    return torch.empty(shape).normal_(std=initializer_range, generator=generator)
