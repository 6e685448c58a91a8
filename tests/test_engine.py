"""The stage engine: exactly the stage's parameters train, and nothing of the prefix is in the graph."""

import hashlib
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from progtuning.engine import StageEngine
from progtuning.model.config import FAMILIES
from progtuning.model.names import EMBEDDINGS, HEAD, unit_of
from progtuning.stages import EMBEDDING_POLICIES, SCHEDULES, Stage, make_schedule
from progtuning.step.optim import build_optimizer
from tests.models import TINY, gradients, reachable, tiny_batch, tiny_model

LABELS = torch.tensor([0, 1, 2, 1, 0])
BLOCK_NAMES = {
    f"{layer}.{kind}"
    for layer in (
        "attention.self.query attention.self.key attention.self.value attention.output.dense "
        "attention.output.LayerNorm intermediate.dense output.dense output.LayerNorm"
    ).split()
    for kind in ("weight", "bias")
}
EMBEDDING_NAMES = {
    "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight",
    "embeddings.token_type_embeddings.weight",
    "embeddings.LayerNorm.weight",
    "embeddings.LayerNorm.bias",
}
HEAD_NAMES = {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"}


def step(engine: StageEngine, seed: int = 0) -> torch.Tensor:
    """Forward, backward and optimizer step on one random batch; return the loss."""
    loss = F.cross_entropy(engine(**tiny_batch(engine.model.config, seed=seed)), LABELS)
    engine.optimizer.zero_grad()
    loss.backward()
    engine.optimizer.step()
    return loss


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()


def stage_from(boundary: int, embeddings: bool = False) -> Stage:
    return Stage(index=0, num_blocks=4, boundary=boundary, embeddings=embeddings)


def test_the_prefix_drops_out_unless_it_is_told_not_to():
    for options, drops_out in (({}, True), ({"prefix_dropout": False}, False)):
        engine = StageEngine(tiny_model(), **options)
        engine.enter(stage_from(2))
        engine.train()
        prefix = (engine.model.embeddings, *engine.model.encoder.layer[:2])
        assert all(module.training == drops_out for part in prefix for module in part.modules())
        assert all(module.training for part in engine.model.encoder.layer[2:] for module in part.modules())


def test_every_parameter_sits_in_one_unit():
    names = [name for name, _ in tiny_model().named_parameters()]
    by_unit = {}
    for name in names:
        by_unit.setdefault(unit_of(name), set()).add(name)
    assert by_unit.pop(EMBEDDINGS) == EMBEDDING_NAMES
    assert by_unit.pop(HEAD) == HEAD_NAMES
    assert by_unit == {i: {f"encoder.layer.{i}.{name}" for name in BLOCK_NAMES} for i in range(4)}


@pytest.mark.parametrize("policy", EMBEDDING_POLICIES)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 6])
def test_exactly_the_stages_parameters_are_trainable_and_in_the_optimizer(name, policy, num_stages):
    model = tiny_model()
    engine = StageEngine(model, build_optimizer(model, lr=1e-3))
    for stage in make_schedule(name, 4, num_stages, policy).stages:
        engine.enter(stage)
        expected = HEAD_NAMES | {f"encoder.layer.{i}.{suffix}" for i in stage.blocks for suffix in BLOCK_NAMES}
        if policy == "always" or (policy == "with-block-1" and 0 in stage.blocks):
            expected |= EMBEDDING_NAMES
        assert {n for n, p in model.named_parameters() if p.requires_grad} == expected == engine.trainable_names(stage)
        held = [p for group in engine.optimizer.param_groups for p in group["params"]]
        assert len(held) == len(expected)
        assert set(held) == {p for n, p in model.named_parameters() if n in expected}
        step(engine)
        assert set(gradients(model)) == expected


@pytest.mark.parametrize("boundary", range(5))
def test_from_the_loss_no_frozen_parameter_and_no_op_of_the_prefix_is_reachable(boundary):
    model = tiny_model()
    engine = StageEngine(model)
    engine.enter(stage_from(boundary))
    batch = tiny_batch(model.config)
    parameters, nodes = reachable(F.cross_entropy(engine(**batch), LABELS))
    names = {name for name, p in model.named_parameters() if p in parameters}
    assert names == HEAD_NAMES | {f"encoder.layer.{i}.{suffix}" for i in range(boundary, 4) for suffix in BLOCK_NAMES}
    # Two LayerNorms a block, and none below the cut.
    assert sum("LayerNorm" in node for node in nodes) == 2 * (4 - boundary)
    assert not any("Embedding" in node for node in nodes)
    assert not engine.prefix(**batch).requires_grad


def test_embeddings_that_always_train_are_reached_through_every_frozen_block():
    model = tiny_model()
    engine = StageEngine(model)
    engine.enter(stage_from(3, embeddings=True))
    parameters, nodes = reachable(F.cross_entropy(engine(**tiny_batch(model.config)), LABELS))
    names = {name for name, p in model.named_parameters() if p in parameters}
    assert names == EMBEDDING_NAMES | HEAD_NAMES | {f"encoder.layer.3.{suffix}" for suffix in BLOCK_NAMES}
    assert sum("LayerNorm" in node for node in nodes) == 2 * 4 + 1


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("boundary", range(5))
def test_active_gradients_are_bit_identical_to_those_of_the_uncut_model(boundary, model_type):
    uncut, cut = tiny_model(model_type=model_type), tiny_model(model_type=model_type)
    batch = tiny_batch(uncut.config)
    engine = StageEngine(cut)
    engine.enter(stage_from(boundary))
    losses = [F.cross_entropy(run(**batch), LABELS) for run in (uncut, engine)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    whole, active = gradients(uncut), gradients(cut)
    assert active and all(torch.equal(gradient, whole[name]) for name, gradient in active.items())


@pytest.mark.parametrize("schedule", ["shrinking", "growing", "without-low-blocks"])
def test_a_stage_leaves_every_bit_of_every_frozen_parameter_and_their_grad_is_none(schedule):
    model = tiny_model()
    engine = StageEngine(model, build_optimizer(model, lr=1e-2, weight_decay=0.1))
    for stage in make_schedule(schedule, 4, 2).stages:
        engine.enter(stage)
        before = {name: digest(p) for name, p in model.named_parameters()}
        for seed in range(4):
            step(engine, seed)
        active = engine.trainable_names(stage)
        for name, parameter in model.named_parameters():
            assert (digest(parameter) == before[name]) == (name not in active), name
            assert (parameter.grad is None) == (name not in active), name


def test_moments_of_parameters_that_stay_survive_a_stage_change_bit_for_bit_and_others_leave():
    model = tiny_model()
    engine = StageEngine(model, build_optimizer(model, lr=1e-2))
    first, second = make_schedule("shrinking", 4, 2).stages
    engine.enter(first)
    for seed in range(3):
        step(engine, seed)
    before = {p: {key: value.clone() for key, value in state.items()} for p, state in engine.optimizer.state.items()}
    engine.enter(second)
    staying = {engine.candidates[name] for name in engine.trainable_names(second)}
    assert set(engine.optimizer.state) == staying and len(before) > len(staying)
    for parameter in staying:
        for key, value in engine.optimizer.state[parameter].items():
            assert torch.equal(value, before[parameter][key])
    assert engine.optimizer.state[model.classifier.weight]["step"] == 3


def test_parameters_that_join_start_with_fresh_moments():
    model = tiny_model()
    engine = StageEngine(model, build_optimizer(model, lr=1e-2))
    first, second = make_schedule("growing", 4, 2).stages
    for stage in (first, second):
        engine.enter(stage)
        step(engine)
    assert engine.optimizer.state[model.encoder.layer[0].output.dense.weight]["step"] == 1
    assert engine.optimizer.state[model.encoder.layer[3].output.dense.weight]["step"] == 2


def test_groups_keep_their_weight_decay_across_stages():
    model = tiny_model()
    optimizer = build_optimizer(model, lr=1e-2, weight_decay=0.1)
    engine = StageEngine(model, optimizer)
    for stage in make_schedule("growing", 4, 4).stages:
        engine.enter(stage)
        decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        for name in engine.trainable_names(stage):
            without = name.endswith("bias") or "LayerNorm" in name
            assert decay[engine.candidates[name]] == (0.0 if without else 0.1)


def saved_bytes(engine: StageEngine) -> int:
    """Bytes that autograd keeps for the backward pass, parameters aside."""
    storages = {}
    parameters = {p.untyped_storage().data_ptr() for p in engine.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # kept alive: no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine(**tiny_batch(engine.model.config)).sum()
    del loss
    return sum(storage.nbytes() for storage in storages.values())


def test_saved_for_backward_bytes_fall_with_every_frozen_block_by_the_same_amount():
    engine = StageEngine(tiny_model())
    sizes = []
    for boundary in range(5):
        engine.enter(stage_from(boundary))
        sizes.append(saved_bytes(engine))
    falls = [low - high for low, high in zip(sizes, sizes[1:])]
    assert min(falls) > 0
    assert falls[0] == falls[1] == falls[2]  # between equal blocks
    engine.enter(stage_from(2, embeddings=True))
    assert saved_bytes(engine) > sizes[0] * 0.7  # a gradient for E keeps the frozen blocks' activations


def test_with_prefix_dropout_off_the_prefix_is_deterministic_and_the_rest_still_drops_out():
    model = tiny_model(hidden_dropout_prob=0.5)
    batch = tiny_batch(model.config)
    for prefix_dropout in (True, False):
        engine = StageEngine(model, prefix_dropout=prefix_dropout)
        engine.enter(stage_from(2))
        engine.train()
        assert torch.equal(engine.prefix(**batch), engine.prefix(**batch)) == (not prefix_dropout)
        assert not torch.equal(engine(**batch), engine(**batch))
        engine.eval()
        assert torch.equal(engine(**batch), engine(**batch))


def test_a_stage_that_unfreezes_turns_the_prefixs_dropout_on_again():
    engine = StageEngine(tiny_model(hidden_dropout_prob=0.5), prefix_dropout=False)
    engine.train()
    engine.enter(stage_from(3))
    engine.enter(stage_from(1))
    modes = [block.training for block in engine.model.encoder.layer]
    assert modes == [False, True, True, True]


def test_a_stage_of_another_depth_is_refused():
    with pytest.raises(ValueError, match="stage must be of 4 blocks, got one of 12"):
        StageEngine(tiny_model()).enter(make_schedule("shrinking", 12, 3).stages[0])


def test_parameters_frozen_before_the_engine_was_built_stay_frozen_in_every_stage():
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("query" in name or name.startswith("classifier"))
    engine = StageEngine(model)
    engine.enter(stage_from(0, embeddings=True))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "classifier.weight",
        "classifier.bias",
        *(f"encoder.layer.{i}.attention.self.query.{kind}" for i in range(4) for kind in ("weight", "bias")),
    }
    assert engine.cut == 0  # E has nothing to train, so it runs without grad


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_any_torch_optimizer_is_kept_in_step(optimizer):
    model = tiny_model()
    engine = StageEngine(model, optimizer(model.parameters(), lr=1e-3))
    for stage in make_schedule("shrinking", 4, 4).stages:
        engine.enter(stage)
        step(engine)
        assert set(engine.optimizer.param_groups[0]["params"]) == {p for p in model.parameters() if p.requires_grad}


def test_a_model_without_blocks_below_the_head_alone_is_cut_at_the_top():
    engine = StageEngine(tiny_model())
    engine.enter(make_schedule("without-low-blocks", 4, 2).stages[-1])
    assert engine.cut == 4
    parameters, _ = reachable(engine(**tiny_batch(engine.model.config)).sum())
    assert {n for n, p in engine.model.named_parameters() if p in parameters} == HEAD_NAMES


def test_the_engine_equals_the_model_before_any_stage_is_entered():
    model = tiny_model(hidden_dropout_prob=0.0)
    batch = tiny_batch(model.config)
    assert torch.equal(StageEngine(model)(**batch), model(**batch))
    assert replace(TINY) == model.config
