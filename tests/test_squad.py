"""SQuAD's files, and windows against transformers' own way of cutting them."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from progtuning.base.errors import InputError
from progtuning.data import questions
from progtuning.data.questions import load_squad
from progtuning.data.squad import Answer, Question, cut_windows, encode_questions, read_questions, read_squad
from progtuning.data.tokenization import load_tokenizer
from progtuning.model.config import BertConfig
from tests.test_tokenization import CORPUS, vocab_and_merges, vocab_txt

seeded = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

CONTEXT = "Ada wrote to 東京 in 1842 🙂. She did."


def entry(**changes):
    answer = {"text": "東京", "answer_start": 13}
    return {"id": "q1", "question": "Where to?", "answers": [answer], **changes}


def document(*entries, context=CONTEXT):
    return {"version": "v2.0", "data": [{"title": "Ada", "paragraphs": [{"context": context, "qas": list(entries)}]}]}


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


# ---- files


def test_the_official_layout_is_read_with_golds_null_answers_and_code_point_offsets(tmp_path):
    twice = [{"text": "1842", "answer_start": 19}, {"text": "in 1842 🙂", "answer_start": 16}]
    impossible = entry(id="q3", answers=[], is_impossible=True, plausible_answers=[{"text": "Ada", "answer_start": 0}])
    file = write(tmp_path / "a.json", document(entry(), entry(id="q2", answers=twice, is_impossible=False), impossible))
    questions = read_squad(file)
    assert questions == [
        Question("q1", "Where to?", CONTEXT, (Answer("東京", 13),)),
        Question("q2", "Where to?", CONTEXT, (Answer("1842", 19), Answer("in 1842 🙂", 16))),
        Question("q3", "Where to?", CONTEXT, ()),
    ]
    assert [question.answers for question in read_squad(file, labelled=False)] == [None] * 3


def test_ids_may_be_integers_or_missing_and_the_file_may_begin_with_a_byte_order_mark(tmp_path):
    nameless = {key: value for key, value in entry().items() if key != "id"}
    value = document(entry(id=700), nameless, entry(id=None), entry(id=-3))
    value["data"] += document(nameless)["data"]
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode())
    for labelled in (True, False):
        assert [question.id for question in read_squad(file, labelled=labelled)] == ["700", "1", "2", "-3", "4"]
    file.write_bytes(b"\xef\xbb\xbf" + b'{"data": ["\xff"]}')
    with pytest.raises(InputError, match=r"a.json: not UTF-8 \(byte 14\)$"):
        read_squad(file)


@pytest.mark.parametrize(("task", "version"), [("squad", "v1.1"), ("squad_v2", "v2.0")])
def test_a_task_reads_the_files_of_its_version_before_those_without(tmp_path, task, version):
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.json", document(entry(id=f"own {split}")))
    assert load_squad(task, tmp_path).train[0].id == "own train"
    for split in ("train", "dev"):
        write(tmp_path / f"{split}-{version}.json", document(entry(id=split)))
    splits = load_squad(task, tmp_path)
    assert splits.train[0].id == "train" and [q.id for q in splits.dev["dev"]] == ["dev"]
    assert splits.task is questions.TASKS[task] and splits.task.head == "question-answering"
    assert splits.task.null_answers == (task == "squad_v2")
    with pytest.raises(InputError, match=rf"/nowhere/train-{version}.json: cannot be read: No such file"):
        load_squad(task, tmp_path / "nowhere")


def test_the_shared_files_have_their_published_numbers_of_questions_and_golds(shared_data):
    one, two = load_squad("squad", shared_data / "squad"), load_squad("squad_v2", shared_data / "squad")
    counts = [len(rows) for splits in (one, two) for rows in (splits.train, splits.dev["dev"])]
    assert counts == [9403, 3445, 3868, 4389]
    assert sum(len(question.answers) for question in one.dev["dev"]) == 11947
    assert [sum(not q.answers for q in rows) for rows in (two.train, two.dev["dev"])] == [188, 2299]
    with pytest.raises(InputError, match=r"dev-v2.0.json: data\[0\].paragraphs\[0\].qas\[5\] \(id '.*expected one"):
        read_squad(shared_data / "squad" / "dev-v2.0.json", null_answers=False)


IN_ENTRY = "data[0].paragraphs[0].qas[0]"
BAD_FILES = {
    "not JSON": ("{", "line 1: not JSON"),
    "a list": ([], "got [], expected a JSON object"),
    "no data": ({"version": 2}, "got nothing for 'data', expected a list"),
    "an article that is text": ({"data": ["x"]}, "data[0]: got 'x', expected a JSON object"),
    "no paragraphs": ({"data": [{}]}, "data[0]: got nothing for 'paragraphs', expected a list"),
    "no context": ({"data": [{"paragraphs": [{"qas": []}]}]}, "data[0].paragraphs[0]: got nothing for 'context'"),
    "a blank context": (document(entry(), context=" \n"), "data[0].paragraphs[0]: got nothing but white space"),
    "qas null": ({"data": [{"paragraphs": [{"context": "a", "qas": None}]}]}, ".paragraphs[0]: got None for 'qas'"),
    "no question at all": (document(), "got no questions, expected at least one"),
    "an id that is true": (document(entry(id=True)), f"{IN_ENTRY}: got True for 'id', expected a string"),
    "an id that is a fraction": (document(entry(id=7.5)), f"{IN_ENTRY}: got 7.5 for 'id', expected a string"),
    "an id that is empty": (document(entry(id="")), f"{IN_ENTRY}: got nothing but white space for 'id'"),
    "an id as a number and as text": (document(entry(id=7), entry(id="7")), "got the id '7' twice"),
    "an id that is another's place": (
        document(entry(id="1"), {"question": "?", "answers": []}),
        "got the id '1' twice",
    ),
    "an entry that is text": (document("x"), f"{IN_ENTRY}: got 'x', expected a JSON object"),
    "no question": (document({"id": "x"}), f"{IN_ENTRY} (id 'x'): got nothing for 'question', expected a string"),
    "no answers": (document({"id": "x", "question": "?"}), f"{IN_ENTRY} (id 'x'): got nothing for 'answers'"),
    "an answer elsewhere": (
        document(entry(answers=[{"text": "東京", "answer_start": 14}])),
        f"{IN_ENTRY} (id 'q1').answers[0]: got '東京' at 14, where the context has '京 '",
    ),
    "a negative start": (
        document(entry(answers=[{"text": ".", "answer_start": -1}])),
        f"{IN_ENTRY} (id 'q1').answers[0]: got '.' at -1, where the context has ''",
    ),
    "a start that is true": (
        document(entry(answers=[{"text": "d", "answer_start": True}])),
        f"{IN_ENTRY} (id 'q1').answers[0]: got True for 'answer_start', expected an integer",
    ),
    "a blank answer": (
        document(entry(answers=[{"text": " ", "answer_start": 3}])),
        f"{IN_ENTRY} (id 'q1').answers[0]: got nothing but white space for 'text'",
    ),
    "half a surrogate pair": (document(entry(question="\ud83d")), f"{IN_ENTRY} (id 'q1'): got half a surrogate pair"),
    "impossible and answered": (document(entry(is_impossible=True)), "got is_impossible True beside 1 answers"),
    "possible and unanswered": (document(entry(is_impossible=False, answers=[])), "got is_impossible False beside 0"),
    "one id twice": (document(entry(), entry()), "got the id 'q1' twice, expected each id once"),
    "a context of a megabyte": (document(entry(), context="a" * (1 << 20) + "b"), "got 1048577 characters for"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_with_the_place_in_it(tmp_path, name):
    value, expected = BAD_FILES[name]
    path = tmp_path / "dev.json"
    path.write_text(value) if isinstance(value, str) else write(path, value)
    with pytest.raises(InputError) as caught:
        read_squad(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and expected in message and len(message.splitlines()) == 1


def test_questions_to_answer_come_from_tsv_jsonl_and_json_without_answers(tmp_path):
    (tmp_path / "a.tsv").write_text(f'question\tcontext\nWho?\t{CONTEXT}\n"When?\ta "b" c\n', encoding="utf-8")
    assert read_questions(tmp_path / "a.tsv") == [Question("0", "Who?", CONTEXT), Question("1", '"When?', 'a "b" c')]
    (tmp_path / "a.jsonl").write_text('\n{"id": 5, "context": "two\\nlines", "question": "?"}\n\n')
    assert read_questions(tmp_path / "a.jsonl") == [Question("5", "?", "two\nlines")]
    write(tmp_path / "a.json", document({"id": "x", "question": "?"}))
    assert read_questions(tmp_path / "a.json") == [Question("x", "?", CONTEXT)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "question\tanswer\na\tb\n",
            "line 1: got columns ['question', 'answer'], of which none is 'context', expected question, context",
        ),
        (
            "question\tcontext\tlabel\na\tb\tc\n",
            "line 1: got columns ['question', 'context', 'label'], of which 'label' is unknown, expected",
        ),
        ("question\tcontext\n \tb\n", "line 2: got nothing but white space for 'question'"),
        ("question\tcontext\tid\na\tb\t1\na\tb\t1\n", "got the id '1' twice, expected each id once"),
        ("question\tcontext\na\tb\nquestion\tcontext\n", "line 3: got the header again (question, context), expected"),
        ("question\tcontext\n\n", "got no questions, expected at least one"),
        (
            '{"question": "a"}\n',
            "line 1: got keys ['question'], of which none is 'context', expected question, context",
        ),
        ('{"question": "a", "context": ["b"]}\n', "line 1: got context ['b'], expected a string"),
    ],
)
def test_a_bad_table_of_questions_is_one_line_with_file_and_line(tmp_path, content, expected):
    (tmp_path / "a.tsv").write_text(content)
    with pytest.raises(InputError) as caught:
        read_questions(tmp_path / "a.tsv")
    assert str(caught.value).startswith(f"{tmp_path}/a.tsv: {expected}")


# ---- windows


@seeded
@given(st.integers(0, 300), st.integers(1, 60), st.integers(0, 80))
def test_windows_cover_all_tokens_are_full_but_the_last_and_overlap_by_the_stride(length, room, stride):
    windows = cut_windows(length, room, stride)
    assert windows[0][0] == 0 and windows[-1][1] == length
    assert all(end - start == room for start, end in windows[:-1]) and windows[-1][1] - windows[-1][0] <= room
    overlap = min(stride, room // 2)
    assert all(before[1] - after[0] == overlap for before, after in zip(windows, windows[1:]))
    assert len({end for _, end in windows}) == len(windows)  # each shows a token that those before do not


def reference(theirs, questions, max_length, stride):
    """The features of transformers' question-answering example, by its rules: ids, types, (start, end)."""
    texts = [question.text.lstrip() for question in questions]
    encoded = theirs(
        texts,
        [question.context for question in questions],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    for i, ids in enumerate(encoded["input_ids"]):
        question = questions[encoded["overflow_to_sample_mapping"][i]]
        offsets = encoded["offset_mapping"][i]
        context = [k for k, sequence in enumerate(encoded.sequence_ids(i)) if sequence == 1]
        start = end = ids.index(theirs.cls_token_id)
        if question.answers:
            first, last = question.answers[0].start, question.answers[0].start + len(question.answers[0].text)
            if offsets[context[0]][0] <= first and offsets[context[-1]][1] >= last:
                start = max(k for k in context if offsets[k][0] <= first)
                end = min(k for k in context if offsets[k][1] >= last)
        yield ids, encoded["token_type_ids"][i], (start, end)


def assert_equal_to_reference(ours, theirs, questions, max_length, stride):
    """Hold that ids, types and positions are the same; return how many windows hold their answer, and how many not."""
    rows = encode_questions(questions, ours, max_length, stride)
    encodings = [(w.encoding.input_ids.tolist(), w.encoding.token_type_ids.tolist()) for w in rows.windows]
    found = [(*encoding, tuple(label)) for encoding, label in zip(encodings, rows.labels.tolist())]
    assert found == list(reference(theirs, questions, max_length, stride))
    inside = int((rows.labels[:, 0] > 0).sum())
    return inside, len(rows) - inside


MADE_CONTEXTS = [
    " ".join(CORPUS),
    " \t\u00a0 " + "  \n\n ".join(CORPUS * 2) + " \u3000 ",
    " ".join(" ".join(word[i:] for i in range(len(word))) for word in CORPUS[4].split()),
    "".join(word + "\r\n" * (len(word) % 3) + " " for word in CORPUS[0].split() * 4),
    "x",
    "[SEP] literal </s> " + CORPUS[1],
]


def made_questions(seed=0, count=300):
    """Questions whose gold answer is any run of words, in contexts of one to many windows, and some without answer."""
    generator = np.random.default_rng(seed)
    questions = []
    for i in range(count):
        context = MADE_CONTEXTS[i % len(MADE_CONTEXTS)]
        words, position = [], 0
        for word in context.split():
            position = context.index(word, position)
            words.append((position, position + len(word)))
            position += len(word)
        first = int(generator.integers(len(words)))
        last = min(len(words) - 1, first + int(generator.integers(8)))
        answer = Answer(context[words[first][0] : words[last][1]], words[first][0])
        text = " " * (i % 3) + " ".join(generator.choice(CORPUS[0].split(), size=int(generator.integers(1, 7))))
        questions.append(Question(str(i), text, context, (answer,) if i % 7 else ()))
    return questions


FORMS = {
    "BERT": lambda folder: vocab_txt(folder),
    "BERT, cased": lambda folder: vocab_txt(folder, do_lower_case=False),
    "RoBERTa": lambda folder: vocab_and_merges(folder),
    "RoBERTa with prefix space": lambda folder: vocab_and_merges(folder, add_prefix_space=True),
}


@pytest.fixture(scope="module", params=FORMS)
def both(request, tmp_path_factory):
    """A tokenizer of ours and transformers' for the same folder."""
    transformers = pytest.importorskip("transformers")
    folder, config = FORMS[request.param](tmp_path_factory.mktemp("model"))
    return load_tokenizer(folder, config), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("max_length", "stride"), [(64, 12), (40, 0), (48, 9)])
def test_windows_and_positions_of_made_text_equal_those_of_transformers(both, max_length, stride):
    questions = [q for q in made_questions() if len(both[0].tokens([q.text.lstrip()])[0][0]) <= 16]
    assert len(questions) > 50
    inside, outside = assert_equal_to_reference(*both, questions, max_length, stride)
    assert inside > 50 and outside > 50


def test_windows_and_positions_of_real_questions_equal_those_of_transformers(shared_data, minilm):
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(minilm, BertConfig.from_json(minilm / "config.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)
    for name in ("train-v1.1", "dev-v2.0"):
        questions = read_squad(shared_data / "squad" / f"{name}.json")[::10]
        inside, _ = assert_equal_to_reference(ours, theirs, questions, 384, 128)
        assert inside >= sum(bool(question.answers) for question in questions)
        assert_equal_to_reference(ours, theirs, questions[::4], 200, 64)  # most contexts in two windows and more


def test_a_long_question_keeps_its_first_tokens_and_at_most_half_the_room(both):
    ours, theirs = both
    words = CORPUS[0].split() * 20
    context = Question("0", " ".join(words), "the painter of older work")
    question_ids = theirs(context.text, add_special_tokens=False)["input_ids"]
    for limit, kept in ((8, 8), (10**6, (64 - theirs.num_special_tokens_to_add(pair=True)) // 2)):
        rows = encode_questions([context], ours, 64, stride=8, max_question_length=limit)
        ids = rows.windows[0].encoding.input_ids.tolist()
        assert ids[1 : 1 + kept] == question_ids[:kept]
        assert ids[1 + kept] == theirs.sep_token_id
        assert rows.labels is None


@seeded
@given(st.data())
def test_an_answer_in_any_text_is_labelled_by_the_tokens_that_have_its_characters(both, data):
    context = data.draw(st.text(min_size=1, max_size=12))
    start = data.draw(st.integers(0, len(context) - 1))
    end = data.draw(st.integers(start + 1, len(context)))
    rows = encode_questions([Question("0", "the painter", context, (Answer(context[start:end], start),))], both[0], 64)
    (window,), ((_, offsets),) = rows.windows, both[0].tokens([context])
    assert window.offsets.tolist() == offsets.tolist()
    answer = [window.context_start + i for i, (low, high) in enumerate(offsets) if high > start and low < end]
    assert rows.labels.tolist() == [[answer[0], answer[-1]] if answer else [0, 0]]


def test_rows_collate_with_pairs_of_positions_and_train_as_in_transformers(both):
    transformers = pytest.importorskip("transformers")
    rows = encode_questions(made_questions(count=12), both[0], max_length=64, stride=12)
    batch = rows.collate(range(len(rows)))
    assert batch["labels"].shape == (len(rows), 2) and batch["labels"].dtype == torch.int64
    assert batch["input_ids"].shape == (len(rows), rows.lengths.max())
    config = transformers.BertConfig(
        vocab_size=both[0].config.vocab_size,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=66,
    )
    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering(config).eval()
    starts, ends = batch["labels"].T
    found = model(batch["input_ids"], batch["attention_mask"], start_positions=starts, end_positions=ends)
    logits = torch.stack([found.start_logits, found.end_logits], dim=-1)  # (B, S, 2)
    torch.testing.assert_close(F.cross_entropy(logits, batch["labels"]), found.loss)


def test_a_sequence_limit_the_model_cannot_take_names_the_option(both):
    questions = made_questions(count=3)
    for max_length in (4, 67, 10**9):
        with pytest.raises(InputError, match=rf"^--max-length must be in [56]\.\.6[46] .*, got {max_length}$"):
            encode_questions(questions, both[0], max_length)
    assert encode_questions(questions, both[0]).lengths.max() <= both[0].config.max_length  # no limit: the model's
    assert encode_questions(questions, both[0], 6).lengths.max() == 6


def test_a_context_without_a_token_has_one_window_and_no_answer(tmp_path):
    tokenizer = load_tokenizer(*vocab_txt(tmp_path))
    rows = encode_questions([Question("0", "the", "\u200b\u200b", (Answer("\u200b", 0),))], tokenizer)
    assert len(rows) == 1 and rows.labels.tolist() == [[0, 0]] and rows.windows[0].offsets.shape == (0, 2)


def test_memory_stays_within_30_bytes_a_byte_of_the_file(tmp_path):
    """Of the official 30 MB that is 0.9 GB, most of it the 230 MB of importing torch left aside."""
    words = CORPUS[0].split()
    paragraphs = []
    for i in range(300):
        context = f"{i} " + " ".join(words * 9)
        answer = {"text": words[0], "answer_start": context.index(words[0])}
        qas = [{"id": f"{i}-{k}", "question": " ".join(words[k:]), "answers": [answer] * 3} for k in range(5)]
        paragraphs.append({"context": context, "qas": qas})
    file = write(tmp_path / "a.json", {"data": [{"title": "a", "paragraphs": paragraphs}]})
    folder, config = vocab_txt(tmp_path, do_lower_case=False)
    tokenizer = load_tokenizer(folder, config)
    tracemalloc.start()
    try:
        rows = encode_questions(read_squad(file), tokenizer)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(rows) > 1500 and peak < 30 * file.stat().st_size
