"""GLUE and SQuAD as the Hugging Face Hub has them: nyu-mll/glue, rajpurkar/squad and rajpurkar/squad_v2, in Parquet.

The rows are those of the official files. A class is the same number as here, and -1 in the test files of GLUE. Reading
Parquet needs pyarrow, which the extra `hub` installs.
"""

import itertools
from collections.abc import Iterator

from progtuning.base.errors import InputError, RunError
from progtuning.base.sources import data_folder
from progtuning.data import squad
from progtuning.data.glue import glue_task
from progtuning.data.questions import TASKS
from progtuning.data.tables import Example, shorten
from progtuning.data.task import Splits

GLUE = "nyu-mll/glue"
# The repository's folder for each task, and the columns of its texts.
_GLUE = {
    "cola": ("cola", ("sentence",)),
    "sst-2": ("sst2", ("sentence",)),
    "mrpc": ("mrpc", ("sentence1", "sentence2")),
    "sts-b": ("stsb", ("sentence1", "sentence2")),
    "qqp": ("qqp", ("question1", "question2")),
    "mnli": ("mnli", ("premise", "hypothesis")),
    "qnli": ("qnli", ("question", "sentence")),
    "rte": ("rte", ("sentence1", "sentence2")),
    "ax": ("ax", ("premise", "hypothesis")),
    "wnli": ("wnli", ("sentence1", "sentence2")),
}
_SQUAD = {"squad": ("rajpurkar/squad", "plain_text"), "squad_v2": ("rajpurkar/squad_v2", "squad_v2")}


def load_hub(task: str) -> Splits:
    """Download (once) and read the training and held-out rows of a GLUE task, "squad" or "squad_v2".

    Raises InputError where the task is unknown, pyarrow is missing or a file is not what was expected, and RunError
    where network or disk fail.
    """
    _pyarrow()
    if task in _SQUAD:
        train, dev = (_squad_split(task, split) for split in ("train", "validation"))
        return Splits(TASKS[task], train, {"dev": dev})
    glue, train = glue_task(task), _glue_split(task, "train")
    dev = {split: _glue_split(task, split.replace("dev", "validation")) for split in glue.dev}
    return Splits(glue.task, train, dev)


def load_hub_test(task: str) -> dict[str, list[Example]]:
    """Download (once) and read the test rows of a GLUE task, "ax" and "wnli" too, by the names of its test splits.
    Raises as `load_hub`."""
    _pyarrow()
    return {split: _glue_split(task, split, labelled=False) for split in glue_task(task, tests=True).test}


def _glue_split(task: str, split: str, labelled: bool = True) -> list[Example]:
    task = glue_task(task, tests=True).task
    folder, columns = _GLUE[task.name]
    examples = []
    for where, row in _rows(GLUE, folder, split, (*columns, "label", "idx")):
        texts, label = [row[column] for column in columns], row["label"]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"{where}: got {shorten(texts)}, expected text in {' and '.join(columns)}")
        if labelled:
            task.check_label(where, label)
        examples.append(Example(*texts, label=label if labelled else None, id=str(row["idx"])))
    if not examples:
        raise InputError(f"{GLUE} {folder} {split}: got no rows, expected at least one")
    return examples


def _squad_split(task: str, split: str) -> list[squad.Question]:
    repository, folder = _SQUAD[task]
    questions, contexts = [], {}
    for where, row in _rows(repository, folder, split, ("id", "question", "context", "answers")):
        context = squad.parse_text(where, row, "context")
        context = contexts.setdefault(context, context)  # one string for all questions of a paragraph
        entry = {**row, "answers": _answers(where, row["answers"])}
        null_answers = TASKS[task].null_answers
        questions.append(squad.parse_question(where, len(questions), entry, context, True, null_answers))
    return squad.check_questions(f"{repository} {split}", questions)


def _answers(where: str, columns) -> list[dict]:
    """Return the answers of one question, which stand in two columns, as the official files have them."""
    lists = [columns.get(key) for key in ("text", "answer_start")] if isinstance(columns, dict) else []
    if not lists or not all(isinstance(values, list) for values in lists) or len(set(map(len, lists))) != 1:
        raise InputError(f"{where}: got answers {shorten(columns)}, expected as many texts as starts")
    return [{"text": text, "answer_start": start} for text, start in zip(*lists)]


def _rows(repository: str, folder: str, split: str, columns: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """Yield (file and 0-based row, {column: value}) for each row of a split. Raises InputError that names the file."""
    pattern = f"{folder}/{split}-*.parquet"
    pyarrow = _pyarrow()
    paths = sorted(data_folder(repository, [pattern]).glob(pattern))
    if not paths:  # what is cached of a Hub that does not answer may be another task
        raise RunError(f"{repository}: {pattern} is not in huggingface_hub's cache, and the Hub does not answer")
    for path in paths:
        try:
            file, number = pyarrow.parquet.ParquetFile(path), itertools.count()
            missing = [column for column in columns if column not in file.schema_arrow.names]
            if missing:
                raise InputError(f"{path}: got no column {missing[0]!r}, expected {', '.join(columns)}")
            for batch in file.iter_batches(columns=list(columns)):
                yield from ((f"{path}: row {next(number)}", row) for row in batch.to_pylist())
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path}: not a Parquet file that can be read: {shorten(str(error), 160)}") from None


def _pyarrow():
    """Return the library. Raises InputError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError("--data hub needs pyarrow: pip install 'progtuning[hub]'") from None
    return pyarrow
