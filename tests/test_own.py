"""Files of one's own: the same rows from every form, a file divided in two, and what is said of what was read."""

import csv
import gzip
import io
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from progtuning.base.errors import InputError
from progtuning.data.own import load_dev, load_own, split_rows
from progtuning.data.squad import read_questions
from progtuning.data.tables import Example, read_table
from progtuning.run.saved import load_checkpoint, load_held_out
from progtuning.settings.train import DataConfig
from tests.hub_server import HubServer
from tests.test_cli import FAST, call, refused
from tests.test_hub import run_python

parquet = pytest.importorskip("pyarrow.parquet")
pyarrow = pytest.importorskip("pyarrow")
arrow_csv = pytest.importorskip("pyarrow.csv")

TRAIN = [
    {"text": 'the film, "good"', "label": "like"},
    {"text": "a sad, poor cast", "label": "dislike"},
    {"text": "nice and great", "label": "like"},
    {"text": "awful é\u2028story", "label": "dislike"},
]
DEV = [{"text": "a good plot", "label": "like"}, {"text": "bad, bad", "label": "dislike"}]
FORMS = ["csv", "tsv", "jsonl", "parquet", "csv.gz", "tsv.gz", "jsonl.gz"]


def as_bytes(rows: list[dict], form: str) -> bytes:
    if form.endswith(".gz"):
        return gzip.compress(as_bytes(rows, form.removesuffix(".gz")))
    if form == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), out := io.BytesIO())
        return out.getvalue()
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    out = io.StringIO(newline="")
    if form == "csv":
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    else:
        out.write("\n".join("\t".join(cells) for cells in [rows[0], *(row.values() for row in rows)]) + "\n")
    return out.getvalue().encode()


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_in_every_form_holds_the_same_rows(tmp_path, form):
    (tmp_path / f"train.{form}").write_bytes(as_bytes(TRAIN, form))
    (tmp_path / f"validation.{form}").write_bytes(as_bytes(DEV, form))
    splits = load_own(tmp_path)
    assert splits.task.labels == ("dislike", "like")
    assert splits.train == [
        Example(row["text"], None, int(row["label"] == "like"), str(i)) for i, row in enumerate(TRAIN)
    ]
    assert [(row.text, row.label) for row in splits.dev["dev"]] == [("a good plot", 1), ("bad, bad", 0)]
    assert load_dev(tmp_path, ("dislike", "like")).dev == splits.dev


def test_a_data_set_of_the_hub_holds_the_same_rows_and_its_numbered_classes_have_names(tmp_path):
    feature = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["dislike", "like"]}}}}
    files = {}
    for split, rows in (("train", TRAIN), ("validation", DEV)):
        table = pyarrow.Table.from_pylist([row | {"label": int(row["label"] == "like")} for row in rows])
        table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
        parquet.write_table(table, out := io.BytesIO())
        files[f"data/{split}-00000-of-00001.parquet"] = out.getvalue()
    (tmp_path / "train.csv").write_bytes(as_bytes(TRAIN, "csv"))
    (tmp_path / "dev.csv").write_bytes(as_bytes(DEV, "csv"))
    program = (
        "import sys; from progtuning.data.own import load_own; a, b = map(load_own, sys.argv[1:]); "
        "assert (a.train, a.dev, a.task.labels) == (b.train, b.dev, b.task.labels); print(a.task.name)"
    )
    with HubServer() as server:
        server.add("some/opinions", files, kind="dataset")
        done = run_python(tmp_path, "-c", program, "hub:some/opinions", tmp_path, HF_ENDPOINT=server.url)
    assert done.stdout == "some/opinions\n", done.stderr


def test_a_run_on_any_form_ends_with_the_same_bits(tiny_folder, tmp_path):
    ends = set()
    for form in ("csv", "jsonl.gz", "parquet"):
        (tmp_path / f"opinions.{form}").write_bytes(as_bytes((TRAIN + DEV) * 4, form))
        arguments = [
            "--task",
            "classification",
            "--data",
            tmp_path / f"opinions.{form}",
            "--dev-share",
            "0.5",
            "--json",
        ]
        output = tmp_path / f"run.{form}"
        status, out, err = call("train", "--model", tiny_folder, *arguments, *FAST, "--output-dir", output)
        assert status == 0, err
        ends.add(((output / "model.safetensors").read_bytes(), json.dumps(json.loads(out)["metrics"])))
        same = call("evaluate", "--checkpoint", output, *arguments, "--device", "cpu")
        assert json.loads(same[1])["metrics"] == json.loads(out)["metrics"], same[2]
    assert len(ends) == 1


# Line ends within a cell are those of the file: pyarrow and Python's csv agree on them.
CELLS = st.text(st.sampled_from('ab ",\n\r\té\u2028;'), min_size=1, max_size=8)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6))
def test_csv_is_read_as_pyarrow_reads_it(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(as_bytes([{"text": text, "text_pair": pair} for text, pair in rows], "csv"))
    options = arrow_csv.ParseOptions(newlines_in_values=True)
    strings = arrow_csv.ConvertOptions(
        column_types={"text": pyarrow.string(), "text_pair": pyarrow.string()}, strings_can_be_null=False
    )
    expected = arrow_csv.read_csv(path, parse_options=options, convert_options=strings).to_pylist()
    found = [{"text": row.text, "text_pair": row.text_pair} for row in read_table(path, require_label=False)[1]]
    assert found == expected == [{"text": text, "text_pair": pair} for text, pair in rows]


def test_an_error_in_csv_names_the_line_in_which_the_row_begins(tmp_path):
    (path := tmp_path / "a.csv").write_text('text,label\n"two\nlines",a\nx,b,c\n')
    assert error_of(read_table, path) == f"{path}: line 4: got 3 columns, expected 2 (text, label)"
    path.write_text('text,label\nx,a\n"two\nlines,a\n')
    assert error_of(read_table, path).startswith(f"{path}: line 3: got a row that is no CSV (unexpected end of data)")
    path.write_text("text,label\nx,a\ntext,label\n")
    assert error_of(read_table, path).startswith(f"{path}: line 3: got the header again")


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet"])
def test_columns_have_the_names_that_are_given_and_others_are_passed_over(tmp_path, form):
    (path := tmp_path / f"a.{form}").write_bytes(
        as_bytes(
            [{"subject": row["text"], "queue": row["label"], "text": "not this", "id": "7"} for row in TRAIN], form
        )
    )
    reading = DataConfig(text_column="subject", label_column="queue")
    labels, rows = read_table(path, reading=reading)
    assert (labels, [row.text for row in rows]) == (("dislike", "like"), [row["text"] for row in TRAIN])
    assert rows[0].text_pair is None and rows[1].id == "1"
    message = error_of(read_table, path)
    assert message.startswith(f"{path}") and "expected text, label" in message
    assert "expected topic, label" in error_of(read_table, path, reading=DataConfig(text_column="topic"))


NAMED = DataConfig(text_column="body", label_column="queue")


def table(path, *rows: str):
    """Write a table whose rows are given with commas between cells, in the form that the name of `path` says."""
    path.write_text("".join(row.replace(",", "," if path.suffix == ".csv" else "\t") + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_wanted_column_stands_once_and_where_others_are_passed_over_these_may_repeat(tmp_path, name):
    path = table(tmp_path / name, "body,note,queue,note,,", "good,1,x,2,,", "bad,3,y,4,?,")
    assert [(row.text, row.label) for row in read_table(path, reading=NAMED)[1]] == [("good", 0), ("bad", 1)]
    for twice, reading, header in (
        ("body", NAMED, "body,queue,body"),
        ("text_pair", NAMED, "body,text_pair,queue,text_pair"),
        ("text", DataConfig(), "text,text,label"),
        ("id", DataConfig(), "text,id,id,label"),
    ):
        path = table(tmp_path / name, header, *["a,b,c,d"[: 2 * len(header.split(",")) - 1]] * 2)
        assert (
            error_of(read_table, path, reading=reading)
            == f"{path}: line 1: column {twice!r} stands twice, expected once"
        )


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_columns_without_a_name_at_the_end_of_a_header_are_passed_over_where_nothing_stands_in_them(tmp_path, name):
    path = table(tmp_path / name, "text,label,, ", "good,x,,", "bad,y, ,")
    for reading in (DataConfig(), DataConfig(text_column="text")):
        assert [row.text for row in read_table(path, reading=reading)[1]] == ["good", "bad"]
    path = table(path, "text,label,,", "good,x,,", "bad,y,a pair,")
    expected = f"{path}: line 3: got 'a pair' in a column without a name, expected nothing there"
    assert error_of(read_table, path) == expected
    assert len(read_table(path, reading=DataConfig(text_column="text"))[1]) == 2
    assert "of which '' is unknown" in error_of(read_table, table(path, ",text,label", "0,good,x"))
    assert "got the header again (text, label, '')" in error_of(read_table, table(path, *["text,label,", "a,x,"] * 2))


QUOTING = "quoting is not read in TSV, but in CSV"


def test_quoted_cells_of_a_tsv_stay_as_they_are_and_are_said_once_with_their_number_and_the_first_line(
    tmp_path, caplog
):
    texts = ["plain", 'he said "x"', 'a "b" c', '"good" and "bad"', '"', 'x"y"']
    with open(path := tmp_path / "a.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["text", "label"], *([text, "x"] for text in texts)])
    rows = read_table(path)[1]
    assert [row.text for row in rows[:3]] == ["plain", '"he said ""x"""', '"a ""b"" c"']
    assert caplog.messages == [
        f"{path}: 5 cells, the first in line 3, have quotation marks around them, read as text: {QUOTING}"
    ]
    caplog.clear()
    path.write_text('text\tlabel\nsay "x"\tx\n"\tx\n"a" or "b"\tx\n"""\tx\nit\'s "\tx\n')
    assert len(read_table(path)[1]) == 5 and not caplog.messages
    path.write_text('body\tnote\nplain\t"n"\n')  # of a column that is passed over nothing is said
    assert read_table(path, require_label=False, reading=DataConfig(text_column="body")) and not caplog.messages


@pytest.mark.parametrize("content, message", [
    ('"text"\t"label"\n"a"\t"x"\n', """line 1: got columns ['"text"', '"label"'], of which none is 'text', expected"""),
    ('text\tlabel\n"a\nb"\tx\n', "line 2: got 1 tab-separated columns, expected 2 (text, label)"),
    ('text\tlabel\n"a\tb"\tx\n', "line 2: got 3 tab-separated columns, expected 2 (text, label)"),
], ids=["a header", "a line end", "a tab"])  # fmt: skip
def test_a_tsv_that_cannot_be_read_for_its_quoting_says_so(tmp_path, content, message):
    (path := tmp_path / "a.tsv").write_text(content)
    error = error_of(read_table, path)
    assert error.startswith(f"{path}: {message}") and error.endswith(f"; {QUOTING}")
    path.write_text(content.replace('"', ""))
    assert "quoting" not in (error_of(read_table, path) if "line 1" not in message else "")


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_the_column_that_is_wrong_is_named_however_wide_the_file_is(tmp_path, form):
    wide = {f"a long name of column {i}": "x" for i in range(50)}
    (path := tmp_path / f"a.{form}").write_bytes(as_bytes([{"text": "a", "label": "x", "text_b": "b"} | wide], form))
    assert "of which 'text_b' is unknown, expected text, label" in error_of(read_table, path)
    assert "of which none is 'queue', expected text, queue" in error_of(
        read_table, path, reading=DataConfig(label_column="queue")
    )


def test_options_of_ones_own_files_are_refused_where_they_say_nothing(tiny_folder, tmp_path):
    assert "--text-column" in error_of(DataConfig, text_column="a", label_column="a")
    assert "exclude each other" in error_of(DataConfig, dev_share=0.5, dev_split="test")
    (path := tmp_path / "a.csv").write_bytes(as_bytes(TRAIN, "csv"))
    assert "--train-split and --dev-split are for a folder" in error_of(load_own, path, DataConfig(dev_split="a"))
    glue = ["--task", "sst-2", "--data", tmp_path, "--text-column", "a"]
    assert "--text-column" in refused(*call("train", "--model", tiny_folder, *glue, "--output-dir", tmp_path / "out"))


def test_files_that_are_broken_are_one_line(tmp_path):
    whole = as_bytes(TRAIN, "csv.gz")
    for content in (whole[:-12], b"text,label\n", whole[:20] + b"\0" * 30):
        (path := tmp_path / "a.csv.gz").write_bytes(content)
        assert error_of(read_table, path).startswith(f"{path}: cannot be read: ")
    (path := tmp_path / "a.parquet").write_bytes(as_bytes(TRAIN, "csv"))
    assert error_of(read_table, path).startswith(f"{path}: not a Parquet file that can be read: ")


ROWS = st.lists(st.builds(Example, st.sampled_from("abcdefgh"), st.none(), st.integers(0, 2)), max_size=60)


@given(ROWS, st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9]), st.integers(0, 99))
def test_a_file_is_divided_class_by_class_and_equal_texts_are_on_one_side(rows, share, seed):
    train, dev = split_rows(rows, share, seed)
    assert Counter(train + dev) == Counter(rows) and (train, dev) == split_rows(rows, share, seed)
    assert not {row.text for row in train} & {row.text for row in dev}
    unique = [Example(str(i), None, row.label) for i, row in enumerate(rows)]
    train, dev = split_rows(unique, share, seed)
    wanted, kept = Counter(row.label for row in unique), Counter(row.label for row in dev)
    assert all(kept[label] == min(round(share * count), count - 1) for label, count in wanted.items())
    places = [unique.index(row) for row in train]
    assert places == sorted(places)


def test_before_training_it_is_said_what_was_read(tiny_folder, tmp_path):
    train = [*TRAIN, {"text": " ", "label": "like"}, {"text": "good " * 30, "label": "like"}]
    (tmp_path / "train.csv").write_bytes(as_bytes(train, "csv"))
    (tmp_path / "dev.csv").write_bytes(as_bytes([*DEV, TRAIN[2]], "csv"))
    arguments = ["--model", tiny_folder, "--task", "classification", "--data", tmp_path, *FAST]
    status, _, err = call("train", *arguments, "--output-dir", tmp_path / "run")
    assert status == 0, err
    lines = err.splitlines()
    start = lines.index("train: 6 rows: dislike 2, like 4")
    assert lines[start + 1].endswith("32 the longest; 1 rows cut to --max-length 16; 1 empty texts")
    assert lines[start + 2] == "dev: 3 rows: dislike 1, like 2"
    assert lines[start + 4] == "  1 of its texts stand in train too"


def test_evaluate_holds_out_what_the_run_did_and_refuses_to_measure_what_it_trained_on(tiny_folder, tmp_path):
    (path := tmp_path / "a.csv").write_bytes(as_bytes((TRAIN + DEV) * 4, "csv"))
    data = ["--task", "classification", "--data", path]
    divided = ["--dev-share", "0.4", "--split-seed", "7"]
    run = tmp_path / "run"
    status, out, err = call("train", "--model", tiny_folder, *data, *FAST, *divided, "--output-dir", run, "--json")
    assert status == 0, err
    summary = json.loads(out)
    assert summary["division"] == {"dev_share": 0.4, "split_seed": 7}

    def evaluate(*options):
        return call("evaluate", "--checkpoint", run, *data, *options, "--device", "cpu", "--json")

    for options in ([], divided):
        assert json.loads(evaluate(*options)[1])["metrics"] == summary["metrics"]
    checkpoint = load_checkpoint(run)
    for reading, rows in ((DataConfig(), summary["dev_rows"]["dev"]), (DataConfig(dev_share=1), len(TRAIN + DEV) * 4)):
        assert len(load_held_out("classification", str(path), checkpoint, reading).dev["dev"]) == rows
    for options in (["--dev-share", "0.3"], ["--split-seed", "3"], ["--dev-share", "0.4"]):
        status, out, err = evaluate(*options)
        assert (status, out) == (2, "") and "--dev-share 0.4 and --split-seed 7 divided the rows of the run" in err
    (tmp_path / "folder").mkdir()  # rows of its own to be measured on are no part of what was divided
    (tmp_path / "folder" / "dev.csv").write_bytes(as_bytes(DEV, "csv"))
    assert len(load_held_out("classification", str(tmp_path / "folder"), checkpoint).dev["dev"]) == len(DEV)
    (run / "summary.json").write_text(json.dumps(summary | {"division": {"dev_share": "0.4"}}))
    status, _, err = evaluate()
    assert status == 2 and "expected the summary of a run of train" in err


def test_evaluate_refuses_a_file_that_the_runs_division_would_divide_otherwise(tiny_folder, tmp_path):
    """A row more or less, or another order, and rows that the run trained on would be measured in silence."""
    rows = [{"text": f"{word} film {number}", "label": word} for number in range(20) for word in ("good", "bad")]
    path, run = tmp_path / "a.csv", tmp_path / "run"
    path.write_bytes(as_bytes(rows, "csv"))
    data = ["--task", "classification", "--data", path]
    assert call("train", "--model", tiny_folder, *data, *FAST, "--output-dir", run)[0] == 0

    def evaluate(*options):
        return call("evaluate", "--checkpoint", run, *data, *options, "--device", "cpu", "--json")

    status, out, err = evaluate()
    assert (status, json.loads(out)["rows"]) == (0, {"dev": 8})
    assert f"{path}: 8 of 40 rows, held out by --dev-share 0.2, are measured; --dev-share 1 measures all." in err
    for changed in (rows[1:], [*rows, {"text": "good", "label": "good"}], rows[::-1], [*rows[:-1], rows[0]]):
        path.write_bytes(as_bytes(changed, "csv"))
        line = refused(*evaluate())
        assert "--dev-share 0.2 holds other rows of this file out than the run did" in line
        status, out, err = evaluate("--dev-share", "1")
        assert (status, json.loads(out)["rows"]) == (0, {"dev": len(changed)}) and "held out" not in err
    assert evaluate("--max-length", "12")[0] == 0, "whose rows are cut otherwise, so that nothing can be compared"


def test_a_file_is_measured_whole_where_the_run_divided_none(tiny_folder, tmp_path):
    for name, rows in (("train", TRAIN), ("dev", DEV)):
        (tmp_path / f"{name}.csv").write_bytes(as_bytes(rows * 4, "csv"))
    data, run = ["--task", "classification", "--data"], tmp_path / "run"
    assert call("train", "--model", tiny_folder, *data, tmp_path, *FAST, "--output-dir", run)[0] == 0
    base = ["evaluate", "--checkpoint", run, *data]
    status, out, err = call(*base, tmp_path / "dev.csv", "--device", "cpu", "--json")
    assert (status, json.loads(out)["rows"]) == (0, {"dev": 4 * len(DEV)}) and "held out" not in err
    status, out, err = call(*base, tmp_path, "--dev-share", "0.5", "--device", "cpu", "--json")
    assert status == 0 and "Whether the model trained on them is not known." in err


def test_compare_and_probe_read_a_file_by_its_columns(tiny_folder, tmp_path):
    rows = [{"body": row["text"], "queue": row["label"]} for row in (TRAIN + DEV) * 4]
    (tmp_path / "a.csv").write_bytes(as_bytes(rows, "csv"))
    columns = ["--text-column", "body", "--label-column", "queue", "--dev-share", "0.5"]
    shared = ["--model", tiny_folder, "--task", "classification", "--data", tmp_path / "a.csv", *columns]
    shared += ["--epochs", "1", "--batch-size", "8", "--device", "cpu", "--json"]
    grid = ["--schedules", "full", "--budgets", "1", "--lrs", "5e-3", "--seeds", "1"]
    status, out, err = call("compare", *shared, *grid, "--output-dir", tmp_path / "compare")
    assert status == 0 and "accuracy" in out, err
    status, out, err = call("probe", *shared, "--lr", "5e-3", "--output-dir", tmp_path / "probe")
    assert status == 0 and "accuracy" in out, err


def times(unit: str, value: int) -> bytes:
    """A Parquet file with a column of times beside the texts, which a person did not ask for."""
    texts = [f"film {i}" for i in range(40)]
    columns = {
        "text": texts,
        "label": ["a", "b"] * 20,
        "when": pyarrow.array([value] * 40, pyarrow.type_for_alias(unit)),
    }
    parquet.write_table(pyarrow.table(columns), out := io.BytesIO())
    return out.getvalue()


def broken_texts() -> bytes:
    offsets = pyarrow.py_buffer(np.arange(0, 82, 2, dtype=np.int32))
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 40, [None, offsets, pyarrow.py_buffer(b"\xff\xfe" * 40)])
    parquet.write_table(pyarrow.table({"text": texts, "label": ["a", "b"] * 20}), out := io.BytesIO())
    return out.getvalue()


def two_labels() -> bytes:
    columns = [pyarrow.array(["good film"] * 40), pyarrow.array(["a", "b"] * 20), pyarrow.array(["x"] * 39 + ["y"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, ["text", "label", "label"]), out := io.BytesIO())
    return out.getvalue()


@pytest.mark.parametrize("content, message", [
    (two_labels(), "got more than one column 'label', expected one"),
    (times("timestamp[ns]", 1), "not a Parquet file that can be read: Nanosecond resolution"),
    (times("timestamp[us]", 2**60), "not a Parquet file that can be read: date value out of range"),
    (broken_texts(), "not a Parquet file that can be read: 'utf-8' codec"),
])  # fmt: skip
def test_what_python_cannot_hold_of_a_parquet_file_is_one_line_that_names_it(content, message, tmp_path):
    (tmp_path / "rows.parquet").write_bytes(content)
    error = error_of(load_own, tmp_path / "rows.parquet")
    assert error.startswith(str(tmp_path / "rows.parquet")) and message in error and "\n" not in error
    columns = DataConfig(text_column="text", label_column="label")  # where these are named, others are not read
    if b"when" in content:
        assert len(load_own(tmp_path / "rows.parquet", columns).train) == 32


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_value_that_is_null_is_said_where_one_is_due_and_is_absent_elsewhere(tmp_path, form):
    def written(**changes):
        rows = [{"text": "a", "text_pair": "b", "label": "x", "id": "7"}] * 2 + [changes]
        (path := tmp_path / f"a.{form}").write_bytes(as_bytes(rows, form))
        return path

    whole = {"text": "a", "text_pair": "b", "label": "y", "id": "8"}
    place = "row 2" if form == "parquet" else "line 3"
    path = written(**whole | {"label": None})
    assert error_of(read_table, path) == f"{path}: {place}: label is null, expected a name or a number"
    assert len(read_table(path, require_label=False)[1]) == 3
    path = written(**whole | {"text": None})
    for asked in ({}, {"require_label": False}):
        assert error_of(read_table, path, **asked) == f"{path}: {place}: text is null, expected a text"
    path = written(**whole | {"text_pair": None})
    reading = DataConfig(pair_column="text_pair")
    assert error_of(read_table, path, reading=reading) == f"{path}: {place}: text_pair is null, expected a text"
    assert read_table(written(**whole | {"id": None}))[1][2].id == "2"
    (path := tmp_path / f"b.{form}").write_bytes(as_bytes([{"question": "who?", "context": None}], form))
    assert error_of(read_questions, path).endswith(": context is null, expected a text")
    (path := tmp_path / f"c.{form}").write_bytes(as_bytes([{"body": None, "queue": None}], form))
    reading = DataConfig(text_column="body", label_column="queue")
    assert "body is null, expected a text" in error_of(read_table, path, reading=reading)
    (path := tmp_path / f"c.{form}").write_bytes(as_bytes([{"body": "a", "queue": None}], form))
    assert "queue is null, expected a name or a number" in error_of(read_table, path, reading=reading)


def test_a_file_that_cannot_be_divided_says_why(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"film {i},{i / 10}\n" for i in range(100)))
    line = error_of(load_own, tmp_path / "rows.csv", DataConfig(), regression=False)
    assert "100 rows in 100 classes are too few to hold 0.2 of each out" in line and "--task regression" in line
    for share in (0.0, 1.0):
        line = error_of(load_own, tmp_path / "rows.csv", DataConfig(dev_share=share))
        assert line.startswith("--dev-share must be between 0 and 1")


def test_a_packed_file_is_one_whatever_the_case_of_its_name(tmp_path):
    content = b"text,label\n" + b"".join(b"good %d,a\nbad %d,b\n" % (i, i) for i in range(5))
    (tmp_path / "ROWS.CSV.GZ").write_bytes(gzip.compress(content))
    (tmp_path / "rows.csv").write_bytes(content)
    upper, lower = (load_own(tmp_path / name, DataConfig(dev_share=0.5)) for name in ("ROWS.CSV.GZ", "rows.csv"))
    assert list(upper.train) == list(lower.train)


def test_predict_refuses_what_evaluate_refuses(tiny_folder, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"good {i},a\nbad {i},b\n" for i in range(20)))
    run = ["--task", "classification", "--data", tmp_path / "rows.csv", "--output-dir", tmp_path / "run", *FAST]
    assert call("train", "--model", tiny_folder, *run)[0] == 0
    (tmp_path / "new.csv").write_text("text\ngood\n")
    more = ["--input", tmp_path / "new.csv", "--output", "-", "--device", "cpu", "--n-best", "3"]
    assert "--n-best is for --task squad or squad_v2" in refused(
        *call("predict", "--checkpoint", tmp_path / "run", *more)
    )
