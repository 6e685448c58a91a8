"""The prefix cache: the same losses, no frozen block twice for one example in a stage, and nothing left behind."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from progtuning.base.errors import InputError, RunError
from progtuning.cost import closed_form
from progtuning.cost.plan import plan
from progtuning.data.batching import EncodedRows
from progtuning.data.tokenization import Encoding
from progtuning.engine import StageEngine
from progtuning.methods.apply import apply_peft
from progtuning.run.build import build_shelves, build_trainer
from progtuning.run.state import refill_cache
from progtuning.settings.peft import PeftConfig
from progtuning.settings.train import DPSConfig, TrainConfig, parse_size
from progtuning.speed.cache import CachedEngine, PrefixCache, Shelves
from progtuning.stages import Stage, make_schedule
from progtuning.step.measure import free_disk, free_memory
from progtuning.step.processes import World
from progtuning.train import Trainer
from tests.models import TINY, tiny_batch, tiny_model

CPU = torch.device("cpu")
SETTINGS = TrainConfig(epochs=4, batch_size=8, lr=1e-3, seed=3)
METHODS = {
    "adapter": PeftConfig("adapter", adapter_size=4),
    "lora": PeftConfig("lora", lora_r=2, lora_dropout=0.2),
    "bitfit": PeftConfig("bitfit"),
    "spafit": PeftConfig("spafit", spafit_bounds=(1, 2), lora_r=2),
}


def rows(count: int = 40, spans: bool = False) -> EncodedRows:
    """Random rows of 3 to 9 tokens, labelled with a class or a span; the first token is the row's number."""
    generator = np.random.default_rng(0)
    encodings = []
    for row in range(count):
        ids = np.concatenate(([row + 1], generator.integers(1, 60, generator.integers(2, 9)))).astype(np.int32)
        encodings.append(Encoding(ids, np.zeros_like(ids)))
    labels = generator.integers(0, 3, count).tolist()
    if spans:
        labels = [[0, len(encoding.input_ids) - 1] for encoding in encodings]
    return EncodedRows(encodings, labels, TINY.pad_token_id)


def trainer(**changes) -> Trainer:
    """A trainer of a model that drops out, by a PEFT method of METHODS where `changes` has a "peft", with their
    "head", "model_type" and "embedding_size".
    """
    changes = changes | {"peft": METHODS.get(changes.get("peft"), PeftConfig())}
    head = changes.pop("head", "classification")
    kind = {"head": head} | {key: changes.pop(key) for key in ("model_type", "embedding_size") if key in changes}
    model = tiny_model(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1, **kind)
    apply_peft(model, changes["peft"])
    return build_trainer(model, rows(spans=head == "question-answering"), replace(SETTINGS, **changes), CPU)


def losses(run: Trainer) -> list[float]:
    """Train; return the loss of every piece of every batch."""
    seen, original = [], run.loss
    run.loss = lambda *batch: seen.append(original(*batch)) or seen[-1]
    run.fit()
    return torch.stack(seen).tolist()


def shelves(lengths, hidden_size: int) -> Shelves:
    """A cache with one shelf, for stages whose cut does not fall."""
    return Shelves([{0: TINY.num_hidden_layers}], lambda: PrefixCache(lengths, hidden_size))


CASES = {
    "Progtuning": {},
    "a stage begins in the middle of an epoch": {"epochs": 2, "stages": 3},
    "two epochs a stage": {"stages": 2},
    "the head alone at the end": {"schedule": "without-low-blocks"},
    "embeddings frozen": {"embeddings": "never"},
    "batches in pieces": {"accumulation_steps": 3},
    "question answering": {"head": "question-answering"},
    "adaptive": {"schedule": "adaptive"},
    "growing": {"schedule": "growing"},
    "growing, two epochs a stage": {"schedule": "growing", "stages": 2},
    "growing, a stage begins in the middle of an epoch": {"schedule": "growing", "epochs": 2, "stages": 3},
    "growing, embeddings frozen": {"schedule": "growing", "embeddings": "never"},
    "down and up, BitFit": {"calendar": "3:2,1:1,2:2", "peft": "bitfit"},
    "down and up by uneven shares": {"calendar": "2:1,4:3,1:2,3:2"},
    "adapter": {"peft": "adapter"},
    "LoRA, embeddings always": {"peft": "lora", "embeddings": "always"},
    "BitFit": {"peft": "bitfit"},
    "SPAFIT, every stage": {"peft": "spafit", "schedule": "full"},
    "DistilBERT": {"model_type": "distilbert"},
    "ELECTRA with a projection of E": {"model_type": "electra", "embedding_size": 8, "embeddings": "never"},
    "DPS dense": {"dps": DPSConfig("dense", update_ratio=0.1)},
    "DPS mix": {"dps": DPSConfig("mix", update_ratio=0.1)},
}


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("case", CASES)
def test_losses_with_the_cache_are_those_without_to_rounding(case, place):
    cached = trainer(cache=place, **CASES[case])
    plain = trainer(prefix_dropout=False, **CASES[case])
    expected = losses(plain)
    assert losses(cached) == pytest.approx(expected, rel=1e-5)
    stages = cached.ledger.account()["stages"]
    assert sum(stage.cache_misses for stage in stages) > 0
    with_prefix = [cost.stage.index + 1 for cost in cached.ledger.costs if cached.engine.cut_of(cost.stage)]
    assert [stage.stage for stage in stages if stage.cache_bytes] == with_prefix
    assert len(set(expected)) == len(expected) >= 10


@pytest.mark.parametrize("case", CASES)
def test_no_frozen_block_runs_twice_for_an_example_in_a_stage_nor_in_two_stages(case, monkeypatch):
    run = trainer(cache="memory", **CASES[case])
    ran = Counter()  # (example, block, stages so far that trained below or in it): forward passes below the cut
    original = StageEngine.prefix

    def spy(self, input_ids, attention_mask=None, token_type_ids=None, start=0, x=None, stop=None):
        before = [self.cut_of(cost.stage) or 0 for cost in run.ledger.costs[:-1]]
        for example in (input_ids[:, 0] - 1).tolist():
            passed = range(start, self.cut if stop is None else stop)
            ran.update((example, block, sum(cut <= block for cut in before)) for block in passed)
        return original(self, input_ids, attention_mask, token_type_ids, start, x, stop)

    calls = Counter()  # block: examples passed through it without grad
    for index, block in enumerate(run.engine.model.encoder.layer):
        block.register_forward_hook(
            lambda module, inputs, output, i=index: calls.update({i: 0 if torch.is_grad_enabled() else len(output)})
        )
    monkeypatch.setattr(StageEngine, "prefix", spy)
    run.fit()
    assert set(ran.values()) == {1}
    assert sum(calls.values()) == len(ran)
    costs = run.ledger.costs
    cuts = [run.engine.cut_of(cost.stage) or 0 for cost in costs]
    whole_epochs = run.num_steps == sum(cost.steps for cost in costs if cost.steps % len(run.loader.batches) == 0)
    if whole_epochs:
        assert {(example, block) for example, block, _ in ran} == {
            (example, block) for example in range(40) for block in range(max(cuts))
        }


@given(st.lists(st.sampled_from([None, 0, 1, 2, 3, 4]), min_size=1, max_size=6))
def test_an_entry_is_kept_where_a_stage_to_come_could_begin_with_it_and_nothing_below_trains_before(cuts):
    kept = closed_form.kept_levels(cuts)
    for stage, levels in enumerate(kept):
        if not cuts[stage]:
            assert levels == {}
            continue
        own = min(levels)
        assert levels[own] == cuts[stage] and all(level <= cuts[stage] for level in levels.values())
        for later in range(stage + 1, len(cuts)):
            if not kept[later]:
                continue
            series = all((a or 0) <= (b or 0) for a, b in zip(cuts[stage:later], cuts[stage + 1 : later + 1]))
            assert (min(kept[later]) == own) == series
            still = all((cut or 0) >= cuts[later] for cut in cuts[stage:later])  # blocks below that have not trained
            begins = min(kept[later]) not in {
                shelf for levels in kept[:later] for shelf in levels if min(levels) == shelf
            }
            if begins and not series:
                assert (levels.get(min(kept[later])) == cuts[later]) == still


def test_hits_and_misses_count_the_examples_of_every_stage():
    run = trainer(cache="memory", epochs=6, stages=3)
    run.fit()
    stages = run.ledger.account()["stages"]
    assert [(stage.cache_hits, stage.cache_misses) for stage in stages] == [(0, 0), (40, 40), (40, 40)]


@pytest.mark.parametrize(
    "case",
    [
        "Progtuning",
        "a stage begins in the middle of an epoch",
        "growing",
        "LoRA, embeddings always",
        "SPAFIT, every stage",
        "ELECTRA with a projection of E",
    ],
)
def test_the_account_leaves_out_the_flops_that_the_cache_spares(case):
    run = trainer(cache="memory", **CASES[case])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run.fit()
    stages = run.ledger.account()["stages"]
    assert counter.get_total_flops() == sum(stage.forward_flops + stage.backward_flops for stage in stages)


@pytest.mark.parametrize("place", ["memory", "disk", "device"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_bytes_are_those_of_the_closed_form(place, dtype):
    run = trainer(cache=place, cache_dtype=dtype)
    tokens = int(run.loader.data.lengths.sum())
    stage = run.schedule.stages[-1]
    expected = closed_form.cache_bytes(TINY, stage, tokens, dtype)
    run.engine.enter(stage)
    assert expected == run.engine.cache.nbytes == run.engine.cache.now._states.untyped_storage().nbytes()
    run.fit()
    sizes = [closed_form.cache_bytes(TINY, stage, tokens, dtype) for stage in run.schedule.stages]
    assert [stage.cache_bytes for stage in run.ledger.account()["stages"]] == sizes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cache_of_half_precision_rounds_and_gives_every_use_the_same_values(precision):
    run = trainer(cache="memory", cache_dtype="bf16", precision=precision)
    plain = trainer(prefix_dropout=False, precision=precision)
    assert losses(run) == pytest.approx(losses(plain), rel=0.05)
    engine = run.engine.eval()
    batch = run.loader.data.collate([4, 2, 7])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    engine.cache.now.levels[[4, 2, 7]] = 0
    first, again = (engine.cached_prefix(**inputs, rows=[4, 2, 7]) for _ in range(2))
    real = inputs["attention_mask"]
    assert torch.equal(first[real], again[real]) and first.dtype == torch.float32
    torch.testing.assert_close(first[real], engine.prefix(**inputs)[real], rtol=2**-8, atol=0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 11), min_size=1)), max_size=12),
    st.sampled_from(["memory", "disk", "device"]),
)
def test_any_batches_under_rising_cuts_give_what_a_run_from_the_start_gives(lengths, batches, place):
    # Block by block 1 is added to 100 times the example's number plus the position.
    cache, cut = PrefixCache(lengths, 2, place), 1
    for rise, chosen in batches:
        cut += rise
        batch = [example for example in chosen if example < len(lengths)]
        if not batch:
            continue
        length = max(lengths[example] for example in batch)
        start = (100.0 * torch.tensor(batch)[:, None] + torch.arange(length))[..., None].expand(-1, -1, 2)
        real = torch.arange(length) < torch.tensor([lengths[example] for example in batch])[:, None]

        def run(chosen, level, x):
            chosen = torch.arange(len(batch)) if chosen is None else torch.from_numpy(chosen)
            assert (x is None) == (level == 0) and level < cut
            if x is not None:
                assert torch.equal(x[real[chosen]], (start[chosen] + level)[real[chosen]])
            return start[chosen] + cut

        x = cache.fetch(batch, cut, length, CPU, run)
        assert x.shape == (len(batch), length, 2) and torch.equal(x[real], (start + cut)[real])
        assert (cache.levels[batch] == cut).all()


@pytest.mark.parametrize("place", ["memory", "disk", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gather_of_a_batch_is_the_loop_over_its_rows_bit_for_bit(place, dtype):
    lengths = np.random.default_rng(0).integers(1, 9, 30)
    states = [torch.randn(length, 5).to(dtype) for length in lengths]
    kept = np.arange(30) % 4 > 0
    cache = PrefixCache(lengths, 5, place, {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype], kept=kept)

    def padded(rows):
        return torch.nn.utils.rnn.pad_sequence([states[row] for row in rows], batch_first=True)

    for batch in np.arange(30).reshape(3, 10):
        x = padded(batch)
        cache.fetch(batch, 2, x.shape[1], CPU, lambda chosen, level, _: x.float())
    for batch in np.random.default_rng(1).permutation(np.flatnonzero(kept))[:21].reshape(7, 3):
        x = cache.fetch(batch, 2, 9, CPU, lambda *_: pytest.fail("what is kept runs again"))
        assert all(torch.equal(one[: lengths[row]], states[row].float()) for one, row in zip(x, batch))
        assert x.shape == (3, 9, 5) and x.isfinite().all()


def test_on_a_cpu_the_cache_on_the_device_is_that_in_memory():
    assert losses(trainer(cache="device")) == losses(trainer(cache="memory"))
    with pytest.raises(InputError, match=r"--cache device needs .* GB, expected at most 1e-09 GB \(--cache-limit\)"):
        trainer(cache="device", cache_limit=1)


def test_growing_reads_in_its_second_stage_what_its_first_has_kept_and_gives_the_rest_back():
    run = trainer(cache="memory", schedule="growing", epochs=3, stages=3)  # cuts 2, 1 and none
    size, cache = int(run.loader.data.lengths.sum()) * 16 * 4, run.engine.cache
    assert cache.nbytes == 2 * size
    run.fit()
    stages = run.ledger.account()["stages"]
    assert [(stage.cache_hits, stage.cache_misses) for stage in stages] == [(0, 40), (40, 0), (0, 0)]
    assert [stage.cache_bytes for stage in stages] == [2 * size, size, 0]
    planned = plan(TINY, run.schedule, 3, batch=1, length=1, tokens=int(run.loader.data.lengths.sum()))
    assert [stage["cache_bytes"] for stage in planned["stages"]] == [stage.cache_bytes for stage in stages]
    assert all(kept._states is None for kept in cache._caches.values())


def test_a_refilled_cache_is_the_lost_one_bit_for_bit():
    class Stop(Exception):
        pass

    def stop(row):
        if row["step"] == 20:
            raise Stop

    run = trainer(cache="memory", epochs=3, stages=4, batch_size=4, accumulation_steps=2)
    run.progress.log = stop
    with pytest.raises(Stop):
        run.fit()
    lost, stage = run.engine.cache.now, run.engine.stage
    assert len(run.ledger.costs) == 3 and set(lost.levels) == {1, 2}
    state = {p: {key: value.clone() for key, value in s.items()} for p, s in run.optimizer.state.items()}
    run.engine.cache = shelves(run.loader.data.lengths, TINY.hidden_size)
    random = torch.get_rng_state()
    refill_cache(run, run.engine)
    assert run.engine.stage == stage and (run.engine.cache.levels == lost.levels).all()
    kept = torch.from_numpy(np.repeat(lost.levels > 0, lost.lengths))
    assert torch.equal(run.engine.cache.now._states[kept], lost._states[kept])
    assert torch.equal(random, torch.get_rng_state())
    assert set(state) == set(run.optimizer.state)
    assert all(torch.equal(value, run.optimizer.state[p][key]) for p, s in state.items() for key, value in s.items())


def test_the_engine_refuses_a_cut_that_falls_and_a_prefix_that_drops_out():
    model = tiny_model()
    batch = tiny_batch(model.config)
    lengths = batch["attention_mask"].sum(1)
    engine = CachedEngine(model, None, shelves(lengths, 16))
    for boundary in (3, 1):
        engine.enter(Stage(0, 4, boundary, embeddings=False))
        if boundary == 1:
            with pytest.raises(ValueError, match="the cut must not fall below what is kept, got 1 and an entry at 3"):
                engine(**batch, rows=range(5))
        expected = engine(**batch)
        if boundary == 3:
            torch.testing.assert_close(engine(**batch, rows=range(5)), expected)
    other = CachedEngine(model, None, shelves(lengths, 16), prefix_dropout=True)
    other.enter(Stage(0, 4, 3, embeddings=False))
    with pytest.raises(ValueError, match="a prefix cache needs prefix_dropout=False"):
        other(**batch, rows=range(5))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cache": "ram"}, "--cache must be one of off, memory, disk, device, got 'ram'"),
        ({"cache_dtype": "fp16"}, "--cache-dtype must be one of fp32, bf16, got 'fp16'"),
        ({"cache_limit": 0}, "--cache-limit must be an integer of at least 1, got 0"),
        ({"cache": "disk", "prefix_dropout": True}, "--cache disk needs the same output of the frozen blocks in every"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(change, message):
    with pytest.raises(InputError) as error:
        replace(SETTINGS, **change)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"embeddings": "always"},
        {"embeddings": "always", "schedule": "adaptive"},
        {"schedule": "full", "embeddings": "never"},
        {"stages": 1},
        {"peft": "bitfit", "embeddings": "always"},
    ],
)
def test_a_run_in_which_nothing_is_ever_frozen_below_is_refused(change):
    with pytest.raises(InputError, match="--cache disk has nothing to keep: under --schedule"):
        trainer(cache="disk", **change)


def test_a_cache_above_the_limit_is_refused_with_its_size_and_one_at_the_limit_is_not(monkeypatch):
    size = int(rows().lengths.sum()) * 16 * 4
    trainer(cache="memory", cache_limit=size)
    with pytest.raises(InputError) as error:
        trainer(cache="memory", cache_limit=size - 1)
    message = str(error.value)
    assert message.startswith("--cache memory needs ") and "(--cache-limit)" in message and "\n" not in message
    for name, place in (("free_memory", "memory"), ("free_disk", "disk")):
        monkeypatch.setattr(f"progtuning.speed.cache.{name}", lambda *_: 2 * size)
        trainer(cache=place)
        monkeypatch.setattr(f"progtuning.speed.cache.{name}", lambda *_: 2 * size - 1)
        with pytest.raises(InputError, match=rf"--cache {place} needs .* \(half of the free {place}\)"):
            trainer(cache=place)
    monkeypatch.setattr("progtuning.speed.cache.free_memory", lambda device: None)
    with pytest.raises(InputError, match="--cache-limit is needed with --cache memory"):
        trainer(cache="memory")


def test_a_cache_that_nobody_shares_is_held_to_its_limit_once_and_one_of_two_twice():
    assert PrefixCache([3, 5], 16, limit=8 * 16 * 4).num_tokens == 8
    with pytest.raises(InputError):
        PrefixCache([3, 5], 16, limit=8 * 16 * 4, num_sharing=2)


@pytest.mark.parametrize("place, device", [("memory", "cpu"), ("device", "cpu"), ("device", "cuda")])
def test_the_limit_is_for_all_shelves_together(place, device):
    """None takes room here: of CUDA the arithmetic alone is tried."""
    data, schedule = rows(20), make_schedule("growing", 4, 3)
    one = int(data.lengths.sum()) * 16 * 4  # bytes; `growing` of 3 stages has two shelves

    def shelves(limit):
        asked = replace(SETTINGS, schedule="growing", cache=place, cache_limit=limit)
        return build_shelves(TINY, asked, schedule, data, torch.device(device), World(), used=False)

    assert shelves(2 * one).nbytes == 2 * one
    with pytest.raises(InputError, match=f"--cache {place} needs"):
        shelves(2 * one - 1)


def test_a_batch_lacks_only_what_is_to_be_kept_and_has_not_passed_the_cut():
    with PrefixCache([3, 5], 4, kept=np.array([True, False])) as cache:
        assert cache.lacks([0, 1], 2)
        cache.fetch([0, 1], 2, 5, torch.device("cpu"), lambda chosen, level, x: torch.zeros(2, 5, 4))
        assert not cache.lacks([0, 1], 2) and cache.lacks([0, 1], 3) and not cache.lacks([1], 3)


def test_what_is_free_is_read_from_the_system(tmp_path):
    assert free_disk(tmp_path) == pytest.approx(os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize, rel=0.05)
    if sys.platform == "linux":
        assert 2**20 < free_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_process_that_keeps_no_row_has_an_empty_cache(place):
    with PrefixCache([3, 4], 16, place, limit=0, kept=np.zeros(2, dtype=bool)) as cache:
        x = torch.ones(2, 4, 16)
        assert cache.nbytes == 0 and not cache.lacks([0, 1], 2)
        assert torch.equal(cache.fetch([0, 1], 2, 4, CPU, lambda chosen, level, states: x), x)


def test_memory_or_a_disk_that_cannot_hold_it_fails_the_run_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="--cache memory: no room for"):
        PrefixCache([2**40], 2**20, limit=2**70)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(RunError, match="--cache disk: .*missing: no room for .*: No such file"):
        PrefixCache([4], 16, "disk", limit=2**60)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError) as error:
        PrefixCache([4], 16, "disk")
    assert str(error.value) == f"--cache disk: {tmp_path}: no room for 2.56e-07 GB: No space left on device"


KILLED = """
import os, signal
from progtuning.speed.cache import CachedEngine, PrefixCache, Shelves
cache = PrefixCache([2**10], 16, "disk")
cache._states.fill_(1.0)
print("filled", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_file(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLED], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL and done.stdout == b"filled\n", done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_a_disk_cache_is_a_file_without_a_name_that_is_given_back_when_closed(tmp_path, monkeypatch):
    def mapped() -> list[str]:
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with PrefixCache([2**10], 16, "disk"):
        assert len(mapped()) == 1 and "(deleted)" in mapped()[0]
        assert list(tmp_path.iterdir()) == []
    assert mapped() == []


@pytest.mark.parametrize(
    "text, size",
    [
        ("8", 8 * 10**9),
        ("0.5", 5 * 10**8),
        ("500MB", 5 * 10**8),
        ("2GiB", 2**31),
        ("1.5 TB", 15 * 10**11),
        ("64KiB", 2**16),
    ],
)
def test_a_size_is_in_gigabytes_or_has_a_unit(text, size):
    assert parse_size("--cache-limit", text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "8 gb", "nan", "1e9", "8G", "٣", "1.2.3", "1 GB or so"])
def test_a_size_in_another_form_is_refused(text):
    with pytest.raises(InputError, match="--cache-limit must be a number of GB, or one with a unit"):
        parse_size("--cache-limit", text)
