"""What is promised of stages, cut, cache, methods and resuming, on every device that is here.

A CPU is always one, CUDA where there is one. On CUDA some sums are taken in an order that changes from run to run.
Under deterministic algorithms, which the fixture asks for, what is bit for bit on a CPU is bit for bit there too.
Between two devices, and where products have other shapes (a cache), it is equal within the bound that is stated.
Compiled and unpadded blocks are tested so in test_compile.py and test_unpad.py; that no step waits for CUDA, in
test_train.py.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from progtuning.engine import StageEngine
from progtuning.methods.apply import apply_peft
from progtuning.run.build import build_trainer
from progtuning.run.state import load_state_dict, state_dict
from progtuning.settings.peft import PeftConfig
from progtuning.settings.train import DPSConfig
from progtuning.speed.checkpointing import checkpoint_blocks
from progtuning.stages import Stage
from progtuning.step.device import forward_pass
from progtuning.step.loader import to_device
from progtuning.train import Trainer
from tests.models import gradients, tiny_batch, tiny_model
from tests.test_train import SETTINGS, rows, weights

PEFT = {
    "adapter": PeftConfig("adapter", adapter_size=4),
    "LoRA": PeftConfig("lora", lora_r=2, lora_dropout=0.1),
    "BitFit": PeftConfig("bitfit"),
    "SPAFIT": PeftConfig("spafit", spafit_bounds=(1, 2), lora_r=2),
}
RUNS = {  # 9 steps: 24 rows in batches of 8, 3 epochs
    "shrinking": {},
    "growing": {"schedule": "growing"},
    "DPS dense": {"dps": DPSConfig("dense", update_ratio=0.23)},
    "DPS mix": {"dps": DPSConfig("mix", update_ratio=0.23)},
    "cache in memory": {"cache": "memory"},
    "cache on the device": {"cache": "device"},
    "checkpointed blocks": {"checkpoint_activations": True},
    "unpadded blocks": {"unpadded": True},
    **{name: {"peft": peft} for name, peft in PEFT.items()},
}


def trainer(device: torch.device, dropout: float = 0.1, **changes) -> Trainer:
    settings = replace(SETTINGS, **changes)
    model = tiny_model(hidden_dropout_prob=dropout)
    apply_peft(model, settings.peft, seed=1)
    return build_trainer(model, rows(24), settings, device)


def losses(run: Trainer) -> list[float]:
    """Train; return the loss of every batch."""
    seen, original = [], run.loss
    run.loss = lambda *batch: seen.append(original(*batch)) or seen[-1]
    run.fit()
    return torch.stack(seen).tolist()


def backward(engine: StageEngine, inputs: dict) -> dict[str, torch.Tensor]:
    """Return the gradients of a batch, of an engine that had none."""
    engine.zero_grad()
    output = engine(**inputs)
    F.cross_entropy(output, torch.arange(len(output), device=output.device) % 3).backward()
    return gradients(engine.model)


@pytest.mark.parametrize("boundary", [1, 3, 4])
def test_gradients_above_the_cut_are_those_of_the_uncut_model_bit_for_bit(boundary, device):
    engine = StageEngine(tiny_model().to(device))
    inputs, _ = to_device(tiny_batch(engine.model.config), device)
    whole = backward(engine, inputs)
    engine.enter(Stage(0, 4, boundary, embeddings=False))
    cut = backward(engine, inputs)
    assert set(cut) == engine.trainable_names(engine.stage) < set(whole)
    assert all(torch.equal(cut[name], whole[name]) for name in cut)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_taken_up_in_its_middle_ends_as_one_that_was_not_bit_for_bit(name, device):
    whole, kept = trainer(device, **RUNS[name]), []

    def keep(stage_ends: bool) -> None:
        if whole.step == 5 and not kept:
            kept.append(tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state_dict(whole)))

    whole.fit(after_step=keep)
    resumed = trainer(device, **RUNS[name])
    load_state_dict(resumed, kept[0])
    resumed.fit()
    found, expected = weights(resumed.engine.model), weights(whole.engine.model)
    assert all(torch.equal(found[key], expected[key]) and found[key].device.type == device.type for key in expected)


@pytest.mark.parametrize("name", RUNS)
def test_what_a_stage_does_not_train_keeps_its_bits_and_the_optimizer_holds_what_it_does_on_the_device(name, device):
    run, before = trainer(device, **RUNS[name]), {}

    def check(stage_ends: bool) -> None:
        now = weights(run.engine.model)
        names = run.engine.trainable_names(run.engine.stage)
        if before:
            assert all(torch.equal(now[key], before[key]) for key in now.keys() - names)
            assert set(run.optimizer.state) == {run.engine.candidates[key] for key in names}
            moments = [x for state in run.optimizer.state.values() for x in state.values() if x.dim()]
            assert moments and all(moment.device.type == device.type for moment in moments)
        before.update(now)

    run.fit(after_step=lambda stage_ends: check(stage_ends) if not stage_ends or run.step == run.num_steps else None)


@pytest.mark.parametrize("name", RUNS)
def test_without_dropout_the_losses_are_those_of_the_cpu_within_a_thousandth(name, device):
    changes = RUNS[name] | ({"peft": replace(PEFT[name], lora_dropout=0.0)} if name in PEFT else {})
    expected = losses(trainer(torch.device("cpu"), dropout=0.0, **changes))
    assert losses(trainer(device, dropout=0.0, **changes)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["shrinking", "growing", "DPS mix", "LoRA", "adapter"])
def test_a_run_with_checkpointed_blocks_ends_as_one_without_bit_for_bit_and_counts_what_ran_again(name, device):
    plain, checkpointed = (trainer(device, checkpoint_activations=value, **RUNS[name]) for value in (False, True))
    for run in (plain, checkpointed):
        run.fit()
    expected, found = (weights(run.engine.model) for run in (plain, checkpointed))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    for ours, theirs in zip(checkpointed.ledger.costs, plain.ledger.costs, strict=True):
        again = ours.backward_flops - theirs.backward_flops
        assert ours.forward_flops == theirs.forward_flops and 0 < again < ours.forward_flops


def test_a_checkpointed_block_runs_again_by_the_kernels_of_its_forward_pass():
    """PyTorch takes cuDNN's attention where it may, and its backward pass does not fit what another kernel kept."""
    taken = []
    model = tiny_model()
    for block in model.encoder.layer:
        block.register_forward_pre_hook(lambda *_: taken.append(torch.backends.cuda.cudnn_sdp_enabled()))
        block.attention.register_forward_pre_hook(lambda *_: taken.append(torch.backends.cuda.cudnn_sdp_enabled()))
    checkpoint_blocks(model)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with forward_pass(torch.device("cpu"), "fp32"):
        output = model(**tiny_batch(model.config))
    output.sum().backward()
    assert len(taken) == 3 * model.num_blocks and not any(taken) and torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("place", ["memory", "disk", "device"])
def test_the_losses_with_a_cache_are_those_without_within_a_ten_thousandth(place, device):
    expected = losses(trainer(device, prefix_dropout=False))
    assert losses(trainer(device, cache=place)) == pytest.approx(expected, rel=1e-4)
