"""LoRA: what is wrapped and drawn, the equation, merging, and equality with the library peft."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from progtuning.base.errors import InputError
from progtuning.methods.apply import apply_peft
from progtuning.methods.lora import LoRALinear, lora_layers, merge, unmerge, unwrap
from progtuning.model.names import BLOCK_LINEARS
from progtuning.model.weights import key_of, save_pretrained
from progtuning.settings.peft import PeftConfig
from tests.models import gradients, linear_pattern, tiny_batch, tiny_model

ALL_TARGETS = tuple(BLOCK_LINEARS)
LABELS = torch.tensor([0, 1, 2, 1, 0])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def lora_model(seed: int = 5, **changes):
    """A tiny model with LoRA whose B is not zero, as after training."""
    model = tiny_model()
    apply_peft(model, PeftConfig("lora", lora_r=3, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.weight.normal_(std=0.2, generator=generator)
    return model


def layer(dropout: float = 0.0, r: int = 2, alpha: float = 3.0) -> LoRALinear:
    return LoRALinear(nn.Linear(6, 4), r, alpha, dropout, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("targets", [(target,) for target in ALL_TARGETS] + [ALL_TARGETS, ("output", "query")])
def test_exactly_the_targets_of_every_block_are_wrapped_and_base_parameters_keep_their_names(targets):
    model = tiny_model()
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    apply_peft(model, PeftConfig("lora", lora_r=2, lora_targets=targets))
    names = {f"encoder.layer.{i}.{BLOCK_LINEARS[target]}" for i in range(4) for target in targets}
    assert {name for name, _ in lora_layers(model)} == names
    after = {name: tuple(p.shape) for name, p in model.named_parameters()}
    added = {f"{name}.{matrix}.weight" for name in names for matrix in ("lora_A", "lora_B")}
    assert after.keys() - before.keys() == added
    assert before == {name: shape for name, shape in after.items() if name not in added}


def test_the_start_is_the_base_model_bit_for_bit():
    base, model = tiny_model(), tiny_model()
    apply_peft(model, PeftConfig("lora", lora_targets=ALL_TARGETS))
    batch = tiny_batch(base.config)
    assert torch.equal(model(**batch), base(**batch))


def test_a_is_kaiming_uniform_with_a_sqrt_5_and_b_is_zero():
    wide = LoRALinear(nn.Linear(400, 300), 50, 1.0, 0.0, torch.Generator().manual_seed(0))
    a = wide.lora_A.weight
    bound = math.sqrt(6 / ((1 + 5) * 400))  # sqrt(6 / ((1 + a^2) fan_in))
    assert a.abs().max() <= bound and a.abs().max() > 0.99 * bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not wide.lora_B.weight.any()
    assert wide.scaling == 1.0 / 50


def test_what_is_drawn_depends_on_the_seed_alone_and_leaves_the_global_random_state():
    draws = []
    for seed, targets in ((7, ("query", "value")), (7, ("value", "query")), (8, ("query", "value"))):
        model, state = tiny_model(), torch.get_rng_state()
        apply_peft(model, PeftConfig("lora", lora_r=2, lora_targets=targets), seed)
        assert torch.equal(torch.get_rng_state(), state)
        draws.append(torch.cat([layer.lora_A.weight.flatten() for _, layer in lora_layers(model)]))
        torch.manual_seed(seed)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert len(draws[0].unique()) == draws[0].numel()  # no layer repeats another's


def test_forward_is_equation_3():
    lora = layer()
    nn.init.normal_(lora.lora_B.weight)
    x = torch.randn(2, 5, 6)
    update = (3.0 / 2) * lora.lora_B.weight @ lora.lora_A.weight
    torch.testing.assert_close(lora(x), x @ (lora.weight + update).T + lora.bias)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_layer_equals_pefts_in_output_and_gradients_dropout_included(dropout):
    peft_lora = pytest.importorskip("peft.tuners.lora")
    from peft import LoraConfig

    ours = layer(dropout).train()
    nn.init.normal_(ours.lora_B.weight)
    base = nn.Linear(6, 4)
    base.weight, base.bias = ours.weight, ours.bias
    config = LoraConfig(r=2, lora_alpha=3.0, lora_dropout=dropout)
    theirs = peft_lora.Linear(base, "default", config, r=2, lora_alpha=3.0).train()
    theirs.lora_A["default"].weight.data.copy_(ours.lora_A.weight)
    theirs.lora_B["default"].weight.data.copy_(ours.lora_B.weight)
    x, results = torch.randn(7, 6), []
    for lora, a, b in (
        (ours, ours.lora_A, ours.lora_B),
        (theirs, theirs.lora_A["default"], theirs.lora_B["default"]),
    ):
        torch.manual_seed(11)
        y = lora(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (a.weight, b.weight))))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra"])
@pytest.mark.parametrize("targets", [("query", "value"), ALL_TARGETS])
def test_logits_and_gradients_equal_pefts_for_the_same_a_and_b_merged_and_unmerged(model_type, targets, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    # In float64: in float32 it is the CPU that says how far rounding leaves the two apart.
    model = tiny_model(model_type=model_type, pad_token_id=1).eval().double()
    save_pretrained(model, tmp_path)
    kinds = {"attn_implementation": "sdpa", "dtype": torch.float64}
    twin = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, **kinds)
    modules = linear_pattern(targets, model.config)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, target_modules=modules, lora_dropout=0.0)
    twin = peft.get_peft_model(twin, config).eval()
    apply_peft(model, PeftConfig("lora", lora_r=3, lora_alpha=5.0, lora_targets=targets))
    theirs = {
        name.replace(".default", "").removeprefix("base_model.model."): p
        for name, p in twin.named_parameters()
        if "lora_" in name
    }
    ours = {key_of(name, model.config): p for name, p in model.named_parameters() if "lora_" in name}
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 4 * len(targets)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            theirs[name].copy_(parameter)
    batch = tiny_batch(model.config)
    their_batch = {key: value.long() for key, value in batch.items()}
    for change, their_change in ((None, None), (merge, twin.merge_adapter), (unmerge, twin.unmerge_adapter)):
        if change is not None:
            change(model)
            their_change()
        logits, their_logits = model(**batch), twin(**their_batch).logits
        torch.testing.assert_close(logits, their_logits, atol=1e-12, rtol=1e-10)
    for parameter in (*ours.values(), *theirs.values()):
        parameter.grad = None
    F.cross_entropy(logits, LABELS).backward()
    F.cross_entropy(their_logits, LABELS).backward()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-12, rtol=1e-10, msg=name)


def test_merging_adds_the_update_is_idempotent_and_keeps_the_logits():
    model = lora_model(lora_targets=ALL_TARGETS).eval()
    batch = tiny_batch(model.config)
    before = model(**batch)
    weights = {name: layer.weight.clone() for name, layer in lora_layers(model)}
    merge(model)
    once = {name: layer.weight.clone() for name, layer in lora_layers(model)}
    merge(model)
    for name, lora in lora_layers(model):
        assert lora.merged and torch.equal(lora.weight, once[name])
        assert not torch.equal(lora.weight, weights[name])
        update = lora.scaling * lora.lora_B.weight @ lora.lora_A.weight
        torch.testing.assert_close(lora.weight, weights[name] + update)
    torch.testing.assert_close(model(**batch), before, atol=1e-5, rtol=1e-5)


def test_unmerging_restores_every_base_weight_bit_for_bit_any_number_of_times():
    model = lora_model(lora_targets=ALL_TARGETS)
    with torch.no_grad():
        for _, lora in lora_layers(model):
            lora.lora_B.weight.mul_(1e4)  # an update beside which W's low bits are lost
    before = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(3):
        merge(model)
        unmerge(model)
        unmerge(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert not any(lora.merged for _, lora in lora_layers(model))


def test_a_merged_layer_takes_one_matrix_product_and_gives_a_and_b_no_gradient():
    model = lora_model()
    merge(model)
    model(**tiny_batch(model.config)).sum().backward()
    assert set(gradients(model)) == {"classifier.weight", "classifier.bias"}


def test_unwrapping_leaves_a_plain_model_with_the_merged_logits():
    model = lora_model(lora_targets=ALL_TARGETS).eval()
    merge(model)
    batch = tiny_batch(model.config)
    merged = model(**batch)
    unwrap(model)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in tiny_model().named_parameters()]
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(**batch), merged)


def test_inserted_modules_follow_the_mode_of_the_model():
    model = tiny_model().eval()
    apply_peft(model, PeftConfig("lora", lora_dropout=0.9))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    "targets, r, message",
    [
        (("query",), 17, r"--lora-r must be in 1..16 for query \(16 x 16\), got 17"),
        (("query", "intermediate"), 20, r"--lora-r must be in 1..16 for query \(16 x 16\), got 20"),
        (("output",), 99, r"--lora-r must be in 1..16 for output \(16 x 24\), got 99"),
    ],
)
def test_a_rank_larger_than_a_layer_is_an_error_and_leaves_the_model_as_it_was(targets, r, message):
    model = tiny_model()
    with pytest.raises(InputError, match=message):
        apply_peft(model, PeftConfig("lora", lora_r=r, lora_targets=targets))
    assert not list(lora_layers(model)) and all(p.requires_grad for p in model.parameters())


def test_the_largest_rank_is_allowed():
    model = tiny_model()
    apply_peft(model, PeftConfig("lora", lora_r=16, lora_targets=ALL_TARGETS))
    assert len(list(lora_layers(model))) == 24


@pytest.mark.parametrize("targets", [("querry",), (), ("query", "pooler")])
def test_a_target_that_matches_no_layer_is_an_error_that_lists_the_targets(targets):
    with pytest.raises(InputError, match="--lora-targets must be among query, key, value, attention-output, inter"):
        PeftConfig("lora", lora_targets=targets)


@pytest.mark.parametrize("first", ["lora", "adapter", "spafit"])
@pytest.mark.parametrize("second", ["none", "lora", "adapter"])
def test_a_method_on_top_of_another_is_refused(first, second):
    model = tiny_model()
    apply_peft(model, PeftConfig(first))
    with pytest.raises(ValueError, match="already"):
        apply_peft(model, PeftConfig(second))
