"""Data sets of the Hugging Face Hub, in Parquet, which the extra `hub` reads.

GLUE and SQuAD are nyu-mll/glue, rajpurkar/squad and rajpurkar/squad_v2. Their rows are those of the official files. A
class is the same number as here, and -1 in the test files of GLUE. Of any other data set the files of a split are
found by their names (`split_files`).
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from progtuning.base.errors import InputError, RunError
from progtuning.base.sources import data_folder
from progtuning.data import squad
from progtuning.data.glue import FOLDERS, glue_task, is_task
from progtuning.data.parquet import parquet_rows, pyarrow
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
_NAME = re.compile(r"hub:([^@:]+/[^@:]+)(@[^@:]+)?(?::(\w[\w.-]*))?")
_CONVERTED = "@refs/convert/parquet"  # the branch in which the Hub has a copy in Parquet of what is written otherwise
_REST = ("-*.parquet", ".parquet", "/*.parquet")
_SQUAD = {"squad": ("rajpurkar/squad", "plain_text"), "squad_v2": ("rajpurkar/squad_v2", "squad_v2")}


def load_hub(task: str) -> Splits:
    """Download (once) and read the training and held-out rows of a GLUE task, "squad" or "squad_v2".

    Raises InputError where the task is unknown, pyarrow is missing or a file is not what was expected, and RunError
    where network or disk fail.
    """
    pyarrow("--data hub")
    if task in _SQUAD:
        train, dev = (_squad_split(task, split) for split in ("train", "validation"))
        return Splits(TASKS[task], train, {"dev": dev})
    glue, train = glue_task(task), _glue_split(task, "train")
    dev = {split: _glue_split(task, split.replace("dev", "validation")) for split in glue.dev}
    return Splits(glue.task, train, dev)


def dataset_of(task: str, data: str | None) -> dict[str, str] | None:
    """Return what the Hub calls the data of a task, as its metadata have it; None where it is not the Hub's.

    That is "name", "type" (the repository), and where there is one "config", "revision", and the "split" held out.
    """
    if is_task(task):
        name = glue_task(task).task.name
        return {"name": f"GLUE {FOLDERS[name]}", "type": GLUE, "config": _GLUE[name][0], "split": "validation"}
    if task in _SQUAD:
        repository, config = _SQUAD[task]
        return {"name": task, "type": repository, "config": config, "split": "validation"}
    if not (match := _NAME.fullmatch(data or "")):
        return None
    repository, revision, config = match.groups()
    found = {"name": repository, "type": repository, "config": config, "revision": revision and revision[1:]}
    return {key: value for key, value in found.items() if value}


def load_hub_test(task: str) -> dict[str, list[Example]]:
    """Download (once) and read the test rows of a GLUE task, "ax" and "wnli" too, by the names of its test splits.
    Raises as `load_hub`."""
    pyarrow("--data hub")
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
    paths = sorted(data_folder(repository, [pattern]).glob(pattern))
    if not paths:  # what is cached of a Hub that does not answer may be another task
        raise _not_cached(repository, pattern)
    for path in paths:
        yield from parquet_rows(path, columns, required=columns)


def _not_cached(repository: str, pattern: str) -> RunError:
    return RunError(f"{repository}: {pattern} is not in huggingface_hub's cache, and the Hub does not answer")


def split_files(data: str, splits: Sequence[str]) -> list[Path]:
    """Download (once) and return the Parquet files of the one of `splits` that a data set of the Hub has, in order.

    `data` is "hub:org/name[@revision][:config]". The files are the data set's own, else, unless there is a revision,
    those of the Hub's copy: data/SPLIT-*.parquet, SPLIT-*.parquet or default/SPLIT/*.parquet; of a configuration
    CONFIG/SPLIT-*.parquet or CONFIG/SPLIT/*.parquet. Raises as `load_hub` does.
    """
    pyarrow(f"--data {data}")
    if not (match := _NAME.fullmatch(data)):
        raise InputError(f"--data must be hub:org/name[@revision][:config], got {data!r}")
    repository, revision, config = match.groups()
    folders = ("data/", "default/", "") if config is None else (f"{config}/",)
    patterns = {split: [f"{folder}{split}{rest}" for folder in folders for rest in _REST] for split in splits}
    everything, places = [one for some in patterns.values() for one in some], [revision or "", _CONVERTED]
    for place in places[:1] if revision else places:
        try:
            folder = data_folder(repository + place, everything)
        except InputError as error:
            refused = error
            continue
        found = {split: sorted({path for one in patterns[split] for path in folder.glob(one)}) for split in splits}
        if found := {split: paths for split, paths in found.items() if paths}:
            return one_split(f"--data {data}", found)
        refused = _not_cached(repository + place, everything[0])
    raise refused


def one_split(where: str, found: dict[str, list[Path]]) -> list[Path]:
    """Return the files of the one split that was found. Raises InputError, beginning with `where`, for several."""
    if len(found) > 1:
        raise InputError(f"{where}: got {' and '.join(found)} to hold out, expected --dev-split to name one")
    return next(iter(found.values()))
