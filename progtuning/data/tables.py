"""Labelled text from files: lines, and tables of TSV, CSV, JSONL and Parquet.

Every text file is UTF-8 with or without a byte-order mark, its lines end in LF or CRLF, none is longer than
MAX_LINE_BYTES, and it is read line by line, unpacked where its name ends in .gz. A line ends at LF alone: U+2028, form
feed and a lone CR are characters of the text.

    TSV      the first line names the columns; a quotation mark is an ordinary character, and nothing is escaped; where
             cells look as if a writer of CSV had quoted them, the user is told
    CSV      the first row names the columns; what stands between quotation marks may hold commas, line ends and, each
             twice, quotation marks (RFC 4180), up to the 131,072 characters that Python's csv takes
    JSONL    one JSON object a line; null where a text, a label or a named column is due is an error, elsewhere absent
    Parquet  a value is what JSON would have for it; classes that the library datasets has numbered have their names

A blank line is no row in CSV, in JSONL, in a TSV of one column, and at the end of any TSV; the user is told how many
there are between rows. The names of the columns may not stand again among the rows, as they do where files with a
header are joined.

Columns or keys: `text`, `text_pair` (optional), `label`, `id` (optional); any other is an error, because a misspelt
`text_pair` would otherwise be left out in silence, unless the user names the columns: then others are passed over. The
columns without a name that end the header of a spreadsheet are passed over where they are empty or others may be. A
label is a class name or a number. The rules where a file leaves a choice:

    regression   unless the caller decides, where every label is a number and one of them has a fractional part
    label order  by value where every label is a number, else by code point
    several      of --task multi-label: a list in JSONL and Parquet, else names with commas between them, or nothing
    JSONL        numbers of one value (1, 1.0, 1e0) are one class, and true and false the classes "true" and "false"
    spelling     otherwise two labels of one value ("1" and "1.0"), or that are one in Unicode's form NFC, are an error
"""

import csv
import gzip
import io
import itertools
import json
import logging
import math
import operator
import re
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

from progtuning.base.errors import InputError
from progtuning.base.files import RepeatedKey, unique_keys
from progtuning.data.parquet import class_names, parquet_rows
from progtuning.settings.train import DataConfig

MAX_LINE_BYTES = 1 << 20  # a sequence is at most some hundred tokens, so a longer line is not text to classify
_log = logging.getLogger(__name__)
_Line = TypeVar("_Line", str, list[str])  # a line, or its cells
_BOM = b"\xef\xbb\xbf"
SUFFIXES = tuple(f".{kind}{gz}" for kind in ("csv", "tsv", "jsonl") for gz in ("", ".gz")) + (".parquet",)
_KEYS = ("text", "text_pair", "label", "id")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NO_QUOTING = "quoting is not read in TSV, but in CSV"
_MAX_NUMBER = 3.4e38  # losses are computed in float32
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # what JSON's escapes can write and UTF-8 or a tokenizer cannot


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a text or a pair of texts, and its label: the index of a class, a number for regression, for several
    classes 1.0 or 0.0 for each, or None."""

    text: str
    text_pair: str | None = None
    label: int | float | tuple[float, ...] | None = None
    id: str | None = None  # the file's own index, else the 0-based number of the row


@dataclass(frozen=True, slots=True)
class Header:
    """The columns that a table must have, those that it may have, and whether others are passed over or an error."""

    required: Sequence[str]
    optional: Sequence[str] = ()
    takes_others: bool = True

    def columns(self, where: str, cells: list[str], hint: str = "") -> list[str]:
        """Return the names in a header, "" for each column without one at its end. Raises InputError, beginning with
        `where` and ending with `hint`."""
        named = len(cells)
        while named > 1 and not cells[named - 1].strip():
            named -= 1
        self.check(where, "columns", cells[:named], hint)
        return cells[:named] + [""] * (len(cells) - named)

    def check(self, where: str, what: str, names: list[str], hint: str = "") -> None:
        """Raise InputError, beginning with `where`, for names of columns or keys that are not these; it names one."""
        wanted = (*self.required, *self.optional)
        if twice := next((name for name in wanted if names.count(name) > 1), None):
            raise InputError(f"{where}: column {twice!r} stands twice, expected once")
        missing = [name for name in self.required if name not in names]
        unknown = [name for name in names if not self.takes_others and name not in wanted]
        if missing or unknown:
            found = f"none is {missing[0]!r}" if missing else f"{shorten(unknown[0])} is unknown"
            got = f"{where}: got {what} {shorten(names)}, of which {found}"
            raise InputError(f"{got}, expected {self._expected()}{hint}")

    def row(self, where: str, columns: list[str], cells: list[str]) -> dict[str, str]:
        """Return {column: cell} of a row. Raises InputError, beginning with `where`, for the header again, in any case
        and order, and for a cell that no name of a column is above, unless others are passed over."""
        names = [cell.strip("\ufeff ").casefold() for cell in cells]  # of joined files each may begin with such a mark
        if len(columns) > 1 and sorted(names) == sorted(column.casefold() for column in columns):
            raise InputError(f"{where}: got the header again ({_listed(columns)}), expected a row")
        row = dict(zip(columns, cells))
        if "" in row and not self.takes_others:
            beside = next((cell for name, cell in zip(columns, cells) if not name and cell.strip()), None)
            if beside is not None:
                raise InputError(f"{where}: got {shorten(beside)} in a column without a name, expected nothing there")
        return row

    def _expected(self) -> str:
        others = ["others"] if self.takes_others else [name for name in self.optional if name not in self.required]
        names = "--text-column, --pair-column and --label-column"
        if "label" not in self.required:
            names = "--text-column and --pair-column"
        hint = f"; {names} name others" if not self.takes_others and "text" in self.required else ""
        return f"{', '.join(self.required)} (and, if need be, {', '.join(others)}){hint}"


def has_pairs(examples: Sequence[Example]) -> bool:
    """Say whether the rows of one task, each a text or a pair of texts, are pairs."""
    return examples[0].text_pair is not None


def read_table(
    *paths: str | Path,
    labels: tuple[str, ...] | None = None,
    regression: bool | None = None,
    multi_label: bool = False,
    require_label: bool = True,
    reading: DataConfig = DataConfig(),
) -> tuple[tuple[str, ...], list[Example]]:
    """Read a table (`-`: standard input), of one file or several; return the class names (none: regression) and rows.

    What a file is its name says (SUFFIXES), but that what begins with `{` and is no CSV is JSONL; under another name
    the rest is TSV. `labels` are the class names to expect, in the order of their indices, or () for regression; where
    None they are taken from the files, as classes (`regression=False`), as numbers (True) or by the module's rule
    (None). With `multi_label` a row has any number of them. Without `require_label` the files may lack labels, and
    every row's is None. `reading` names the columns. Raises InputError that names file and line.
    """
    rows, names = [], []
    known = {_identity(name): name for name in reversed(labels or ())}  # of twins the first
    required = ("text", "label") if require_label else ("text",)
    if reading.pair_column is not None:
        required += ("text_pair",)
    optional = ("text_pair",) if reading.names_columns else _KEYS
    columns = reading.columns if reading.names_columns else None
    for where, values in itertools.chain(*(keyed_rows(path, required, optional, columns) for path in paths)):
        rows.append(Example(values["text"], values.get("text_pair"), None, values.get("id", str(len(rows)))))
        if (rows[-1].text_pair is None) != (rows[0].text_pair is None):
            raise InputError(
                f"{where}: got a pair and a single text in one file, expected text_pair in every row or in none"
            )
        if require_label:
            cells = _labels_in(where, values["label"], multi_label)
            found = [_label_name(where, label) for label in cells]
            found = [name if isinstance(label, str) else known.get(label, name) for label, name in zip(cells, found)]
            if len(set(found)) < len(found):
                raise InputError(f"{where}: got label {shorten(values['label'])}, expected each class once")
            names.append((where, found))
    if not rows:
        raise InputError(f"{paths[0]}: line 1: got no rows, expected at least one")
    if not require_label:
        return labels or (), rows
    if labels is None:
        written = [(where, name) for where, found in names for name in found]
        labels = _infer_labels({name for _, name in written}, False if multi_label else regression)
        if labels:
            _check_spelling(written)
        elif multi_label:
            raise InputError(f"{paths[0]}: got no label in any row, expected some")
    index = {name: i for i, name in enumerate(labels)}
    for i, (where, found) in enumerate(names):
        of_row = [class_index(where, name, index) if labels else parse_number(where, name) for name in found]
        label = tuple(float(i in of_row) for i in range(len(labels))) if multi_label else of_row[0]
        rows[i] = replace(rows[i], label=label)
    return labels, rows


def keyed_rows(
    path: str | Path, required: Sequence[str], optional: Sequence[str], columns: Mapping[str, str] | None = None
) -> Iterator[tuple[str, dict[str, str | int | float]]]:
    """Yield (file and line, {key: text}) for each row of a table, for which see `read_table`; `-` is standard input.

    Every row has the keys `required`, and of others only those in `optional`. With `columns`, which names the file's
    column for each of some keys, the file may have others. A number that JSONL or Parquet has as a label stays one.
    Raises InputError that names file and line.
    """
    named = {key: key if columns is None else columns.get(key, key) for key in (*required, *optional)}
    header = Header([named[key] for key in required], [named[key] for key in optional], columns is not None)
    kind = Path(str(path).lower().removesuffix(".gz")).suffix
    if kind == ".parquet":
        rows = parquet_rows(path, columns and named.values(), header.required)
        return _values(_numbered_classes(path, rows, named.get("label")), header, named)
    lines = itertools.dropwhile(lambda line: _is_blank(line[1]), read_lines(path, keep_ends=kind == ".csv"))
    first = next(lines, (1, ""))
    lines = itertools.chain([first], lines)
    if kind == ".csv":
        rows = _csv_rows(path, lines, header)
    elif kind == ".jsonl" or first[1].lstrip().startswith("{"):
        return _values(_json_objects(path, lines), header, named)
    else:
        rows = _tsv_table_rows(path, lines, header, named)
    return ((where, {key: row[name] for key, name in named.items() if name in row}) for where, row in rows)


def written_rows(columns: Sequence[str], rows: Iterable[Sequence], kind: str = "tsv", number: str = ".6f") -> str:
    """Return a table as the text of a file of `kind`: "tsv", "csv" or "jsonl", each as `keyed_rows` reads it.

    A cell is a text, a float, of which the format `number` says how many digits stand, or a list of names, which JSONL
    keeps and the others write with commas between them.
    """
    if kind == "jsonl":
        plain = ([float(format(cell, number)) if isinstance(cell, float) else cell for cell in row] for row in rows)
        objects = (dict(zip(columns, row)) for row in plain)
        return "".join(json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n" for one in objects)
    texts = [[_cell(cell, number) for cell in row] for row in rows]
    if kind == "tsv":
        return "".join("\t".join(row) + "\n" for row in (columns, *texts))
    with io.StringIO(newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *texts])
        return file.getvalue()


def _cell(cell: str | float | list[str], number: str) -> str:
    if isinstance(cell, float):
        return format(cell, number)
    return ",".join(cell) if isinstance(cell, list) else cell


def read_lines(path: str | Path, keep_ends: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (1-based number, text) for each line of a text file; `-` is standard input. The line end is left out,
    unless `keep_ends`.

    Raises InputError that names file and line for what is not UTF-8 (with the byte's offset in the file), has a NUL
    byte or is longer than MAX_LINE_BYTES, and for a file that cannot be read or is empty.
    """
    offset = 0
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else _open(path) as file:
            for number in itertools.count(1):
                line = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    break
                text = _decode(f"{path}: line {number}", line, offset)
                yield number, text if keep_ends else text.removesuffix("\n").removesuffix("\r")
                offset += len(line)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not offset:
        raise InputError(f"{path}: line 1: got an empty file, expected rows")


def check_file(path: Path) -> Path:
    """Return `path`. Raises InputError for a pipe or a device, which a folder should not have: it may never end."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a file")
    return path


def tsv_rows(
    path: str | Path,
    lines: Iterator[tuple[int, str]],
    *,
    columns: Sequence[str] | None = None,
    header: Header | None = None,
    max_short_rows: int = 0,
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, {column: cell}) for each row among `lines` of a tab-separated file without quoting.

    `columns` names the columns of a file without a header; otherwise the first line does, as `header` has it. At most
    `max_short_rows` rows with too few columns are passed over. Raises InputError that names file and line.
    """
    if header is not None:
        number, line = next(lines)
        cells = line.split("\t")
        columns = header.columns(f"{path}: line {number}", cells, _quoting_hint(cells))
    if len(columns) == 1:  # a blank line would be an empty text
        lines = _without_blank(path, lines)
    short_rows, blank = 0, None  # the first of the blank lines that end the file, unless a row follows
    for number, line in lines:
        cells = line.split("\t")
        if len(cells) < len(columns) and short_rows < max_short_rows:
            short_rows += 1
        elif len(columns) > 1 and _is_blank(line):
            blank = blank or number
        elif blank or len(cells) != len(columns):
            number, found = (blank, 1) if blank else (number, len(cells))
            raise InputError(
                f"{path}: line {number}: got {found} tab-separated columns, "
                f"expected {len(columns)} ({_listed(columns)}){_quoting_hint(cells)}"
            )
        elif header is None:
            yield number, dict(zip(columns, cells))
        else:
            yield number, header.row(f"{path}: line {number}", columns, cells)
    if short_rows:
        _log.warning("%s: %d rows with fewer than %d columns passed over", path, short_rows, len(columns))


def class_index(where: str, label: str, index: dict[str, int]) -> int:
    """Return the index of a class name. Raises InputError, beginning with `where`, for a name that `index` lacks."""
    if label not in index:
        names = ", ".join(map(repr, itertools.islice(index, 10))) + (", ..." if len(index) > 10 else "")
        same = [_two_ways(label, name) for name in index if _identity(name) == _identity(label)]
        raise InputError(f"{where}: got label {shorten(label)}, expected one of {names}{''.join(same[:1])}")
    return index[label]


def parse_number(where: str, text: str) -> float:
    """Return the number that `text` is, finite in float32. Raises InputError, beginning with `where`, for others."""
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not abs(value) <= _MAX_NUMBER:
        raise InputError(f"{where}: got {shorten(text)}, expected a finite number")
    return value


def shorten(value, width: int = 60, written: Callable[[object], str] = repr) -> str:
    """Return `written(value)`, one line, cut to `width` characters."""
    text = written(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def _open(path: str | Path) -> BinaryIO:
    return gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb")


def _decode(where: str, line: bytes, offset: int) -> str:
    if len(line) > MAX_LINE_BYTES:
        raise InputError(f"{where}: got more than {MAX_LINE_BYTES} bytes, expected a line of at most that")
    start = len(_BOM) if offset == 0 and line.startswith(_BOM) else 0
    try:
        text = line[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        byte = offset + start + error.start
        raise InputError(
            f"{where}: got a byte that is not UTF-8 at offset {byte} of the file, expected UTF-8"
        ) from None
    if "\0" in text:
        raise InputError(f"{where}: got a NUL byte, expected text")
    return text


def _is_blank(line: str) -> bool:
    """Say whether a line is nothing but white space; one with a tab is a row of empty cells."""
    return not line.strip() and "\t" not in line


def _without_blank(
    path: str | Path, lines: Iterator[tuple[int, _Line]], is_blank: Callable[[_Line], bool] = _is_blank
) -> Iterator[tuple[int, _Line]]:
    """Yield the lines that are not blank. The user is told of those between rows, which a count of lines includes."""
    blank = between = 0
    for number, line in lines:
        if is_blank(line):
            blank += 1
        else:
            between, blank = between + blank, 0
            yield number, line
    if between:
        _log.warning("%s: %d blank lines between the rows passed over", path, between)


def _listed(columns: list[str]) -> str:
    return ", ".join(column or "''" for column in columns)


def _tsv_table_rows(
    path: str | Path, lines: Iterator[tuple[int, str]], header: Header, named: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (file and line, {column: cell}) for each row of TSV. The user is told of cells that a writer of CSV has
    quoted, among those that are read: their marks are part of the text."""
    quoted, first = 0, None
    for number, row in tsv_rows(path, lines, header=header):
        if count := sum(name in row and _is_quoted(row[name]) for name in named.values()):
            quoted, first = quoted + count, first or number
        yield f"{path}: line {number}", row
    if quoted:
        told = "%s: %d cells, the first in line %d, have quotation marks around them, read as text: %s"
        _log.warning(told, path, quoted, first, _NO_QUOTING)


def _is_quoted(cell: str) -> bool:
    """Say whether quotation marks stand around a cell, and within it only doubled ones (RFC 4180)."""
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")


def _quoting_hint(cells: list[str]) -> str:
    """Return the end of an error of TSV whose reason may be that its cells are quoted, as tabs and line ends are."""
    return f"; {_NO_QUOTING}" if any(cell.startswith('"') for cell in cells) else ""


def _csv_rows(
    path: str | Path, lines: Iterator[tuple[int, str]], header: Header
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (file and first line, {column: cell}) for each row of CSV among `lines`, which have their ends."""
    records = _csv_records(path, lines)
    first, cells = next(records)
    columns = header.columns(f"{path}: line {first}", cells)
    for first, cells in _without_blank(path, records, operator.not_):  # an empty text in quotation marks is [""]
        where = f"{path}: line {first}"
        if len(cells) != len(columns):
            raise InputError(f"{where}: got {len(cells)} columns, expected {len(columns)} ({_listed(columns)})")
        yield where, header.row(where, columns, cells)


def _csv_records(path: str | Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, cells) for each record of CSV; a blank line is one without cells."""
    first = 0

    def texts() -> Iterator[str]:
        nonlocal first
        for number, text in lines:
            first = first or number
            yield text

    records = csv.reader(texts(), strict=True)
    while True:
        first = 0
        try:
            cells = next(records, None)
        except csv.Error as error:
            raise InputError(
                f"{path}: line {first}: got a row that is no CSV ({error}), expected it as RFC 4180"
            ) from None
        if cells is None:
            return
        yield first, cells


def _json_objects(path: str | Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[str, dict]]:
    for number, line in _without_blank(path, lines):
        where = f"{path}: line {number}"
        yield where, _json_object(where, line)


def _numbered_classes(path: Path, rows: Iterator[tuple[str, dict]], label: str | None) -> Iterator[tuple[str, dict]]:
    """Yield the rows of Parquet with the name of a class in the place of its number, where the file has names."""
    names = label and class_names(path, label)
    for where, row in rows:
        if names and row.get(label) is not None:
            several = row[label] if isinstance(row[label], list) else [row[label]]
            if not all(isinstance(number, int) and number in range(len(names)) for number in several):
                raise InputError(f"{where}: got label {shorten(row[label])}, expected a class in 0..{len(names) - 1}")
            named = [names[number] for number in several]
            row[label] = named if isinstance(row[label], list) else named[0]
        yield where, row


def _values(
    rows: Iterator[tuple[str, dict]], header: Header, named: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, str | int | float]]]:
    """Yield for each row, an object of JSON values, what its keys have under their names in the file."""
    for where, row in rows:
        given = {name: value for name, value in row.items() if value is not None}
        header.check(where, "keys", [name for name in row if name in given or name in header.required])
        if null := next((name for name in header.required if name not in given), None):
            what = "a name or a number" if null == named.get("label") else "a text"
            raise InputError(f"{where}: {null} is null, expected {what}")
        yield where, {key: _json_value(where, key, given[name]) for key, name in named.items() if name in given}


def _json_object(where: str, line: str) -> dict:
    """Parse a line of JSONL."""
    try:
        value = json.loads(line, object_pairs_hook=unique_keys)
    except RepeatedKey as error:
        raise InputError(f"{where}: got JSON in which {error}, expected each key once") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: got no JSON ({error.msg}, character {error.pos + 1}), expected an object") from None
    except (RecursionError, ValueError):  # ValueError: an integer of more digits than Python converts
        raise InputError(
            f"{where}: got JSON nested too deeply or a number too long, expected an object of strings"
        ) from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: got {shorten(value)}, expected a JSON object")
    return value


def _json_value(where: str, key: str, value) -> str | int | float | list[str | int | float]:
    """Return the text that a value is, true and false as JSON writes them; a number that is a label stays one, and so
    does a list of labels."""
    if key == "label" and isinstance(value, list):
        return [_json_value(where, "label", label) if not isinstance(label, list) else label for label in value]
    kinds = {"label": (str, int, float), "id": (str, int)}.get(key, (str,))
    if not isinstance(value, kinds) or (isinstance(value, bool) and key != "label"):
        raise InputError(f"{where}: got {key} {shorten(value)}, expected a string{' or a number' * (len(kinds) > 1)}")
    if key == "label" and type(value) in (int, float):
        return value
    text = json.dumps(value) if isinstance(value, bool) else str(value)
    if _NOT_TEXT.search(text):
        raise InputError(f"{where}: got a NUL or half a surrogate pair in {key}, expected text")
    return text


def _labels_in(where: str, value: str | int | float | list, multi_label: bool) -> list[str | int | float]:
    """Return the labels that a row has: one, or with `multi_label` those of a list, or of a text with commas between
    them. Raises InputError."""
    if not multi_label:
        if isinstance(value, list):
            raise InputError(f"{where}: got label {shorten(value)}, expected one; --task multi-label takes several")
        return [value]
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")] if value.strip() else []
    labels = value if isinstance(value, list) else [value]
    if any(isinstance(label, list) or "," in str(label) for label in labels):
        raise InputError(f"{where}: got label {shorten(value)}, expected a list of names without commas")
    return labels


def _label_name(where: str, label: str | int | float) -> str:
    """Return the name of a label; that of a whole number has no fractional part (1.0 is "1", -0.0 is "0")."""
    name = str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)
    if not name or name != name.strip() or not name.isprintable():
        got = f"{where}: got label {shorten(name)}"
        raise InputError(f"{got}, expected a name without space around it or invisible characters, or a number")
    if _NOT_FINITE.fullmatch(name):
        raise InputError(f"{where}: got label {shorten(name)}, expected a name or a finite number")
    return name


def _identity(name: str) -> int | float | str:
    """Return what a label is however it is written: the number, or the name in Unicode's form NFC."""
    if not _NUMBER.fullmatch(name):
        return unicodedata.normalize("NFC", name)
    try:
        return int(name)  # exact, and equal to a float of that value
    except ValueError:
        return float(name) if math.isfinite(float(name)) else name


def _check_spelling(names: Sequence[tuple[str, str]]) -> None:
    """Raise InputError where two of the labels, each with its file and line, are one by `_identity`."""
    places: dict[str, str] = {}  # the first of each name
    for where, name in names:
        places.setdefault(name, where)
    found: dict[int | float | str, str] = {}
    for name, where in places.items():
        other = found.setdefault(_identity(name), name)
        if other != name:
            got = f"{where}: got label {shorten(name)} after {shorten(other)} in {places[other].rpartition(': ')[2]}"
            raise InputError(f"{got}, expected each label written in one way{_two_ways(name, other)}")


def _two_ways(name: str, other: str) -> str:
    """Say that two labels are one, in ASCII: forms of Unicode look alike."""
    kind = "number" if _NUMBER.fullmatch(name) else "name in two forms of Unicode"
    return f"; {shorten(name, written=ascii)} and {shorten(other, written=ascii)} are one {kind}"


def _infer_labels(names: set[str], regression: bool | None) -> tuple[str, ...]:
    """Return the class names in order, or () for regression, by the rules at the top of the module."""
    are_numbers = all(map(_NUMBER.fullmatch, names))
    if regression is None:
        regression = are_numbers and not all(float(name).is_integer() for name in names)
    if regression:
        return ()
    return tuple(sorted(names, key=(lambda name: (float(name), name)) if are_numbers else None))
