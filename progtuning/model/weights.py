"""Weights of whole models: Hugging Face safetensors in and out."""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from progtuning.base.errors import InputError, RunError
from progtuning.base.files import read_json, replacing, write_json
from progtuning.base.sources import left_modules
from progtuning.model.bert import Model
from progtuning.model.config import HEADS, BertConfig, passed_over, read_head

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_BACKBONE = ("embeddings.", "encoder.", "pooler.")  # under the prefix in a file; the rest is the head's last layers
_LAYERS = "|".join(sorted({head.layer for head in HEADS.values()}))
_LAST_LAYER = re.compile(rf"({_LAYERS})(\.out_proj)?\.(weight|bias)")  # a row for each output
_OF_BLOCK = re.compile(r"encoder\.layer\.(\d{1,4})\.")
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
    and keys of its config.json that were not used, why a head that the file has was not taken whole, and what a model
    of sentence-transformers has beside its encoder."""

    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    passed_over: tuple[str, ...] = ()
    head: str | None = None
    modules: tuple[str, ...] = ()
    more_blocks: int | None = None  # of the file, where the config has fewer

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person who trains or measures the model should know, a line each."""
        keys = f"Passed over in {CONFIG}, as no part of the model: {', '.join(self.passed_over)}."
        modules = f"Left of the sentence-transformers model, whose encoder is taken: {', '.join(self.modules)}."
        blocks = f"The file has {self.more_blocks} blocks, {CONFIG} fewer: those above are left out."
        notes = ((self.passed_over, keys), (self.head, self.head), (self.modules, modules), (self.more_blocks, blocks))
        return tuple(note for about, note in notes if about)


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
    state, fresh, used, drawn = {}, [], set(), {}
    with ExitStack() as stack:
        files = _open_tensors(folder, stack)
        keys = internal_names(files, config, folder)
        _check_family(keys, model, folder)
        for name, parameter in model.named_parameters():
            key = keys.get(name)
            if key is None and (not fresh_head or name.startswith(("embeddings.", "encoder."))):
                bare = _renamed(name, config.family.tensor_names)
                raise InputError(f"{folder}: tensor {bare!r} is missing ({_what_is_there(bare, files)})")
            if key is not None and not _LAST_LAYER.fullmatch(name):
                state[name] = read_tensor(files[key], key, parameter.shape)
                used.add(key)
                continue
            rows, lacks = ({}, None) if key is None else _rows_by_name(own, config, _num_rows(files[key], key))
            if lacks and not fresh_head:
                raise InputError(f"{files[key].path}: tensor {key!r} lacks {lacks}")
            if key is None and name.startswith("pooler."):
                lacks = "the pooler, which the model does not have"
            drawn |= {lacks: None} if lacks else {}
            state[name] = _draw(name, parameter.shape, config.initializer_range, generator)
            if len(rows) < len(parameter):
                fresh.append(name)
            if rows:
                shape = (_num_rows(files[key], key), *parameter.shape[1:])
                state[name][list(rows)] = read_tensor(files[key], key, shape)[list(rows.values())]
                used.add(key)
    model.load_state_dict(state, assign=True)
    _check_encoder(keys, model, folder)
    unused = tuple(sorted(set(files) - used))
    note = f"Drawn afresh: {'; '.join(drawn)}." if drawn else None
    blocks = 1 + max((int(found[1]) for found in map(_OF_BLOCK.match, keys) if found), default=-1)
    more_blocks = blocks if blocks > config.num_hidden_layers else None
    report = LoadReport(tuple(fresh), unused, passed_over(own), note, left_modules(folder), more_blocks)
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
        if family.lower() == model.config.model_type:
            continue
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
    if not model.config.first_position and len(row) and not row.any():
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
    key = _renamed(name, config.family.tensor_names)
    return f"{config.family.prefix}.{key}" if config.head and name.startswith(_BACKBONE) else key


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Return a parameter's name with the modules that `names` has, each a run of whole parts, called as it says."""
    modules = "|".join(map(re.escape, names))
    return re.sub(rf"(?<![^.])(?:{modules})(?![^.])", lambda match: names[match[0]], name) if names else name


def read_object(path: Path) -> dict:
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _internal_name(key: str, config: BertConfig) -> str:
    """Map a file's key to our parameter's name, which has no prefix.

    BERT's first release had other names for LayerNorm's parameters; they are mapped too, and those of a family whose
    names are not BERT's.
    """
    name = ".".join(part for part in key.split(".") if part not in _WRAPPERS).removeprefix(f"{config.family.prefix}.")
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return _renamed(name, {theirs: ours for ours, theirs in config.family.tensor_names.items()})


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
