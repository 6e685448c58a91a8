"""Parameter groups, the learning-rate schedule and what leaves the optimizer."""

import pytest
import torch

from progtuning.engine import keep_only
from progtuning.settings.train import LR_SCHEDULES
from progtuning.step.optim import build_optimizer, learning_rate_schedule, parameter_groups
from tests.models import tiny_model


def test_biases_and_layer_norms_are_not_decayed_and_everything_else_is_as_transformers_groups_them():
    transformers = pytest.importorskip("transformers")
    model = tiny_model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, others = parameter_groups(model, lr=1e-3, weight_decay=0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    # transformers' Trainer decays what is neither in a LayerNorm nor a bias.
    theirs = transformers.Trainer.get_decay_parameter_names(None, model)
    assert {names[p] for p in decayed["params"]} == set(theirs)
    assert {names[p] for p in others["params"]} == set(names.values()) - set(theirs)


def test_frozen_parameters_are_in_no_group():
    model = tiny_model()
    model.requires_grad_(False)
    model.classifier.bias.requires_grad_(True)
    assert parameter_groups(model, 1e-3, 0.1) == [{"params": [model.classifier.bias], "lr": 1e-3, "weight_decay": 0.0}]


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_a_first_step_moves_each_block_by_its_share_of_the_rate_of_the_one_above(decay):
    """AdamW's first step is the learning rate, whatever the gradient; it is 1 for each block that lies above."""
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, lr=1e-2, weight_decay=0.0, lr_decay=decay)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    powers = {"embeddings": 4, **{f"encoder.layer.{index}": 3 - index for index in range(4)}}
    for name, parameter in model.named_parameters():
        power = next((power for unit, power in powers.items() if name.startswith(f"{unit}.")), 0)
        step = torch.full_like(parameter, 1e-2 * decay**power)
        torch.testing.assert_close(before[name] - parameter, step, rtol=1e-3, atol=1e-6)


def test_one_line_of_warm_up_and_fall_scales_every_blocks_rate_and_keeps_their_shares():
    optimizer = build_optimizer(tiny_model(), lr=1e-2, lr_decay=0.5)
    line = learning_rate_schedule(optimizer, num_steps=10, warmup_steps=2)
    first = {group["initial_lr"] for group in optimizer.param_groups}
    assert first == {1e-2 * 0.5**power for power in range(5)} and len(optimizer.param_groups) == 10
    for _ in range(6):
        optimizer.step()
        line.step()
    assert {group["lr"] for group in optimizer.param_groups} == {rate / 2 for rate in first}


def test_the_kernel_is_fused_and_the_decay_is_that_of_adamw_unless_given():
    optimizer = build_optimizer(tiny_model(), lr=1e-3)
    assert optimizer.defaults["fused"] is True
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


@pytest.mark.parametrize("epsilon", [{}, {"epsilon": 1e-1}])
def test_the_step_is_torchs_adamw(epsilon):
    models = [tiny_model(), tiny_model()]
    ours = build_optimizer(models[0], lr=1e-2, weight_decay=0.1, **epsilon)
    theirs = torch.optim.AdamW(
        parameter_groups(models[1], 1e-2, 0.1),
        lr=1e-2,
        betas=(0.9, 0.999),
        eps=epsilon.get("epsilon", 1e-8),
        foreach=False,
        fused=False,
    )
    for seed in range(3):
        for model, optimizer in zip(models, (ours, theirs)):
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", LR_SCHEDULES)
@pytest.mark.parametrize("num_steps, warmup_steps", [(10, 0), (10, 3), (1, 1), (7, 7), (1, 0)])
def test_the_learning_rate_is_that_of_transformers_schedule_of_the_same_shape(num_steps, warmup_steps, shape):
    transformers = pytest.importorskip("transformers")

    def rates(build):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        schedule = build(optimizer)
        seen = []
        for _ in range(num_steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return seen

    name = {"linear": "linear", "constant": "constant_with_warmup"}[shape]
    theirs = rates(lambda optimizer: transformers.get_scheduler(name, optimizer, warmup_steps, num_steps))
    ours = rates(lambda optimizer: learning_rate_schedule(optimizer, num_steps, warmup_steps, shape))
    assert ours == pytest.approx(theirs)


def test_what_leaves_loses_its_state_and_no_longer_moves():
    stays, leaves = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.AdamW([stays, leaves], lr=0.1, weight_decay=0.5)
    stays.grad, leaves.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    before = leaves.detach().clone()
    keep_only(optimizer, [[stays, leaves]], {stays})
    assert list(optimizer.state) == [stays] and optimizer.param_groups[0]["params"] == [stays]
    optimizer.step()  # leaves.grad is still there, as set_to_none=False would leave it
    assert torch.equal(leaves, before) and not torch.equal(stays, before)
    keep_only(optimizer, [[stays, leaves]], {stays, leaves})
    optimizer.step()
    assert (optimizer.state[stays]["step"], optimizer.state[leaves]["step"]) == (3, 1)


def test_an_emptied_group_does_not_break_the_step():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [a]}, {"params": [b]}], lr=0.1, fused=True)
    keep_only(optimizer, [[a], [b]], {b})
    b.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(a, torch.ones(2)) and not torch.equal(b, torch.ones(2))
