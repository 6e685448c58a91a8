"""Settings of the model (`BertConfig`, a Hugging Face config.json), the method (`PeftConfig`), the run (`TrainConfig`).

Small frozen dataclasses that check themselves; what they do not know, they refuse. The reader of config.json sorts its
keys in three: those that are the architecture, those that cannot change what the encoder computes (tokens, generation,
book-keeping), and those that would change it unless they have one value. Keys that other libraries add are passed over,
and named for the caller to say so (`passed_over`). Any other key is an error: a key that is passed over in silence may
be a different model.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from math import ceil
from pathlib import Path

from progtuning.base.checks import check_choice, check_number
from progtuning.errors import InputError
from progtuning.files import read_json
from progtuning.model.names import BLOCK_LINEARS, EMBEDDINGS, HEAD, prefix_of, unit_of
from progtuning.settings.options import Options, option
from progtuning.stages import EMBEDDING_POLICIES

ACTIVATIONS = ("gelu", "gelu_new", "relu")
# Other names of these functions: they differ in how they are computed, by rounding alone.
_SAME_ACTIVATION = {
    "gelu_python": "gelu",
    **dict.fromkeys(("gelu_accurate", "gelu_fast", "gelu_python_tanh", "gelu_pytorch_tanh"), "gelu_new"),
}
PEFT_METHODS = ("none", "adapter", "bitfit", "lora", "spafit")
MERGEABLE = ("lora", "bitfit", "spafit")  # what they do to a model fits in its own layers
DPS_MODES = ("off", "dense", "mix")
PRECISIONS = ("fp32", "bf16")
CACHES = ("off", "memory", "disk")
LR_SCHEDULES = ("linear", "constant")


@dataclass(frozen=True)
class Head:
    """What a head is, beside its layers and loss in `model.heads`; what transformers and peft call it."""

    architecture: str  # the end of the class's name, for config.json
    peft_task: str  # the task_type of adapter_config.json
    layer: str = "classifier"  # the module with the last linear layer
    num_outputs: int | None = None  # None: one for each class
    per_token: bool = False  # outputs for each token (B, S, C), else for each sequence (B, C)
    problem_type: str | None = None  # of config.json, for what shares an architecture

    @property
    def has_labels(self) -> bool:
        """Whether the outputs are classes, which have names."""
        return self.num_outputs is None


_SEQUENCE = ("ForSequenceClassification", "SEQ_CLS")
HEADS = {
    "classification": Head(*_SEQUENCE, problem_type="single_label_classification"),
    "regression": Head(*_SEQUENCE, num_outputs=1, problem_type="regression"),
    # The two outputs of a token are the logits of an answer's start and end.
    "question-answering": Head("ForQuestionAnswering", "QUESTION_ANS", "qa_outputs", num_outputs=2, per_token=True),
}

# Keys of a config.json with which the encoder computes the same whatever their value.
_WITHOUT_EFFECT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path architectures attn_implementation bos_token_id
    chunk_size_feed_forward cls_token_id decoder_start_token_id directionality dtype eos_token_id finetuning_task
    gradient_checkpointing language license mask_token_id model_max_length name output_attentions output_hidden_states
    output_past pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type prefix
    return_dict sep_token_id task_specific_params tf_legacy_loss tie_word_embeddings tokenizer_class torch_dtype
    torchscript transformers_version unk_token_id use_bfloat16 use_cache

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split()
)
# Keys that say what the head's outputs mean. They do not matter where the head is replaced.
_HEAD_KEYS = ("problem_type", "id2label", "label2id", "num_labels", "_num_labels")
# Keys that are no architecture's: those of sentence-transformers and of adapters, which wrap the model, and two that
# transformers wrote until 4.3 and pytorch-transformers 1.
_FOREIGN = re.compile(r"sentence_transformers|sbert_ce_\w+|adapters|xla_device|vocab_size_or_config_json_file")
# Keys by which other families of encoders are known where neither model_type nor architectures names them.
_OF_OTHER_FAMILIES = {
    "attention_window": "Longformer",
    "dim": "DistilBERT",
    "embedding_size": "ELECTRA or ALBERT",
    "num_hidden_groups": "ALBERT",
    "relative_attention": "DeBERTa",
    "relative_attention_num_buckets": "MPNet",
}
# The files of BERT's first release have neither. RoBERTa and its kin, whose tensors bear the same names but whose
# positions count from the padding's id, differ in these values.
_OF_FIRST_BERT = {"layer_norm_eps": 1e-12, "pad_token_id": 0, "type_vocab_size": 2}
# Keys that would change what the encoder computes, with the one value that is supported.
_SUPPORTED_VALUE = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
    "quantization_config": None,
    "tie_encoder_decoder": False,
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class BertConfig:
    """The architecture of a BERT or RoBERTa encoder and its head, in the names of Hugging Face's config.json.

    `head` is one of HEADS, or None for an encoder whose file names no head. `labels` are the class names in order; a
    regression head has one, and a question-answering head none. Raises InputError where a value is out of range.
    """

    vocab_size: int
    hidden_size: int  # D
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    intermediate_size: int  # F
    max_position_embeddings: int
    model_type: str = "bert"  # or "roberta"
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = None  # None: 0 for BERT, 1 for RoBERTa
    head: str | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self):
        check_choice("model_type", self.model_type, ("bert", "roberta"))
        if self.pad_token_id is None:
            object.__setattr__(self, "pad_token_id", 0 if self.model_type == "bert" else 1)
        for name in (*_REQUIRED, "type_vocab_size"):
            check_number(name, getattr(self, name), int, low=1, high=1000 if name == "num_hidden_layers" else 2**24)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            if name != "classifier_dropout" or self.classifier_dropout is not None:
                check_number(name, getattr(self, name), float, low=0, high=1)
        check_number("initializer_range", self.initializer_range, float, low=0)
        check_number("layer_norm_eps", self.layer_norm_eps, float, low=0)
        check_number("pad_token_id", self.pad_token_id, int, low=0, high=self.vocab_size - 1)
        if self.hidden_size % self.num_attention_heads:
            got = f"{self.hidden_size} and {self.num_attention_heads}"
            raise InputError(f"hidden_size must be divisible by num_attention_heads, got {got}")
        check_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        if self.head is not None:
            check_choice("head", self.head, HEADS)
        if self.max_length < 1:
            raise InputError(
                f"max_position_embeddings must exceed pad_token_id + 1 for roberta, got {self.max_position_embeddings}"
            )
        if len(set(self.labels)) != len(self.labels) or (self.has_labels and len(self.labels) < 2):
            raise InputError(f"labels must be two or more distinct names, got {list(self.labels)}")

    @property
    def max_length(self) -> int:
        """The longest sequence in tokens. RoBERTa's first position is pad_token_id + 1."""
        return self.max_position_embeddings - (self.pad_token_id + 1 if self.model_type == "roberta" else 0)

    @property
    def num_outputs(self) -> int:
        """Columns of the head's last layer: classes, 1 for regression, 2 (start, end) for question answering."""
        return len(self.labels) if self.head is None or self.has_labels else HEADS[self.head].num_outputs

    @property
    def has_labels(self) -> bool:
        """Whether the head's outputs are classes, whose names are `labels`."""
        return self.head is not None and HEADS[self.head].has_labels

    @property
    def has_pooler(self) -> bool:
        """Whether the head begins with BERT's pooler (RoBERTa's classification head brings its own dense layer)."""
        return self.model_type == "bert" and self.head is not None and not HEADS[self.head].per_token

    def with_head(self, head: str | None, labels: tuple[str, ...] = ()) -> "BertConfig":
        """Return this architecture under another head. `labels` are the class names, for classification."""
        has_labels = head in HEADS and HEADS[head].has_labels
        return replace(self, head=head, labels=labels if has_labels else ("LABEL_0",))

    def renamed(self, names: Mapping[str, str]) -> "BertConfig":
        """Return this architecture with other names for its classes: `names`, by their present ones.

        Raises InputError where it has no such class, or two would have one name.
        """
        classes = ", ".join(self.labels)
        if not self.has_labels:
            raise InputError(f"--label-map is for classes, got it with a {self.head} head")
        if unknown := sorted(set(names) - set(self.labels)):
            raise InputError(f"--label-map gives a name to {unknown[0]!r}, expected classes of the model: {classes}")
        labels = tuple(names.get(label, label) for label in self.labels)
        if len(set(labels)) != len(labels) or not all(label and label.isprintable() for label in labels):
            raise InputError(f"--label-map must give distinct printable names to {classes}, got {', '.join(labels)}")
        return replace(self, labels=labels)

    @classmethod
    def from_dict(cls, values: Mapping, keep_head: bool = True) -> "BertConfig":
        """Read the dictionary of a config.json. Raises InputError that names the key.

        `keep_head=False`, for a head that is replaced, gives the encoder without one: what its keys say of the old
        head is not read.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"expected a JSON object, got {type(values).__name__}")
        values = dict(values, model_type=_model_type(values))
        for key in _REQUIRED:
            if key not in values:
                raise InputError(f"key {key!r} is missing")
        for key, supported in _SUPPORTED_VALUE.items():
            if values.pop(key, supported) not in (supported, None):
                raise InputError(f"key {key!r} changes what the model computes and is supported only as {supported!r}")
        head, labels = read_head(values) if keep_head else (None, cls.labels)
        known = {field.name for field in fields(cls)} - {"head", "labels"}
        unknown = sorted(set(values) - known - _WITHOUT_EFFECT - set(_HEAD_KEYS) - set(passed_over(values)))
        if unknown:
            raise InputError(f"key {unknown[0]!r} is unknown: remove it if it does not change what the model computes")
        values = {key: value for key, value in values.items() if key in known}
        if isinstance(values.get("hidden_act"), str):
            values["hidden_act"] = _SAME_ACTIVATION.get(values["hidden_act"], values["hidden_act"])
        return cls(head=head, labels=labels, **values)

    @classmethod
    def from_json(cls, path: str | Path, keep_head: bool = True) -> "BertConfig":
        """Read a config.json file, as `from_dict`. Raises InputError that names the file."""
        values = read_json(path)
        try:
            return cls.from_dict(values, keep_head)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_dict(self) -> dict:
        """Return the dictionary that transformers' AutoConfig and `from_dict` read."""
        values = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("head", "labels")
        }
        head = None if self.head is None else HEADS[self.head]
        suffix = "Model" if head is None else head.architecture
        values["architectures"] = [("Bert" if self.model_type == "bert" else "Roberta") + suffix]
        if head and head.problem_type:
            values["problem_type"] = head.problem_type
        if head and (head.problem_type or head.has_labels):
            values["id2label"] = {str(i): label for i, label in enumerate(self.labels)}
            values["label2id"] = {label: i for i, label in enumerate(self.labels)}
        return values


def _architecture(values: Mapping) -> str:
    names = values.get("architectures") or [""]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise InputError(f"key 'architectures' must be a list of names, got {names!r}")
    return names[0]


def _model_type(values: Mapping) -> str:
    """Return the family of a config.json: what it says, or where it says nothing what its architecture or keys are."""
    if values.get("model_type") is not None:
        check_choice("model_type", values["model_type"], ("bert", "roberta"))
        return values["model_type"]
    architecture = _architecture(values)
    if match := re.fullmatch(r"(Bert|Roberta)(Model|LMHeadModel|For[A-Z]\w*)", architecture):
        return match[1].lower()
    if architecture:
        expected = "a Bert or Roberta model where model_type is missing"
        raise InputError(f"architectures must name {expected}, got {architecture!r}")
    if found := sorted(set(values) & set(_OF_OTHER_FAMILIES)):
        family = _OF_OTHER_FAMILIES[found[0]]
        raise InputError(f"key 'model_type' must be bert or roberta, got none and {found[0]!r}, a key of {family}")
    for key, of_bert in _OF_FIRST_BERT.items():
        if values.get(key) not in (None, of_bert):
            got = f"none, and {key} {values[key]!r} where BERT has {of_bert}"
            raise InputError(f"key 'model_type' must be bert or roberta, got {got}")
    return "bert"


def passed_over(values: Mapping) -> tuple[str, ...]:
    """Return the keys of a config.json that other libraries added, which the model is read without.

    Raises InputError where they name adapters inside the encoder, which would change what it computes.
    """
    adapters = values.get("adapters")
    if isinstance(adapters, Mapping) and (adapters.get("adapters") or adapters.get("fusions")):
        raise InputError("key 'adapters' changes what the model computes and is supported only with no adapter in it")
    return tuple(sorted(key for key in values if isinstance(key, str) and _FOREIGN.fullmatch(key)))


def read_head(values: Mapping) -> tuple[str | None, tuple[str, ...]]:
    """Return the head that a config.json names, one of HEADS or None, and for classification its class names by row.

    Raises InputError that names the key.
    """
    architecture = _architecture(values)
    found = next((name for name, head in HEADS.items() if architecture.endswith(head.architecture)), None)
    if found is None or not (HEADS[found].problem_type or HEADS[found].has_labels):
        return found, BertConfig.labels
    if HEADS[found].problem_type is None:
        return found, _labels(values)
    labels, problem = _labels(values), values.get("problem_type")
    if problem not in (None, "regression", "single_label_classification"):
        expected = "regression, single_label_classification or none"
        raise InputError(f"problem_type {problem!r} is not supported, expected {expected}")
    if problem is not None and (problem == "regression") != (len(labels) == 1):
        expected = "one output" if problem == "regression" else "two or more classes"
        raise InputError(f"problem_type {problem!r} is supported with {expected}, got {len(labels)}")
    return sequence_head(len(labels)), labels


def sequence_head(num_outputs: int) -> str:
    """Return the head with so many outputs for a sequence: for transformers a single one is regression."""
    return "regression" if num_outputs == 1 else "classification"


def _labels(values: Mapping) -> tuple[str, ...]:
    """Return the names of the head's outputs in the order of their ids."""
    count = values.get("num_labels", values.get("_num_labels"))
    names = values.get("id2label")
    if names is None:
        if count is not None:
            check_number("num_labels", count, int, low=1, high=100_000)
        return tuple(f"LABEL_{i}" for i in range(2 if count is None else count))
    if not isinstance(names, Mapping) or {str(key) for key in names} != {str(i) for i in range(len(names))}:
        raise InputError(f"key 'id2label' must map 0..{len(names) - 1 if isinstance(names, Mapping) else 'n'} to names")
    by_id = {str(key): name for key, name in names.items()}
    for name in by_id.values():  # a label is a cell of the TSV that `predict` writes
        if not isinstance(name, (str, int)) or not str(name).isprintable():
            raise InputError(f"key 'id2label' must map to printable names, got {name!r}")
    labels = tuple(str(by_id[str(i)]) for i in range(len(by_id)))
    if len(set(labels)) != len(labels):
        raise InputError(f"key 'id2label' must map to distinct names, got {list(labels)}")
    return labels


# For `plan`, which needs no weights: the public config.json of each, as published on the Hugging Face Hub.
_BERT_BASE = BertConfig(30522, 768, 12, 12, 3072, 512)
_BERT_LARGE = BertConfig(30522, 1024, 24, 16, 4096, 512)
_ROBERTA = {"model_type": "roberta", "type_vocab_size": 1, "layer_norm_eps": 1e-5}
ARCHITECTURES = {
    "bert-base-uncased": _BERT_BASE,
    "bert-base-cased": replace(_BERT_BASE, vocab_size=28996),
    "bert-large-uncased": _BERT_LARGE,
    "bert-large-cased": replace(_BERT_LARGE, vocab_size=28996),
    "bert-base-multilingual-uncased": replace(_BERT_BASE, vocab_size=105879),
    "bert-base-multilingual-cased": replace(_BERT_BASE, vocab_size=119547),
    "bert-base-chinese": replace(_BERT_BASE, vocab_size=21128),
    "roberta-base": BertConfig(50265, 768, 12, 12, 3072, 514, **_ROBERTA),
    "roberta-large": BertConfig(50265, 1024, 24, 16, 4096, 514, **_ROBERTA),
    "minilm-l6": BertConfig(30522, 384, 6, 12, 1536, 512),
}


@dataclass(frozen=True)
class PeftConfig(Options):
    """Which parameters a fine-tuning method adds and trains, before they are partitioned by block (Algorithm 1).

    `adds` and `trains` are the rule, for the closed forms and for what is done to a built model. Raises InputError that
    names the option where a value is out of range.
    """

    method: str = option("none", "{choices}", name="peft", choices=PEFT_METHODS)  # "none" trains every parameter
    adapter_size: int = option(64, "width of the bottleneck", at_least=1, at_most=2**16)
    adapter_activation: str = option("gelu", "{choices}", choices=ACTIVATIONS)
    # Houlsby et al. (2019) train the LayerNorms of the blocks with the adapters,
    adapter_layer_norms: bool = option(True, "train the blocks' LayerNorms with the adapters")
    # and in their code E's, beneath which no backward pass can be cut.
    adapter_embedding_layer_norm: bool = option(False, "train E's too, in the stages that train E")
    # Their Section 3.6 has this deviation, their code 1e-3.
    adapter_init_std: float = option(1e-2, "deviation of the adapters' weights at the start", at_least=1e-8, at_most=1)
    lora_r: int = option(8, "rank", at_least=1)
    lora_alpha: float = option(16.0, "the update is scaled by alpha / r", at_least=0)
    lora_dropout: float = option(0.0, "dropout before A", at_least=0, at_most=1)
    lora_targets: tuple[str, ...] = option(
        ("query", "value"), f"comma-separated, of {', '.join(BLOCK_LINEARS)}", choices=tuple(BLOCK_LINEARS)
    )
    lora_pooler: bool = option(False, "train BERT's pooler with the head")  # RoBERTa's head has a dense layer for it
    # "query,intermediate" is the half-size variant of Zaken et al. (2021).
    bitfit_biases: str = option("all", "all, or query,intermediate", choices=("all", "query,intermediate"))
    # N1 <= N2: blocks below N1 frozen, below N2 biases only, the rest LoRA
    spafit_bounds: tuple[int, int] | None = option(None, "N1,N2, or 4-9 or 4-14 (of 24 blocks) (4-9)", is_text=True)

    def __post_init__(self):
        super().__post_init__()
        if self.spafit_bounds is not None:
            n1, n2 = self.spafit_bounds
            check_number("--spafit-bounds", n1, int, low=0)
            check_number("--spafit-bounds", n2, int, low=0)
            _check_bounds(n1, n2)

    def adds(self, target: str, n_out: int, n_in: int, block: int, num_blocks: int) -> dict[str, tuple[int, ...]]:
        """Return what stands beside or behind the layer `target` (a key of BLOCK_LINEARS) of block `block`, 0-based.

        It is {name in the block: shape}, where the layer's weight is (n_out, n_in). Raises InputError where LoRA's rank
        does not fit the layer, or SPAFIT's bounds the number of blocks.
        """
        layer = BLOCK_LINEARS[target]
        if layer in self.lora_layers(block, num_blocks):
            r, limit = self.lora_r, min(n_out, n_in)
            if r > limit:
                raise InputError(f"--lora-r must be in 1..{limit} for {target} ({n_out} x {n_in}), got {r}")
            return {f"{layer}.lora_A.weight": (r, n_in), f"{layer}.lora_B.weight": (n_out, r)}
        if self.method == "adapter" and target in ("attention-output", "output"):  # either ends a half of the block
            adapter, size = layer.removesuffix("dense") + "adapter", self.adapter_size
            down = {f"{adapter}.down.weight": (size, n_out), f"{adapter}.down.bias": (size,)}
            return down | {f"{adapter}.up.weight": (n_out, size), f"{adapter}.up.bias": (n_out,)}
        return {}

    def lora_layers(self, block: int, num_blocks: int) -> tuple[str, ...]:
        """Return the layers of a block (values of BLOCK_LINEARS, in its order) that have an A and a B."""
        if self.method == "lora" or (self.method == "spafit" and block >= self.bounds(num_blocks)[1]):
            return tuple(layer for target, layer in BLOCK_LINEARS.items() if target in self.lora_targets)
        return ()

    def trains(self, name: str, num_blocks: int) -> bool:
        """Say whether the parameter `name`, of the base or added, trains in a model of `num_blocks` blocks.

        method    E                  a block                                              H
        none      all                all                                                  all
        adapter   LN by option       two adapters, the LayerNorms by option               all but the pooler
        lora      -                  A and B of the targets                               all, the pooler by option
        bitfit    LayerNorm's bias   biases                                               all but the pooler's weight
        spafit    -                  by group: nothing; biases; A and B, other biases     all but the pooler's weight

        The pooler is BERT's, and pre-trained. RoBERTa's classification head has none and trains whole.
        BitFit's variant "query,intermediate" is the half of the biases that its authors find to do nearly as well
        (Section 4, "Fewer bias parameters"): b_q and b_m2 of every block, and none of E. Their code trains the pooler's
        bias with either.

        Raises ValueError for a name that is none of the model's, InputError as `bounds` does.
        """
        unit = unit_of(name)
        layer, _, kind = name.removeprefix(prefix_of(unit)).rpartition(".")
        if self.method == "none" or (unit == HEAD and not name.startswith("pooler.")):
            return True
        if self.method == "adapter":  # Houlsby et al. 2019 train the LayerNorms too
            layer_norms = self.adapter_embedding_layer_norm if unit == EMBEDDINGS else self.adapter_layer_norms
            return ".adapter." in name or (layer_norms and layer.endswith("LayerNorm"))
        if self.method == "lora":
            return ".lora_" in name or (unit == HEAD and self.lora_pooler)
        if self.method == "bitfit":  # of the pooler the bias in either variant, as in the authors' code
            every = self.bitfit_biases == "all" or unit == HEAD
            return kind == "bias" and (every or layer in {BLOCK_LINEARS[key] for key in self.bitfit_biases.split(",")})
        if isinstance(unit, int):  # SPAFIT's groups: nothing; biases; A and B, and the biases of layers without
            tuned = unit >= self.bounds(num_blocks)[0]
            return tuned and (".lora_" in name or (kind == "bias" and layer not in self.lora_layers(unit, num_blocks)))
        return unit == HEAD and kind == "bias"

    def bounds(self, num_blocks: int) -> tuple[int, int]:
        """Return N1, N2 of SPAFIT (Arora & Wang 2024, arXiv 2405.00201): the blocks in three groups, each tuned more
        than the one below it.

        group 1   blocks  0 .. N1-1     frozen, as is E
        group 2   blocks N1 .. N2-1     biases
        group 3   blocks N2 .. L-1      LoRA on the targets, the biases of every other layer

        H trains too: its last layers, and of the pooler the bias. Under a schedule, a stage trains what it has in
        common with the groups. Two variants are named after their bounds, of the 24 blocks of BERT-large; for other
        depths the bounds are in proportion, rounded down. Where none are given they are those of "4-9".

        Of the paper we could read the abstract and summaries, which give the groups; for the bounds, the rank and the
        pooler's bias there was no source, nor is there code of the authors. At our defaults 0.21 % of BERT-large's
        parameters train (4-14: 0.16 %), where summaries of the paper say 1 to 2 %.

        Raises InputError where the bounds exceed the number of blocks.
        """
        if self.spafit_bounds is None:
            return parse_bounds("4-9", num_blocks)
        _check_bounds(*self.spafit_bounds, num_blocks)
        return self.spafit_bounds


def _check_bounds(n1: int, n2: int, num_blocks: int | None = None) -> None:
    if n1 > n2 or (num_blocks is not None and n2 > num_blocks):
        limit = "" if num_blocks is None else f" <= {num_blocks}"
        raise InputError(f"--spafit-bounds must be two numbers 0 <= N1 <= N2{limit}, got {n1},{n2}")


SPAFIT_VARIANTS = {"4-9": (4, 9), "4-14": (4, 14)}  # N1, N2 of 24 blocks


def parse_bounds(text: str, num_blocks: int) -> tuple[int, int]:
    """Return N1, N2 from the name of a variant, "4-9" or "4-14", or from two numbers, "N1,N2".

    >>> parse_bounds("4-14", num_blocks=24), parse_bounds("4-14", num_blocks=12), parse_bounds("3,5", num_blocks=12)
    ((4, 14), (2, 7), (3, 5))

    Raises InputError where the text is neither, or the bounds are not 0 <= N1 <= N2 <= num_blocks.
    """
    if text in SPAFIT_VARIANTS:
        n1, n2 = SPAFIT_VARIANTS[text]
        return n1 * num_blocks // 24, n2 * num_blocks // 24
    if numbers := re.fullmatch(r"\s*(\d{1,9})\s*,\s*(\d{1,9})\s*", text):
        n1, n2 = map(int, numbers.groups())
        if n1 <= n2 <= num_blocks:
            return n1, n2
    names = " or ".join(SPAFIT_VARIANTS)
    raise InputError(f"--spafit-bounds must be {names}, or N1,N2 with 0 <= N1 <= N2 <= {num_blocks}, got {text!r}")


@dataclass(frozen=True)
class DPSConfig(Options):
    """Gradient-chosen subnetworks (Zhang et al. 2022). Raises InputError that names the option that is out of range."""

    mode: str = option("off", "gradient-chosen subnetworks: {choices}", name="dps", choices=DPS_MODES)
    p: float = option(0.3, "share of each matrix that a subnetwork leaves out", name="dps-p", at_least=0, at_most=1)
    update_ratio: float = option(
        0.05, "length of a window, as a share of all steps", name="dps-update-ratio", at_least=0, at_most=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.p == 1:
            raise InputError("--dps-p must be less than 1, the share that would leave nothing to train")
        if self.update_ratio == 0:
            raise InputError("--dps-update-ratio must be more than 0, got 0")


@dataclass(frozen=True)
class SquadConfig(Options):
    """How questions and contexts become windows, and logits become answers; the values of google-research/bert's
    run_squad.py, but for the stride, which is counted as in transformers' run_qa.py. Raises InputError that names the
    option that is out of range.
    """

    doc_stride: int = option(128, "SQuAD: tokens by which the windows of a context overlap", at_least=0, at_most=1000)
    max_query_length: int = option(64, "SQuAD: tokens kept of a question", at_least=1, at_most=1000)
    max_answer_length: int = option(30, "SQuAD: tokens of the longest answer", at_least=1, at_most=1000)
    n_best: int = option(20, "SQuAD: answers kept for each question", at_least=1, at_most=1000)
    # None: 0 for squad_v2, else there always is one
    null_threshold: float | None = option(
        None, "SQuAD v2.0: odds above which there is no answer (0)", at_least=-1e9, at_most=1e9
    )


@dataclass(frozen=True)
class ScheduleKind:
    """What the settings of a run must know of a schedule before it is built (`methods.schedules.build_schedule`)."""

    stages_an_epoch: int = 1
    fewest_stages: int = 1
    only_freezes: bool = True  # no block trains again once it was frozen: so its output can be kept
    prefix_drops_out: bool = True


SCHEDULE_KINDS = {
    "full": ScheduleKind(),
    "shrinking": ScheduleKind(),
    "growing": ScheduleKind(only_freezes=False),
    "without-low-blocks": ScheduleKind(),
    "adaptive": ScheduleKind(stages_an_epoch=5, fewest_stages=3, prefix_drops_out=False),
}


@dataclass(frozen=True)
class TrainConfig(Options):
    """How a run trains. Raises InputError that names the command-line option where a value is out of range."""

    schedule: str = option("shrinking", "{choices}", choices=tuple(SCHEDULE_KINDS))
    stages: int | None = option(  # T
        None, "stages (one an epoch); of adaptive, intervals (five an epoch)", at_least=1, at_most=100_000
    )
    freeze_percentile: float = option(
        50.0, "of the scores of adaptive: lower ones freeze, from below", at_least=0, at_most=100
    )
    embeddings: str = option("with-block-1", "when E trains: {choices}", choices=EMBEDDING_POLICIES)
    epochs: int = option(3, "passes over the training rows", at_least=1, at_most=100_000)
    # Of evaluation too, where --batch-tokens does not count.
    batch_size: int = option(32, "examples an optimizer step", at_least=1, at_most=2**24)
    batch_tokens: int | None = option(  # rows times longest row of a batch, at most
        None, "instead, tokens an optimizer step, padding included", at_least=1, at_most=2**24
    )
    accumulation_steps: int = option(  # the update is the same
        1, "pieces that a batch is processed in, to save memory", at_least=1, at_most=2**24
    )
    lr: float = option(2e-5, "peak learning rate", at_least=0)
    lr_schedule: str = option("linear", "linear, which falls to 0 after the warm-up, or constant", choices=LR_SCHEDULES)
    weight_decay: float = option(0.01, "AdamW's decay of weights, not of biases and LayerNorms", at_least=0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", at_least=1e-30)  # 0 divides 0 by 0
    warmup: float = option(0.1, "share of the steps in which the learning rate rises", at_least=0, at_most=1)
    max_grad_norm: float = option(1.0, "clip the gradient's norm; 0 does not", at_least=0)
    max_length: int | None = option(
        None, "tokens a sequence (128, of SQuAD 384, or what the model takes)", at_least=1, at_most=2**24
    )
    precision: str = option("fp32", "{choices}", choices=PRECISIONS)  # bf16: autocast
    compile: bool = option(False, "compile each block with torch.compile")
    unpadded: bool = option(False, "run the blocks without padding, where attention does not drop out; CUDA and bf16")
    hidden_dropout_prob: float | None = option(None, "dropout (the model's own)", at_least=0, at_most=1)
    attention_probs_dropout_prob: float | None = option(
        None, "dropout of attention (the model's own)", at_least=0, at_most=1
    )
    # Below the cut. A cache needs it off, and "adaptive" has it so (AutoFreeze).
    prefix_dropout: bool | None = option(None, "dropout in the frozen blocks (true; false with --cache or adaptive)")
    cache: str = option("off", "keep the output of the frozen blocks for each example: {choices}", choices=CACHES)
    cache_dtype: str = option("fp32", "what the cache holds: {choices}", choices=PRECISIONS)
    cache_limit: int | None = option(  # bytes
        None, "largest cache, in GB or with a unit: 500MB (half of what is free)", at_least=1, is_text=True
    )
    group_by_length: bool = option(True, "batches of like lengths")
    evaluate: str = option("epoch", "after every epoch, or at the end", choices=("epoch", "end"))
    skip_nonfinite: bool = option(False, "pass over batches whose loss or gradient is not finite")
    seed: int = option(42, "of the data order, what is drawn afresh, and dropout", at_least=0, at_most=2**63 - 1)
    peft: PeftConfig = PeftConfig()
    dps: DPSConfig = DPSConfig()
    squad: SquadConfig = SquadConfig()

    def __post_init__(self):
        super().__post_init__()
        self._check_cache()
        if self.unpadded and (self.precision != "bf16" or self.compile):
            raise InputError("--unpadded needs --precision bf16, and does not go with --compile")
        if self.accumulation_steps > self.batch_size and self.batch_tokens is None:
            got = f"{self.accumulation_steps} and {self.batch_size}"
            raise InputError(f"--accumulation-steps must be at most --batch-size, got {got}")
        if self.num_stages < self.kind.fewest_stages:
            raise InputError(
                f"--schedule {self.schedule} freezes after two intervals that it compares: "
                f"--stages must be at least {self.kind.fewest_stages}, got {self.num_stages}"
            )
        if self.dps.mode != "off" and self.peft.method != "none":
            raise InputError(f"--dps masks weights that --peft {self.peft.method} freezes: give --peft none with it")

    def _check_cache(self) -> None:
        if self.prefix_dropout and self.cache != "off":
            raise InputError(
                f"--cache {self.cache} needs the same output of the frozen blocks in every epoch: "
                "leave out --prefix-dropout"
            )
        if not self.kind.only_freezes and self.cache != "off":
            kept = "keeps the output of blocks that stay frozen"
            raise InputError(f"--cache {self.cache} {kept}, and --schedule {self.schedule} unfreezes")

    @property
    def kind(self) -> ScheduleKind:
        return SCHEDULE_KINDS[self.schedule]

    @property
    def drops_out_prefix(self) -> bool:
        """Whether the blocks below the cut drop out too."""
        if self.prefix_dropout is not None:
            return self.prefix_dropout
        return self.cache == "off" and self.kind.prefix_drops_out

    @property
    def num_stages(self) -> int:
        if self.stages is not None:
            return self.stages
        return self.kind.stages_an_epoch * self.epochs


def parse_size(option: str, text: str) -> int:
    """Return the bytes that `text` says: a number of GB, or one with a unit, as 500MB or 2GiB. Raises InputError.

    >>> parse_size("--cache-limit", "1.5"), parse_size("--cache-limit", "2 GiB")
    (1500000000, 2147483648)
    """
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?)\s*(?:([KMGT])(i?)B)?", text.strip(), re.ASCII)
    if not found:
        raise InputError(f"{option} must be a number of GB, or one with a unit (500MB, 2GiB), got {text!r}")
    number, letter, binary = found.groups()
    return int(Fraction(number) * (1024 if binary else 1000) ** " KMGT".index(letter or "G"))


def parse_label_map(text: str) -> dict[str, str]:
    """Return {present name: name} of OLD=NEW,OLD=NEW, or of a JSON object, which any name can stand in.

    Raises InputError that names --label-map.

    >>> parse_label_map("LABEL_0=negative,LABEL_1=positive")
    {'LABEL_0': 'negative', 'LABEL_1': 'positive'}
    """
    wrong = InputError(f"--label-map must be OLD=NEW,OLD=NEW or a JSON object of names, each OLD once, got {text!r}")
    if text.lstrip().startswith("{"):
        try:
            pairs = json.loads(text, object_pairs_hook=list)
        except (ValueError, RecursionError):
            raise wrong from None
    else:
        pairs = [[name.strip() for name in part.split("=")] for part in text.split(",")]
    if not all(len(pair) == 2 and all(isinstance(name, str) and name for name in pair) for pair in pairs):
        raise wrong
    if not pairs or len({old for old, _ in pairs}) != len(pairs):
        raise wrong
    return dict(pairs)


def format_label_map(names: Mapping[str, str]) -> str:
    """Return the option, quoted for a shell, that `parse_label_map` reads as `names`."""
    text = ",".join(f"{old}={new}" for old, new in names.items())
    try:
        plain = parse_label_map(text) == names
    except InputError:
        plain = False
    return f"--label-map {shlex.quote(text if plain else json.dumps(dict(names), ensure_ascii=False))}"


@dataclass(frozen=True)
class CheckpointConfig(Options):
    """When a run is saved, so that it can be resumed. Raises InputError that names the option that is out of range."""

    save_every: int | None = option(  # None: only where a signal stops the run
        None, "save the run every N optimizer steps and at each stage's end", metavar="N", at_least=1
    )
    keep: int = option(2, "keep the last K of them", name="keep-checkpoints", metavar="K", at_least=1)
    resume: bool = option(False, "go on from the last checkpoint in --output-dir", is_flag=True)


# Progtuning's own epochs on SQuAD (Table 2), of one stage each.
TASK_DEFAULTS = {"squad": {"epochs": 3}, "squad_v2": {"epochs": 2}}

# How Progtuning trains E (arXiv 2506.21119, Section 3.2: with every stage), under whatever method: in the ablations
# whose stages never or late train block 1 too. A method that trains something in E then leaves no backward pass to cut.
_PROGTUNING = {"embeddings": "always"}
# How a method trains is its authors'. Devlin et al. 2019 (arXiv 1810.04805): Section 4.1 gives GLUE's batch, epochs and
# learning rates (the best of four), 4.2 and 4.3 SQuAD's. The rest is google-research/bert: run_classifier.py,
# run_squad.py, and epsilon in optimization.py, whose Adam corrects no bias of its moments, and whose rate falls from
# the first step on, so that it is 0.9 of the peak where the warm-up ends; here both are as in transformers.
_BERT = {"warmup": 0.1, "weight_decay": 0.01, "adam_epsilon": 1e-6, **_PROGTUNING}
_BERT_GLUE = {"lr": 2e-5, "epochs": 3, "batch_size": 32, "max_length": 128, **_BERT}
_BERT_SQUAD = {
    "squad": {"lr": 5e-5, "epochs": 3, "batch_size": 32, "max_length": 384, **_BERT},
    "squad_v2": {"lr": 5e-5, "epochs": 2, "batch_size": 48, "max_length": 384, **_BERT},
}
# Houlsby et al. 2019 (arXiv 1902.00751): google-research/adapter-bert has batch, rate and epochs in the example of its
# README.md, decay and epsilon in optimization.py, GELU by tanh and the deviation at the start in modeling.py. Its
# bottleneck is of 64, and every LayerNorm trains, E's too. The recipe has instead what Progtuning's Table 3 counts, so
# that a run can be held against it: bottlenecks of 48 (a sixteenth of BERT-base's 768), no LayerNorm, and so nothing in
# E, and a backward pass that is cut. The table counts 16 epochs (MNLI, QNLI and QQP: 20), the example has 5: compare by
# the epoch, or give --epochs.
_ADAPTER = {
    **_BERT_GLUE,
    "lr": 3e-4,
    "epochs": 5,
    "adapter_size": 48,
    "adapter_layer_norms": False,
    "adapter_activation": "gelu_new",
    "adapter_init_std": 1e-3,
}
# Ben Zaken et al. 2022 (arXiv 2106.10199): benzakenelad/BitFit, the defaults of run_glue.py, and of glue_evaluator.py a
# constant rate, and transformers 4.2.1's AdamW as it comes: no decay, and this epsilon. (Progtuning names a linear
# decay for its ablations, and for BitFit says only that it keeps to the original.) Its Table 3 counts 8 epochs (MNLI,
# QNLI and QQP: 10), not these 16: compare by the epoch, or give --epochs.
_BITFIT = {
    "lr": 1e-3,
    "lr_schedule": "constant",
    "warmup": 0.0,
    "epochs": 16,
    "batch_size": 8,
    "max_length": 128,
    "weight_decay": 0.0,
    "adam_epsilon": 1e-6,
    **_PROGTUNING,
}
# Hu et al. 2021 (arXiv 2106.09685): microsoft/LoRA, examples/NLU/roberta_base_*.sh, which agree with the paper's Table
# 9 but for alpha (8 there). The batch of both, 16 or 32, is a GPU's, and the scripts start 8 GPUs, for CoLA 2 (the
# README beside them speaks of 4). Here it is what an optimizer step saw; --accumulation-steps makes it fit one GPU.
# Epochs are those that Progtuning's Table 3 counts. Theirs start MRPC, RTE and STS-B from the LoRA of MNLI; here every
# task starts afresh.
_LORA = {"lora_r": 8, "lora_alpha": 16.0, "max_length": 512, "warmup": 0.06, "weight_decay": 0.1, **_PROGTUNING}
_LORA_GLUE = {
    "mnli": {"lr": 5e-4, "epochs": 30, "batch_size": 8 * 16},
    "sst-2": {"lr": 5e-4, "epochs": 60, "batch_size": 8 * 16},
    "mrpc": {"lr": 4e-4, "epochs": 30, "batch_size": 8 * 16},
    "cola": {"lr": 4e-4, "epochs": 80, "batch_size": 2 * 32},
    "qnli": {"lr": 4e-4, "epochs": 25, "batch_size": 8 * 32},
    "qqp": {"lr": 5e-4, "epochs": 25, "batch_size": 8 * 16},
    "rte": {"lr": 5e-4, "epochs": 80, "batch_size": 8 * 32},
    "sts-b": {"lr": 4e-4, "epochs": 40, "batch_size": 8 * 16},
}
# Zhang et al. 2022 (arXiv 2211.01642): ZhangHaojie077/DPS, script/run_glue.sh, whose max_steps are 3 epochs; epsilon is
# the Trainer's, our default. script/run_trainer.py turns dropout off, but for dense in runs of 2,000 steps or more.
_DPS = {
    "lr": 2e-5,
    "epochs": 3,
    "batch_size": 16,
    "max_length": 128,
    "warmup": 0.1,
    "weight_decay": 0.01,
    "dps_p": 0.3,
    "dps_update_ratio": 0.05,
    **_PROGTUNING,
}
_DPS_DENSE_DROPS_OUT_FROM = 2000  # optimizer steps


def recipe(method: str, task: str, dps: str = "off", num_rows: int = 0, given: Mapping | None = None) -> dict:
    """Return what `--recipe paper` sets: the values that a method's authors trained with, by field of the settings.

    The keys are fields of TrainConfig and PeftConfig, `dps_` and a field of DPSConfig, and the two dropouts of
    BertConfig. `method` is one of PEFT_METHODS, `task` the name of a task, `dps` one of DPS_MODES. What trains is what
    the tables of Progtuning count. Dropout under DPS depends on the optimizer steps over `num_rows` training rows, with
    the epochs and batch size of `given` (fields of TrainConfig) before the recipe's. Raises InputError where the
    authors give no values; it says for what they do.
    """
    if dps != "off" and task not in _BERT_SQUAD:
        run = {**_DPS, **(given or {})}
        num_steps = run["epochs"] * ceil(num_rows / max(1, run["batch_size"]))
        dropout = 0.1 if dps == "dense" and num_steps >= _DPS_DENSE_DROPS_OUT_FROM else 0.0
        return {**_DPS, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if dps == "off" and method == "none":
        return dict(_BERT_SQUAD.get(task, _BERT_GLUE))
    if dps == "off" and method == "lora" and task in _LORA_GLUE:
        return {**_LORA, **_LORA_GLUE[task]}
    if dps == "off" and method in ("adapter", "bitfit") and task not in _BERT_SQUAD:
        return dict(_ADAPTER if method == "adapter" else _BITFIT)
    got = f"--peft {method}" if dps == "off" else f"--dps {dps}"
    raise InputError(
        "--recipe paper has values for --peft none on every task, for adapter, bitfit and --dps on all but SQuAD, "
        f"and for lora on {', '.join(_LORA_GLUE)}; it has none for {got} on {task}"
    )
