"""Stages in models of other code: transformers' own, by the paths of their modules."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from progtuning.base.errors import InputError
from progtuning.model.names import EMBEDDINGS, HEAD
from progtuning.speed.foreign import ForeignEngine
from progtuning.stages import Stage, make_schedule
from tests.models import gradients, reachable

ROWS, LENGTH, HIDDEN, BUCKETS = 3, 7, 16, 4
COMMON = {"vocab_size": 40, "initializer_range": 0.3, "attn_implementation": "eager", "pad_token_id": 0}
FOUR = {"hidden_size": HIDDEN, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}


@dataclass(frozen=True)
class Kind:
    """A kind of model: how one is made, with a dropout, and the paths of its parts."""

    make: Callable[[float], nn.Module]
    blocks: str
    embeddings: Sequence[str]
    head: Sequence[str]
    options: dict = field(default_factory=dict)

    def engine(self, model: nn.Module, optimizer=None, **changes) -> ForeignEngine:
        return ForeignEngine(model, self.blocks, self.embeddings, self.head, optimizer, **self.options | changes)

    def unit(self, name: str) -> int | str:
        """Return the unit of a parameter by its name alone, a tied one by the name that it has in E."""
        if name.startswith(self.blocks):
            return int(name.removeprefix(f"{self.blocks}.").split(".")[0])
        return EMBEDDINGS if name.startswith(tuple(self.embeddings)) else HEAD


def deberta(dropout: float) -> nn.Module:
    relative = {"relative_attention": True, "position_buckets": BUCKETS, "norm_rel_ebd": "layer_norm"}
    relative |= {"pos_att_type": ["c2p", "p2c"], "share_att_key": True, "position_biased_input": False}
    drops = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout"), dropout)
    config = DebertaV2Config(**COMMON, **FOUR, **relative, **drops, type_vocab_size=0, num_labels=3)
    return DebertaV2ForSequenceClassification(config)


def modern_bert(dropout: float) -> nn.Module:
    drops = dict.fromkeys(("embedding_dropout", "mlp_dropout", "attention_dropout", "classifier_dropout"), dropout)
    special = dict.fromkeys(("cls_token_id", "bos_token_id", "sep_token_id", "eos_token_id"), 1)
    config = ModernBertConfig(**COMMON, **FOUR, **drops, **special, num_labels=3, local_attention=4)
    config.initializer_cutoff_factor = 3.0
    return ModernBertForSequenceClassification(config)


def gpt2(dropout: float) -> nn.Module:
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(**COMMON, n_embd=HIDDEN, n_layer=4, n_head=2, n_positions=16, **drops))


def llama(dropout: float, tied: bool = False) -> nn.Module:
    special = {"bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**COMMON, **FOUR, **special, attention_dropout=dropout))


GPT2_PATHS = (
    "transformer.h",
    ("transformer.wte", "transformer.wpe", "transformer.drop"),
    ("transformer.ln_f", "lm_head"),
)
LLAMA_PATHS = ("model.layers", ("model.embed_tokens",), ("model.norm", "lm_head"))
KINDS = {
    "DeBERTa-v2": Kind(
        deberta,
        "deberta.encoder.layer",
        ("deberta.embeddings", "deberta.encoder.rel_embeddings", "deberta.encoder.LayerNorm"),
        ("pooler", "classifier"),
    ),
    "ModernBERT": Kind(modern_bert, "model.layers", ("model.embeddings",), ("model.final_norm", "head", "classifier")),
    "GPT-2": Kind(gpt2, *GPT2_PATHS, {"tied": "embeddings"}),
    "Llama": Kind(llama, *LLAMA_PATHS),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def build(kind: Kind, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return kind.make(dropout).train()


def batch(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random rows, the last of them padded, with labels of rows or of tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 4:] = 0
    of_rows = hasattr(model, "classifier") or hasattr(model, "score")
    labels = torch.tensor([0, 1, 2]) if of_rows else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def stage_from(boundary: int, embeddings: bool = False) -> Stage:
    return Stage(index=1, num_blocks=4, boundary=boundary, embeddings=embeddings)


def step(engine: ForeignEngine, seed: int = 0) -> None:
    engine.model(**batch(engine.model, seed)).loss.backward()
    engine.optimizer.step()
    engine.optimizer.zero_grad()


def expected_names(kind: Kind, model: nn.Module, stage: Stage) -> set[str]:
    units = {HEAD, *stage.blocks, *([EMBEDDINGS] if stage.embeddings else [])}
    return {name for name, _ in model.named_parameters() if kind.unit(name) in units}


@each_kind
@pytest.mark.parametrize("boundary", [0, 2, 4])
def test_from_the_loss_no_frozen_parameter_and_no_op_below_the_cut_is_reachable(kind, boundary):
    model = build(kind)
    engine = kind.engine(model)
    stage = stage_from(boundary)
    engine.enter(stage)
    made, entered = [], []
    layers = model.get_submodule(kind.blocks)
    below = [module for path in kind.embeddings for module in model.get_submodule(path).modules()]
    below += [module for layer in layers[:boundary] for module in layer.modules()]
    for module in below:
        module.register_forward_hook(lambda module, args, output: made.append(output))
    for layer in layers[: boundary + 1]:
        layer.register_forward_pre_hook(lambda module, *inputs: entered.append(inputs), with_kwargs=True)
    parameters, nodes = reachable(model(**batch(model)).loss)
    names = {name for name, parameter in model.named_parameters() if parameter in parameters}
    assert names == expected_names(kind, model, stage) == engine.trainable_names(stage)
    leaves = torch.utils._pytree.tree_leaves((made, entered))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    assert len(tensors) > len(made) and not any(tensor.requires_grad for tensor in tensors)
    assert not any("Embedding" in node for node in nodes)


@each_kind
@pytest.mark.parametrize("boundary, embeddings", [(0, False), (2, False), (3, True)])
def test_active_gradients_are_bit_identical_to_those_of_the_uncut_model(kind, boundary, embeddings):
    model = build(kind)
    uncut = copy.deepcopy(model)
    engine = kind.engine(model)
    engine.enter(stage_from(boundary, embeddings))
    losses = [run(**batch(model)).loss for run in (uncut, engine)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    whole, active = gradients(uncut), gradients(model)
    assert set(active) == expected_names(kind, model, engine.stage)
    assert all(torch.equal(gradient, whole[name]) for name, gradient in active.items())
    assert any(gradient.any() for gradient in active.values())


@each_kind
@pytest.mark.parametrize("name", ["shrinking", "growing"])
def test_the_optimizer_holds_the_stage_and_every_bit_of_what_is_frozen_stays(kind, name):
    model = build(kind)
    engine = kind.engine(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1))
    steps = dict.fromkeys(model.parameters(), 0)
    for stage in make_schedule(name, 4, 2).stages:
        before = {p: {key: value.clone() for key, value in s.items()} for p, s in engine.optimizer.state.items()}
        engine.enter(stage)
        expected = expected_names(kind, model, stage)
        held = {
            n for n, p in model.named_parameters() if any(p is q for q in engine.optimizer.param_groups[0]["params"])
        }
        assert held == expected == {n for n, p in model.named_parameters() if p.requires_grad}
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        for n, p in model.named_parameters():
            assert (p in engine.optimizer.state) == (n in expected and p in before)
            assert all(torch.equal(value, before[p][key]) for key, value in engine.optimizer.state.get(p, {}).items())
            steps[p] = steps[p] + 2 if n in expected else 0
        for seed in range(2):
            step(engine, seed)
        for n, p in model.named_parameters():
            assert torch.equal(p, weights[n]) == (n not in expected), n
            assert p.grad is None and engine.optimizer.state.get(p, {"step": 0})["step"] == steps[p]


@each_kind
def test_the_flops_of_a_stage_are_those_of_its_blocks_and_its_head(kind):
    model = build(kind)
    engine = kind.engine(model)
    found, wholes = [], set()
    for boundary in (0, 2, 4):
        engine.enter(stage_from(boundary, embeddings=boundary == 0))
        forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
        with forward:
            loss = model(**batch(model)).loss
        with backward:
            loss.backward()
        found.append(backward.get_total_flops())
        wholes.add(forward.get_total_flops())
        modules = forward.get_flop_counts()
    blocks = [sum(modules[f"{type(model).__name__}.{kind.blocks}.{index}"].values()) for index in range(4)]
    assert len(set(blocks)) == 1
    unread = [0, 0, 0]  # gradients of the products in active modules that nothing asks for
    if kind is KINDS["DeBERTa-v2"]:  # no LayerNorm is before the layers that read a block's input, or the pooler's
        square = 2 * HIDDEN * HIDDEN
        relative = 2 * 2 * BUCKETS * square  # two layers on E's relative positions, in every block
        unread[1:] = [3 * ROWS * LENGTH * square + 2 * relative, ROWS * square]
    if kind is KINDS["GPT-2"]:  # the tied head's weight is frozen with E
        unread[1:] = [2 * ROWS * LENGTH * HIDDEN * 40] * 2
    (whole,) = wholes
    head = whole - sum(blocks)
    assert found == [2 * (head + sum(blocks[b:])) - nothing for b, nothing in zip((0, 2, 4), unread)]


# What several units share


TIED = {"GPT-2": KINDS["GPT-2"], "Llama": Kind(lambda dropout: llama(dropout, tied=True), *LLAMA_PATHS)}
each_tied = pytest.mark.parametrize("kind", TIED.values(), ids=TIED)


@each_tied
def test_a_tied_head_needs_a_decision(kind):
    with pytest.raises(InputError, match="^the embeddings and the head share a parameter, .* = lm_head.weight: tied"):
        kind.engine(build(kind), tied=None)


@each_tied
def test_a_tied_head_that_trains_with_the_embeddings_freezes_with_them(kind):
    model = build(kind)
    engine = kind.engine(model, torch.optim.AdamW(model.parameters(), lr=1e-2), tied="embeddings")
    engine.enter(stage_from(2))
    before = model.lm_head.weight.detach().clone()
    step(engine)
    assert engine.cut == 2 and torch.equal(model.lm_head.weight, before)


@each_tied
def test_a_tied_head_that_trains_in_every_stage_keeps_the_embeddings_alive_and_nothing_is_cut(kind):
    model = build(kind)
    uncut = copy.deepcopy(model)
    engine = kind.engine(model, tied="head")
    engine.enter(stage_from(2))
    assert engine.cut is None
    parameters, nodes = reachable(engine(**batch(model)).loss)
    assert model.lm_head.weight in parameters and any("Embedding" in node for node in nodes)
    for run in (uncut, model):
        run(**batch(model)).loss.backward()
    whole, active = gradients(uncut), gradients(model)
    tied = "transformer.wte.weight" if kind is KINDS["GPT-2"] else "model.embed_tokens.weight"
    assert tied in active and set(active) == expected_names(kind, model, engine.stage) | {tied}
    assert all(torch.equal(gradient, whole[name]) for name, gradient in active.items())


class Stack(nn.Module):
    """E, blocks and H of one linear layer each, without any library."""

    def __init__(self, blocks: int = 3):
        super().__init__()
        self.below = nn.Linear(2, 2)
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(blocks))
        self.scale = nn.Parameter(torch.ones(2))
        self.top = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.below(x) * self.scale
        for block in self.blocks:
            x = block(x).tanh()
        return self.top(x)


def stack_engine(model: nn.Module, optimizer=None, **options) -> ForeignEngine:
    return ForeignEngine(model, "blocks", ("below", "scale"), ("top",), optimizer, **options)


def test_blocks_that_share_a_parameter_are_an_error():
    model = Stack()
    model.blocks[2] = model.blocks[0]
    with pytest.raises(InputError, match=r"^block 0 and block 2 share a parameter, blocks.0.weight = blocks.2.weight"):
        stack_engine(model)
    model = Stack()
    model.top.weight = model.blocks[1].weight
    with pytest.raises(InputError, match="^block 1 and the head share a parameter, blocks.1.weight = top.weight: no"):
        stack_engine(model)


# What cannot be placed


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embeddings": ["below"]}, "parameter 'scale' must lie in a block, the embeddings or the head, got none of"),
        ({"head": []}, "parameter 'top.weight' must lie in a block, the embeddings or the head, got none of them"),
        ({"head": ["top", "blocks.2"]}, "parameter 'blocks.2.weight' must .* got block 2 and the head"),
        ({"head": ["top", "below"]}, "parameter 'below.weight' must .* got the embeddings and the head"),
        (
            {"blocks": "layers"},
            "'layers' must be the path of a module: of 'layers', expected one of below, blocks, top",
        ),
        ({"head": ["top", "top.a.b"]}, "'top.a.b' must be the path of a module: of 'a', expected one of none"),
        ({"blocks": "top"}, "blocks must be the path of a list of modules, got 'top': Linear"),
        ({"embeddings": "below"}, "embeddings must be a list of paths, got 'below'"),
        ({"tied": "both"}, "tied must be one of embeddings, head, got 'both'"),
    ],
)
def test_what_cannot_be_placed_is_an_error_and_not_the_heads(changes, message):
    given_paths = {"blocks": "blocks", "embeddings": ["below", "scale"], "head": ["top"]}
    with pytest.raises(InputError, match=f"^{message}"):
        ForeignEngine(Stack(), **given_paths | changes)


def test_what_is_frozen_from_the_start_need_not_be_placed():
    model = Stack()
    model.scale.requires_grad_(False)
    engine = ForeignEngine(model, "blocks", ["below"], ["top"])
    engine.enter(Stage(0, 3, 0, embeddings=True))
    assert not model.scale.requires_grad and all(p.requires_grad for p in model.blocks.parameters())
    engine.release()
    assert not model.scale.requires_grad


def test_a_head_that_runs_below_the_cut_is_an_error_in_the_forward_pass():
    kind = KINDS["DeBERTa-v2"]
    model = build(kind)
    wrong = ForeignEngine(model, kind.blocks, kind.embeddings[:1], (*kind.head, *kind.embeddings[1:]))
    wrong.enter(stage_from(1))
    with pytest.raises(
        InputError, match=r"^what is in block 0 lies below the cut of stage 2, but 'deberta.encoder.\w+.weight'"
    ):
        model(**batch(model))
    assert torch.is_grad_enabled()
    model = Stack()
    ForeignEngine(model, "blocks", ["top", "scale"], ["below"]).enter(Stage(0, 3, 0, embeddings=False))
    with pytest.raises(
        InputError, match="^what is in the embeddings lies below the cut of stage 1, but 'below.weight'"
    ):
        model(torch.ones(1, 2))


# The prefix's dropout, copies, checkpoints


@each_kind
def test_with_prefix_dropout_off_the_prefix_is_deterministic_and_the_rest_still_drops_out(kind):
    model = build(kind, dropout=0.4)
    kept, layers = [], model.get_submodule(kind.blocks)
    layers[2].register_forward_pre_hook(lambda module, args: kept.append(args[0].detach()))
    for prefix_dropout in (True, False):
        engine = kind.engine(model, prefix_dropout=prefix_dropout)
        engine.enter(stage_from(2))
        kept.clear()
        outputs = [model.train()(**batch(model)).logits for _ in range(2)]
        assert torch.equal(*kept) == (not prefix_dropout)
        assert not torch.equal(*outputs)
        assert all(module.training for module in model.modules())
        engine.enter(stage_from(1))
        kept.clear()
        outputs = [model(**batch(model)).logits for _ in range(2)]
        assert not torch.equal(*kept)
        engine.release()


def test_a_block_that_raises_leaves_grad_and_modes_as_they_were():
    model = Stack()
    engine = stack_engine(model, prefix_dropout=False)
    engine.enter(Stage(0, 3, 2, embeddings=False))
    with pytest.raises(RuntimeError, match="shape"):
        model.blocks[0](torch.ones(1, 3))
    assert torch.is_grad_enabled() and all(module.training for module in model.modules())
    assert model(torch.ones(1, 2)).requires_grad


def test_a_copy_of_the_model_runs_its_own_weights():
    model = Stack()
    stack_engine(model).enter(Stage(0, 3, 2, embeddings=False))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].weight.zero_()
    assert not torch.equal(twin(torch.ones(1, 2)), model(torch.ones(1, 2)))
    parameters, _ = reachable(twin(torch.ones(1, 2)).sum())
    assert parameters == {*twin.blocks[2].parameters(), *twin.top.parameters()}


@each_kind
def test_activation_checkpointing_which_makes_embeddings_require_a_gradient_does_not_undo_the_cut(kind):
    model = build(kind)
    uncut = copy.deepcopy(model)
    model.activation_checkpointing_enable()
    engine = kind.engine(model)
    engine.enter(stage_from(2))
    ran = []
    model.get_submodule(kind.blocks)[1].register_forward_hook(lambda module, args, output: ran.append(output))
    for run in (uncut, model):
        run(**batch(model)).loss.backward()
    output = ran[0][0] if isinstance(ran[0], tuple) else ran[0]
    assert len(ran) == 1 and not output.requires_grad  # neither in the graph, nor run again by the backward pass
    whole, active = gradients(uncut), gradients(model)
    assert set(active) == engine.trainable_names(engine.stage)
    assert all(torch.equal(gradient, whole[name]) for name, gradient in active.items())


def test_a_compiled_model_is_cut_where_the_stage_is_after_every_change_of_stage():
    model = Stack(blocks=2)
    uncut = copy.deepcopy(model)
    engine = stack_engine(model)
    compiled = torch.compile(model, backend="aot_eager")
    for boundary in (1, 0):
        engine.enter(Stage(0, 2, boundary, embeddings=False))
        for run in (uncut, compiled):
            run.zero_grad()
            run(torch.ones(1, 2)).sum().backward()
        whole, active = gradients(uncut), gradients(model)
        assert set(active) == engine.trainable_names(engine.stage)
        assert all(torch.equal(gradient, whole[name]) for name, gradient in active.items())


def test_the_state_of_the_optimizer_can_be_loaded_by_one_that_no_stage_has_changed():
    kind = KINDS["Llama"]
    schedule = make_schedule("shrinking", 4, 2)
    model = build(kind)
    engine = kind.engine(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for stage in schedule.stages:
        engine.enter(stage)
        step(engine)
    saved = copy.deepcopy((model.state_dict(), engine.optimizer.state_dict()))
    held = [p for group in engine.optimizer.param_groups for p in group["params"]]
    assert set(engine.optimizer.state) == set(held) == {engine.candidates[n] for n in engine.trainable_names(stage)}
    assert len(saved[1]["state"]) == len(held) < len(list(model.parameters()))
    assert saved[1]["param_groups"][0]["params"] == list(range(len(list(model.parameters()))))
    step(engine, seed=5)
    other = build(kind)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    other.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    resumed = kind.engine(other, optimizer)
    resumed.enter(stage)
    step(resumed, seed=5)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_an_engine_that_is_in_a_stage_leaves_it_where_its_optimizer_loads_a_state():
    model = Stack()
    engine = stack_engine(model, torch.optim.Adam(model.parameters(), lr=1e-2))
    first, second = make_schedule("shrinking", 3, 2).stages
    engine.enter(first)
    model(torch.ones(1, 2)).sum().backward()
    engine.optimizer.step()
    saved = copy.deepcopy(engine.optimizer.state_dict())
    engine.enter(second)
    engine.optimizer.load_state_dict(saved)
    assert engine.stage is None
    engine.enter(first)
    assert set(engine.optimizer.state) == set(model.parameters())
    engine.enter(second)
    assert set(engine.optimizer.state) == {engine.candidates[name] for name in engine.trainable_names(second)}


def test_a_model_has_one_engine_at_a_time():
    model = Stack()
    engine = stack_engine(model)
    for taken in (model, copy.deepcopy(model)):
        with pytest.raises(InputError, match="^the model is in an engine already, or is a copy of one that is"):
            stack_engine(taken)
    engine.release()
    stack_engine(model)


def test_released_the_model_and_the_optimizer_are_as_they_were():
    model = Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = stack_engine(model, optimizer)
    engine.enter(Stage(0, 3, 3, embeddings=False))
    engine.release()
    assert all(p.requires_grad for p in model.parameters())
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert reachable(model(torch.ones(1, 2)).sum())[0] == set(model.parameters())
    assert len(optimizer.state_dict()["param_groups"][0]["params"]) == len(list(model.parameters()))


@settings(max_examples=20)
@given(stages=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=5), always=st.booleans())
def test_after_any_stages_what_trains_is_the_stages_with_the_gradients_of_the_uncut_model(stages, always):
    model = Stack()
    if always:
        model.top.weight = model.below.weight
    engine = stack_engine(model, torch.optim.AdamW(model.parameters(), lr=1e-2), tied="head" if always else None)
    names = {name for name, _ in model.named_parameters()}
    of_embeddings, of_head = {"below.weight", "below.bias", "scale"}, {"top.weight", "top.bias"} & names
    for boundary, embeddings in stages:
        uncut = copy.deepcopy(model).requires_grad_()
        for handles in (module._forward_pre_hooks for module in uncut.modules()):
            handles.clear()
        engine.enter(Stage(0, 3, boundary, embeddings))
        expected = of_head | {name for name in names if name[:8] >= f"blocks.{boundary}" and name.startswith("blocks")}
        expected |= of_embeddings if embeddings else {"below.weight"} if always else set()
        for run in (uncut, model):
            run(torch.tensor([[0.3, -1.0]])).square().sum().backward()
        whole, active = gradients(uncut), gradients(model)
        assert set(active) == expected
        assert all(torch.equal(gradient, whole[name]) for name, gradient in active.items())
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        assert {n for n, p in model.named_parameters() if p in engine.optimizer.state} == expected
