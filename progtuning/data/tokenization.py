"""Texts to token ids, by the `tokenizers` library, from the tokenizer files of a Hugging Face model folder.

`tokenizer_class` of tokenizer_config.json, else that of config.json, else the model's type says what is read:

    BERT's own class, or another name of it     the WordPiece vocabulary of tokenizer.json, else of vocab.txt, with
                                                do_lower_case, strip_accents and tokenize_chinese_chars
    RoBERTa's own class, or another name of it  the byte-level BPE of tokenizer.json, else of vocab.json and merges.txt,
                                                with add_prefix_space and trim_offsets
    any other class                             tokenizer.json alone, whole

Settings are those of tokenizer_config.json. Special and added tokens come from it, special_tokens_map.json,
added_tokens.json and tokenizer.json. Padding and truncation that tokenizer.json may carry are switched off.

Ids and token types equal those of transformers' AutoTokenizer (version 5.23) for the same folder. There a class of BERT
or RoBERTa keeps nothing of tokenizer.json but vocabulary and added tokens. So where tokenizer.json says something else
than the class does, and tokenizer_config.json does not decide it, the folder is refused.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from operator import itemgetter
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from progtuning.base.errors import InputError
from progtuning.base.files import read_json, replacing, write_json
from progtuning.data.tables import shorten
from progtuning.model.config import BertConfig

# Every file of a model folder from which transformers may build a tokenizer of these kinds.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
MAX_FILE_BYTES = 64 << 20  # several times the largest tokenizer.json of a published model

# What the library encodes at once: it takes some 500 bytes a token before a text is cut.
_BATCH_ROWS = 1000
_BATCH_CHARACTERS = 1 << 18
_MAX_GROWTH = 16  # times that a normalizer may make a text longer
# Of tokenizer_config.json, and what a part of a tokenizer.json calls it.
_SETTINGS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
    "add_prefix_space": "add_prefix_space",
    "trim_offsets": None,
    "split_special_tokens": None,
}
# Names of tokenizer_class, a final "Fast" left out, for which transformers builds BERT's or RoBERTa's own tokenizer.
_BERT_CLASSES = (
    *("BertTokenizer", "ConvBertTokenizer", "DistilBertTokenizer", "DPRContextEncoderTokenizer"),
    *("DPRQuestionEncoderTokenizer", "ElectraTokenizer", "LayoutLMTokenizer", "LxmertTokenizer"),
    *("MobileBertTokenizer", "SqueezeBertTokenizer"),
)
_ROBERTA_CLASSES = ("RobertaTokenizer", "BartTokenizer", "LEDTokenizer", "LongformerTokenizer", "MvpTokenizer")
# Those that cut words by a SentencePiece model, which a tokenizer.json holds.
_UNIGRAM_CLASSES = ("XLMRobertaTokenizer", "CamembertTokenizer")
# Names of classes that split words by rules of their own, written in Python, and read no tokenizer.json.
_PYTHON_CLASSES = (
    *("BertGenerationTokenizer", "BertJapaneseTokenizer", "BertweetTokenizer", "CanineTokenizer", "EsmTokenizer"),
    *("FlaubertTokenizer", "PhobertTokenizer", "ProphetNetTokenizer", "RoCBertTokenizer", "TapasTokenizer"),
    "XLMTokenizer",
)
_ANY_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")  # take any tokenizer.json as it is
# The library prints other flags on standard output.
_TOKEN_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BERT_SPECIAL = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_ROBERTA_SPECIAL = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """One text or pair, special tokens included: input_ids (S,) and token_type_ids (S,), both int32."""

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    num_cut: int = 0  # tokens left out


@dataclass(frozen=True)
class _Part:
    """A part of the template that makes a sequence of tokens: a special token, or all tokens of a text."""

    text: int | None  # 0: the text, 1: its pair, None: a special token
    id: int  # of the special token
    type_id: int


class Tokenizer:
    """A tokenizer and the files it came from. Build one with `load_tokenizer`.

    `backend` is the library's own tokenizer, without padding and truncation.

    Texts are cut here and not by the library, which keeps what it cuts off, and of a pair every combination of the
    rests: more than a gigabyte for two texts of 8,000 words and 128 tokens.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: BertConfig,
        source: Path,
        files: dict[str, bytes],
        settings: dict,
        class_name: str,
    ):
        self.backend = backend
        self.config = config
        self.source = source  # the file that errors name
        self.settings = settings  # tokenizer_config.json
        self.class_name = class_name  # as transformers calls it
        self._files = files
        self._has_types = config.type_vocab_size > 1 and _gives_types(settings, class_name)
        self._templates = {False: _template(backend, source, False), True: _template(backend, source, True)}
        self._check_ids()

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str | None] | None = None, *, max_length: int | None = None
    ) -> list[Encoding]:
        """Encode texts, or pairs of them, with special tokens, cut to `max_length` tokens (None: what the model takes).

        The longer text of a pair is cut first, down to the other's length, then both alike ("longest_first").
        Raises InputError where `max_length` is more than the model takes or leaves no room for text, and where the
        tokenizer's file is at fault; ValueError where `pairs` has another length than `texts`.
        """
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"pairs must be as many as texts, got {len(pairs)} and {len(texts)}")
        max_length = self.check_max_length(max_length, pairs=pairs is not None)
        encodings = []
        for rows in _batches(texts, pairs or [None] * len(texts)):
            with _library_errors(self.source):
                flat = [text for row in rows for text in row]
                found = iter(self.backend.encode_batch_fast(flat, add_special_tokens=False))
            encodings += [self._cut_and_join([next(found).ids for _ in row], max_length) for row in rows]
        return encodings

    def _cut_and_join(self, texts: list[list[int]], max_length: int) -> Encoding:
        kept = self._cut(texts, max_length)
        return replace(self.join(kept), num_cut=sum(map(len, texts)) - sum(map(len, kept)))

    def tokens(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return for each text alone, uncut and without special tokens, ids (N,) and offsets (N, 2), both int32.

        Offsets are the characters [start, end) of the text that a token stands for. Raises InputError where the
        tokenizer's file is at fault.
        """
        found = []
        for rows in _batches(texts, [None] * len(texts)):
            with _library_errors(self.source):
                encodings = self.backend.encode_batch([text for (text,) in rows], add_special_tokens=False)
            for encoding in encodings:
                offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
                found.append((np.array(encoding.ids, dtype=np.int32), offsets))
        return found

    def join(self, texts: Sequence[Sequence[int]]) -> Encoding:
        """Put the special tokens around the ids of one text, or around and between those of a pair."""
        template = self._templates[len(texts) == 2]
        pieces = [[part.id] if part.text is None else texts[part.text] for part in template]
        types = np.repeat([self._type_id(part) for part in template], [len(piece) for piece in pieces])
        return Encoding(np.concatenate(pieces).astype(np.int32), types.astype(np.int32))

    def check_max_length(self, max_length: int | None, pairs: bool = False) -> int:
        """Return `max_length`, or for None the most the model takes. Raises InputError where it is out of range."""
        if max_length is None:
            max_length = self.config.max_length
        low = len(self._templates[pairs])  # the special tokens, and one of each text
        if not low <= max_length <= self.config.max_length:
            raise InputError(
                f"--max-length must be in {low}..{self.config.max_length} for this model, got {max_length}"
            )
        return max_length

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into an existing model folder, each byte for byte as it was read.

        tokenizer_config.json alone is completed where it lacks the class. Raises RunError where the disk refuses.
        """
        for name, content in self._files.items():
            with replacing(Path(folder) / name) as temporary:
                temporary.write_bytes(content)
        if self.settings.get("tokenizer_class") != self.class_name:
            write_json(Path(folder) / "tokenizer_config.json", {**self.settings, "tokenizer_class": self.class_name})

    def digest(self) -> str:
        """Return the SHA-256, in hexadecimal, of the tokenizer's files."""
        digest = hashlib.sha256()
        for name, content in sorted(self._files.items()):
            digest.update(f"{name} {len(content)}\n".encode() + content)
        return digest.hexdigest()

    def _cut(self, texts: list[list[int]], max_length: int) -> list[list[int]]:
        """Cut the ids of one or two texts so that with the special tokens they are at most `max_length`."""
        room = max_length - (len(self._templates[len(texts) == 2]) - len(texts))
        kept = _longest_first([len(ids) for ids in texts], room)
        from_left = self.settings.get("truncation_side") == "left"
        return [ids[len(ids) - keep :] if from_left else ids[:keep] for ids, keep in zip(texts, kept)]

    def _type_id(self, part: _Part) -> int:
        return part.type_id if self._has_types else 0

    def _check_ids(self) -> None:
        """Hold that all ids and token types which the tokenizer can give are within the model's embeddings."""
        config, parts = self.config, [part for parts in self._templates.values() for part in parts]
        vocab = {**self.backend.get_vocab(), **{self.backend.id_to_token(part.id): part.id for part in parts}}
        vocab.pop("", None)  # a blank line of vocab.txt: no text gives it
        token, largest = max(vocab.items(), key=itemgetter(1))
        if largest >= config.vocab_size:
            raise InputError(
                f"{self.source}: got token id {largest} for {shorten(token)}, "
                f"expected less than the model's vocab_size {config.vocab_size}"
            )
        largest = max(map(self._type_id, parts))
        if largest >= max(1, config.type_vocab_size):  # a model without types is given zeros
            raise InputError(
                f"{self.source}: got token type {largest}, expected less than the model's {config.type_vocab_size}"
            )


def load_tokenizer(folder: str | Path, config: BertConfig) -> Tokenizer:
    """Read the tokenizer of a model folder. `config` is the model's, with which its ids must agree.

    Raises InputError that names the file: there is none for the tokenizer's class, it is not a tokenizer or not one of
    that class, it adds no special tokens, or it gives ids (or token types) for which the model has no embedding.
    """
    folder = Path(folder)
    files = _read_files(folder)
    settings = _read_settings(folder, files)
    class_name = _class_name(folder, settings, config)
    source = _source(folder, files, class_name)
    with _library_errors(source):
        if source.name == "tokenizer.json":
            backend, side = _from_json(source, files, settings, class_name, config.vocab_size)
            settings = {"truncation_side": side, **settings} if side else settings
        else:
            backend = _own_class(source, settings, class_name, config.vocab_size)
        backend.encode_special_tokens = settings.get("split_special_tokens", False)
    return Tokenizer(backend, config, source, files, settings, class_name)


def _read_files(folder: Path) -> dict[str, bytes]:
    files = {}
    for path in (folder / name for name in TOKENIZER_FILES):
        if not path.exists():
            continue
        if not path.is_file():
            raise InputError(f"{path}: not a file")
        try:
            with open(path, "rb") as file:
                files[path.name] = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
        if len(files[path.name]) > MAX_FILE_BYTES:
            raise InputError(f"{path}: got more than {MAX_FILE_BYTES} bytes, expected a tokenizer's file")
    return files


def _read_settings(folder: Path, files: dict[str, bytes]) -> dict:
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.name in files else {}
    if not isinstance(settings, dict):
        raise InputError(f"{path}: got {shorten(settings)}, expected a JSON object")
    for key in _SETTINGS:
        allowed = (True, False, None) if key == "strip_accents" else (True, False)
        if not any(settings.get(key, True) is value for value in allowed):
            raise InputError(f"{path}: got {shorten(settings[key])} for {key}, expected true or false")
    if settings.get("truncation_side", "right") not in ("right", "left"):
        raise InputError(
            f"{path}: got {shorten(settings['truncation_side'])} for truncation_side, expected right or left"
        )
    names = settings.get("model_input_names", [])
    if not isinstance(names, list):
        raise InputError(f"{path}: got {shorten(names)} for model_input_names, expected a list of names")
    return settings


def _class_name(folder: Path, settings: dict, config: BertConfig) -> str:
    """Return the name of transformers' class: what a file says, or the one for the model's type."""
    name, path = settings.get("tokenizer_class"), folder / "tokenizer_config.json"
    if name is None and (path := folder / "config.json").exists():
        values = read_json(path)
        name = values.get("tokenizer_class") if isinstance(values, dict) else None
    if name is None:
        return config.family.tokenizer_class
    if not isinstance(name, str) or not name:
        raise InputError(f"{path}: got {shorten(name)} for tokenizer_class, expected a name")
    if name.removesuffix("Fast") in _PYTHON_CLASSES:
        raise InputError(
            f"{path}: got tokenizer_class {name}, whose rules are Python code of transformers; "
            "expected one whose tokenizer a tokenizer.json holds"
        )
    return name


def _is_class(name: str, own: Sequence[str]) -> bool:
    return name.removesuffix("Fast") in own


def _gives_types(settings: dict, class_name: str) -> bool:
    """Say whether transformers gives a model token types; without them all are 0."""
    if "model_input_names" in settings:
        return "token_type_ids" in settings["model_input_names"]
    return _is_class(class_name, _BERT_CLASSES) and not _is_class(class_name, ("DistilBertTokenizer",))


def _source(folder: Path, files: dict[str, bytes], class_name: str) -> Path:
    """Return the file with the vocabulary."""
    needed = ()
    if _is_class(class_name, _BERT_CLASSES):
        needed = ("vocab.txt",)
    elif _is_class(class_name, _ROBERTA_CLASSES):
        needed = ("vocab.json", "merges.txt")
    if "tokenizer.json" in files:
        return folder / "tokenizer.json"
    if needed and files.keys() >= {*needed}:
        return folder / needed[0]
    expected = " or ".join(["tokenizer.json", *([" and ".join(needed)] if needed else [])])
    raise InputError(f"{folder}: got no tokenizer for tokenizer_class {class_name}, expected {expected}")


def _from_json(
    source: Path, files: dict[str, bytes], settings: dict, class_name: str, vocab_size: int
) -> tuple[tokenizers.Tokenizer, str | None]:
    """Return the tokenizer of a tokenizer.json, and the side on which it says that texts are cut."""
    file = tokenizers.Tokenizer.from_str(files[source.name].decode("utf-8"))
    side, pad = file.truncation and file.truncation["direction"], file.padding and file.padding["pad_token"]
    file.no_padding()
    file.no_truncation()
    _check_growth(file, source)
    if _is_class(class_name, (*_BERT_CLASSES, *_ROBERTA_CLASSES)):
        return _own_class(source, settings, class_name, vocab_size, file), side
    if _is_class(class_name, _UNIGRAM_CLASSES):
        _check_unigram(file, settings, source, class_name)
    if not _is_class(class_name, _ANY_CLASSES):
        _check_settings(file, settings, source, class_name)
    _add_tokens(file, _read_tokens(source, settings, {"pad_token": pad}, file), vocab_size)
    return file, side


def _check_unigram(file: tokenizers.Tokenizer, settings: dict, source: Path, class_name: str) -> None:
    """Raise InputError where a tokenizer.json has another model or other parts than the class builds."""
    if not isinstance(file.model, models.Unigram) or _state(file.model).get("byte_fallback"):
        raise _unlike(source, "another model", class_name)
    backend = tokenizers.Tokenizer(models.Unigram())
    prepend = "always" if settings.get("add_prefix_space", True) else "never"
    metaspace = pre_tokenizers.Metaspace("\u2581", prepend_scheme=prepend)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    if _state(file.pre_tokenizer) != _state(backend.pre_tokenizer):
        raise _unlike(source, f"the pre_tokenizer {_state(file.pre_tokenizer).get('type')}", class_name)
    if _state(file.normalizer).get("type", "Precompiled") != "Precompiled":
        raise _unlike(source, f"the normalizer {_state(file.normalizer)['type']}", class_name)
    cls, sep = ((token, file.token_to_id(token) or 0) for token in ("<s>", "</s>"))
    pair = [cls[0], "$A", sep[0], sep[0], "$B", sep[0]]
    backend.post_processor = processors.TemplateProcessing([cls[0], "$A", sep[0]], pair, [cls, sep])
    for pairs in (False, True):
        got, expected = (_around(_template(one, source, pairs), has_types=False) for one in (file, backend))
        if got != expected:
            raise _unlike(source, "other special tokens around a text", class_name)


def _check_settings(file: tokenizers.Tokenizer, settings: dict, source: Path, class_name: str) -> None:
    """Raise InputError where tokenizer_config.json contradicts tokenizer.json: which one wins is the class's affair."""
    for state in (_state(file.normalizer), _state(file.pre_tokenizer)):
        for key, name in _SETTINGS.items():
            if name in state and key in settings and state[name] != settings[key]:
                raise InputError(
                    f"{source}: got {name} {json.dumps(state[name])}, expected {json.dumps(settings[key])} as "
                    f"tokenizer_config.json has it for {key} of tokenizer_class {class_name}"
                )


def _own_class(
    source: Path, settings: dict, class_name: str, vocab_size: int, file: tokenizers.Tokenizer | None = None
) -> tokenizers.Tokenizer:
    """Build BERT's or RoBERTa's own tokenizer, on the vocabulary of `file`, a tokenizer.json, or of `source`."""
    is_bert = _is_class(class_name, _BERT_CLASSES)
    tokens = _read_tokens(source, settings, _BERT_SPECIAL if is_bert else _ROBERTA_SPECIAL, file)
    model = file.model if file else _wordpiece(source) if is_bert else _byte_level_bpe(source)
    _check_model(model, source, class_name)
    backend = tokenizers.Tokenizer(model)
    unk, cls, sep = (_known(backend, tokens, role, source) for role in ("unk_token", "cls_token", "sep_token"))
    model.unk_token = unk if is_bert else None
    _add_tokens(backend, tokens, vocab_size)
    around = [(token, backend.token_to_id(token)) for token in (cls, sep)]
    (_set_bert_parts if is_bert else _set_roberta_parts)(backend, settings, *around)
    if file:
        _check_parts(file, backend, settings, source, class_name)
    return backend


def _known(backend: tokenizers.Tokenizer, tokens: "_Tokens", role: str, source: Path) -> str:
    """Return the token of a role without which no text is encoded."""
    token = _content(tokens.named[role])
    if not isinstance(token, str) or (backend.token_to_id(token) is None and token not in tokens.contents):
        raise InputError(
            f"{source}: got no token {shorten(token)}, expected it among the {backend.get_vocab_size()} of the file"
        )
    return token


def _wordpiece(source: Path) -> models.WordPiece:
    return models.WordPiece(models.WordPiece.read_file(str(source)))


def _byte_level_bpe(source: Path) -> models.BPE:
    return models.BPE.from_file(str(source), str(source.with_name("merges.txt")))


def _set_bert_parts(backend: tokenizers.Tokenizer, settings: dict, cls: tuple[str, int], sep: tuple[str, int]) -> None:
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    single = [cls[0], "$A", sep[0]]
    backend.post_processor = processors.TemplateProcessing(single, [*single, "$B:1", f"{sep[0]}:1"], [cls, sep])


def _set_roberta_parts(
    backend: tokenizers.Tokenizer, settings: dict, cls: tuple[str, int], sep: tuple[str, int]
) -> None:
    add_prefix_space = settings.get("add_prefix_space", False)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(
        sep, cls, settings.get("trim_offsets", True), add_prefix_space
    )


def _check_model(model: models.Model, source: Path, class_name: str) -> None:
    """Raise InputError where a tokenizer.json has another model than the class builds."""
    if _is_class(class_name, _BERT_CLASSES):
        fits = isinstance(model, models.WordPiece) and model.continuing_subword_prefix == "##"
        fits = fits and model.max_input_chars_per_word == 100
    else:
        fits = isinstance(model, models.BPE) and not (model.continuing_subword_prefix or model.end_of_word_suffix)
        fits = fits and not (model.dropout or model.byte_fallback or model.ignore_merges)
    if not fits:
        raise _unlike(source, "another model", class_name)


def _check_parts(
    file: tokenizers.Tokenizer, backend: tokenizers.Tokenizer, settings: dict, source: Path, class_name: str
) -> None:
    """Raise InputError where tokenizer.json says something else than the class does, and the settings do not decide."""
    said = {name for key, name in _SETTINGS.items() if key in settings}
    for part in ("normalizer", "pre_tokenizer"):
        got, expected = _state(getattr(file, part)), _state(getattr(backend, part))
        if got.get("type") != expected.get("type"):
            raise _unlike(source, f"the {part} {got.get('type')}", class_name)
        for name in got.keys() - {"trim_offsets"} - said:  # a pre-tokenizer's trim_offsets changes nothing
            if got[name] != expected[name] and _effect(got, name) != _effect(expected, name):
                key = next((key for key, other in _SETTINGS.items() if other == name), None)
                value = json.dumps(got[name])
                if key is None:
                    raise _unlike(source, f"{name} {value}", class_name)
                raise InputError(
                    f"{source}: got {name} {value}, expected {key} in tokenizer_config.json too: without it "
                    f"{class_name} takes {json.dumps(expected[name])}"
                )
    if file.post_processor is not None:
        has_types = _gives_types(settings, class_name)
        for pair in (False, True):
            got, expected = (_around(_template(tokenizer, source, pair), has_types) for tokenizer in (file, backend))
            if got != expected:
                raise _unlike(source, "other special tokens around a text", class_name)


def _state(part) -> dict:
    """Return what tokenizer.json has for a normalizer or a pre-tokenizer."""
    return {} if part is None else json.loads(part.__getstate__())


def _effect(state: dict, name: str):
    """Return the value of a setting; accents are stripped with lower-casing where nothing is said of them."""
    return state["lowercase"] if name == "strip_accents" and state[name] is None else state[name]


def _around(template: Sequence[_Part], has_types: bool) -> list[tuple]:
    return [(part.text, part.text is None and part.id, has_types and part.type_id) for part in template]


def _unlike(source: Path, what: str, class_name: str) -> InputError:
    return InputError(
        f"{source}: got {what} for tokenizer_class {class_name}, which has its own; expected in tokenizer_config.json "
        "the tokenizer_class PreTrainedTokenizerFast, which takes the file as it is"
    )


def _check_growth(backend: tokenizers.Tokenizer, source: Path) -> None:
    """Raise InputError where replacements, one after the other, may make a text so long that it fills the memory."""
    growth, nodes = 1, [json.loads(backend.normalizer.__getstate__())] if backend.normalizer else []
    while nodes and growth <= _MAX_GROWTH:
        node = nodes.pop()
        nodes += node.get("normalizers", ())
        content, replaced = node.get("content", ""), node.get("pattern", {}).get("String", "")
        if node["type"] == "Prepend":
            growth += len(node["prepend"])
        elif len(content) > len(replaced):
            growth *= -(-len(content) // len(replaced)) if replaced else 1 + len(content)  # "": perhaps at every place
    if growth > _MAX_GROWTH:
        raise InputError(f"{source}: its normalizer may make a text {_MAX_GROWTH} times longer and more, expected less")


@dataclass(frozen=True)
class _Tokens:
    """The tokens that are found whole in a text, as the files beside the vocabulary have them."""

    named: dict[str, AddedToken | str]  # by role, cls_token for one; then those of roles that the library does not know
    placed: list[AddedToken]  # to which a file gives an id, in the order of the ids
    extra: list[AddedToken | str]

    @property
    def contents(self) -> list[str]:
        return [token.content for token in self.placed]


def _read_tokens(
    source: Path, settings: dict, defaults: dict[str, str], file: tokenizers.Tokenizer | None = None
) -> _Tokens:
    """Read them in transformers' order of precedence: added_tokens_decoder of tokenizer_config.json replaces
    special_tokens_map.json, added_tokens.json and those of a tokenizer.json."""
    stated = {key: _token(value) for key, value in settings.items()}
    if not stated.get("extra_special_tokens") and "additional_special_tokens" in stated:
        stated["extra_special_tokens"] = stated.pop("additional_special_tokens")
    if "added_tokens_decoder" in settings:
        placed = {int(index): _token(token) for index, token in settings["added_tokens_decoder"].items()}
    else:
        stated = _with_map(source.with_name("special_tokens_map.json"), stated)
        special = {*(_content(stated.get(role)) for role in _ROLES), *map(_content, _listed(stated))}
        placed = {
            index: AddedToken(content, normalized=content not in special, special=content in special)
            for content, index in _read_object(source.with_name("added_tokens.json")).items()
        }
        placed |= file.get_added_tokens_decoder() if file else {}
    if "extra_special_tokens" not in stated and "additional_special_tokens" in stated:
        stated["extra_special_tokens"] = stated["additional_special_tokens"]
    by_content = {token.content: token for token in placed.values()}
    named = {role: stated.get(role, defaults.get(role)) for role in _ROLES}
    named = {role: by_content.get(_content(token), token) for role, token in named.items()}
    others = {key: value for key, value in stated.items() if key.endswith("_token") and key not in _ROLES}
    if isinstance(stated.get("extra_special_tokens"), dict):
        others |= stated["extra_special_tokens"]
    named |= {key: value for key, value in others.items() if isinstance(value, (str, AddedToken))}
    return _Tokens(named, [placed[index] for index in sorted(placed)], _listed(stated))


def _with_map(path: Path, stated: dict) -> dict:
    """Return what tokenizer_config.json states with what special_tokens_map.json does, which wins."""
    for key, value in _read_object(path).items():
        value = _token(value, special=True)
        if key == "extra_special_tokens" and isinstance(value, list):
            value = [*_listed(stated), *(token for token in value if token not in _listed(stated))]
        stated = {**stated, key: value}
    return stated


def _read_object(path: Path) -> dict:
    values = read_json(path) if path.exists() else {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: got {shorten(values)}, expected a JSON object")
    return values


def _token(value, **flags):
    """Return the tokens in a value of JSON: an object that has a token's content, and those in a list of them."""
    if isinstance(value, list):
        return [_token(item, **flags) for item in value]
    if not isinstance(value, dict) or "content" not in value:
        return value
    return AddedToken(**{**{key: value[key] for key in _TOKEN_FLAGS if key in value}, **flags})


def _content(token):
    return token.content if isinstance(token, AddedToken) else token


def _listed(stated: dict) -> list:
    tokens = stated.get("extra_special_tokens")
    return tokens if isinstance(tokens, list) else []


def _add_tokens(backend: tokenizers.Tokenizer, tokens: _Tokens, vocab_size: int) -> None:
    """Let the tokens be found whole in a text. Each has its id of the vocabulary, or one after the last.

    A named token that no file places, the usual [MASK] for one, is left out where the model has no embedding for it.
    """
    known = {*(token.content for token in backend.get_added_tokens_decoder().values()), *tokens.contents}
    new, named = list(tokens.placed), {_content(token) for token in tokens.named.values()}
    for token in [*tokens.named.values(), *tokens.extra]:
        if token is None or _content(token) in known or token in new:
            continue
        if _content(token) in named and _content(token) not in tokens.extra:
            unknown = {item for item in map(_content, [*new, token]) if backend.token_to_id(item) is None}
            if _content(token) in unknown and backend.get_vocab_size() + len(unknown) > vocab_size:
                continue
        new.append(token)
    new = [AddedToken(token, special=True) if isinstance(token, str) else token for token in new]
    for token in new:
        token.special = token.special or token.content in named
    backend.add_tokens(new)


def _template(backend: tokenizers.Tokenizer, source: Path, pair: bool) -> tuple[_Part, ...]:
    """Return the parts that the tokenizer puts together for one text or a pair, read off an example."""
    with _library_errors(source):
        sample = _example(backend)
        example = backend.encode(sample, sample if pair else None)
    parts = []
    for text, token, type_id in zip(example.sequence_ids, example.ids, example.type_ids):
        if text is None or not parts or text != parts[-1].text:
            parts.append(_Part(text, token, type_id))
    texts = [part.text for part in parts if part.text is not None]
    if sorted(texts) != [0, 1][: 1 + pair] or len(parts) == len(texts):
        kind = "pair" if pair else "text"
        raise InputError(
            f"{source}: got {example.tokens} for a {kind} of {sample!r}, expected special tokens around each text"
        )
    return tuple(parts)


def _example(backend: tokenizers.Tokenizer) -> str:
    """Return a text that has tokens: "a", or the first token of the vocabulary that has, as where there is no Latin."""
    texts = chain(["a"], (token for token, _ in sorted(backend.get_vocab().items(), key=itemgetter(1))))
    return next((text for text in texts if backend.encode(text, add_special_tokens=False).ids), "a")


def _batches(texts: Sequence[str], pairs: Sequence[str | None]) -> Iterator[list[tuple[str, ...]]]:
    batch, characters = [], 0
    for text, pair in zip(texts, pairs):
        row = (text,) if pair is None else (text, pair)
        length = sum(map(len, row))
        if batch and (len(batch) == _BATCH_ROWS or characters + length > _BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(row)
        characters += length
    if batch:
        yield batch


def _longest_first(lengths: list[int], room: int) -> list[int]:
    """Return how many tokens to keep of each of one or two texts, together at most `room`."""
    if sum(lengths) <= room:
        return lengths
    if len(lengths) == 1:
        return [room]
    short = min(*lengths, room // 2)
    return [short, room - short] if lengths[0] <= lengths[1] else [room - short, short]


@contextmanager
def _library_errors(source: Path) -> Iterator[None]:
    """Turn whatever a tokenizer's files make the library, or the reading of them, raise into one line with the file."""
    try:
        with _quiet():
            yield
    except (InputError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library's panics are no Exception
        raise InputError(f"{source}: not a usable tokenizer: {shorten(' '.join(str(error).split()), 160)}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard what is written to descriptor 2: a panic of the library prints its stack there before it is raised."""
    try:
        saved = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
