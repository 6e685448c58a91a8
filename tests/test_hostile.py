"""Hostile input through the command line: each ends in one clear line and leaves nothing, or is valid after all.

The cases are those of `hostile.py`. PROGTUNING_SOAK is how many random damages of each kind are tried (40).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import hostile
from tests.hostile import GREEDY, HUB, MUTATED, Mutations, Sandbox, corpus, make_ground, result, start_cases
from tests.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[1]
SOAK = int(os.environ.get("PROGTUNING_SOAK", "40"))
KINDS = (
    "safetensors",
    "shards",
    "config.json",
    "tokenizer files",
    "TSV",
    "JSONL",
    "SQuAD",
    "adapter folders",
    "checkpoints and summaries",
    "options and output",
    "archives",
)


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    return make_ground(tmp_path_factory.mktemp("hostile") / "ground")


@pytest.fixture(scope="module", autouse=True)
def answers(ground, tmp_path_factory) -> subprocess.Popen:
    """A process with the cases of the Hub, which for the most part waits for answers while the other tests run."""
    with HubServer(hang=3) as server:
        process = hostile.start_hub_cases(server, tmp_path_factory.mktemp("hub"), ground)
        yield process
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", KINDS)
def test_every_case_of_the_corpus_ends_as_specified(kind, ground, tmp_path):
    cases = corpus(ground)[kind]
    wrong = {}
    for number, (name, case) in enumerate(cases.items()):
        if found := hostile.attempt(case, tmp_path / str(number), ground):
            wrong[name] = found
    print(f"{kind}: {len(cases)} tried, {len(cases) - len(wrong)} ended as specified")
    assert not wrong and len(cases) > 20


def test_the_corpus_has_no_kind_that_is_not_run(ground):
    assert set(corpus(ground)) == {*KINDS, HUB}


def test_the_greediest_cases_stay_within_600_mb(ground, tmp_path):
    ended = result(start_cases(tmp_path, ground, GREEDY, memory=1 << 30))
    assert not [row for row in ended["wrong"] if row[2]]
    assert ended["grown"] < 600 << 20, f"{ended['grown'] >> 20} MiB"


@pytest.mark.parametrize("kind", MUTATED)
def test_a_good_file_damaged_at_random_is_refused_in_one_line_or_still_valid(kind, ground, tmp_path):
    damages = Mutations(kind, tmp_path / "box", ground)

    @settings(max_examples=SOAK, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def attempt(data):
        assert not damages.attempt(lambda count: data.draw(st.integers(0, count - 1)))

    attempt()
    refused = damages.tried - damages.accepted
    print(f"{kind}, damaged at random: {damages.tried} tried, {refused} refused, {damages.accepted} valid")
    assert refused > damages.tried / 10


def process(box: Sandbox, *arguments, **environment: str) -> subprocess.Popen:
    """Start the command in a sandbox."""
    places = {"HOME": box.root / "home", "TMPDIR": box.root / "temporary", "PROGTUNING_CACHE": box.root / "cache"}
    places = {name: str(path) for name, path in places.items()}
    return subprocess.Popen(
        [sys.executable, "-m", "progtuning", *map(str, arguments)],
        cwd=box.root / "work",
        env={**os.environ, **places, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_real_processes_end_as_the_function_does(ground, tmp_path):
    """A panic of the tokenizers library, which prints its stack; a pipe for a file; a label no ASCII terminal shows."""
    broken, stuck, accented = (Sandbox(tmp_path / name, ground) for name in ("broken", "stuck", "accented"))
    broken.put("run/tokenizer.json", hostile.TOKENIZERS["tokenizer.json"]["a map of characters that is none"])
    stuck.put("run/config.json", hostile.FIFO)
    accented.put("run/config.json", hostile.with_values(id2label={"0": "caf\u00e9", "1": "good"}))
    accented.put("task/input.tsv", b"text\na\n")
    runs = [process(box, *hostile.evaluate(box), RUST_BACKTRACE="1") for box in (broken, stuck)]
    runs.append(process(accented, *hostile.predict(accented, output="-"), PYTHONIOENCODING="ascii"))
    results = [(run.communicate(timeout=100), run.returncode) for run in runs]
    for box, name, ((out, err), status) in zip((broken, stuck), ("tokenizer.json", "config.json"), results):
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert f"run/{name}: " in err and not box.leftovers()
    (out, err), status = results[2]
    assert (status, err) == (0, "") and out.startswith("label\tprobability\n")


def test_memory_that_does_not_suffice_is_a_failed_run_of_one_line(ground, tmp_path, monkeypatch):
    def exhausted(*arguments, **values):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr("progtuning.run.saved.measure_splits", exhausted)
    box = Sandbox(tmp_path / "box", ground)
    box.remember()
    with box.entered():
        ended = hostile.run(*hostile.evaluate(box))
    assert ended.status == 1 and not hostile.judge(ended, box, ("out of memory", "--batch-size"))


def test_every_answer_of_the_hub_ends_as_specified(ground, answers):
    ended = result(answers)["wrong"]
    wrong = {name: found for _, name, found in ended if found}
    print(f"{HUB}: {len(ended)} tried, {len(ended) - len(wrong)} ended as specified")
    assert not wrong and len(ended) == len(corpus(ground)[HUB])
