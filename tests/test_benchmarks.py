"""The benchmarks at tiny sizes: each runs, can be taken up again, and writes what it promises; no time is judged."""

import gc
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from progtuning.base.errors import InputError
from progtuning.cost import closed_form
from progtuning.model.config import ARCHITECTURES
from progtuning.settings.peft import PeftConfig
from progtuning.stages import Stage
from tests.models import TINY
from tests.squad_files import write_squad

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # the scripts import one another as their folder's

import backward_savings  # noqa: E402
import gather  # noqa: E402
import gpu  # noqa: E402
import harness  # noqa: E402
import step_options  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny_architecture(monkeypatch):
    """A model of 4 blocks that drops out, so that attention on a CPU is PyTorch's two products."""
    config = replace(TINY, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, head=None, labels=("no", "yes"))
    monkeypatch.setitem(ARCHITECTURES, "tiny", config)
    monkeypatch.setattr(harness.measure, "matmul_peak", partial(harness.measure.matmul_peak, size=64))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def savings(folder: Path, *more: str, methods: str = "full", stages_of: int = 2) -> list[str]:
    grid = f"--models tiny --lengths 9 --methods {methods} --stages-of {stages_of} --device cpu --rounds 2 --steps 1"
    return [*grid.split(), "--output", str(folder), *more]


def rows_by_form(document: dict, method: str = "full") -> dict[tuple[int, str], dict]:
    return {(row["frozen_blocks"], row["form"]): row for row in document["rows"] if row["method"] == method}


# backward_savings.py


def test_the_forms_are_those_of_the_stages_and_policies_each_once():
    config = ARCHITECTURES["bert-base-uncased"].with_head("classification", ("a", "b"))
    named = {
        method: [(form.frozen_blocks, form.name) for form in backward_savings.forms(config, PeftConfig(method), [3])]
        for method in ("none", "lora")
    }
    frozen = [(4, "cut"), (4, "cut + cache"), (8, "cut"), (8, "cut + cache")]
    assert set(named["none"]) == {(0, "E trains"), (0, "cut"), (4, "E always"), (8, "E always"), *frozen}
    assert named["none"][0] == (0, "E trains")
    assert set(named["lora"]) == {(0, "cut"), *frozen}  # LoRA has nothing in E, so the policies agree


def test_every_stage_is_measured_and_its_flops_counted_equal_the_closed_form(tmp_path):
    path = backward_savings.main(savings(tmp_path, methods="full lora"))
    document = read(path)
    rows = rows_by_form(document)
    assert set(rows) == {(0, "E trains"), (0, "cut"), (2, "E always"), (2, "cut"), (2, "cut + cache")}
    assert set(rows_by_form(document, "lora")) == {(0, "cut"), (2, "cut"), (2, "cut + cache")}
    for row in document["rows"]:
        assert row["counted_flops"] == [row["forward_flops"], row["backward_flops"]]
        assert all(row["milliseconds"][phase] > 0 for phase in ("forward", "backward", "optimizer"))
        assert row["rounds"] == 2 and not row["out_of_memory"] and row["attention"] == "math"
        assert row["share_of_matmul_peak"] == pytest.approx(row["flops_per_second"] / document["matmul_peak"])
    assert rows[0, "E trains"]["backward_measured"] == {"median": 1, "lowest": 1, "highest": 1}
    cached, cut, always = (rows[2, form] for form in ("cut + cache", "cut", "E always"))
    assert cached["forward_flops"] < cut["forward_flops"] and cached["backward_flops"] == cut["backward_flops"]
    assert cut["backward_ideal"] < always["backward_ideal"] < 1
    assert cut["saved_bytes"] < always["saved_bytes"] < rows[0, "E trains"]["saved_bytes"]
    assert {"stages_of": 2, "embeddings": "always", "stage": 2} in always["stages"]
    assert {(where["embeddings"], where["stage"]) for where in cut["stages"]} == {("with-block-1", 2), ("never", 2)}

    assert {"device", "processor", "versions", "settings", "runs"} <= set(document)
    assert document["runs"][0]["command"].startswith("python benchmarks/backward_savings.py --models tiny")
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "equal the closed form in 8 of 8 rows" in text and document["device"] in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_series_that_a_time_limit_ended_is_taken_up_and_a_whole_one_is_left_alone(tmp_path, monkeypatch):
    path = backward_savings.main(savings(tmp_path, "--time-limit", "1e-9"))
    assert {row["rounds"] for row in read(path)["rows"]} == {1}
    backward_savings.main(savings(tmp_path))
    whole = read(path)
    assert {row["rounds"] for row in whole["rows"]} == {2} and len(whole["runs"]) == 2

    monkeypatch.setattr(backward_savings, "Group", None)  # nothing is built, so nothing is measured
    backward_savings.main(savings(tmp_path))
    assert read(path)["rows"] == whole["rows"]


def test_other_stages_join_the_file_and_keep_what_was_there(tmp_path):
    path = backward_savings.main(savings(tmp_path))
    backward_savings.main(savings(tmp_path, stages_of=4))
    found = {(where["stages_of"], where["stage"]) for row in read(path)["rows"] for where in row["stages"]}
    assert found == {(2, 1), (2, 2), (4, 1), (4, 2), (4, 3), (4, 4)}


def test_a_file_of_other_settings_is_refused_and_kept(tmp_path):
    path = backward_savings.main(savings(tmp_path))
    before = path.read_bytes()
    with pytest.raises(InputError, match="settings.*--output"):
        backward_savings.main(savings(tmp_path, "--batch-size", "3"))
    assert path.read_bytes() == before


def test_a_form_for_which_the_memory_does_not_suffice_is_kept_as_such(tmp_path, monkeypatch):
    loss = backward_savings.Group.loss

    def refuse(self, form):
        if form.name == "E always":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(self, form)

    monkeypatch.setattr(backward_savings.Group, "loss", refuse)
    path = backward_savings.main(savings(tmp_path))
    rows = rows_by_form(read(path))
    assert [key for key, row in rows.items() if row["out_of_memory"]] == [(2, "E always")]
    assert rows[2, "E always"]["backward_measured"] is None and rows[2, "cut"]["backward_measured"]["median"] > 0
    lines = path.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "out of memory" in line] == [line for line in lines if "| E always" in line]


# harness.py


@pytest.mark.parametrize("name", ["E trains", "cut"])
def test_saved_bytes_are_those_of_the_closed_form_and_what_the_loss_and_the_indices_keep(name):
    config = ARCHITECTURES["tiny"].with_head("classification", ("no", "yes"))
    group = backward_savings.Group(config, PeftConfig(), 3, 7, CPU, "fp32")
    form = backward_savings.Form(0 if name == "E trains" else 2, embeddings=name == "E trains")
    stage = Stage(0, 4, form.frozen_blocks, form.embeddings)
    closed = closed_form.stage_bytes(config, stage, PeftConfig(), 3, 7)["activation_bytes"]
    indices = 8 * (3 * 7 + 3 * 7 + 7 if form.embeddings else 0)  # tokens, types, positions
    of_loss = 3 * 2 * 4 + 3 * 8 + 4  # log-probabilities (B, C), labels (B,), the sum of the weights
    assert harness.saved_for_backward(group.variant(form), CPU, "fp32") == closed + indices + of_loss


def test_what_was_saved_is_given_back(monkeypatch):
    config = ARCHITECTURES["tiny"].with_head("classification", ("no", "yes"))
    group = backward_savings.Group(config, PeftConfig(), 3, 7, CPU, "fp32")
    outputs = []
    head = group.model.head

    def watched(x: torch.Tensor) -> torch.Tensor:
        outputs.append(weakref.ref(x))
        return head(x)

    monkeypatch.setattr(group.model, "head", watched)
    harness.saved_for_backward(group.variant(backward_savings.Form(0, True)), CPU, "fp32")
    gc.collect()
    assert [reference() for reference in outputs] == [None]


def test_the_backend_of_attention_is_read_from_the_graph():
    config = ARCHITECTURES["tiny"].with_head("classification", ("no", "yes"))
    form = backward_savings.Form(0, embeddings=True)
    for dropout, backend in ((0.1, "math"), (0.0, "FlashAttentionForCpu")):
        of_dropout = replace(config, attention_probs_dropout_prob=dropout)
        variant = backward_savings.Group(of_dropout, PeftConfig(), 2, 8, CPU, "fp32").variant(form)
        assert harness.attention_backend(variant, CPU, "fp32") == backend


def test_every_variant_takes_one_turn_a_round_and_leaves_no_gradient():
    config = ARCHITECTURES["tiny"].with_head("classification", ("no", "yes"))
    group = backward_savings.Group(config, PeftConfig(), 2, 8, CPU, "bf16")
    forms = [backward_savings.Form(0, True), backward_savings.Form(3, False)]
    variants = {form: group.variant(form) for form in forms}
    rounds = harness.take_turns(variants, rounds=3, steps=2, device=CPU, precision="bf16")
    assert [[len(timing.rounds) for timing in timings.values()] for timings in rounds] == [[1, 1], [2, 2], [3, 3]]
    assert all(parameter.grad is None for parameter in group.model.parameters())


def test_a_ratio_is_taken_within_each_round():
    slow = harness.Timing([{"backward": value, "forward": 1.0} for value in (10.0, 40.0, 10.0)])
    fast = harness.Timing([{"backward": value, "forward": 1.0} for value in (5.0, 20.0, 2.0)])
    assert fast.ratio(slow, "backward") == {"median": 0.5, "lowest": 0.2, "highest": 0.5}
    assert slow.milliseconds("forward", "backward") == 11
    assert fast.ratio(harness.Timing(out_of_memory=True), "backward") is None


def test_an_error_other_than_lack_of_memory_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(backward_savings.Group, "loss", lambda self, form: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        backward_savings.main(savings(tmp_path))


# peers.py and end_to_end.py


@pytest.fixture
def peers():
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    import peers

    return peers


@pytest.fixture
def end_to_end():
    for name in ("transformers", "peft", "accelerate"):
        pytest.importorskip(name)
    import end_to_end

    return end_to_end


@pytest.mark.parametrize("padding", [0, 4])
def test_both_sides_train_the_same_parameters_at_the_same_flops(peers, tmp_path, padding):
    arguments = f"--model tiny --length 9 --padding {padding} --stages-of 2 --device cpu --rounds 1 --steps 1".split()
    document = read(peers.main([*arguments, "--output", str(tmp_path)]))
    rows = {row["variant"]: row for row in document["rows"]}
    compared = [row for row in rows.values() if row["peer"]]
    assert len(rows) == 10 and len(compared) == 6
    for row in compared:
        peer = rows[row["peer"]]
        assert row["trainable_parameters"] == peer["trainable_parameters"]
        (forward, backward), (peer_forward, peer_backward) = row["counted_flops"], peer["counted_flops"]
        assert backward == peer_backward
        assert forward < peer_forward if row["variant"].endswith("cached") else forward == peer_forward
        assert row["step_of_peer"]["median"] > 0 and row["step_of_full"]["median"] > 0
        speed = row["speed"]
        missing = 1 - speed["tokens_per_second"] / speed["slots_per_second"]
        assert missing == pytest.approx(4 * padding / (8 * 9))  # 8 rows lack half of `padding` on average
        assert speed["share_of_matmul_peak"] == pytest.approx(speed["flops_per_second"] / document["matmul_peak"])
    assert "peft LoRA, stage 2, requires_grad" in {row["peer"] for row in compared}
    text = (tmp_path / f"peers_cpu_fp32{'_padded' if padding else ''}.md").read_text(encoding="utf-8")
    assert all(name in text for name in rows) and "at most" not in text  # targets are for BERT-base alone
    document = read(peers.main([*arguments, "--without-lora", "--output", str(tmp_path)]))
    assert [row["variant"] for row in document["rows"]] == [name for name in rows if "LoRA" not in name]


def test_the_logits_of_both_sides_are_equal_for_equal_weights_and_a_padded_batch(peers):
    from progtuning.model.bert import build_model

    config = replace(ARCHITECTURES["tiny"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = config.with_head("classification", ("no", "yes"))
    batch = peers.Batch.random(config, 4, 9, 5, CPU)
    stages = [Stage(0, 4, 0, True)]
    ours = peers.ours(config, PeftConfig(), stages, batch, "fp32")["full"]
    theirs = peers.theirs(config, False, stages, batch)["full"]
    state = build_model(config, seed=3).state_dict()
    ours.model.model.load_state_dict(state)
    own_head = ("classifier.weight", "classifier.bias")
    theirs.model.load_state_dict({key if key in own_head else f"bert.{key}": value for key, value in state.items()})
    for variant in (ours, theirs):
        variant.enter()
    assert torch.allclose(ours.loss(), theirs.loss(), rtol=1e-6)


def test_the_targets_stand_beside_what_was_measured_and_say_what_was_missed(peers):
    def ratio(value: float) -> dict:
        return {"median": value, "lowest": value, "highest": value}

    def row(name: str, step_of_full: float, backward: float, ideal: float) -> dict:
        values = {"step_of_peer": ratio(0.9), "step_of_full": ratio(step_of_full), "backward_of_full": ratio(backward)}
        names = {"variant": name, "peer": "transformers, full", "full": "ours, full"}
        return {**names, "backward_ideal": ideal, "out_of_memory": False, **values}

    settings = {"model": "bert-base-uncased", "batch_size": 8, "length": 128, "precision": "fp32", "stages_of": 3}
    rows = [
        row("ours, full", 1.0, 1.0, 1.0),
        row("ours, stage 2, cut, eval", 0.71, 0.66, 0.66),
        row("ours, stage 3, cut, eval", 0.50, 0.36, 0.32),
        row("ours, stage 3, cached", 0.40, 0.32, 0.32),
    ]
    table = peers.targets_table({"device": "CPU, 2 threads", "settings": settings, "rows": rows})
    reached = [line.split("|")[-2].strip() for line in table.splitlines()[2:]]
    assert reached == ["yes", "no", "yes", "yes", "yes", "no", "yes"]
    assert peers.targets_table({"device": "NVIDIA H200", "settings": settings, "rows": rows}) is None


@pytest.fixture(scope="module")
def small_task(tmp_path_factory) -> tuple[Path, Path]:
    """A model of 4 blocks that takes 128 tokens, and a task of 24 and 10 rows of 1 to 9 words."""
    import random

    from progtuning.model.weights import save_pretrained
    from tests.conftest import WORDS
    from tests.models import tiny_model

    folder, data = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("opinions")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    limits = {"vocab_size": len(vocabulary), "max_position_embeddings": 130}
    save_pretrained(tiny_model(head=None, labels=("no", "yes"), **limits), folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    generator = random.Random(0)
    for name, count in (("train", 24), ("dev", 10)):
        texts = (" ".join(generator.choices(WORDS, k=generator.randint(1, 9))) for _ in range(count))
        rows = (f"{text}\t{'ab'[i % 2]}\n" for i, text in enumerate(texts))
        (data / f"{name}.tsv").write_text("text\tlabel\n" + "".join(rows))
    return folder, data


def test_whole_runs_give_their_rows_and_a_series_is_taken_up(end_to_end, small_task, tmp_path, monkeypatch):
    folder, data = small_task
    runs = ["Trainer, padded to 128", "Trainer, dynamic padding", "full", "Progtuning cut + cache"]
    runs += ["peft LoRA, Trainer, dynamic padding", "LoRA, Progtuning cut + cache, random batches"]
    runs += ["Trainer, dynamic padding, stages"]
    arguments = f"--task classification --data {data} --model {folder} --device cpu --seeds 1 --epochs 2".split()
    arguments += ["--lora-epochs", "2", "--batch-size", "8", "--max-dev-rows", "6", "--output", str(tmp_path), "--runs"]
    path = end_to_end.main([*arguments, runs[0]])
    end_to_end.main([*arguments, *runs])
    rows = {row["run"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    assert list(rows) == runs
    for row in rows.values():
        assert row["wall_seconds"] > 0 and row["steps"] == 2 * 3 and set(row["metrics"]) == {"accuracy", "matthews"}
        assert {"device", "versions", "date", "command", "settings"} <= set(row)
        assert row["train_rows"] == 24 and row["dev_rows"] == 6

    config = ARCHITECTURES["tiny"].with_head("classification", ("a", "b"))
    config = replace(config, vocab_size=5 + 21, max_position_embeddings=130)
    everything = Stage(0, 4, 0, True)
    step = closed_form.forward_flops(config, PeftConfig(), 8, 128) + closed_form.backward_flops(
        config, everything, PeftConfig(), 8, 128
    )
    assert rows["Trainer, padded to 128"]["flops"] == 6 * step
    assert rows["Trainer, dynamic padding"]["flops"] < 6 * step / 5
    for base, other in (
        ("Trainer, dynamic padding", "full"),
        (runs[4], "LoRA, Progtuning cut + cache, random batches"),
    ):
        same = other == "full"
        assert (rows[base]["updated_parameters"] == rows[other]["updated_parameters"]) == same
    assert rows["Progtuning cut + cache"]["flops"] < rows["full"]["flops"]
    assert rows[runs[6]]["updated_parameters"] == rows["Progtuning cut + cache"]["updated_parameters"]
    assert 0.6 < rows[runs[6]]["flops"] / rows["Trainer, dynamic padding"]["flops"] < 0.9

    monkeypatch.setattr(end_to_end, "timed", None)  # every row is there, so nothing runs
    end_to_end.main([*arguments, *runs])
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"| {run} " in table for run in runs) and "| times faster |" in table


def test_speed_and_metric_are_compared_over_the_seeds_that_both_runs_have(end_to_end):
    def rows(seconds: list[float], accuracies: list[float]) -> list[dict]:
        pairs = enumerate(zip(seconds, accuracies))
        return [{"seed": seed, "wall_seconds": wall, "metrics": {"accuracy": value}} for seed, (wall, value) in pairs]

    groups = {
        "Progtuning cut + cache": rows([10, 10], [0.80, 0.82]),
        "Progtuning cut + cache, bf16": rows([5, 7.5], [0.80, 0.82]),
        "Trainer, padded to 128": rows([50, 50, 1], [0.81, 0.83, 0.5]),
        "Trainer, dynamic padding": rows([16, 16], [0.90, 0.92]),
    }
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in end_to_end.targets_table(groups).splitlines()[2:]
    ]
    assert [line[1:] for line in cells] == [
        ["Trainer, padded to 128", "8.00", "4.0", "yes", "-1.0", "yes"],
        ["Trainer, padded to 128", "5.00", "", "", "-1.0", "yes"],
        ["Trainer, dynamic padding", "1.60", "1.7", "no", "-10.0", "no"],
    ]


def test_the_gather_and_the_loop_of_the_cache_are_timed_in_every_place(tmp_path, capsys):
    shape = "--device cpu --widths 4 --rows 40 --batch-size 8 --batches 3"
    gather.main([*shape.split(), "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "gather_cpu.json").read_text())["rows"]
    assert [(row["cache"], row["width"]) for row in rows] == [("memory", 4), ("disk", 4), ("device", 4)]
    assert all(row[way] > 0 for row in rows for way in ("loop", "gather"))
    assert capsys.readouterr().out.strip() in (tmp_path / "gather_cpu.md").read_text()


def test_a_script_refuses_a_wrong_option_in_one_line_with_status_2():
    command = [sys.executable, str(BENCHMARKS / "backward_savings.py"), "--lengths", "128", "0"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(BENCHMARKS.parent), "PATH": ""}
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: --lengths must be at least 1, got 0\n")


def test_the_other_scripts_refuse_a_wrong_option(peers, end_to_end):
    with pytest.raises(InputError, match="^--padding must be in 0..127, got 128$"):
        peers.main(["--padding", "128"])
    with pytest.raises(InputError, match="^--epochs must be at least 1, got 0$"):
        end_to_end.main(["--epochs", "0"])


def test_what_needs_cuda_is_refused_on_a_cpu_before_anything_is_timed(tmp_path, capsys):
    shape = ["--device", "cpu", "--output", str(tmp_path / "out")]
    with pytest.raises(InputError, match="--variants graphs cudnn: needs a CUDA device, got cpu"):
        step_options.main([*shape, "--variants", "graphs", "cudnn"])
    with pytest.raises(InputError, match="--cuda-graphs needs CUDA and 5 --steps, got cpu and 3"):
        backward_savings.main([*shape, "--cuda-graphs", "--steps", "3"])
    assert not (tmp_path / "out").exists()


# step_options.py


def test_options_of_a_step_have_time_memory_and_what_the_closed_forms_promise(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(step_options.SHAPES, "tiny", 8)
    shape = "--models tiny --batch-size 4 --paddings 0 0.25 --dropouts 0.1 --rounds 1 --steps 1"
    step_options.main(
        [*f"--device cpu {shape} --variants plain unpadded checkpointed".split(), "--output", str(tmp_path)]
    )
    rows = json.loads((tmp_path / "step_options_cpu_fp32.json").read_text())["rows"]
    assert [(row["padding"], row["variant"]) for row in rows] == [
        (0, "plain"), (0, "checkpointed"), (0.25, "plain"), (0.25, "unpadded"), (0.25, "checkpointed")
    ]  # fmt: skip
    plain, unpadded, checkpointed = rows[2:]
    assert plain["step_ideal"] == 1 and unpadded["step_ideal"] == unpadded["share_of_tokens"] == 0.75
    assert 1.3 < checkpointed["step_ideal"] < 1.4 and checkpointed["closed_form_bytes"] < plain["closed_form_bytes"]
    assert all(row["milliseconds"] > 0 for row in rows) and "| checkpointed |" in capsys.readouterr().out
    assert plain["step_measured"]["median"] == 1 and plain["added_bytes"] is None  # what others took is among it
    alone = f"--device cpu {shape.replace('0 0.25', '0')} --variants checkpointed --output {tmp_path / 'alone'}"
    step_options.main(alone.split())
    (checkpointed,) = json.loads((tmp_path / "alone" / "step_options_cpu_fp32.json").read_text())["rows"]
    assert checkpointed["step_measured"] is None and checkpointed["added_bytes"] is not None


# gpu.py


def steps_of(*codes: tuple[str, str]) -> list[gpu.Step]:
    def figures():
        yield gpu.Figure("lines", "1", "1")

    return [gpu.Step(name, 1, [sys.executable, "-c", code], figures) for name, code in codes]


def test_a_step_that_fails_or_is_late_stops_no_other_and_only_what_is_done_is_not_repeated(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    steps = steps_of(("fails", "print('why'); 1 / 0"), ("is late", child), ("counts", count))
    begin = time.monotonic()
    for _ in range(2):
        gpu.run(steps, tmp_path / "out", 1, dict(os.environ))
    assert 2 < time.monotonic() - begin < 20
    rows = harness.read_rows(tmp_path / "out" / "steps.jsonl")
    found = [(row["step"], row["status"]) for row in rows]
    assert found[:3] == [("fails", "failed"), ("is late", gpu.LATE), ("counts", "done")] and found[3:] == found[:2]
    assert (tmp_path / "count").read_text() == "x" and "why" in (tmp_path / "out" / "fails.log").read_text()
    page = gpu.table(steps, tmp_path / "out").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page]
    assert cells[0] == ["step", "seconds", "of what", "figure", "ideal"]
    assert [row[3] for row in cells[2::2]] == ["failed", gpu.LATE, "done"]
    assert all(row[2:] == ["lines", "1", "1"] for row in cells[3::2])
    with tarfile.open(tmp_path / "out" / "results.tgz") as archive:
        assert {"steps.jsonl", "steps.md", "fails.log", "counts.log"} <= set(archive.getnames())


def test_a_step_for_which_half_of_its_time_is_not_left_is_not_begun_and_a_shorter_one_is(tmp_path):
    (long,) = steps_of(("long", "1 / 0"))
    gpu.run([replace(long, limit=99), replace(long, name="short", command=["true"])], tmp_path, 0.15, {})
    rows = [(row["step"], row["status"]) for row in harness.read_rows(tmp_path / "steps.jsonl")]
    assert rows == [("long", gpu.NOT_BEGUN), ("short", "done")]


def test_a_signal_that_stops_the_steps_leaves_no_process_of_theirs(tmp_path):
    """A group of its own does not hear the signal that ends the parent: what went on took the device from others."""
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"""
import sys, gpu
from pathlib import Path
gpu.steps_of = lambda args, work: [gpu.Step("long", 60, [sys.executable, "-c", {child!r}])]
gpu.main(["--device", "cpu", "--output", {str(tmp_path / "out")!r}])
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(gpu.ROOT), str(gpu.ROOT / "benchmarks")])}
    run = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.DEVNULL)
    while not (pid.exists() and pid.read_text()):
        assert run.poll() is None
        time.sleep(0.05)
    run.terminate()
    assert run.wait(timeout=20) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_rehearsal_of_two_steps_gives_their_figures_beside_the_ideal(tmp_path, capsys):
    arguments = ["--rehearse", "--device", "cpu", "--minutes", "2", "--output", str(tmp_path), "--only"]
    gpu.main([*arguments, "plain", "cache in memory"])
    rows = {row["step"]: row for row in harness.read_rows(tmp_path / "steps.jsonl")}
    assert [row["status"] for row in rows.values()] == ["done", "done"]
    figures = {what: (value, ideal) for what, value, ideal in rows["cache in memory"]["figures"]}
    assert list(figures) == ["tokens/s", *(f"stage {number}, of stage 1" for number in (1, 2, 3))]
    plain = {what: ideal for what, _, ideal in rows["plain"]["figures"]}
    assert plain["tokens/s"] is None and figures["tokens/s"][1] is not None
    assert float(figures["stage 3, of stage 1"][1]) < float(plain["stage 3, of stage 1"]) < 1
    assert "| cache in memory |" in capsys.readouterr().out


# squad.py


def test_questions_give_a_row_for_each_schedule_and_the_memory_of_a_file(tiny_folder, tmp_path, monkeypatch, capsys):
    import squad

    monkeypatch.setattr(squad, "MODEL", str(tiny_folder))
    monkeypatch.setattr(squad, "RESULTS", tmp_path / "squad.jsonl")
    monkeypatch.setattr(squad, "FULL_SIZE", 20_000)
    folder = write_squad(tmp_path / "films", "v2.0", train=24, dev=6)
    for arguments in (["--task", "squad_v2", "--data", str(folder), "--rows", "16"], ["--memory"], ["--table"]):
        monkeypatch.setattr(sys, "argv", ["squad.py", *arguments])
        squad.main()
    *runs, memory = [json.loads(line) for line in (tmp_path / "squad.jsonl").read_text().splitlines()]
    assert [row["schedule"] for row in runs] == ["full", "shrinking"]
    assert runs[0]["flops"] > runs[1]["flops"] > 0 and runs[0]["train_rows"] == 16
    assert all(row["epochs"] == 2 and 0 <= row["metrics"]["exact"] <= row["metrics"]["f1"] <= 1 for row in runs)
    assert 20_000 <= memory["file_bytes"] < 25_000 and memory["peak_bytes"] >= memory["peak_bytes_before"] > 0
    assert memory["windows"] >= memory["questions"] > 20
    assert "| squad_v2 | shrinking | 16 x 2" in capsys.readouterr().out


# accuracy.py


@pytest.fixture
def small_study(tiny_folder, tmp_path, monkeypatch):
    """accuracy.py with a study of two tasks (a sentence's opinion, a question's answer), and where their files are."""
    import accuracy

    text, rows = "sentence\tlabel\n", ("a good film\t1\n", "a bad film\t0\n")
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").write_text(text + "".join(rows * 10))
    (tmp_path / "SST-2" / "dev.tsv").write_text(text + "".join(rows * 3))
    data = accuracy.Data(tmp_path, write_squad(tmp_path / "films", "v1.1", train=16, dev=5))
    study = {"model": str(tiny_folder), "tasks": ["sst-2", "squad"], "methods": ["full", "progtuning + cache"]}
    study |= {"seeds": [1], "rows": 12, **accuracy._COMMON, "batch_size": 4}
    monkeypatch.setitem(accuracy.STUDIES, "small", study)
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path)
    return accuracy, data


def test_a_study_gives_a_row_a_run_two_at_once_and_is_taken_up_where_it_stopped(small_study, monkeypatch):
    accuracy, data = small_study
    path = accuracy.RESULTS / "small.jsonl"
    study = accuracy.STUDIES["small"]
    monkeypatch.setitem(accuracy.STUDIES, "small", study | {"methods": ["full"]})
    accuracy.run_study("small", data, CPU)
    begun = path.read_text(encoding="utf-8")
    monkeypatch.setitem(accuracy.STUDIES, "small", study)
    accuracy.run_study("small", data, CPU, jobs=2)
    assert path.read_text(encoding="utf-8").startswith(begun)
    rows = accuracy.read_rows(path)
    keys = [(row["task"], row["method"], row["seed"], row["lr"]) for row in rows]
    assert sorted(keys) == sorted(run.key for run in accuracy.runs_of(study))
    for row in rows:
        assert row["train_rows"] == 12 and len(row["predictions"]) == row["dev_rows"]["dev"]
        held_out = accuracy.HeldOut(row["task"], data)
        metric = held_out.sampled(row["predictions"])(np.arange(len(row["predictions"])))
        assert metric == pytest.approx(row["metrics"][held_out.task.main_metric], abs=1e-9)  # as what was saved gives
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in accuracy.table(path, data).splitlines()]
    by_method = {cells[0]: cells for cells in lines if len(cells) == 7}
    by_task = {(cells[0], cells[1]): cells for cells in lines if len(cells) == 9}
    difference = re.compile(r"[+-]\d+\.\d \([+-]\d+\.\d to [+-]\d+\.\d\)")
    assert by_method["method"][2:4] == ["sst-2, accuracy", "squad, f1"] and not by_method["full"][4]
    assert difference.fullmatch(by_method["progtuning + cache"][4])
    assert difference.fullmatch(by_task["squad", "progtuning + cache"][5]) and not by_task["squad", "full"][5]
    assert by_method["full"][5:] == ["1.00", "1.00"] and 0 < float(by_method["progtuning + cache"][6]) < 1


def test_a_study_without_the_files_of_a_task_ends_before_the_first_run(small_study):
    accuracy, data = small_study
    with pytest.raises(InputError, match="^the task squad needs --squad, the folder of its files$"):
        accuracy.run_study("small", replace(data, squad=None), CPU)
    assert not (accuracy.RESULTS / "small.jsonl").exists()


def test_the_table_has_costs_averaged_over_the_seeds_decisions_and_rows_with_and_without_predictions(tmp_path):
    import accuracy

    common = {"task": "movie-reviews", "metrics": {"accuracy": 0.5}, "lr": 1e-4, "seconds": 1.0}
    rows = [
        common | {"method": "full", "seed": seed, "updated_parameters": 10**6, "flops": flops}
        for seed, flops in ((1, 100), (2, 300))
    ]
    frozen = [{"step": 18, "frozen_blocks": 0}, {"step": 27, "frozen_blocks": 2}, {"step": 36, "frozen_blocks": 2}]
    rows += [
        common
        | {"method": "adaptive", "seed": seed, "updated_parameters": 10**6 * seed, "flops": 100}
        | {"decisions": frozen[:seed], "predictions": [0, 1]}
        for seed in (1, 2)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = accuracy.table(path, accuracy.Data(None, None))
    by_method, by_task, decided = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()]
        for part in text.split("\n\n")[1:]
    )
    assert by_method[3][-2:] == ["1.50", "0.50"] and by_task[3][-3:-1] == ["1.50", "0.50"]
    assert [line[2:] for line in decided[2:]] == [["1", "1", "none"], ["2", "2", "2 after 27"]]


# pays.py


def comparison(folder: Path, task: str, labels: Sequence[int], schedules: dict[str, dict[int, list[int]]]) -> Path:
    """Write the files of a comparison at one budget: of each schedule the predictions of each seed."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"identity": {"task": {"name": task}}}))
    common = {"part": "result", "budget": 0.5, "lr": 1e-4}
    rows = [common | {"part": "choice", "schedule": "full", "seed": 1, "metrics": {"accuracy": 0.0}}]
    for schedule, by_seed in schedules.items():
        for seed, predictions in by_seed.items():
            metrics = {"accuracy": float(np.mean(np.equal(predictions, labels)))}
            rows.append(common | {"schedule": schedule, "seed": seed, "predictions": predictions, "metrics": metrics})
    rows.append(common | {"schedule": "2", "seed": 3, "error": "diverged"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_differences_to_full_at_equal_cost_stand_beside_each_other_with_their_mean(tmp_path, capsys):
    import pays

    labels, right, wrong = [0, 1] * 20, [0, 1] * 20, [1, 0] * 20
    (tmp_path / "SST-2").mkdir()
    lines = "sentence\tlabel\n" + "".join(f"a film\t{label}\n" for label in labels)
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "SST-2" / name).write_text(lines)
    half = right[:20] + wrong[20:]
    one = comparison(tmp_path / "one", "sst-2", labels, {"full": {1: half, 2: half}, "2": {1: right, 2: right}})
    two = comparison(tmp_path / "two", "sst-2", labels, {"full": {1: right, 2: right}, "2": {1: right, 2: half}})
    picture = tmp_path / "frontier.png"
    pays.main([str(one), str(two), "--glue", str(tmp_path), "--output", str(picture)])
    full, frozen = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]
    ]
    assert full == ["0.5", "full", "50.0 ± 0.0, 2 seeds", "100.0 ± 0.0, 2 seeds", ""]
    assert frozen[:2] == ["0.5", "2"] and frozen[2].startswith("+50.0 (") and frozen[3].startswith("-25.0 (")
    assert frozen[4].startswith("+12.5 (")  # the seed that failed takes part in none
    data = pays.Data(tmp_path, None)
    draws, _ = pays.compared([one, two], data)
    of_tasks = draws[0.5, "2"]
    np.testing.assert_allclose(of_tasks[pays.MEAN], (of_tasks["one"] + of_tasks["two"]) / 2)
    draws, _ = pays.compared([one, comparison(tmp_path / "three", "sst-2", labels, {"full": {1: half}})], data)
    assert list(draws[0.5, "2"]) == ["one"]  # no mean of the tasks that happen to have it
    low, high = pays.percentiles(of_tasks["one"])
    assert 0.3 < low < 0.5 < high < 0.7  # 40 rows of which half differ
    pytest.importorskip("matplotlib")
    assert picture.stat().st_size > 5000


@pytest.mark.parametrize(
    "curve, budget",
    [
        ({0.25: 60, 0.5: 70, 1: 90}, 0.75),
        ({0.25: 60, 0.5: 80, 1: 70}, 0.5),
        ({0.25: 81, 0.5: 70, 1: 90}, 0.25),
        ({0.5: 80, 1: 85}, 0.5),
        ({0.25: 60, 0.5: 70, 1: 79.9}, None),
    ],
)
def test_the_budget_at_which_a_curve_first_is_as_good_is_read_between_its_points(curve, budget):
    import pays

    assert pays.reached(curve, 80) == (None if budget is None else pytest.approx(budget))


def test_what_is_as_good_as_full_at_a_budget_of_one_has_its_budget_seconds_and_bytes(tmp_path):
    import pays

    def rows(metric, seconds):
        one = {"seed": 1, "seconds": seconds, "peak_bytes": 10 * seconds}
        return {"sts-b": [one | {"metrics": {"pearson": metric + d, "spearman": 0}} for d in (-0.01, 0.01)]}

    found = {(budget, "full"): rows(0.6 + 0.1 * budget, 8 * budget) for budget in (1, 0.25, 0.5)}
    found |= {(budget, "2+cache"): rows(0.65 + 0.1 * budget, 6 * budget) for budget in (0.25, 1, 0.75)}
    found |= {(budget, "growing"): rows(0.5, 4) for budget in (0.25, 0.75, 1.5)} | {(0.5, "4"): rows(0.9, 1)}
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in pays.as_good_table(found).splitlines()[2:]]
    assert cells == [
        ["full", "1.00", "1.00", "1.00"],
        ["2+cache", "0.50", "0.75", "0.75"],
        ["growing", "over 1.50", "", ""],
    ]
    assert pays.as_good_table({key: one for key, one in found.items() if key != (1, "full")}) is None
    pytest.importorskip("matplotlib")
    assert pays.draw_curves(found, tmp_path / "curves.png") and (tmp_path / "curves.png").stat().st_size > 5000
    assert not pays.draw_curves({key: one for key, one in found.items() if key[0] == 0.25}, tmp_path / "none.png")


def test_a_folder_of_no_comparison_is_refused(tmp_path):
    import pays

    with pytest.raises(InputError, match="run.json"):
        pays.main([str(tmp_path)])
