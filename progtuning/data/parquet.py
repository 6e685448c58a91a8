"""Rows of Parquet files, which pyarrow reads; the extra `hub` installs it."""

import itertools
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from progtuning.base.errors import InputError


def pyarrow(what: str):
    """Return the library. Raises InputError, beginning with `what`, which needs it, where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{what} needs pyarrow: pip install 'progtuning[hub]'") from None
    return pyarrow


def parquet_rows(
    path: Path, wanted: Collection[str] | None = None, required: Collection[str] = ()
) -> Iterator[tuple[str, dict]]:
    """Yield (file and 0-based row, {column: value}) for each row, of the columns `wanted` alone (None: of all).

    Raises InputError that names the file where it is no Parquet, has no column of those `required`, or two of a name.
    """
    library, numbers = pyarrow(str(path)), itertools.count()
    with _errors(path):
        file = library.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if missing := [column for column in required if column not in names]:
            raise InputError(f"{path}: got no column {missing[0]!r}, expected {', '.join(required)}")
        columns = [name for name in names if wanted is None or name in wanted]
        if twice := next((name for name in columns if columns.count(name) > 1), None):
            raise InputError(f"{path}: got more than one column {twice!r}, expected one")
        for batch in file.iter_batches(columns=columns):
            yield from ((f"{path}: row {next(numbers)}", row) for row in batch.to_pylist())


def class_names(path: Path, column: str) -> list[str] | None:
    """Return the names of the classes that a column has by number, one or a list, where the library datasets wrote
    them; else None. Raises InputError that names the file where it is no Parquet."""
    with _errors(path):
        metadata = pyarrow(str(path)).parquet.read_schema(path).metadata or {}
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][column]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)  # those of a list
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises of a file into InputError that names it."""
    library = pyarrow(str(path))
    try:
        yield
    except InputError:
        raise
    except (library.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two of a single value
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not a Parquet file that can be read: {reason}") from None
