"""The GLUE benchmark (Wang et al., 2019, arXiv 1804.07461), all tasks but WNLI, from the official TSV folders.

Of WNLI and of the diagnostic set AX a submission has predictions too, so their test rows are read. A model of MNLI
predicts AX. WNLI's training rows mislead a model: every row has the majority class, not_entailment, 65 % of the test
rows (Section 3.3 there).

The files have no quoting. Columns are found by the names in the header, so that MNLI's 12 (train), 16 (dev) and 10
(test) need no rule of their own; CoLA's train and dev files have no header. Class names and their order are those of
the data set nyu-mll/glue on the Hugging Face Hub. `file_labels` are the same classes as the files write them, and as a
submission must.

The official QQP training file has a few rows broken by a line feed within a question; they are passed over, as in
nyu-mll/glue, which leaves 363,846. In every other file a wrong number of columns is an error.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from progtuning.base.errors import InputError
from progtuning.data.tables import Example, Header, check_file, read_lines, tsv_rows
from progtuning.data.task import Classes, Numbers, Splits

_MAX_BROKEN_ROWS = 32


@dataclass(frozen=True)
class GlueTask:
    """A task and the layout of its files. Regression has no `file_labels`."""

    task: Classes | Numbers
    text: str  # name of the column
    text_pair: str | None = None
    label: str = "label"
    file_labels: tuple[str, ...] = ()
    bounds: tuple[float, float] = (-math.inf, math.inf)  # of the numbers of a submission
    index: str = "index"  # the column of official row numbers, where the file has it
    columns: tuple[str, ...] | None = None  # of train and dev files without a header
    dev: tuple[str, ...] = ("dev",)
    test: tuple[str, ...] = ("test",)
    test_names: tuple[str, ...] = ()  # of the test file, the first that there is; none: that of the split
    constant: int | None = None  # the class that every row of a submission has; None: what a model predicts
    max_broken_rows: int = 0


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")

TASKS = {
    "cola": GlueTask(
        Classes("cola", ("unacceptable", "acceptable"), ("matthews",)),
        text="sentence",
        file_labels=_BINARY,
        columns=("source", "label", "mark", "sentence"),
    ),
    "sst-2": GlueTask(Classes("sst-2", ("negative", "positive"), ("accuracy",)), text="sentence", file_labels=_BINARY),
    "mrpc": GlueTask(
        Classes("mrpc", ("not_equivalent", "equivalent"), ("f1", "accuracy")),
        text="#1 String",
        text_pair="#2 String",
        label="Quality",
        file_labels=_BINARY,
    ),
    "sts-b": GlueTask(
        Numbers("sts-b", (), ("pearson", "spearman")),
        text="sentence1",
        text_pair="sentence2",
        label="score",
        bounds=(0, 5),
    ),
    "qqp": GlueTask(
        Classes("qqp", ("not_duplicate", "duplicate"), ("f1", "accuracy")),
        text="question1",
        text_pair="question2",
        label="is_duplicate",
        file_labels=_BINARY,
        index="id",
        max_broken_rows=_MAX_BROKEN_ROWS,
    ),
    "mnli": GlueTask(
        Classes("mnli", _NLI, ("accuracy",)),
        text="sentence1",
        text_pair="sentence2",
        label="gold_label",
        file_labels=_NLI,
        dev=("dev_matched", "dev_mismatched"),
        test=("test_matched", "test_mismatched"),
    ),
    "qnli": GlueTask(
        Classes("qnli", _ENTAILMENT, ("accuracy",)), text="question", text_pair="sentence", file_labels=_ENTAILMENT
    ),
    "rte": GlueTask(
        Classes("rte", _ENTAILMENT, ("accuracy",)), text="sentence1", text_pair="sentence2", file_labels=_ENTAILMENT
    ),
}
# What a submission has beside those.
TEST_TASKS = {
    "ax": GlueTask(
        replace(TASKS["mnli"].task, name="ax"),
        text="sentence1",
        text_pair="sentence2",
        file_labels=_NLI,
        test_names=("AX", "diagnostic"),  # as it is published, and as GLUE's script for downloads saves it
    ),
    "wnli": GlueTask(
        Classes("wnli", ("not_entailment", "entailment"), ("accuracy",)),
        text="sentence1",
        text_pair="sentence2",
        file_labels=_BINARY,
        constant=0,
    ),
}
_ALIASES = {"sst2": "sst-2", "stsb": "sts-b"}


def is_task(name: str) -> bool:
    """Say whether `glue_task` knows the name."""
    return _ALIASES.get(name.lower(), name.lower()) in TASKS


def glue_task(name: str, tests: bool = False) -> GlueTask:
    """Return the task of that name, in any case, with `tests` one of TEST_TASKS too; `sst2` and `stsb` are names too.

    Raises InputError for any other.
    """
    tasks, known = TASKS | (TEST_TASKS if tests else {}), _ALIASES.get(name.lower(), name.lower())
    if known not in tasks:
        raise InputError(f"--task must be one of {', '.join(tasks)}, got {name!r}")
    return tasks[known]


# The official folder of each task, beside one another.
FOLDERS = {name: {"cola": "CoLA"}.get(name, name.upper()) for name in TASKS}


def load_glue(name: str, folder: str | Path) -> Splits:
    """Read train.tsv and dev.tsv (MNLI: dev_matched.tsv and dev_mismatched.tsv) of a task's official folder.

    Raises InputError that names the file and its line.
    """
    glue, folder = glue_task(name), Path(folder)
    train = read_glue_file(name, folder / "train.tsv", max_broken_rows=glue.max_broken_rows)
    return Splits(glue.task, train, {split: read_glue_file(name, folder / f"{split}.tsv") for split in glue.dev})


def load_glue_test(name: str, folder: str | Path) -> dict[str, list[Example]]:
    """Read test.tsv (MNLI: test_matched.tsv and test_mismatched.tsv, AX: AX.tsv) of a task's official folder, by split.

    Raises InputError that names the file and its line.
    """
    glue, tests = glue_task(name, tests=True), {}
    for split in glue.test:
        files = [Path(folder) / f"{stem}.tsv" for stem in glue.test_names or (split,)]
        file = next(filter(Path.exists, files), files[0])
        tests[split] = read_glue_file(name, file, labelled=False)
    return tests


def read_glue_file(name: str, path: str | Path, *, labelled: bool = True, max_broken_rows: int = 0) -> list[Example]:
    """Read one official file. Without `labelled`, the format is that of the test files, and every label is None.

    An example's id is the official row number (the columns `index` or `id`) or, in files without one, the 0-based
    number of the row. At most `max_broken_rows` rows with too few columns are passed over. Raises InputError that names
    file and line.
    """
    glue = glue_task(name, tests=not labelled)
    texts = [glue.text] + ([glue.text_pair] if glue.text_pair else [])
    columns = glue.columns if labelled else None
    header = Header([*texts, glue.label] if labelled else texts, [glue.index]) if columns is None else None
    lines = read_lines(check_file(Path(path)))
    rows = tsv_rows(path, lines, columns=columns, header=header, max_short_rows=max_broken_rows)
    label_index = {label: i for i, label in enumerate(glue.file_labels)}
    examples = []
    for number, row in rows:
        label = None
        if labelled:
            where, cell = f"{path}: line {number}", row[glue.label]
            label = glue.task.parse_label(where, cell, label_index)
        pair = row[glue.text_pair] if glue.text_pair else None
        examples.append(Example(row[glue.text], pair, label, row.get(glue.index, str(len(examples)))))
    if not examples:
        raise InputError(f"{path}: line 1: got no rows, expected at least one")
    return examples
