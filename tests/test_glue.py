"""The official GLUE layouts: real files where they are at hand, and written ones for every column position."""

import re
from collections import Counter

import pytest

from progtuning.base.errors import InputError
from progtuning.data.glue import TASKS, TEST_TASKS, glue_task, load_glue, load_glue_test, read_glue_file
from progtuning.data.metrics import METRICS
from progtuning.data.registry import own_name
from progtuning.data.tables import Example

FOLDERS = {
    "cola": "CoLA",
    "sst-2": "SST-2",
    "mrpc": "MRPC",
    "sts-b": "STS-B",
    "qqp": "QQP",
    "mnli": "MNLI",
    "qnli": "QNLI",
    "rte": "RTE",
}


def published_balance(shared_data):
    """Read {file: (rows, balance)} from the table in the data's README."""
    readme = (shared_data / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| glue/(\S+) \| ([\d,]+)[^|]*\|[^|]*\| ([^|]+) \|", readme, flags=re.MULTILINE)
    return {file: (int(rows.replace(",", "")), balance.strip()) for file, rows, balance in table}


@pytest.mark.parametrize("name", FOLDERS)
def test_rows_and_label_balance_of_the_real_files_are_the_published_ones(shared_data, name):
    published = published_balance(shared_data)
    glue = TASKS[name]
    splits = load_glue(name, shared_data / "glue" / FOLDERS[name])
    files = {f"{FOLDERS[name]}/{split}.tsv" for split in ("train", *splits.dev)}
    assert files == {file for file in published if file.startswith(f"{FOLDERS[name]}/")}
    for split, examples in {"train": splits.train, **splits.dev}.items():
        rows, balance = published[f"{FOLDERS[name]}/{split}.tsv"]
        assert len(examples) == rows
        assert all(e.text and (e.text_pair is None) == (glue.text_pair is None) for e in examples)
        if glue.task.head == "regression":
            assert f"mean {sum(e.label for e in examples) / rows:.3f}" == balance
            assert all(0 <= e.label <= 5 for e in examples)
            continue
        counts = {m[1]: int(m[2].replace(",", "")) for m in re.finditer(r"(\w+)[:.]? ([\d,]+)", balance)}
        found = Counter(glue.file_labels[e.label] for e in examples)
        assert len(found) == len(counts) == len(glue.task.labels)
        assert all(
            found[label] == count for start, count in counts.items() for label in found if label.startswith(start)
        )


def test_first_rows_of_the_real_files_are_read_as_published(shared_data):
    glue = shared_data / "glue"
    assert load_glue("cola", glue / "CoLA").train[0] == Example(
        "Our friends won't buy this analysis, let alone the next one we propose.", None, 1, "0"
    )
    assert load_glue("mrpc", glue / "MRPC").dev["dev"][0] == Example(
        "He said the foodservice pie business doesn 't fit the company 's long-term growth strategy .",
        '" The foodservice pie business does not fit our long-term growth strategy .',
        1,
        "0",
    )
    assert load_glue("stsb", glue / "STS-B").train[0] == Example(
        "A plane is taking off.", "An air plane is taking off.", 5.0, "0"
    )
    first = load_glue("mnli", glue / "MNLI").dev["dev_matched"][0]
    assert (first.id, first.text_pair) == ("3344", "The St. Louis Cardinals have always won.")


MNLI = "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|sentence2_parse"
STSB = "index|genre|filename|year|old_index|source1|source2"
# Per task: headers of train, dev and test (columns divided by a bar; None: none), and the 0-based columns of index,
# text, pair and label in train and dev, and in test.
LAYOUTS = {
    "cola": (None, None, "index|sentence", (None, 3, None, 1), (0, 1, None)),
    "sst-2": ("sentence|label", "sentence|label", "index|sentence", (None, 0, None, 1), (0, 1, None)),
    "mrpc": (
        "Quality|#1 ID|#2 ID|#1 String|#2 String",
        "Quality|#1 ID|#2 ID|#1 String|#2 String",
        "index|#1 ID|#2 ID|#1 String|#2 String",
        (None, 3, 4, 0),
        (0, 3, 4),
    ),
    "sts-b": (f"{STSB}|sentence1|sentence2|score",) * 2 + (f"{STSB}|sentence1|sentence2", (0, 7, 8, 9), (0, 7, 8)),
    "qqp": ("id|qid1|qid2|question1|question2|is_duplicate",) * 2 + ("id|question1|question2", (0, 3, 4, 5), (0, 1, 2)),
    "mnli": (
        f"{MNLI}|sentence1|sentence2|label1|gold_label",
        f"{MNLI}|sentence1|sentence2|label1|label2|label3|label4|label5|gold_label",
        f"{MNLI}|sentence1|sentence2",
        (0, 8, 9, -1),
        (0, 8, 9),
    ),
    "qnli": ("index|question|sentence|label",) * 2 + ("index|question|sentence", (0, 1, 2, 3), (0, 1, 2)),
    "rte": ("index|sentence1|sentence2|label",) * 2 + ("index|sentence1|sentence2", (0, 1, 2, 3), (0, 1, 2)),
}


def official_file(path, header, places, rows):
    """Write rows of (index, text, pair, label) to the given columns; every other cell is a decoy."""
    lines = [] if header is None else [header.replace("|", "\t")]
    for row in rows:
        cells = [f"decoy {i}" for i in range(4 if header is None else header.count("|") + 1)]
        for place, value in zip(places, row):
            if place is not None:
                cells[place] = value
        lines.append("\t".join(cells))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("name", LAYOUTS)
def test_text_pair_label_and_index_come_from_the_official_columns(tmp_path, name):
    train, dev, test, places, test_places = LAYOUTS[name]
    glue = TASKS[name]
    labels = list(glue.file_labels) or ["0.000", "3.250", "5.000"]
    rows = [(str(70 + i), f'"text {i}', f"pair\u2028{i} ", label) for i, label in enumerate(labels)]
    official_file(tmp_path / "train.tsv", train, places, rows)
    for split in glue.dev:
        official_file(tmp_path / f"{split}.tsv", dev, places, rows)
    expected = [
        Example(
            text,
            pair if glue.text_pair else None,
            i if glue.file_labels else float(label),
            index if places[0] is not None else str(i),
        )
        for i, (index, text, pair, label) in enumerate(rows)
    ]
    splits = load_glue(name, tmp_path)
    assert splits.train == expected
    assert splits.dev == {split: expected for split in glue.dev}
    assert splits.task is glue.task
    for split in glue.test:
        official_file(tmp_path / f"{split}.tsv", test, test_places, rows)
        examples = read_glue_file(name, tmp_path / f"{split}.tsv", labelled=False)
        assert [(e.id, e.text, e.label) for e in examples] == [(index, text, None) for index, text, _, _ in rows]
        assert [e.text_pair for e in examples] == [e.text_pair for e in expected]


def test_label_names_and_metrics_are_those_of_the_benchmark():
    labels = {name: glue.task.labels for name, glue in TASKS.items()}
    assert labels == {
        "cola": ("unacceptable", "acceptable"),
        "sst-2": ("negative", "positive"),
        "mrpc": ("not_equivalent", "equivalent"),
        "sts-b": (),
        "qqp": ("not_duplicate", "duplicate"),
        "mnli": ("entailment", "neutral", "contradiction"),
        "qnli": ("entailment", "not_entailment"),
        "rte": ("entailment", "not_entailment"),
    }
    metrics = {name: set(glue.task.metrics) for name, glue in TASKS.items()}
    accuracy = {"accuracy"}
    assert metrics == {
        "cola": {"matthews"},
        "sst-2": accuracy,
        "mrpc": {"f1", "accuracy"},
        "sts-b": {"pearson", "spearman"},
        "qqp": {"f1", "accuracy"},
        "mnli": accuracy,
        "qnli": accuracy,
        "rte": accuracy,
    }
    assert set().union(*metrics.values()) <= set(METRICS)


def test_task_names_have_aliases_and_an_unknown_one_names_the_option():
    assert (
        glue_task("SST2") is TASKS["sst-2"]
        and glue_task("stsb") is TASKS["sts-b"]
        and glue_task("MRPC") is TASKS["mrpc"]
    )
    with pytest.raises(InputError, match="^--task must be one of cola, sst-2, .*, rte, got 'wnli'$"):
        glue_task("wnli")


def test_the_diagnostic_set_and_wnli_are_read_for_a_submission_alone(tmp_path):
    table = 'index\tsentence1\tsentence2\n5\ta\tb\n7\t"c\td\n\n'
    expected = {"test": [Example("a", "b", None, "5"), Example('"c', "d", None, "7")]}
    for name, file in (("ax", "diagnostic.tsv"), ("AX", "AX.tsv"), ("wnli", "test.tsv")):
        (tmp_path / file).write_text(table)
        assert load_glue_test(name, tmp_path) == expected
        with pytest.raises(InputError, match=f"^--task must be one of cola, .*, rte, got '{name}'$"):
            load_glue(name, tmp_path)
    (tmp_path / "diagnostic.tsv").write_text(table.replace("5", "6"))
    assert load_glue_test("ax", tmp_path) == expected  # AX.tsv goes before
    with pytest.raises(InputError, match=r"/none/AX.tsv: cannot be read: No such file"):
        load_glue_test("ax", tmp_path / "none")
    with pytest.raises(InputError, match="^--task must be one of cola, .*, rte, ax, wnli, got 'snli'$"):
        load_glue_test("snli", tmp_path)
    assert TEST_TASKS["ax"].task.labels == TASKS["mnli"].task.labels
    assert TEST_TASKS["wnli"].task.labels[TEST_TASKS["wnli"].constant] == "not_entailment"


QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
BROKEN = '7\t1\t2\tOne question?\n"\tAnother question?\t0\n'  # a line feed within question1


def test_broken_rows_of_the_qqp_training_file_are_passed_over_with_a_warning(tmp_path, caplog):
    (tmp_path / "train.tsv").write_text(QQP + "1\t1\t2\ta\tb\t1\n" + BROKEN + "3\t1\t2\tc\td\t0\n")
    (tmp_path / "dev.tsv").write_text(QQP + "1\t1\t2\ta\tb\t1\n")
    assert [e.id for e in load_glue("qqp", tmp_path).train] == ["1", "3"]
    assert caplog.messages == [f"{tmp_path}/train.tsv: 2 rows with fewer than 6 columns passed over"]


def test_broken_rows_elsewhere_and_too_many_of_them_are_errors(tmp_path):
    (tmp_path / "train.tsv").write_text(QQP + "1\t1\t2\ta\tb\t1\n" + BROKEN * 17)
    (tmp_path / "dev.tsv").write_text(QQP + BROKEN)
    with pytest.raises(InputError, match=r"/train.tsv: line 35: got 4 tab-separated columns, expected 6"):
        load_glue("qqp", tmp_path)
    (tmp_path / "train.tsv").write_text(QQP + "1\t1\t2\ta\tb\t1\textra\n")
    with pytest.raises(InputError, match=r"/train.tsv: line 2: got 7 tab-separated columns, expected 6"):
        load_glue("qqp", tmp_path)
    with pytest.raises(InputError, match=r"/dev.tsv: line 2: got 4 tab-separated columns, expected 6"):
        read_glue_file("qqp", tmp_path / "dev.tsv")
    with pytest.raises(InputError, match=r"/t.tsv: line 2: got 3 tab-separated columns, expected 4"):
        (tmp_path / "t.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\n")
        read_glue_file("rte", tmp_path / "t.tsv")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "rte",
            "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tneutral\n",
            "line 2: got label 'neutral', expected one of 'ent",
        ),
        ("sst-2", "sentence\tlabel\na\t2\n", "line 2: got label '2', expected one of '0', '1'"),
        (
            "sst-2",
            "sentence\tlabel\na\t1.0\n",
            "line 2: got label '1.0', expected one of '0', '1'; '1.0' and '1' are one number",
        ),
        (
            "sst-2",
            "sentence\tlabel\na\t1\nsentence\tlabel\nb\t0\n",
            "line 3: got the header again (sentence, label), expected a row",
        ),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n\n1\ta\tb\tentailment\n", "line 3: got 1"),
        ("cola", "gj04\t \t\ta\n", "line 1: got label ' ', expected one of '0', '1'"),
        (
            "cola",
            "index\tsentence\n0\ta\n",
            "line 1: got 2 tab-separated columns, expected 4 (source, label, mark, sentence)",
        ),
        (
            "sts-b",
            f"{STSB}|sentence1|sentence2|score\n0|a|b|c|d|e|f|g|h|nan".replace("|", "\t"),
            "line 2: got 'nan', expected",
        ),
        (
            "qnli",
            "index\tquestion\tsentence\n0\ta\tb\n",
            "line 1: got columns ['index', 'question', 'sentence'], of which none is 'label', expected",
        ),
        ("qnli", "index\tquestion\tsentence\tlabel\n", "line 1: got no rows, expected at least one"),
        ("rte", "", "line 1: got an empty file, expected rows"),
    ],
)
def test_a_bad_glue_file_is_one_line_with_file_and_line(tmp_path, name, content, expected):
    path = tmp_path / "dev.tsv"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_glue_file(name, path)
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_split_is_named(tmp_path):
    table = f"{MNLI}|sentence1|sentence2|label1|gold_label\n0|1|2|3|4|5|6|7|a|b|neutral|neutral\n".replace("|", "\t")
    for split in ("train", "dev_matched"):
        (tmp_path / f"{split}.tsv").write_text(table)
    with pytest.raises(InputError, match=r"/dev_mismatched.tsv: cannot be read: No such file"):
        load_glue("mnli", tmp_path)


def test_a_recipe_knows_a_task_by_any_name_that_train_takes():
    names = {"RTE": "rte", "sst2": "sst-2", "STSB": "sts-b", "classification": "classification", "squad": "squad"}
    assert {name: own_name(name) for name in names} == names
