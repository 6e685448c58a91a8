"""Texts to token ids, by the `tokenizers` library, from the tokenizer files of a Hugging Face model folder.

The first of these that the folder has is read:

    tokenizer.json           all of it; the padding and truncation that it may carry are switched off
    vocab.txt                BERT's WordPiece, with do_lower_case, strip_accents and tokenize_chinese_chars of
                             tokenizer_config.json
    vocab.json, merges.txt   RoBERTa's byte-level BPE, with add_prefix_space of tokenizer_config.json

Ids equal those of transformers' AutoTokenizer for the same folder. As there, tokenizer_config.json wins where it has
one of these four settings and tokenizer.json says otherwise (unless its tokenizer_class takes tokenizer.json as it is).
Unlike there, a setting that tokenizer_config.json lacks is what tokenizer.json says, and not transformers' default.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from progtuning.config import BertConfig
from progtuning.data.text import shorten
from progtuning.errors import InputError
from progtuning.files import read_json, replacing, write_json

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
_SETTINGS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars", "add_prefix_space")
# The library prints other flags on standard output.
_TOKEN_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized")
_BERT_SPECIAL = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_ROBERTA_SPECIAL = {
    "bos": "<s>",
    "eos": "</s>",
    "unk": "<unk>",
    "sep": "</s>",
    "pad": "<pad>",
    "cls": "<s>",
    "mask": "<mask>",
}


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """One text or pair, special tokens included: input_ids (S,) and token_type_ids (S,), both int32."""

    input_ids: np.ndarray
    token_type_ids: np.ndarray


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
        self, backend: tokenizers.Tokenizer, config: BertConfig, source: Path, files: dict[str, bytes], settings: dict
    ):
        self.backend = backend
        self.config = config
        self.source = source  # the file that errors name
        self.settings = settings  # tokenizer_config.json
        self._files = files
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
            encodings += [self.join(self._cut([next(found).ids for _ in row], max_length)) for row in rows]
        return encodings

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

        tokenizer_config.json alone is completed where it lacks a setting or the class, for which transformers would
        take a default of its own. Raises RunError where the disk refuses.
        """
        for name, content in self._files.items():
            with replacing(Path(folder) / name) as temporary:
                temporary.write_bytes(content)
        missing = {key: value for key, value in self._implied_settings().items() if key not in self.settings}
        if missing:
            write_json(Path(folder) / "tokenizer_config.json", {**self.settings, **missing})

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
        one_type = self.config.model_type == "roberta" or self.config.type_vocab_size == 1
        return 0 if one_type else part.type_id

    def _check_ids(self) -> None:
        """Hold that all ids and token types which the tokenizer can give are within the model's embeddings."""
        config, parts = self.config, [part for parts in self._templates.values() for part in parts]
        largest = max([*self.backend.get_vocab().values(), *(part.id for part in parts)])
        if largest >= config.vocab_size:
            raise InputError(
                f"{self.source}: got token id {largest}, expected less than the model's vocab_size {config.vocab_size}"
            )
        largest = max(map(self._type_id, parts))
        if largest >= config.type_vocab_size:
            raise InputError(
                f"{self.source}: got token type {largest}, expected less than the model's {config.type_vocab_size}"
            )

    def _implied_settings(self) -> dict:
        """Return what transformers must find in tokenizer_config.json to build the same tokenizer."""
        normalizer, pre_tokenizer = self.backend.normalizer, self.backend.pre_tokenizer
        template = self.backend.encode("", "").tokens
        if isinstance(normalizer, normalizers.BertNormalizer) and template == ["[CLS]", "[SEP]", "[SEP]"]:
            return {
                "tokenizer_class": "BertTokenizer",
                "do_lower_case": normalizer.lowercase,
                "strip_accents": normalizer.strip_accents,
                "tokenize_chinese_chars": normalizer.handle_chinese_chars,
            }
        if isinstance(pre_tokenizer, pre_tokenizers.ByteLevel) and template == ["<s>", "</s>", "</s>", "</s>"]:
            return {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": pre_tokenizer.add_prefix_space}
        return {"tokenizer_class": "PreTrainedTokenizerFast"}  # takes tokenizer.json as it is


def load_tokenizer(folder: str | Path, config: BertConfig) -> Tokenizer:
    """Read the tokenizer of a model folder. `config` is the model's, with which its ids must agree.

    Raises InputError that names the file: there is none, it is not a tokenizer, it adds no special tokens, or it gives
    ids (or token types) for which the model has no embedding.
    """
    folder = Path(folder)
    files = _read_files(folder)
    settings = _read_settings(folder, files)
    if "tokenizer.json" in files:
        source = folder / "tokenizer.json"
        with _library_errors(source):
            backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
            backend.no_padding()
            backend.no_truncation()
            _apply_settings(backend, settings)
        _check_growth(backend, source)
    elif "vocab.txt" in files:
        source = folder / "vocab.txt"
        with _library_errors(source):
            backend = _wordpiece(source, files, settings)
    elif "vocab.json" in files and "merges.txt" in files:
        source = folder / "vocab.json"
        with _library_errors(source):
            backend = _byte_level_bpe(source, settings)
    else:
        raise InputError(
            f"{folder}: got no tokenizer, expected tokenizer.json, or vocab.txt, or vocab.json and merges.txt"
        )
    return Tokenizer(backend, config, source, files, settings)


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
    return settings


def _apply_settings(backend: tokenizers.Tokenizer, settings: dict) -> None:
    """Let what tokenizer_config.json says win over tokenizer.json."""
    if settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        return
    normalizer, pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    if isinstance(normalizer, normalizers.BertNormalizer):
        normalizer.lowercase = settings.get("do_lower_case", normalizer.lowercase)
        normalizer.strip_accents = settings.get("strip_accents", normalizer.strip_accents)
        normalizer.handle_chinese_chars = settings.get("tokenize_chinese_chars", normalizer.handle_chinese_chars)
        backend.normalizer = normalizer
    if isinstance(pre_tokenizer, pre_tokenizers.ByteLevel):
        pre_tokenizer.add_prefix_space = settings.get("add_prefix_space", pre_tokenizer.add_prefix_space)
        backend.pre_tokenizer = pre_tokenizer


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


def _wordpiece(source: Path, files: dict[str, bytes], settings: dict) -> tokenizers.Tokenizer:
    lines = files["vocab.txt"].decode("utf-8").removesuffix("\n").split("\n")
    vocab = {line.rstrip(): i for i, line in enumerate(lines)}
    special = _special_tokens(source, settings, _BERT_SPECIAL, vocab)
    cls, sep = special["cls"].content, special["sep"].content
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=special["unk"].content))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
    )
    backend.add_special_tokens(list(special.values()))
    return backend


def _byte_level_bpe(source: Path, settings: dict) -> tokenizers.Tokenizer:
    model = models.BPE.from_file(str(source), str(source.with_name("merges.txt")))
    backend = tokenizers.Tokenizer(model)
    vocab = backend.get_vocab()
    special = _special_tokens(source, settings, _ROBERTA_SPECIAL, vocab)
    cls, sep = special["cls"].content, special["sep"].content
    add_prefix_space = settings.get("add_prefix_space", False)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(
        (sep, vocab[sep]), (cls, vocab[cls]), add_prefix_space=add_prefix_space
    )
    backend.add_special_tokens(list(special.values()))
    return backend


def _special_tokens(
    source: Path, settings: dict, defaults: dict[str, str], vocab: dict[str, int]
) -> dict[str, AddedToken]:
    """Return the special tokens by role, of tokenizer_config.json and special_tokens_map.json or the usual ones.

    cls, sep and unk must stand in the vocabulary; others that do not are left out. Raises InputError where a file adds
    further tokens: they come with a tokenizer.json.
    """
    map_file, added_file = source.with_name("special_tokens_map.json"), source.with_name("added_tokens.json")
    settings = {**settings, **(read_json(map_file) if map_file.exists() else {})}
    flags = {token["content"]: token for token in (settings.get("added_tokens_decoder") or {}).values()}
    special = {}
    for role, default in defaults.items():
        token = settings.get(f"{role}_token", default)
        token = token if isinstance(token, dict) else {"content": token}
        token = {**token, **flags.get(token["content"], {})}
        if token["content"] in vocab:
            special[role] = AddedToken(**{key: token[key] for key in _TOKEN_FLAGS if key in token}, special=True)
        elif role in ("cls", "sep", "unk"):
            raise InputError(
                f"{source}: got no token {shorten(token['content'])}, expected it among the {len(vocab)} of the file"
            )
    added = {*flags, *(read_json(added_file) if added_file.exists() else ())}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        added.update(token["content"] if isinstance(token, dict) else token for token in settings.get(key) or ())
    further = sorted(added - {token.content for token in special.values()})
    if further:
        raise InputError(
            f"{source}: got the added token {shorten(further[0])} beside it, expected a tokenizer.json that has it"
        )
    return special


def _template(backend: tokenizers.Tokenizer, source: Path, pair: bool) -> tuple[_Part, ...]:
    """Return the parts that the tokenizer puts together for one text or a pair, read off an example."""
    with _library_errors(source):
        example = backend.encode("a", "a" if pair else None)
    parts = []
    for text, token, type_id in zip(example.sequence_ids, example.ids, example.type_ids):
        if text is None or not parts or text != parts[-1].text:
            parts.append(_Part(text, token, type_id))
    texts = [part.text for part in parts if part.text is not None]
    if sorted(texts) != [0, 1][: 1 + pair] or len(parts) == len(texts):
        kind = "pair" if pair else "text"
        raise InputError(
            f"{source}: got {example.tokens} for a {kind} of 'a', expected special tokens around each text"
        )
    return tuple(parts)


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
