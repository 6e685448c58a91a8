"""SQuAD v1.1 (Rajpurkar et al. 2016, arXiv 1606.05250) and v2.0 (2018, arXiv 1806.03822): files, features, answers.

A file is one JSON document. `answers` is empty where the context does not answer a question (v2.0):

    {"data": [{"paragraphs": [{"context": ..., "qas": [{"id": ..., "question": ...,
        "is_impossible": ..., "answers": [{"text": ..., "answer_start": ...}, ...]}]}]}]}

An id is a string or an integer, of which the digits are taken; a question without one has the 0-based number that it is
in the file.

What a model reads is a question beside a window of its context:

    [CLS] question [SEP] window [SEP]       BERT; token types 0 up to the first [SEP], then 1
    <s> question </s></s> window </s>       RoBERTa

A context longer than the room beside its question is cut in windows that overlap, as transformers' run_qa.py cuts it:
`stride` is the overlap (in run_squad.py of google-research/bert, the step from one window to the next). A window that
does not hold the whole answer is labelled as one without an answer: with the position of [CLS], which is 0.

N windows, S tokens of one, W of them of the context. Text is measured in characters (code points), as answer_start is.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from progtuning.base.errors import InputError
from progtuning.base.files import read_json
from progtuning.data.batching import EncodedRows
from progtuning.data.tables import keyed_rows, shorten
from progtuning.data.tokenization import Encoding, Tokenizer

MAX_LENGTH, STRIDE, MAX_QUESTION_LENGTH = 384, 128, 64  # tokens; the values of run_squad.py
MAX_CHARACTERS = 1 << 20  # of one context or question
MAX_FILE_BYTES = 1 << 27  # three times the largest official file


@dataclass(frozen=True, slots=True)
class Answer:
    """A gold answer: context[start : start + len(text)] == text."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its context, and its gold answers: () where the context has none, None where they are not known."""

    id: str
    text: str
    context: str
    answers: tuple[Answer, ...] | None = None


def read_squad(path: str | Path, *, labelled: bool = True, null_answers: bool = True) -> list[Question]:
    """Read a file of SQuAD's layout. Without `labelled` answers are not looked at, and every question's are None.

    Raises InputError that names the file and the place in it: where a key is missing, a text is empty, an answer does
    not stand where its answer_start says, an id comes twice, or, without `null_answers`, a question has no answer.
    """
    questions = []
    for i, article in enumerate(_value(str(path), read_json(path, MAX_FILE_BYTES), "data", list)):
        in_article = f"{path}: data[{i}]"
        for j, paragraph in enumerate(_value(in_article, article, "paragraphs", list)):
            where = f"{in_article}.paragraphs[{j}]"
            context = parse_text(where, paragraph, "context")
            for k, entry in enumerate(_value(where, paragraph, "qas", list)):
                place = f"{where}.qas[{k}]"
                questions.append(parse_question(place, len(questions), entry, context, labelled, null_answers))
    return check_questions(path, questions)


def read_questions(path: str | Path) -> list[Question]:
    """Read questions to be answered: SQuAD's layout (a file that ends in .json), or a table; `-` is standard input.

    The table is TSV with a header, or JSONL, of `question`, `context` and, if need be, `id` (else the 0-based number of
    the row). Raises InputError that names the file and the place in it.
    """
    if Path(path).suffix == ".json":
        return read_squad(path, labelled=False)
    questions = []
    for where, values in keyed_rows(path, required=("question", "context"), optional=("id",)):
        texts = (parse_text(where, values, key) for key in ("question", "context"))
        questions.append(Question(values.get("id", str(len(questions))), *texts))
    return check_questions(path, questions)


def parse_question(where: str, number: int, entry, context: str, labelled: bool, null_answers: bool) -> Question:
    """Return the question that an entry of `qas` is, the `number`th (0-based). Raises InputError, beginning with
    `where`."""
    identity = _question_id(where, number, entry)
    where = f"{where} (id {shorten(identity)})"
    text = parse_text(where, entry, "question", may_be_blank=True)
    if not labelled:
        return Question(identity, text, context)
    items = _value(where, entry, "answers", list)
    answers = tuple(_answer(f"{where}.answers[{i}]", item, context) for i, item in enumerate(items))
    is_impossible = entry.get("is_impossible", not answers)
    if is_impossible is not (not answers):
        raise InputError(f"{where}: got is_impossible {shorten(is_impossible)} beside {len(answers)} answers")
    if is_impossible and not null_answers:
        raise InputError(f"{where}: got a question without an answer, expected one; --task squad_v2 takes both")
    return Question(identity, text, context, answers)


def parse_text(where: str, entry, key: str, may_be_blank: bool = False) -> str:
    """Return the text entry[key]. Raises InputError, beginning with `where`, where it is none, blank or too long."""
    text = _value(where, entry, key, str)
    if len(text) > MAX_CHARACTERS or not (may_be_blank or text.strip()):
        got = f"{len(text)} characters" if text.strip() else "nothing but white space"
        raise InputError(f"{where}: got {got} for {key!r}, expected a text of at most {MAX_CHARACTERS} characters")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where}: got half a surrogate pair in {key!r}, expected text") from None
    return text


def check_questions(path: str | Path, questions: list[Question]) -> list[Question]:
    """Return `questions`. Raises InputError that names the file where there are none, or two have one id."""
    if not questions:
        raise InputError(f"{path}: got no questions, expected at least one")
    seen = set()
    for question in questions:
        if question.id in seen:
            raise InputError(f"{path}: got the id {shorten(question.id)} twice, expected each id once")
        seen.add(question.id)
    return questions


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A question beside a part of its context, as a model reads it, and the positions of the answer's start and end."""

    question: int  # its place in the list of questions
    encoding: Encoding
    context_start: int  # position of the first token of the context
    offsets: np.ndarray  # (W, 2): the characters [start, end) of the context that each of these tokens stands for
    label: tuple[int, int]


class SquadRows(EncodedRows):
    """The windows of questions, to be collated into batches; `labels` are (N, 2) int64, the positions of start and end.

    Every question has one window or more; they stand side by side, in the order of the questions.
    """

    def __init__(self, questions: Sequence[Question], windows: Sequence[Window], pad_token_id: int):
        labelled = all(question.answers is not None for question in questions)
        labels = [window.label for window in windows] if labelled else None
        ids = [questions[window.question].id for window in windows]
        super().__init__([window.encoding for window in windows], labels, pad_token_id, ids)
        self.questions = questions
        self.windows = windows

    def digest(self) -> str:
        digest = hashlib.sha256(super().digest().encode())
        for question in self.questions:  # the gold answers beside the first, which alone is a label
            digest.update(repr(question).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def encode_questions(
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    max_length: int | None = None,
    stride: int = STRIDE,
    max_question_length: int = MAX_QUESTION_LENGTH,
) -> SquadRows:
    """Tokenize questions and contexts and cut the windows: at most `max_length` tokens, special ones included.

    `max_length` None is 384, or what the model takes where that is less. A question keeps its first
    `max_question_length` tokens, and windows overlap by `stride` tokens; where `max_length` is small, both are at most
    half of the room that there is. The label is that of the first gold answer; if some question's answers are not
    known, no row has a label. Raises InputError where `max_length` is out of range.
    """
    if max_length is None:
        max_length = min(MAX_LENGTH, tokenizer.config.max_length)
    tokenizer.check_max_length(max_length, pairs=True)
    num_special, num_before = _special_tokens(tokenizer)
    contexts = list(dict.fromkeys(question.context for question in questions))
    context_tokens = dict(zip(contexts, tokenizer.tokens(contexts)))  # once for all questions of a paragraph
    question_tokens = tokenizer.tokens([question.text.lstrip() for question in questions])  # as run_qa.py does
    room, windows = max_length - num_special, []
    for i, question in enumerate(questions):
        question_ids = question_tokens[i][0][: min(max_question_length, room // 2)]
        context_ids, offsets = context_tokens[question.context]
        first, last = _token_span(offsets, question.answers[0]) if question.answers else (-1, -1)
        context_start = num_before + len(question_ids)
        for start, end in cut_windows(len(context_ids), room - len(question_ids), stride):
            encoding = tokenizer.join([question_ids, context_ids[start:end]])
            inside = start <= first <= last < end
            label = (context_start + first - start, context_start + last - start) if inside else (0, 0)
            windows.append(Window(i, encoding, context_start, offsets[start:end], label))
    return SquadRows(questions, windows, tokenizer.config.pad_token_id)


def cut_windows(length: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Return the [start, end) of windows of `room` tokens, the last perhaps shorter, that cover `length` tokens.

    Neighbours overlap by `stride` tokens, at most by half of `room`. Where there is no token there is one empty window.

    >>> cut_windows(length=10, room=6, stride=2)
    [(0, 6), (4, 10)]
    """
    overlap = min(stride, room // 2)
    return [(start, min(start + room, length)) for start in range(0, max(length - overlap, 1), room - overlap)]


def _special_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return how many special tokens a pair has in all, and how many before its second text.

    Raises InputError where a pair does not begin with a special token, the position of no answer.
    """
    question, context = -1, -2  # one token of each
    pair = tokenizer.join([[question], [context]]).input_ids.tolist()
    if not 0 < pair.index(question) < pair.index(context):
        raise InputError(f"{tokenizer.source}: got no special token before a pair, expected one as [CLS] is")
    return len(pair) - 2, pair.index(context) - 1


def _token_span(offsets: np.ndarray, answer: Answer) -> tuple[int, int]:
    """Return the first and the last token that has a character of `answer`; first > last where none has.

    White space at the ends of an answer belongs to no token, and so do characters that the tokenizer drops. (run_qa.py
    takes the neighbouring tokens in their place.)
    """
    first = np.searchsorted(offsets[:, 1], answer.start, side="right")
    last = np.searchsorted(offsets[:, 0], answer.start + len(answer.text), side="left") - 1
    return int(first), int(last)


def _question_id(where: str, number: int, entry) -> str:
    value = entry.get("id") if isinstance(entry, dict) else ""
    if value is None:
        return str(number)
    return str(value) if type(value) is int else parse_text(where, entry, "id")


def _answer(where: str, entry, context: str) -> Answer:
    text, start = parse_text(where, entry, "text"), _value(where, entry, "answer_start", int)
    found = context[start : start + len(text)] if start >= 0 else ""
    if found != text:
        raise InputError(f"{where}: got {shorten(text)} at {start}, where the context has {shorten(found)}")
    return Answer(text, start)


def _value(where: str, entry, key: str, kind: type):
    if not isinstance(entry, dict):
        raise InputError(f"{where}: got {shorten(entry)}, expected a JSON object")
    value = entry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {list: "a list", str: "a string", int: "an integer"}
        got = shorten(value) if key in entry else "nothing"
        raise InputError(f"{where}: got {got} for {key!r}, expected {names[kind]}")
    return value
