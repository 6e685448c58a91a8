"""Token ids against transformers' AutoTokenizer, for each form that a model folder's tokenizer takes; damaged files."""

import json
import os
import random
import resource
import sys
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors

from progtuning.base.errors import InputError
from progtuning.data import tokenization
from progtuning.data.glue import load_glue
from progtuning.data.tokenization import TOKENIZER_FILES, load_tokenizer
from progtuning.model.config import BertConfig
from tests.models import config_of

seeded = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

CORPUS = [
    "The committee praised the painter, whose naïve façade hid a déjà vu of older work.",
    "Prices rose by 3.5% in 2021; nobody's forecast (not even the bank's) had said so!",
    "An Ångström is 10^-10 m. Straße, ÆTHER, İstanbul and ﬁnance test the lower-casing.",
    "漢字とかな交じり文 mixes with English words, 🙂 emoji and e\u0301 combining accents.",
    "Unhappily, unbelievable reinterpretations of misunderstandings resurface repeatedly.",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "\t leading and trailing \u00a0\u2003 spaces \n",
    "[CLS] literal [SEP] special [MASK] tokens [UNK]",
    "<s> literal </s> special <mask> tokens <unk>",
    "zero\u200bwidth, soft\u00adhyphen, control\x07 and \ufffd replacement",
    "unseen: Привет мир, שלום, مرحبا, नमस्ते",
    "x" * 150,
    "word " * 60,
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


# Vocabularies made by hand: the library's trainers give another one in every process.
WORDS = sorted({word for text in CORPUS for word in (text + " " + text.lower()).split()})
VOCAB = list(dict.fromkeys([
    *SPECIAL,
    *sorted({character for word in WORDS for character in word}),
    *sorted({"##" + character for word in WORDS for character in word}),
    *(word[:length] for word in WORDS for length in (3, 6)),
    *("##" + word[start:] for word in WORDS for start in (2, 5) if word[start:]),
]))  # fmt: skip


def wordpiece(lowercase):
    tokenizer = LibraryTokenizer(models.WordPiece({token: i for i, token in enumerate(VOCAB)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = [(token, VOCAB.index(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def byte_level_bpe():
    """Each word of the corpus, with the space before it, is merged from the left, one byte at a time."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = [word for text in CORPUS for word, _ in split.pre_tokenize_str(text)]
    merges = list(dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word))))
    tokens = [*ROBERTA_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = LibraryTokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.add_special_tokens(ROBERTA_SPECIAL)
    return tokenizer


def sentencepiece_unigram(first: list[str]):
    """A SentencePiece model as its tokenizer.json has it: words of the corpus and its characters, the best cut wins."""
    words = sorted({f"▁{word}" for text in CORPUS for word in text.split()})
    characters = sorted({"▁", *"".join(words)})
    pieces = [(token, 0.0) for token in first] + [(word, -2.0 - len(word) / 8) for word in words]
    pieces += [(character, -9.0) for character in characters if character not in words]
    tokenizer = LibraryTokenizer(models.Unigram(pieces, unk_id=first.index("<unk>")))
    metaspace = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    ids = [(token, first.index(token)) for token in ("<s>", "</s>")]
    pair = "<s> $A </s> </s> $B </s>"
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", pair, ids)
    tokenizer.add_special_tokens([token for token in first if token.startswith("<") and "NOT" not in token])
    return tokenizer


def config_for(vocab_size, model_type="bert", **changes):
    values = dict(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, max_position_embeddings=66
    )
    types = {} if model_type in ("bert", "electra") else {"type_vocab_size": 1}
    return config_of(model_type, vocab_size=vocab_size, **{**values, **types, **changes})


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def vocab_txt(folder, model_type="bert", **tokenizer_config):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    if tokenizer_config:
        write_json(folder / "tokenizer_config.json", tokenizer_config)
    return finish(folder, config_for(len(VOCAB), model_type))


def tokenizer_json(folder, tokenizer, model_type, **tokenizer_config):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if tokenizer_config:
        write_json(folder / "tokenizer_config.json", tokenizer_config)
    return finish(folder, config_for(tokenizer.get_vocab_size(), model_type))


def vocab_and_merges(folder, **tokenizer_config):
    folder.mkdir(exist_ok=True)
    tokenizer = byte_level_bpe()
    tokenizer.model.save(str(folder))
    if tokenizer_config:
        write_json(folder / "tokenizer_config.json", tokenizer_config)
    return finish(folder, config_for(tokenizer.get_vocab_size(), "roberta"))


def finish(folder, config):
    """Write the config.json by which transformers chooses the tokenizer's class."""
    write_json(folder / "config.json", {"model_type": config.model_type})
    return folder, config


def padded_and_truncated(folder):
    tokenizer = wordpiece(lowercase=True)
    tokenizer.enable_padding(length=48)
    tokenizer.enable_truncation(16)
    return tokenizer_json(folder, tokenizer, "bert", do_lower_case=True)


FORMS = {
    "vocab.txt alone": lambda folder: vocab_txt(folder),
    "vocab.txt, cased": lambda folder: vocab_txt(folder, do_lower_case=False),
    "vocab.txt, lower case with accents": lambda folder: vocab_txt(folder, do_lower_case=True, strip_accents=False),
    "vocab.txt, Chinese not split": lambda folder: vocab_txt(folder, do_lower_case=False, tokenize_chinese_chars=False),
    "vocab.txt, DistilBERT": lambda folder: vocab_txt(folder, "distilbert"),
    "vocab.txt, ELECTRA": lambda folder: vocab_txt(folder, "electra"),
    "vocab.txt, cut on the left": lambda folder: vocab_txt(folder, truncation_side="left"),
    "tokenizer.json with padding and truncation": padded_and_truncated,
    "tokenizer.json, overruled by tokenizer_config.json": lambda folder: tokenizer_json(
        folder, wordpiece(True), "bert", do_lower_case=False, tokenizer_class="BertTokenizer"
    ),
    "tokenizer.json of a generic class": lambda folder: tokenizer_json(
        folder, wordpiece(False), "bert", do_lower_case=True, tokenizer_class="PreTrainedTokenizerFast"
    ),
    "tokenizer.json, RoBERTa": lambda folder: tokenizer_json(folder, byte_level_bpe(), "roberta"),
    "tokenizer.json, RoBERTa with prefix space": lambda folder: tokenizer_json(
        folder, byte_level_bpe(), "roberta", add_prefix_space=True
    ),
    "tokenizer.json, XLM-RoBERTa": lambda folder: tokenizer_json(
        folder, sentencepiece_unigram(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]), "xlm-roberta"
    ),
    "tokenizer.json, XLM-RoBERTa, class named": lambda folder: tokenizer_json(
        folder,
        sentencepiece_unigram(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]),
        "xlm-roberta",
        tokenizer_class="XLMRobertaTokenizer",
    ),
    "tokenizer.json, CamemBERT": lambda folder: tokenizer_json(
        folder,
        sentencepiece_unigram(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<s>NOTUSED"]),
        "camembert",
        tokenizer_class="CamembertTokenizer",
    ),
    "vocab.json and merges.txt": lambda folder: vocab_and_merges(folder),
    "vocab.json and merges.txt with prefix space": lambda folder: vocab_and_merges(folder, add_prefix_space=True),
}


@pytest.fixture(scope="module", params=FORMS)
def both(request, tmp_path_factory):
    """A tokenizer of ours and transformers' for the same folder."""
    transformers = pytest.importorskip("transformers")
    folder, config = FORMS[request.param](tmp_path_factory.mktemp("model"))
    return load_tokenizer(folder, config), transformers.AutoTokenizer.from_pretrained(folder), config, folder


def assert_equal(ours, theirs, texts, pairs, max_length):
    expected = theirs(texts, pairs, truncation="longest_first", max_length=max_length)
    encodings = ours.encode(texts, pairs, max_length=max_length)
    assert [e.input_ids.tolist() for e in encodings] == expected["input_ids"]
    given = ours.config.type_vocab_size and expected.get("token_type_ids")  # a model without types reads none
    types = given or [[0] * len(ids) for ids in expected["input_ids"]]
    assert [e.token_type_ids.tolist() for e in encodings] == types


@pytest.mark.parametrize("max_length", [5, 6, 9, 24, 64])
def test_ids_of_texts_and_pairs_equal_those_of_transformers(both, max_length):
    ours, theirs, _, _ = both
    assert_equal(ours, theirs, TEXTS, None, max_length)
    pairs = TEXTS[::-1]
    if max_length > 5:  # RoBERTa adds 4 tokens to a pair
        assert_equal(ours, theirs, TEXTS, pairs, max_length)
        assert_equal(ours, theirs, TEXTS, TEXTS[3:] + TEXTS[:3], max_length)


@seeded
@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=4), st.integers(6, 64))
def test_ids_of_any_text_equal_those_of_transformers(both, rows, max_length):
    ours, theirs, _, _ = both
    texts, pairs = map(list, zip(*rows))
    assert_equal(ours, theirs, texts, None, max_length)
    assert_equal(ours, theirs, texts, pairs, max_length)


def test_a_saved_folder_gives_transformers_the_same_ids(both, tmp_path):
    from transformers import AutoTokenizer

    ours, _, config, folder = both
    finish(tmp_path, config)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert_equal(ours, theirs, TEXTS, TEXTS[::-1], 64)
    again = load_tokenizer(tmp_path, config)
    assert_equal(again, theirs, TEXTS, TEXTS[::-1], 64)
    assert theirs.pad_token_id is not None or ours.class_name == "PreTrainedTokenizerFast"
    for name in TOKENIZER_FILES:
        if name != "tokenizer_config.json":
            assert (tmp_path / name).exists() == (folder / name).exists()
            assert not (folder / name).exists() or (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} <= {*TOKENIZER_FILES, "config.json"}  # no temporary file


ONE_END_IN_A_PAIR = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", [("<s>", 0), ("</s>", 2)])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: setattr(t, "normalizer", normalizers.NFKC()), "the normalizer NFKC"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()), "the pre_tokenizer Metaspace"),
        (lambda t: setattr(t, "post_processor", ONE_END_IN_A_PAIR), "other special tokens around a text"),
        (lambda t: setattr(t, "model", models.BPE()), "another model"),
    ],
)
def test_a_sentencepiece_file_that_transformers_would_not_take_as_it_is_is_refused(change, message, tmp_path):
    tokenizer = sentencepiece_unigram(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    change(tokenizer)
    folder, config = tokenizer_json(tmp_path / "model", tokenizer, "xlm-roberta")
    with pytest.raises(InputError, match=f"got {message} for tokenizer_class XLMRobertaTokenizer, which has its own"):
        load_tokenizer(folder, config)


def test_complete_files_are_saved_byte_for_byte(tmp_path):
    complete = {
        "do_lower_case": True,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "tokenizer_class": "BertTokenizer",
    }
    folder, config = vocab_txt(tmp_path / "model", **complete)
    (tmp_path / "saved").mkdir()
    load_tokenizer(folder, config).save(tmp_path / "saved")
    for name in ("vocab.txt", "tokenizer_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()


def test_special_tokens_of_other_names_are_read_from_either_file(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, config = vocab_txt(tmp_path / "model")
    text = (folder / "vocab.txt").read_text(encoding="utf-8")
    (folder / "vocab.txt").write_text(text.replace("[CLS]", "<start>").replace("[SEP]", "<end>"), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"cls_token": "<start>"})
    write_json(
        folder / "special_tokens_map.json", {"sep_token": {"content": "<end>", "lstrip": False, "rstrip": False}}
    )
    ours, theirs = load_tokenizer(folder, config), transformers.AutoTokenizer.from_pretrained(folder)
    assert_equal(ours, theirs, TEXTS, TEXTS[::-1], 64)
    assert ours.backend.encode("", "").tokens == ["<start>", "<end>", "<end>"]


def test_minilm_l6_equals_transformers_on_real_sentences(shared_data, minilm):
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(minilm, BertConfig.from_json(minilm / "config.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)
    for task, name in (("mnli", "MNLI"), ("stsb", "STS-B")):
        examples = load_glue(task, shared_data / "glue" / name).dev
        texts, pairs = zip(*((e.text, e.text_pair) for split in examples.values() for e in split))
        assert_equal(ours, theirs, list(texts), list(pairs), 48)
        assert_equal(ours, theirs, list(texts), None, 512)


@pytest.fixture
def bert(tmp_path):
    folder, config = vocab_txt(tmp_path / "model")
    return load_tokenizer(folder, config)


def test_single_texts_may_stand_among_pairs(bert):
    encodings = bert.encode(["the painter", "the painter"], ["older work", None])
    assert encodings[0].token_type_ids.max() == 1 and encodings[1].token_type_ids.max() == 0
    assert encodings[1].input_ids.tolist() == bert.encode(["the painter"])[0].input_ids.tolist()
    with pytest.raises(ValueError, match="pairs must be as many as texts, got 1 and 2"):
        bert.encode(["a", "b"], ["c"])


def test_many_texts_come_back_in_order_and_none_gives_none(bert, monkeypatch):
    rng = random.Random(0)
    texts = [" ".join(rng.choices(CORPUS[0].split(), k=rng.randrange(9))) for _ in range(500)]
    expected = [bert.encode([text])[0].input_ids.tolist() for text in texts]
    monkeypatch.setattr(tokenization, "_BATCH_ROWS", 7)
    assert [e.input_ids.tolist() for e in bert.encode(texts)] == expected
    monkeypatch.setattr(tokenization, "_BATCH_CHARACTERS", 50)
    assert [e.input_ids.tolist() for e in bert.encode(texts)] == expected
    assert bert.encode([]) == bert.encode([], []) == []


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_a_pair_of_long_texts_is_cut_in_bounded_memory(bert):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    encoding = bert.encode(["the " * 8000], ["work " * 8000], max_length=66)[0]
    assert len(encoding.input_ids) == 66
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
    )  # the library's own cut takes gigabytes


def test_roberta_gets_no_second_token_type_and_bert_does(bert, tmp_path):
    assert bert.encode(["a"], ["b"])[0].token_type_ids.max() == 1
    folder, config = vocab_txt(tmp_path / "model", tokenizer_class="BertTokenizer")
    one_type = config_for(config.vocab_size, "roberta")  # with BERT's own tokenizer
    assert load_tokenizer(folder, one_type).encode(["a"], ["b"])[0].token_type_ids.max() == 0
    folder, config = vocab_and_merges(tmp_path / "roberta")
    two_types = config_for(config.vocab_size, "roberta", type_vocab_size=2)
    assert load_tokenizer(folder, two_types).encode(["a"], ["b"])[0].token_type_ids.max() == 0


@pytest.mark.parametrize("max_length", [2, 1, 0, -5, 67, 10**9])
def test_a_sequence_limit_the_model_cannot_take_names_the_option(bert, max_length):
    with pytest.raises(InputError, match=rf"^--max-length must be in 3\.\.66 for this model, got {max_length}$"):
        bert.encode(["a"], max_length=max_length)


def test_sequence_limits_of_pairs_and_of_roberta_are_their_own(bert, tmp_path):
    with pytest.raises(InputError, match=r"^--max-length must be in 5\.\.66 for this model, got 4$"):
        bert.encode(["a"], ["b"], max_length=4)
    folder, config = vocab_and_merges(tmp_path / "roberta")
    with pytest.raises(InputError, match=r"^--max-length must be in 6\.\.64 for this model, got 65$"):
        load_tokenizer(folder, config).encode(["a"], ["b"], max_length=65)


def test_the_backend_is_left_without_padding_and_truncation(tmp_path):
    folder, config = padded_and_truncated(tmp_path / "model")
    tokenizer = load_tokenizer(folder, config)
    assert tokenizer.backend.padding is None and tokenizer.backend.truncation is None
    tokenizer.encode(["a"], max_length=5)
    assert tokenizer.backend.truncation is None
    encoding = tokenizer.backend.encode("The painter", "older work")
    assert (
        len(encoding.offsets) == len(encoding.ids) and encoding.sequence_ids.count(1) > 0
    )  # what question answering needs


GOOD_JSON = wordpiece(lowercase=True).to_str()


def good_json_with(**changes):
    """The good tokenizer.json with other values, or without those that are None."""
    values = {**json.loads(GOOD_JSON), **changes}
    return json.dumps({key: value for key, value in values.items() if value is not None})


def template_with(**changes):
    return good_json_with(post_processor={**json.loads(GOOD_JSON)["post_processor"], **changes})


FAR_SPECIAL = {token: {"id": token, "ids": [99999], "tokens": [token]} for token in ("[CLS]", "[SEP]")}
NO_TOKENIZER = "not a usable tokenizer: "
# What is wrong: the file beside a good vocab.txt (or in its place), its content, and the error after the file's name.
BAD_FILES = {
    "garbage": ("tokenizer.json", "garbage", NO_TOKENIZER),
    "empty": ("tokenizer.json", "", NO_TOKENIZER),
    "binary": ("tokenizer.json", bytes(range(256)), NO_TOKENIZER),
    "other JSON": ("tokenizer.json", '{"a": [1, 2]}', NO_TOKENIZER),
    "nested JSON": ("tokenizer.json", "[" * 100_000, NO_TOKENIZER),
    "truncated": ("tokenizer.json", GOOD_JSON[: len(GOOD_JSON) // 2], NO_TOKENIZER),
    "no model": ("tokenizer.json", good_json_with(model=None), NO_TOKENIZER),
    "no template for one text": (
        "tokenizer.json",
        template_with(single=[]),
        "got [] for a text of 'a', expected special",
    ),
    "special token far out": (
        "tokenizer.json",
        template_with(special_tokens=FAR_SPECIAL),
        "got other special tokens around a text for tokenizer_class BertTokenizer, which has its own",
    ),
    "settings a list": ("tokenizer_config.json", "[1]", "got [1], expected a JSON object"),
    "settings no JSON": ("tokenizer_config.json", "{", "line 1: not JSON"),
    "setting of another type": (
        "tokenizer_config.json",
        '{"do_lower_case": "no"}',
        "got 'no' for do_lower_case, expected true or false",
    ),
    "setting 0": ("tokenizer_config.json", '{"strip_accents": 0}', "got 0 for strip_accents, expected true or false"),
    "unknown side": (
        "tokenizer_config.json",
        '{"truncation_side": "up"}',
        "got 'up' for truncation_side, expected right",
    ),
    "special tokens no JSON": ("special_tokens_map.json", b"\xff", "not UTF-8 (byte 0)"),
    "vocab.txt without special tokens": ("vocab.txt", "the\ncat\n", "got no token '[UNK]', expected it among the 2"),
    "vocab.txt empty": ("vocab.txt", "", "got no token '[UNK]'"),
    "vocab.txt not UTF-8": ("vocab.txt", b"[PAD]\n\xff\xfe\n", NO_TOKENIZER),
    "vocab.txt longer than the model's": (
        "vocab.txt",
        "\n".join([*VOCAB, *map(str, range(1000))]),
        f"got token id {len(VOCAB) + 999} for '999', expected less than the model's vocab_size {len(VOCAB)}",
    ),
}
# The same where it makes vocab.txt unusable, and that is named.
BAD_SPECIAL_TOKENS = {
    "a number": ("tokenizer_config.json", '{"cls_token": 3}', "got no token 3, expected it among the"),
    "a list": ("special_tokens_map.json", '{"cls_token": [3]}', NO_TOKENIZER),
    "not there": ("tokenizer_config.json", '{"sep_token": "<sep>"}', "got no token '<sep>', expected it among the"),
    "added by a file": (
        "added_tokens.json",
        '{"<new>": 250}',
        f"got token id {len(VOCAB)} for '<new>', expected less than the model's vocab_size {len(VOCAB)}",
    ),
    "added by settings": (
        "tokenizer_config.json",
        '{"added_tokens_decoder": {"300": {"content": "<new>"}}}',
        f"got token id {len(VOCAB)} for '<new>', expected less",
    ),
    "added by a list": (
        "tokenizer_config.json",
        '{"additional_special_tokens": ["<new>"]}',
        f"got token id {len(VOCAB)} for '<new>', expected less",
    ),
}


def one_line_error(folder, config):
    with pytest.raises(InputError) as caught:
        load_tokenizer(folder, config).encode(TEXTS)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 400
    return message


def write_bad(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_no_tokenizer_is_one_line_that_names_it(tmp_path, kind):
    folder, config = vocab_txt(tmp_path / "model")
    name, content, expected = BAD_FILES[kind]
    write_bad(folder, name, content)
    assert one_line_error(folder, config).startswith(f"{folder}/{name}: {expected}")


@pytest.mark.parametrize("kind", BAD_SPECIAL_TOKENS)
def test_special_tokens_that_the_vocabulary_lacks_are_one_line(tmp_path, kind):
    folder, config = vocab_txt(tmp_path / "model")
    name, content, expected = BAD_SPECIAL_TOKENS[kind]
    write_bad(folder, name, content)
    assert one_line_error(folder, config).startswith(f"{folder}/vocab.txt: {expected}")


# ---- folders of every other make, each against AutoTokenizer before and after it is saved

HARD_TEXTS = [
    *TEXTS,
    "the <e1> film, a<e1>b <E2>painter </e1>The",
    "Xa\x1c c\x85d e\u2028f g\x0bh Xa the\x1d\x1e\x1f",
    "\ufeff[PAD] <mask>word  <mask> [MASK]the",
    "die\u0301 A\u030a Ｆｕｌｌ ẞ \u0130 각 𠀀 ｶﾞ a\u200d\u00ad\u202eb",
]
NAMES = {"[CLS]": "<s>", "[SEP]": "</s>", "[PAD]": "<pad>", "[UNK]": "<unk>", "[MASK]": "<mask>"}
OTHER_NAMES = {
    "cls_token": "<s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
SWAPPED = {"cls_token": "[SEP]", "sep_token": "[CLS]"}
ANY = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "token_type_ids"]}
LOWER = {"do_lower_case": True}


def a_token(content, **flags):
    return {**dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False), "content": content, **flags}


def json_with(tokenizer=None, **parts):
    """A tokenizer.json, BERT's in lower case if none is given, with other parts than its own."""
    tokenizer = LibraryTokenizer.from_str((tokenizer or wordpiece(True)).to_str())
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer.to_str()


def cut_from_left():
    tokenizer = wordpiece(True)
    tokenizer.enable_truncation(12, direction="left")
    tokenizer.enable_padding(direction="left", pad_token="<none>")
    return tokenizer.to_str()


def georgian():
    """A BPE of letters without an unknown token: "a" has no token."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted({*"ეს ფილმი კარგია"} - {" "})])}
    tokenizer = LibraryTokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = LibraryTokenizer.from_str(GOOD_JSON).post_processor
    return tokenizer


def merges_as(change):
    return {"vocab.json": ROBERTA_FILES["vocab.json"], "merges.txt": change(ROBERTA_FILES["merges.txt"])}


VOCAB_TXT = "\n".join(VOCAB) + "\n"
TRAPS = [
    *("x\x1c", "Xa\x1d", "x\x1e", "x\x1f", "c\x85d", "e\u2028f", "g\x0bh", "b\x0c", "q\u3000 ", "\u00a0"),
    "",
    "the",
]
_BPE = json.loads(byte_level_bpe().to_str())["model"]
ROBERTA_FILES = {
    "vocab.json": json.dumps(_BPE["vocab"]),
    "merges.txt": "".join(["#version: 0.2\n", *(" ".join(pair) + "\n" for pair in _BPE["merges"])]),
}
# The files by which a make differs; values that are no text are written as JSON.
BASES = {
    "vocab.txt": {"vocab.txt": VOCAB_TXT},
    "BERT's tokenizer.json": {"tokenizer.json": wordpiece(True).to_str()},
    "any tokenizer.json": {"tokenizer.json": wordpiece(True).to_str(), "tokenizer_config.json": ANY},
    "vocab.json": {**ROBERTA_FILES, "config.json": {"model_type": "roberta"}},
}
NEW = len(VOCAB)
ROUTES = {
    "added_tokens_decoder": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                str(NEW + 1): a_token("<e1>", special=True),
                str(NEW): a_token("<E2>", lstrip=True),
            }
        }
    },
    "additional_special_tokens": {"tokenizer_config.json": {"additional_special_tokens": ["<E2>", "painter"]}},
    "extra_special_tokens": {"tokenizer_config.json": {"extra_special_tokens": {"image_token": "<e1>"}}},
    "added_tokens.json": {"added_tokens.json": {"<e1>": NEW, "<E2>": NEW + 1}},
    "special_tokens_map.json": {
        "special_tokens_map.json": {
            "additional_special_tokens": ["<e1>"],
            "mask_token": a_token("<mask>", lstrip=True),
        }
    },
    "several": {
        "special_tokens_map.json": {"extra_special_tokens": ["<E2>", a_token("</e1>", rstrip=True)]},
        "added_tokens.json": {"<E2>": NEW, "<e1>": NEW + 1},
        "tokenizer_config.json": {"image_token": "painter"},
    },
}
MAKES = {
    **{
        f"{route} beside {base}": {**BASES[base], **ROUTES[route], "tokenizer_config.json": {
            **BASES[base].get("tokenizer_config.json", {}), **ROUTES[route].get("tokenizer_config.json", {})
        }}
        for base in BASES for route in ROUTES
    },
    **{
        f"{name} of {file}": {"vocab.txt": VOCAB_TXT, file: {"model_type": "bert", "tokenizer_class": name}}
        for name in ("DistilBertTokenizer", "ElectraTokenizerFast", "MobileBertTokenizer", "DPRContextEncoderTokenizer")
        for file in ("config.json", "tokenizer_config.json")
    },
    "RoBERTa's under another name": {
        **BASES["vocab.json"], "tokenizer_config.json": {"tokenizer_class": "LongformerTokenizerFast"}
    },
    "RoBERTa with BERT's": {
        "vocab.txt": VOCAB_TXT, "config.json": {"model_type": "roberta", "tokenizer_class": "BertTokenizer"}
    },
    "BERT with RoBERTa's": {
        **ROBERTA_FILES, "tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer"}, "vocab.txt": VOCAB_TXT,
        "config.json": {"model_type": "bert"},
    },
    "a class that transformers lacks": {
        "tokenizer.json": wordpiece(False).to_str(), "tokenizer_config.json": {"tokenizer_class": "KoBertTokenizer"}
    },
    "a generic class without types": {
        "tokenizer.json": wordpiece(True).to_str(), "tokenizer_config.json": {"tokenizer_class": "TokenizersBackend"}
    },
    "no types by name": {
        "vocab.txt": VOCAB_TXT, "tokenizer_config.json": {"model_input_names": ["input_ids", "attention_mask"]}
    },
    "lines that other splitters cut": {"vocab.txt": VOCAB_TXT + "\n".join(TRAPS) + "\n\n\n"},
    "a blank last line that the model has no row for": {"vocab.txt": VOCAB_TXT + "\n" * 30},
    "CRLF and no last line end": {"vocab.txt": VOCAB_TXT.strip().replace("\n", "\r\n")},
    "a byte-order mark": {"vocab.txt": "\ufeff" + VOCAB_TXT},
    "no mask token": {"vocab.txt": VOCAB_TXT.replace("[MASK]", "mask")},
    "names in tokenizer_config.json": {
        "vocab.txt": "\n".join(NAMES.get(token, token) for token in VOCAB), "tokenizer_config.json": OTHER_NAMES
    },
    "names in special_tokens_map.json": {
        "vocab.txt": "\n".join(NAMES.get(token, token) for token in VOCAB), "special_tokens_map.json": OTHER_NAMES
    },
    "special tokens swapped": {"vocab.txt": VOCAB_TXT, "special_tokens_map.json": SWAPPED},
    "a map that added_tokens_decoder replaces": {
        "vocab.txt": VOCAB_TXT, "special_tokens_map.json": SWAPPED,
        "tokenizer_config.json": {"added_tokens_decoder": {"3": a_token("[SEP]", special=True)}},
    },
    "no post-processor": {"tokenizer.json": good_json_with(post_processor=None)},
    "added by tokenizer.json alone": {
        "tokenizer.json": good_json_with(added_tokens=[{"id": NEW, **a_token("<e1>", special=False)}])
    },
    "added by tokenizer.json, not by added_tokens_decoder": {
        "tokenizer.json": good_json_with(added_tokens=[{"id": NEW, **a_token("<e1>", special=False)}]),
        "tokenizer_config.json": {"added_tokens_decoder": {}},
    },
    "cut from the left by tokenizer.json": {"tokenizer.json": cut_from_left()},
    "cut from the left by any tokenizer.json": {"tokenizer.json": cut_from_left(), "tokenizer_config.json": ANY},
    "special tokens split": {"vocab.txt": VOCAB_TXT, "tokenizer_config.json": {"split_special_tokens": True}},
    "settings without effect": {
        "vocab.txt": VOCAB_TXT,
        "tokenizer_config.json": {
            **{"do_basic_tokenize": False, "never_split": ["painter"], "clean_up_tokenization_spaces": True},
            **{"model_max_length": 16, "add_bos_token": True, "padding_side": "left", "return_token_type_ids": False},
        },
    },
    "merges without a header": merges_as(lambda text: text.split("\n", 1)[1]),
    "merges with CRLF": merges_as(lambda text: text.replace("\n", "\r\n")),
    "offsets not trimmed": {
        **ROBERTA_FILES, "tokenizer_config.json": {"trim_offsets": False, "add_prefix_space": True}
    },
}  # fmt: skip


def a_folder(folder, files):
    folder.mkdir()
    is_roberta = "vocab.json" in files
    for name, content in {"config.json": {"model_type": "roberta" if is_roberta else "bert"}, **files}.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_bytes(text.encode())
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    size = NEW if "no row" in folder.name else max(NEW, len(_BPE["vocab"])) + 20
    return folder, config_for(size, model_type, type_vocab_size=2)


@pytest.mark.parametrize("make", MAKES)
def test_a_folder_of_any_make_gives_the_ids_and_types_of_transformers_and_so_does_what_is_saved(tmp_path, make):
    transformers = pytest.importorskip("transformers")
    folder, config = a_folder(tmp_path / make.replace("/", ""), MAKES[make])
    ours, theirs = load_tokenizer(folder, config), transformers.AutoTokenizer.from_pretrained(folder)
    saved = tmp_path / "saved"
    saved.mkdir()
    finish(saved, config)
    ours.save(saved)
    again = transformers.AutoTokenizer.from_pretrained(saved)
    for tokenizer in (theirs, again):
        assert_equal(ours, tokenizer, HARD_TEXTS, None, 64)
        assert_equal(ours, tokenizer, HARD_TEXTS, HARD_TEXTS[4:] + HARD_TEXTS[:4], 9)


def test_question_offsets_are_trimmed_as_tokenizer_config_says(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name in ("offsets not trimmed", "merges with CRLF"):
        folder, config = a_folder(tmp_path / name, MAKES[name])
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text, (_, offsets) in zip(CORPUS, load_tokenizer(folder, config).tokens(CORPUS)):
            expected = theirs(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            assert list(map(tuple, offsets.tolist())) == expected


def test_a_vocabulary_without_latin_letters_is_taken(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, config = a_folder(tmp_path / "model", {"tokenizer.json": georgian().to_str(), "tokenizer_config.json": ANY})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert_equal(load_tokenizer(folder, config), theirs, ["ეს ფილმი კარგია", "ფილმი a ცუდია"], None, 64)


def named(name, **files):
    return {"vocab.txt": VOCAB_TXT, **ROBERTA_FILES, "tokenizer_config.json": {"tokenizer_class": name}, **files}


CASED = normalizers.BertNormalizer(lowercase=False)
JAPANESE = named("BertJapaneseTokenizer")
OWN = "tokenizer_class BertTokenizer, which has its own; expected in tokenizer_config.json the tokenizer_class Pre"
# What transformers would read in another way than the folder says, and the error after the folder's name.
REFUSED = {
    "Japanese": (JAPANESE, "/tokenizer_config.json: got tokenizer_class BertJapaneseTokenizer, whose rules are Python"),
    "Japanese by config.json": (
        {"vocab.txt": VOCAB_TXT, "config.json": {"model_type": "bert", "tokenizer_class": "BertJapaneseTokenizer"}},
        "/config.json: got tokenizer_class BertJapaneseTokenizer, whose rules are Python code",
    ),
    "Japanese with tokenizer.json": (
        {**JAPANESE, "tokenizer.json": GOOD_JSON},
        "/tokenizer_config.json: got tokenizer_class BertJapaneseTokenizer",
    ),
    **{
        f"{name} alone": (named(name), f": got no tokenizer for tokenizer_class {name}, expected tokenizer.json")
        for name in ("HerbertTokenizer", "KoBertTokenizer", "MPNetTokenizerFast", "CLIPTokenizer", *ANY.values())
        if isinstance(name, str)
    },
    "RoBERTa with vocab.txt alone": (
        {"vocab.txt": VOCAB_TXT, "config.json": {"model_type": "roberta"}},
        ": got no tokenizer for tokenizer_class RobertaTokenizer, expected tokenizer.json or vocab.json and merges.txt",
    ),
    "BERT with vocab.json alone": (
        {**ROBERTA_FILES, "config.json": {"model_type": "bert"}},
        ": got no tokenizer for tokenizer_class BertTokenizer, expected tokenizer.json or vocab.txt",
    ),
    "case said by tokenizer.json alone": (
        {"tokenizer.json": json_with(normalizer=CASED)},
        "/tokenizer.json: got lowercase false, expected do_lower_case in tokenizer_config.json too: without it "
        "BertTokenizer takes true",
    ),
    "prefix space said by tokenizer.json alone": (
        {
            "tokenizer.json": json_with(
                byte_level_bpe(), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)
            ),
            "config.json": {"model_type": "roberta"},
        },
        "/tokenizer.json: got add_prefix_space true, expected add_prefix_space in tokenizer_config.json too",
    ),
    "a normalizer of another kind": (
        {"tokenizer.json": json_with(normalizer=normalizers.Lowercase())},
        f"/tokenizer.json: got the normalizer Lowercase for {OWN}",
    ),
    "text not cleaned": (
        {"tokenizer.json": json_with(normalizer=normalizers.BertNormalizer(clean_text=False))},
        f"/tokenizer.json: got clean_text false for {OWN}",
    ),
    "a pre-tokenizer of another kind": (
        {"tokenizer.json": json_with(pre_tokenizer=pre_tokenizers.Whitespace())},
        f"/tokenizer.json: got the pre_tokenizer Whitespace for {OWN}",
    ),
    "a model of another kind": (
        {"tokenizer.json": byte_level_bpe().to_str()},
        f"/tokenizer.json: got another model for {OWN}",
    ),
    "longer words": (
        {"tokenizer.json": json_with(model=models.WordPiece({"[UNK]": 0}, max_input_chars_per_word=50))},
        f"/tokenizer.json: got another model for {OWN}",
    ),
    "other tokens around a text": (
        {"tokenizer.json": template_with(single=json.loads(GOOD_JSON)["post_processor"]["single"][:2])},
        f"/tokenizer.json: got other special tokens around a text for {OWN}",
    ),
    "files that contradict each other": (
        {
            "tokenizer.json": GOOD_JSON,
            "tokenizer_config.json": {"tokenizer_class": "KoBertTokenizer", "do_lower_case": False},
        },
        "/tokenizer.json: got lowercase true, expected false as tokenizer_config.json has it for do_lower_case",
    ),
    "no special tokens": (
        {"tokenizer.json": good_json_with(post_processor=None), "tokenizer_config.json": ANY},
        "/tokenizer.json: got ['a'] for a text of 'a', expected special tokens around each text",
    ),
    "a class without a name": (
        {"vocab.txt": VOCAB_TXT, "tokenizer_config.json": {"tokenizer_class": 3}},
        "/tokenizer_config.json: got 3 for tokenizer_class, expected a name",
    ),
    "inputs no list": (
        {"vocab.txt": VOCAB_TXT, "tokenizer_config.json": {"model_input_names": "input_ids"}},
        "/tokenizer_config.json: got 'input_ids' for model_input_names, expected a list of names",
    ),
    "added tokens a list": (
        {"vocab.txt": VOCAB_TXT, "added_tokens.json": ["<e1>"]},
        "/added_tokens.json: got ['<e1>'], expected a JSON object",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_transformers_would_read_in_another_way_is_refused_by_name(tmp_path, kind):
    files, expected = REFUSED[kind]
    folder, config = a_folder(tmp_path / "model", {"config.json": {"model_type": "bert"}, **files})
    assert one_line_error(folder, config).startswith(f"{folder}{expected}")


@pytest.mark.parametrize(
    ("vocab", "merges"),
    [
        ('{"a": 0}', "#version: 0.2\na b\n"),
        ('{"a": "b"}', "#version: 0.2\n"),
        ("[]", "#version: 0.2\n"),
        ('{"a": 0, "b": 1, "<s>": 2, "</s>": 3, "<unk>": 4}', "#version: 0.2\na b c d\n"),
        ('{"a": 0, "b": 1}', "#version: 0.2\n"),
        ('{"a": 0, "<s>": 2, "</s>": 3, "<unk>": 99999}', "#version: 0.2\n"),
    ],
)
def test_vocab_json_and_merges_that_do_not_fit_are_one_line(tmp_path, vocab, merges):
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text(merges)
    assert one_line_error(tmp_path, config_for(2000, "roberta")).startswith(f"{tmp_path}/vocab.json: ")


def test_no_tokenizer_half_of_one_and_a_folder_in_its_place_are_named(tmp_path):
    config = config_for(len(VOCAB))
    expected = f"{tmp_path}: got no tokenizer for tokenizer_class BertTokenizer, expected tokenizer.json or vocab.txt"
    assert one_line_error(tmp_path, config) == expected
    roberta = one_line_error(tmp_path, config_for(len(VOCAB), "roberta"))
    assert roberta.endswith("tokenizer_class RobertaTokenizer, expected tokenizer.json or vocab.json and merges.txt")
    (tmp_path / "vocab.json").write_text("{}")
    assert one_line_error(tmp_path, config) == expected
    (tmp_path / "tokenizer.json").mkdir()
    assert one_line_error(tmp_path, config) == f"{tmp_path}/tokenizer.json: not a file"
    assert one_line_error(tmp_path / "none", config).startswith(f"{tmp_path}/none: got no tokenizer")


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "vocab.txt")
    assert one_line_error(tmp_path, config_for(len(VOCAB))) == f"{tmp_path}/vocab.txt: not a file"


def test_a_huge_file_is_refused_in_bounded_memory(tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(8 << 30)  # sparse: takes no disk
    tracemalloc.start()
    message = one_line_error(tmp_path, config_for(len(VOCAB)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message.startswith(f"{tmp_path}/tokenizer.json: got more than {tokenization.MAX_FILE_BYTES} bytes")
    assert peak < 3 * tokenization.MAX_FILE_BYTES


def test_token_ids_and_types_that_the_model_lacks_are_refused(tmp_path):
    folder, config = tokenizer_json(tmp_path / "model", wordpiece(lowercase=True), "bert")
    message = one_line_error(folder, config_for(len(VOCAB) - 1))
    last = len(VOCAB) - 1
    where, token = f"{folder}/tokenizer.json", VOCAB[-1]
    assert message == f"{where}: got token id {last} for {token!r}, expected less than the model's vocab_size {last}"
    values = json.loads(GOOD_JSON)
    values["post_processor"]["pair"][-1]["SpecialToken"]["type_id"] = 2
    write_json(folder / "tokenizer.json", values)
    names = {"model_input_names": ["input_ids", "token_type_ids"]}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    message = one_line_error(folder, config)
    assert message == f"{folder}/tokenizer.json: got token type 2, expected less than the model's 2"


@seeded
@given(st.data())
def test_a_damaged_tokenizer_json_works_or_is_one_line(tmp_path, data):
    """Values of a good file replaced by others of the same or another type, and bytes by other bytes."""
    values = json.loads(GOOD_JSON)
    node, keys = values, None
    for _ in range(data.draw(st.integers(1, 4))):
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        if not keys:
            break
        parent, key = node, data.draw(st.sampled_from(list(keys)))
        node = node[key]
    parent[key] = data.draw(
        st.sampled_from([None, -1, 7, 2**63, 1e400, "", "x" * 1000, [], {}, True, [[]], {"type": "BPE"}, "[CLS]"])
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    config = config_for(len(VOCAB))
    try:
        encodings = load_tokenizer(tmp_path, config).encode(TEXTS)
    except InputError as error:
        assert str(error).startswith(f"{tmp_path}/tokenizer.json: ") and len(str(error).splitlines()) == 1
    else:
        assert all(0 <= e.input_ids.min() and e.input_ids.max() < config.vocab_size for e in encodings)
        assert all(0 <= e.token_type_ids.min() and e.token_type_ids.max() < 2 for e in encodings)
        assert all(len(e.input_ids) <= config.max_length for e in encodings)
