"""The architecture of a model and its head: `BertConfig`, from a Hugging Face config.json.

A small frozen dataclass that checks itself; what it does not know, it refuses. The reader of config.json sorts its
keys in three: those that are the architecture, those that cannot change what the encoder computes (tokens, generation,
book-keeping), and those that would change it unless they have one value. Keys that other libraries add are passed over,
and named for the caller to say so (`passed_over`). Any other key is an error: a key that is passed over in silence may
be a different model.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from progtuning.base.checks import check_choice, check_number
from progtuning.base.errors import InputError
from progtuning.base.files import read_json

ACTIVATIONS = ("gelu", "gelu_new", "relu")

# Other names of these functions: they differ in how they are computed, by rounding alone.
_SAME_ACTIVATION = {
    "gelu_python": "gelu",
    **dict.fromkeys(("gelu_accurate", "gelu_fast", "gelu_python_tanh", "gelu_pytorch_tanh"), "gelu_new"),
}


@dataclass(frozen=True)
class Head:
    """What a head is, beside its layers and loss in `model.heads`; what transformers and peft call it."""

    architecture: str  # the end of the class's name, for config.json
    peft_task: str  # the task_type of adapter_config.json
    layer: str = "classifier"  # the module with the last linear layer
    num_outputs: int | None = None  # None: one for each class
    per_token: bool = False  # outputs for each token (B, S, C), else for each sequence (B, C)
    problem_type: str | None = None  # of config.json, for what shares an architecture
    has_several: bool = False  # a sequence has any number of the classes, else one

    @property
    def has_labels(self) -> bool:
        """Whether the outputs are classes, which have names."""
        return self.num_outputs is None


@dataclass(frozen=True)
class Family:
    """What tells a family of encoders from another whose blocks are BERT's; what transformers calls it."""

    class_prefix: str  # begins the names of its classes, for config.json
    prefix: str  # of its tensors' names in a file, before embeddings, encoder and pooler
    pad_token_id: int = 1  # where config.json names none
    pads_positions: bool = True  # positions count from the padding's id + 1, else from 0
    has_pooler: bool = False  # its head for sequences begins with a pooler, else it brings a dense layer of its own
    tokenizer_class: str = "RobertaTokenizer"  # where no file names one
    head_act: str = "tanh"  # after that dense layer
    # Where dropout stands: before that dense layer as well as after it; between attention and its residual sum.
    drops_out_head_input: bool = True
    drops_out_attention: bool = True
    config_keys: Mapping[str, str] = field(default_factory=dict)  # what config.json calls a field of `BertConfig`
    tensor_names: Mapping[str, str] = field(default_factory=dict)  # what a file calls a module of `bert.Model`
    # Fields that config.json lacks, with the value by which the encoder computes; those that it need not name.
    fixed: Mapping[str, object] = field(default_factory=lambda: {"embedding_size": None, "qa_dropout": 0.0})
    defaults: Mapping[str, object] = field(default_factory=dict)

    def key_of(self, name: str) -> str:
        """Return the key that a field of `BertConfig` has in config.json."""
        return self.config_keys.get(name, name)


_DISTILBERT_KEYS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "seq_classif_dropout",
}
_DISTILBERT_NAMES = {
    "encoder": "transformer",
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
    "classifier.dense": "pre_classifier",
    "classifier.out_proj": "classifier",
}
FAMILIES = {  # by model_type
    "bert": Family("Bert", "bert", 0, pads_positions=False, has_pooler=True, tokenizer_class="BertTokenizer"),
    "roberta": Family("Roberta", "roberta"),
    "xlm-roberta": Family("XLMRoberta", "roberta", tokenizer_class="XLMRobertaTokenizer"),
    "camembert": Family("Camembert", "roberta", tokenizer_class="CamembertTokenizer"),
    "distilbert": Family(
        "DistilBert",
        "distilbert",
        0,
        pads_positions=False,
        tokenizer_class="DistilBertTokenizer",
        head_act="relu",
        drops_out_head_input=False,
        drops_out_attention=False,
        config_keys=_DISTILBERT_KEYS,
        tensor_names=_DISTILBERT_NAMES,
        fixed={"embedding_size": None, "type_vocab_size": 0, "layer_norm_eps": 1e-12},
        defaults={"classifier_dropout": 0.2, "qa_dropout": 0.1},
    ),
    "electra": Family(
        "Electra",
        "electra",
        0,
        pads_positions=False,
        tokenizer_class="ElectraTokenizer",
        head_act="gelu",
        tensor_names={"embeddings.project": "embeddings_project"},
        fixed={"qa_dropout": 0.0},
        defaults={"embedding_size": 128},
    ),
}

_SEQUENCE = ("ForSequenceClassification", "SEQ_CLS")
HEADS = {
    "classification": Head(*_SEQUENCE, problem_type="single_label_classification"),
    "regression": Head(*_SEQUENCE, num_outputs=1, problem_type="regression"),
    "multi-label": Head(*_SEQUENCE, problem_type="multi_label_classification", has_several=True),
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
    return_dict sep_token_id sinusoidal_pos_embds summary_activation summary_last_dropout summary_type summary_use_proj
    task_specific_params tf_legacy_loss tie_weights_ tie_word_embeddings tokenizer_class torch_dtype torchscript
    transformers_version unk_token_id use_bfloat16 use_cache

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
    """The architecture of an encoder of BERT's family and its head, in the names of Hugging Face's config.json of BERT.

    `head` is one of HEADS, or None for an encoder whose file names no head. `labels` are the class names in order; a
    regression head has one, and a question-answering head none. Raises InputError where a value is out of range, or is
    one that the family does not have.
    """

    vocab_size: int
    hidden_size: int  # D
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    intermediate_size: int  # F
    max_position_embeddings: int
    model_type: str = "bert"  # one of FAMILIES
    type_vocab_size: int = 2  # 0: no embeddings of token types
    embedding_size: int | None = None  # of the tables of E; None: that of the family, else hidden_size
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: that of the family, else hidden_dropout_prob
    qa_dropout: float | None = None  # before the layer of question answering; None: that of the family
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = None  # None: that of the family
    head: str | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self):
        check_choice("model_type", self.model_type, FAMILIES)
        for name, value in ({"pad_token_id": self.family.pad_token_id} | self.family.defaults).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, value in self.family.fixed.items():
            if getattr(self, name) not in (value, getattr(BertConfig, name)):
                raise InputError(f"{name} must be {value} for {self.model_type}, got {getattr(self, name)!r}")
            object.__setattr__(self, name, value)
        named = self.family.key_of  # errors are for who reads the file
        for name in (*_REQUIRED, "type_vocab_size", "embedding_size"):
            if name not in self.family.fixed:
                high = 1000 if name == "num_hidden_layers" else 2**24
                check_number(named(name), getattr(self, name), int, low=1, high=high)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "qa_dropout"):
            if name != "classifier_dropout" or self.classifier_dropout is not None:
                check_number(named(name), getattr(self, name), float, low=0, high=1)
        check_number("initializer_range", self.initializer_range, float, low=0)
        check_number("layer_norm_eps", self.layer_norm_eps, float, low=0)
        check_number("pad_token_id", self.pad_token_id, int, low=0, high=self.vocab_size - 1)
        if self.hidden_size % self.num_attention_heads:
            divided, got = named("hidden_size"), f"{self.hidden_size} and {self.num_attention_heads}"
            raise InputError(f"{divided} must be divisible by {named('num_attention_heads')}, got {got}")
        check_choice(named("hidden_act"), self.hidden_act, ACTIVATIONS)
        if self.head is not None:
            check_choice("head", self.head, HEADS)
        if self.max_length < 1:
            least = f"pad_token_id + 1 for {self.model_type}"
            raise InputError(f"max_position_embeddings must exceed {least}, got {self.max_position_embeddings}")
        if len(set(self.labels)) != len(self.labels) or (self.has_labels and len(self.labels) < 2):
            raise InputError(f"labels must be two or more distinct names, got {list(self.labels)}")

    @property
    def family(self) -> Family:
        """The row of FAMILIES."""
        return FAMILIES[self.model_type]

    @property
    def embedding_width(self) -> int:
        """Columns of the tables of E. Where they are not D, as of a small ELECTRA, E ends with a projection to D."""
        return self.embedding_size or self.hidden_size

    @property
    def first_position(self) -> int:
        """The position of the first token: 0, and of RoBERTa and its kin pad_token_id + 1."""
        return self.pad_token_id + 1 if self.family.pads_positions else 0

    @property
    def max_length(self) -> int:
        """The longest sequence in tokens."""
        return self.max_position_embeddings - self.first_position

    @property
    def attention_dropout_prob(self) -> float:
        """Dropout of attention's output, before the residual sum."""
        return self.hidden_dropout_prob if self.family.drops_out_attention else 0.0

    @property
    def head_dropout_prob(self) -> float:
        """Dropout within the head."""
        if self.head is not None and HEADS[self.head].per_token:
            return self.qa_dropout
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

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
        return self.family.has_pooler and self.head is not None and not HEADS[self.head].per_token

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
        family = FAMILIES[values["model_type"]]
        for key in map(family.key_of, _REQUIRED):
            if key not in values:
                raise InputError(f"key {key!r} is missing")
        for key, supported in _SUPPORTED_VALUE.items():
            if values.pop(key, supported) not in (supported, None):
                raise InputError(f"key {key!r} changes what the model computes and is supported only as {supported!r}")
        head, labels = read_head(values) if keep_head else (None, cls.labels)
        known = {family.key_of(name): name for name in _names_of_fields(family)}
        unknown = sorted(set(values) - set(known) - _WITHOUT_EFFECT - set(_HEAD_KEYS) - set(passed_over(values)))
        if unknown:
            raise InputError(f"key {unknown[0]!r} is unknown: remove it if it does not change what the model computes")
        values = {known[key]: value for key, value in values.items() if key in known}
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
        values = {self.family.key_of(name): getattr(self, name) for name in _names_of_fields(self.family)}
        head = None if self.head is None else HEADS[self.head]
        suffix = "Model" if head is None else head.architecture
        values["architectures"] = [self.family.class_prefix + suffix]
        if head and head.problem_type:
            values["problem_type"] = head.problem_type
        if head and (head.problem_type or head.has_labels):
            values["id2label"] = {str(i): label for i, label in enumerate(self.labels)}
            values["label2id"] = {label: i for i, label in enumerate(self.labels)}
        return values


def _names_of_fields(family: Family) -> list[str]:
    """Return the fields of `BertConfig` that a config.json of the family has, but for the head."""
    return [field.name for field in fields(BertConfig) if field.name not in {"head", "labels", *family.fixed}]


def _architecture(values: Mapping) -> str:
    names = values.get("architectures") or [""]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise InputError(f"key 'architectures' must be a list of names, got {names!r}")
    return names[0]


def _model_type(values: Mapping) -> str:
    """Return the family of a config.json: what it says, or where it says nothing what its architecture or keys are."""
    if values.get("model_type") is not None:
        check_choice("model_type", values["model_type"], FAMILIES)
        return values["model_type"]
    architecture, prefixes = _architecture(values), {family.class_prefix: name for name, family in FAMILIES.items()}
    if match := re.fullmatch(rf"({'|'.join(prefixes)})(Model|LMHeadModel|For[A-Z]\w*)", architecture):
        return prefixes[match[1]]
    if architecture:
        expected = f"a {' or '.join(prefixes)} model where model_type is missing"
        raise InputError(f"architectures must name {expected}, got {architecture!r}")
    if found := sorted(set(values) & set(_OF_OTHER_FAMILIES)):
        family = _OF_OTHER_FAMILIES[found[0]]
        raise InputError(
            f"key 'model_type' must be one of {', '.join(FAMILIES)}, got none and {found[0]!r}, a key of {family}"
        )
    for key, of_bert in _OF_FIRST_BERT.items():
        if values.get(key) not in (None, of_bert):
            got = f"none, and {key} {values[key]!r} where BERT has {of_bert}"
            raise InputError(f"key 'model_type' must be one of {', '.join(FAMILIES)}, got {got}")
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
    heads = {head.problem_type: name for name, head in HEADS.items() if head.problem_type}
    if problem not in (None, *heads):
        raise InputError(f"problem_type {problem!r} is not supported, expected {', '.join(heads)} or none")
    if problem is not None and (problem == "regression") != (len(labels) == 1):
        expected = "one output" if problem == "regression" else "two or more classes"
        raise InputError(f"problem_type {problem!r} is supported with {expected}, got {len(labels)}")
    return heads.get(problem, sequence_head(len(labels))), labels


def sequence_head(num_outputs: int, of_base: str | None = None) -> str:
    """Return the head with so many outputs for a sequence: for transformers a single one is regression, and several are
    classes of which a sequence has one, unless the head `of_base` says that it has any number."""
    if num_outputs == 1:
        return "regression"
    return of_base if of_base is not None and HEADS[of_base].has_several else "classification"


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
_DISTILBERT_BASE = BertConfig(30522, 768, 6, 12, 3072, 512, "distilbert")
_ROBERTA = {"model_type": "roberta", "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_XLM_ROBERTA = _ROBERTA | {"model_type": "xlm-roberta"}
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
    "distilbert-base-uncased": _DISTILBERT_BASE,
    "distilbert-base-cased": replace(_DISTILBERT_BASE, vocab_size=28996),
    "distilbert-base-multilingual-cased": replace(_DISTILBERT_BASE, vocab_size=119547),
    "google/electra-small-discriminator": BertConfig(30522, 256, 12, 4, 1024, 512, "electra"),
    "google/electra-base-discriminator": BertConfig(30522, 768, 12, 12, 3072, 512, "electra", embedding_size=768),
    "google/electra-large-discriminator": BertConfig(30522, 1024, 24, 16, 4096, 512, "electra", embedding_size=1024),
    "xlm-roberta-base": BertConfig(250002, 768, 12, 12, 3072, 514, **_XLM_ROBERTA),
    "xlm-roberta-large": BertConfig(250002, 1024, 24, 16, 4096, 514, **_XLM_ROBERTA),
    "camembert-base": BertConfig(32005, 768, 12, 12, 3072, 514, **_ROBERTA | {"model_type": "camembert"}),
    "minilm-l6": BertConfig(30522, 384, 6, 12, 1536, 512),
}


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
