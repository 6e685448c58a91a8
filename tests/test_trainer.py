"""The README's callback under transformers' Trainer: schedule, optimizer, checkpoints, accumulation, two processes."""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from progtuning.stages import make_schedule
from tests.trainer_worker import (
    BATCH,
    BLOCK,
    CASES,
    REFUSED,
    STEPS,
    build,
    callback,
    make_trainer,
    mean_loss,
    rows,
    train,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def launch(tmp_path_factory):
    """Two processes under torchrun, with gloo, which run beside the tests that do not need them."""
    folder = tmp_path_factory.mktemp("launched")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "tests.trainer_worker", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes) as process:
        yield process, folder
        process.terminate()


def trained_names(stage, model: torch.nn.Module) -> set[str]:
    """Return what trains in a stage, by the names of DeBERTa-v2 alone."""
    below = {name for name, _ in model.named_parameters() if not name.startswith(("pooler", "classifier"))}
    blocks = {name for name in below for block in stage.blocks if f".layer.{block}." in name}
    head = {name for name, _ in model.named_parameters()} - below
    return head | blocks | ({name for name in below if ".layer." not in name} if stage.embeddings else set())


def stages_of(schedule: str) -> list:
    return [make_schedule(schedule, 4, 3).at_step(step, STEPS) for step in range(STEPS)]


class Look(transformers.TrainerCallback):
    """After the README's callback: what requires a gradient, has one, is in the optimizer and has moments there."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        held = {p for group in optimizer.param_groups for p in group["params"]}
        self.seen.append(
            {
                "requires": {name for name, p in model.named_parameters() if p.requires_grad},
                "grad": {name for name, p in model.named_parameters() if p.grad is not None},
                "held": {name for name, p in model.named_parameters() if p in held},
                "steps": {
                    n: int(optimizer.state[p]["step"]) for n, p in model.named_parameters() if p in optimizer.state
                },
            }
        )


def test_the_block_has_at_most_fifteen_lines():
    assert BLOCK.count("\n") <= 15


@pytest.mark.parametrize("schedule", ["shrinking", "growing"])
def test_right_after_each_change_the_optimizer_holds_the_stage_and_the_moments_of_what_stays(schedule, tmp_path):
    model, look, expected = build(), Look(), {}
    make_trainer(tmp_path, model, callback(schedule), look).train()
    assert len(look.seen) == STEPS
    for seen, stage in zip(look.seen, stages_of(schedule), strict=True):
        names = trained_names(stage, model)
        expected = {name: steps for name, steps in expected.items() if name in names}
        assert seen["requires"] == seen["held"] == names
        assert seen["steps"] == expected and not seen["grad"]
        expected = {name: expected.get(name, 0) + 1 for name in names}


def test_a_run_is_bit_for_bit_that_of_a_loop_which_sets_requires_grad(tmp_path):
    model, batches = build(), []
    model.register_forward_pre_hook(lambda module, args, inputs: batches.append(dict(inputs)), with_kwargs=True)
    trainer = make_trainer(tmp_path, model, callback())
    trainer.train()
    assert len(batches) == STEPS and all(p.requires_grad for p in model.parameters())
    label_of = {tuple(row["input_ids"].tolist()): row["labels"] for row in rows()}
    loop = build()
    decayed = trainer.get_decay_parameter_names(loop)
    groups = [[p for n, p in loop.named_parameters() if (n in decayed) == decays] for decays in (True, False)]
    groups = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.1, 0.0))]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    rates = transformers.get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    for stage, inputs in zip(stages_of("shrinking"), batches, strict=True):
        names = trained_names(stage, loop)
        for name, parameter in loop.named_parameters():
            parameter.requires_grad_(name in names)
        labels = torch.tensor([label_of[tuple(ids)] for ids in inputs["input_ids"].tolist()])
        mean_loss(loop(**inputs), labels, BATCH).backward()
        torch.nn.utils.clip_grad_norm_(loop.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), loop.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_run_resumed_in_the_middle_of_a_stage_ends_bit_for_bit_as_if_it_had_not_stopped(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 7}
    model = build(dropout=0.1)
    make_trainer(tmp_path, model, callback(), **saves).train()
    moments = {}
    for step in (7, 14):
        checkpoint = tmp_path / f"checkpoint-{step}"
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        moments[step] = len(state["state"])
        assert moments[step] == len(trained_names(stages_of("shrinking")[step - 1], model))
        resumed, look = build(dropout=0.1), Look()
        make_trainer(tmp_path / "resumed", resumed, callback(), look).train(resume_from_checkpoint=str(checkpoint))
        assert set(look.seen[0]["steps"].values()) == {step} and len(look.seen) == STEPS - step
        for (name, ours), theirs in zip(model.named_parameters(), resumed.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
    assert moments[14] < moments[7] < len(list(model.parameters()))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a process alone makes of a schedule, in whole batches, each run once."""
    return lru_cache(maxsize=None)(lambda schedule: train(tmp_path_factory.mktemp("alone"), {"schedule": schedule}))


@pytest.mark.parametrize("case", CASES)
def test_batches_in_pieces_and_activation_checkpointing_give_the_same_weights(case, alone, tmp_path):
    weights, trained = train(tmp_path, CASES[case])
    expected, expected_names = alone(CASES[case].get("schedule", "shrinking"))
    assert trained == expected_names
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def launched(launch) -> Path:
    """The folder with what the two processes made of every case."""
    process, folder = launch
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_under_the_trainers_ddp_give_the_weights_of_one(case, launched, alone):
    weights, trained = alone(CASES[case].get("schedule", "shrinking"))
    first, second = (load_file(launched / f"{case}.{rank}.safetensors") for rank in (0, 1))
    for rank in (0, 1):
        assert json.loads((launched / f"{case}.{rank}.json").read_text()) == trained
    for name, weight in weights.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", REFUSED)
def test_a_ddp_that_cannot_leave_parameters_out_says_so_in_the_second_step(case, launched):
    for rank in (0, 1):
        message = json.loads((launched / f"refused.{rank}.json").read_text())[case]
        assert message.startswith("Expected to have finished reduction in the prior iteration")
