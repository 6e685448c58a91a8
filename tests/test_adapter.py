"""Houlsby adapters: where they stand, how they start, and what trains."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from progtuning.base.errors import InputError
from progtuning.engine import StageEngine
from progtuning.methods.apply import apply_peft
from progtuning.model.bert import Model
from progtuning.model.config import ARCHITECTURES
from progtuning.settings.peft import PeftConfig
from progtuning.stages import EMBEDDING_POLICIES, Stage, embeddings_train
from progtuning.step.optim import build_optimizer
from tests.models import gradients, tiny_batch, tiny_model

ACTIVATIONS = {"gelu": nn.GELU(), "gelu_new": nn.GELU(approximate="tanh"), "relu": nn.ReLU()}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def adapted(**changes) -> Model:
    """A tiny model whose adapters are far from the identity."""
    model = tiny_model()
    apply_peft(model, PeftConfig("adapter", adapter_size=5, **changes))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.normal_(std=0.5, generator=generator)
    return model


def test_two_adapters_a_block_are_all_that_is_added():
    model = tiny_model()
    before = {name for name, _ in model.named_parameters()}
    apply_peft(model, PeftConfig("adapter", adapter_size=5))
    shapes = {"down.weight": (5, 16), "down.bias": (5,), "up.weight": (16, 5), "up.bias": (16,)}
    added = {
        f"encoder.layer.{i}.{half}.adapter.{name}": shape
        for i in range(4)
        for half in ("attention.output", "output")
        for name, shape in shapes.items()
    }
    after = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert before <= after.keys()
    assert {name: after[name] for name in after.keys() - before} == added


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_adapter_stands_after_dropout_and_before_the_residual_sum_and_layer_norm(activation):
    model = adapted(adapter_activation=activation).train()
    for output, width in ((model.encoder.layer[1].attention.output, 16), (model.encoder.layer[1].output, 24)):
        output.dropout.p = 0.5
        x, residual = torch.randn(3, 7, width), torch.randn(3, 7, 16)
        torch.manual_seed(9)
        got = output(x, residual)
        torch.manual_seed(9)
        y = F.dropout(F.linear(x, output.dense.weight, output.dense.bias), 0.5)
        bottleneck = ACTIVATIONS[activation](F.linear(y, output.adapter.down.weight, output.adapter.down.bias))
        y = y + F.linear(bottleneck, output.adapter.up.weight, output.adapter.up.bias)
        norm = output.LayerNorm
        expected = F.layer_norm(y + residual, (16,), norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(got, expected)


def test_the_start_is_near_the_base_model_but_both_projections_are_drawn():
    base, model = tiny_model().eval(), tiny_model().eval()
    apply_peft(model, PeftConfig("adapter", adapter_size=8))
    batch = tiny_batch(base.config)
    difference = (model(**batch) - base(**batch)).abs().max().item()
    assert 0 < difference < 1e-2


@pytest.mark.parametrize("changes, std", [({}, 1e-2), ({"adapter_init_std": 1e-3}, 1e-3)])
def test_projections_start_as_a_normal_of_the_deviation_cut_at_two_deviations_and_biases_at_zero(changes, std):
    model = tiny_model(hidden_size=400)
    apply_peft(model, PeftConfig("adapter", adapter_size=100, **changes))
    for layer in (model.encoder.layer[1].output.adapter.down, model.encoder.layer[2].attention.output.adapter.up):
        assert 1.99 * std < layer.weight.abs().max() <= 2 * std
        assert layer.weight.std().item() == pytest.approx(0.87963 * std, rel=0.02)  # of a normal cut at 2 deviations
        assert abs(layer.weight.mean().item()) < 0.02 * std
        assert not layer.bias.any()


def test_what_is_drawn_depends_on_the_seed_alone_and_leaves_the_global_random_state():
    draws = []
    for seed in (7, 7, 8):
        model, state = tiny_model(), torch.get_rng_state()
        apply_peft(model, PeftConfig("adapter"), seed)
        assert torch.equal(torch.get_rng_state(), state)
        draws.append(model.encoder.layer[2].output.adapter.up.weight.clone())
        torch.manual_seed(123)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("layer_norms", [True, False])
def test_a_step_moves_adapters_and_head_and_by_option_the_blocks_layer_norms_and_nothing_else(layer_norms):
    model = adapted(adapter_layer_norms=layer_norms)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, lr=1e-2, weight_decay=0.1)
    model(**tiny_batch(model.config)).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    expected = {"classifier.weight", "classifier.bias"} | {name for name in before if ".adapter." in name}
    if layer_norms:
        expected |= {name for name in before if name.startswith("encoder.") and "LayerNorm" in name}
    assert moved == expected == set(gradients(model))


@pytest.mark.parametrize("policy", EMBEDDING_POLICIES)
@pytest.mark.parametrize("boundary", [0, 2, 4])
def test_by_option_the_layer_norm_of_the_embeddings_trains_where_the_embeddings_do_and_then_nothing_is_cut(
    policy, boundary
):
    peft = PeftConfig("adapter", adapter_size=2, adapter_embedding_layer_norm=True)
    model = tiny_model()
    apply_peft(model, peft)
    engine, trains = StageEngine(model), embeddings_train(policy, boundary)
    engine.enter(Stage(0, 4, boundary, trains))
    engine(**tiny_batch(model.config)).sum().backward()
    of_embeddings = {name for name in gradients(model) if name.startswith("embeddings.")}
    assert of_embeddings == ({"embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"} if trains else set())
    assert engine.cut == (None if trains else boundary)


def test_bert_base_with_a_bottleneck_of_48_has_1789056_adapter_parameters():
    with torch.device("meta"):
        model = Model(ARCHITECTURES["bert-base-uncased"].with_head("classification", ("no", "yes")))
    apply_peft(model, PeftConfig("adapter", adapter_size=48, adapter_layer_norms=False))
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(size for name, size in sizes.items() if ".adapter." in name) == 1_789_056
    assert {name for name in sizes if ".adapter." not in name} == {"classifier.weight", "classifier.bias"}
    assert all(p.is_meta for p in model.parameters())  # inserted on the device of the model


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"adapter_size": 0}, "--adapter-size must be an integer in 1..65536, got 0"),
        ({"adapter_size": 10**12}, "--adapter-size must be an integer in 1..65536"),
        ({"adapter_init_std": 0}, "--adapter-init-std must be a number in 1e-08..1, got 0"),
        ({"adapter_activation": "swish"}, "--adapter-activation must be one of gelu, gelu_new, relu, got 'swish'"),
    ],
)
def test_bad_options_are_errors_that_say_what_is_allowed(changes, message):
    with pytest.raises(InputError, match=message):
        PeftConfig("adapter", **changes)
