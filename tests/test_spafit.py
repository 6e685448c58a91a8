"""SPAFIT: three groups of blocks, by bounds, under any schedule."""

import doctest
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from progtuning.base.errors import InputError
from progtuning.cost.closed_form import units
from progtuning.engine import StageEngine
from progtuning.methods.apply import apply_peft
from progtuning.methods.lora import lora_layers
from progtuning.model.config import ARCHITECTURES
from progtuning.model.names import BLOCK_LINEARS
from progtuning.settings.peft import PeftConfig, parse_bounds
from progtuning.stages import SCHEDULES, make_schedule
from tests.models import TINY, tiny_batch, tiny_model

HEAD = {"pooler.dense.bias", "classifier.weight", "classifier.bias"}
LAYERS = (*BLOCK_LINEARS.values(), "attention.output.LayerNorm", "output.LayerNorm")


def group(index: int, n1: int, n2: int, targets) -> set[str]:
    """What trains in block `index`: nothing; or biases; or LoRA on the targets, and biases elsewhere."""
    layers = [BLOCK_LINEARS[target] for target in targets]
    if index < n1:
        names = set()
    elif index < n2:
        names = {f"{layer}.bias" for layer in LAYERS}
    else:
        names = {f"{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"}
        names |= {f"{layer}.bias" for layer in LAYERS if layer not in layers}
    return {f"encoder.layer.{index}.{name}" for name in names}


def trainable(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bounds", [(a, b) for a in range(5) for b in range(a, 5)])
@pytest.mark.parametrize("targets", [("query", "value"), ("query", "key", "value", "attention-output")])
def test_every_group_trains_exactly_what_it_should_and_embeddings_never(bounds, targets):
    model = tiny_model()
    apply_peft(model, PeftConfig("spafit", spafit_bounds=bounds, lora_r=2, lora_targets=targets))
    assert trainable(model) == HEAD.union(*(group(i, *bounds, targets) for i in range(4)))
    wrapped = {int(name.split(".")[2]) for name, _ in lora_layers(model)}
    assert wrapped == set(range(bounds[1], 4))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("policy", ["always", "with-block-1"])
def test_a_stage_intersects_the_groups_and_the_cut_rises_to_the_lowest_block_that_trains(schedule, policy):
    targets, bounds = ("query", "value"), (1, 3)
    model = tiny_model()
    apply_peft(model, PeftConfig("spafit", spafit_bounds=bounds, lora_r=2))
    engine = StageEngine(model)
    for stage in make_schedule(schedule, 4, 4, policy).stages:
        engine.enter(stage)
        assert trainable(model) == HEAD.union(*(group(i, *bounds, targets) for i in stage.blocks))
        assert engine.cut == max(stage.boundary, 1)
        engine(**tiny_batch(model.config)).sum().backward()


def test_blocks_frozen_to_the_top_leave_the_head():
    model = tiny_model()
    apply_peft(model, PeftConfig("spafit", spafit_bounds=(4, 4)))
    assert trainable(model) == HEAD
    base, batch = tiny_model(), tiny_batch(model.config)
    assert torch.equal(model(**batch), base(**batch))


def test_a_rank_that_fits_no_layer_is_an_error_where_a_block_has_lora_and_nowhere_else():
    unused, used = (PeftConfig("spafit", spafit_bounds=(1, n2), lora_r=17) for n2 in (4, 3))
    apply_peft(tiny_model(), unused)
    assert units(TINY, unused).num_trainable
    for refuse in (lambda: apply_peft(tiny_model(), used), lambda: units(TINY, used)):
        with pytest.raises(InputError, match="--lora-r must be in 1..16 for query"):
            refuse()


@pytest.mark.parametrize("num_blocks, expected", [(24, (4, 9)), (12, (2, 4)), (6, (1, 2)), (4, (0, 1)), (1, (0, 0))])
def test_the_default_bounds_are_4_and_9_of_24_blocks_in_proportion(num_blocks, expected):
    config = replace(TINY, num_hidden_layers=num_blocks)
    assert PeftConfig("spafit").bounds(config.num_hidden_layers) == expected == parse_bounds("4-9", num_blocks)


@pytest.mark.parametrize("name, percent", [("4-9", 0.21), ("4-14", 0.16)])
def test_at_the_defaults_the_percents_of_bert_large_that_the_docstring_says_train(name, percent):
    config = ARCHITECTURES["bert-large-uncased"].with_head("classification", ("a", "b"))
    model = units(config, PeftConfig("spafit", spafit_bounds=parse_bounds(name, 24)))
    assert round(100 * model.num_trainable / model.num_parameters, 2) == percent
    assert f"{percent} %" in PeftConfig.bounds.__doc__


def test_the_variants_of_the_paper_have_names():
    assert parse_bounds("4-9", 24) == (4, 9)
    assert parse_bounds("4-14", 24) == (4, 14)
    [examples] = doctest.DocTestFinder().find(parse_bounds, globs={"parse_bounds": parse_bounds})
    assert doctest.DocTestRunner().run(examples) == (0, 1)  # failed, attempted


@given(st.integers(1, 40), st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_two_numbers_in_order_are_read_back(num_blocks, data):
    n1, n2 = sorted(data.draw(st.tuples(st.integers(0, num_blocks), st.integers(0, num_blocks))))
    assert parse_bounds(f"{n1},{n2}", num_blocks) == (n1, n2)
    for name in ("4-9", "4-14"):
        low, high = parse_bounds(name, num_blocks)
        assert 0 <= low <= high <= num_blocks


@pytest.mark.parametrize(
    "text", ["9,4", "4,13", "-1,4", "4", "4,", "4,9,12", "a,b", "4-8", "", "4.0,9", "9" * 5000 + ",1"]
)
def test_other_bounds_are_an_error_that_says_what_is_allowed(text):
    with pytest.raises(InputError, match="must be 4-9 or 4-14, or N1,N2 with 0 <= N1 <= N2 <= 12, got"):
        parse_bounds(text, 12)


@pytest.mark.parametrize("bounds", [(3, 2), (-1, 2), (1.5, 2), (1, True)])
def test_settings_refuse_bounds_that_are_not_two_integers_in_order(bounds):
    with pytest.raises(InputError, match="--spafit-bounds"):
        PeftConfig("spafit", spafit_bounds=bounds)


def test_bounds_above_the_models_depth_are_refused_and_leave_the_model_as_it_was():
    model = tiny_model()
    with pytest.raises(InputError, match="0 <= N1 <= N2 <= 4, got 2,5"):
        apply_peft(model, PeftConfig("spafit", spafit_bounds=(2, 5)))
    assert not list(lora_layers(model)) and all(p.requires_grad for p in model.parameters())
