"""Every fine-tuning method under every schedule: trainable sets, the cut, the optimizer's memory, the closed forms."""

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from progtuning.accounting import units
from progtuning.bert import Model
from progtuning.config import (
    ARCHITECTURES,
    BLOCK_LINEARS,
    HEADS,
    PEFT_METHODS,
    DPSConfig,
    PeftConfig,
    TrainConfig,
    recipe,
)
from progtuning.engine import StageEngine
from progtuning.errors import InputError
from progtuning.optim import build_optimizer
from progtuning.peft import apply_peft, trainable_names
from progtuning.stages import EMBEDDING_POLICIES, SCHEDULES, Stage, make_schedule
from tests.models import gradients, reachable, tiny_batch, tiny_model

LABELS = torch.tensor([0, 1, 2, 1, 0])
METHODS = PEFT_METHODS[1:]
SETTINGS = {
    "adapter": PeftConfig("adapter", adapter_size=3),
    "bitfit": PeftConfig("bitfit"),
    "lora": PeftConfig("lora", lora_r=2),
    "spafit": PeftConfig("spafit", lora_r=2, spafit_bounds=(1, 3)),
}

# What a block trains, name for name.
ADAPTER = """
    attention.output.adapter.down.weight attention.output.adapter.down.bias attention.output.adapter.up.weight
    attention.output.adapter.up.bias attention.output.LayerNorm.weight attention.output.LayerNorm.bias
    output.adapter.down.weight output.adapter.down.bias output.adapter.up.weight output.adapter.up.bias
    output.LayerNorm.weight output.LayerNorm.bias
""".split()
BIASES = """
    attention.self.query.bias attention.self.key.bias attention.self.value.bias attention.output.dense.bias
    attention.output.LayerNorm.bias intermediate.dense.bias output.dense.bias output.LayerNorm.bias
""".split()
LORA = """
    attention.self.query.lora_A.weight attention.self.query.lora_B.weight
    attention.self.value.lora_A.weight attention.self.value.lora_B.weight
""".split()
NEITHER_QUERY_NOR_VALUE = [name for name in BIASES if "query" not in name and "value" not in name]
BLOCKS = {
    "adapter": 4 * [ADAPTER],
    "bitfit": 4 * [BIASES],
    "lora": 4 * [LORA],
    "spafit": [[], BIASES, BIASES, LORA + NEITHER_QUERY_NOR_VALUE],
}
CLASSIFIER = {"classifier.weight", "classifier.bias"}
WITH_POOLER_BIAS = CLASSIFIER | {"pooler.dense.bias"}
HEAD = {"adapter": CLASSIFIER, "lora": CLASSIFIER, "bitfit": WITH_POOLER_BIAS, "spafit": WITH_POOLER_BIAS}


def expected_names(method: str, stage: Stage) -> set[str]:
    names = HEAD[method].union(*({f"encoder.layer.{i}.{name}" for name in BLOCKS[method][i]} for i in stage.blocks))
    return names | ({"embeddings.LayerNorm.bias"} if method == "bitfit" and stage.embeddings else set())


def engine_of(method: str, **changes) -> StageEngine:
    model = tiny_model(**changes)
    apply_peft(model, SETTINGS[method])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name or ".adapter." in name:  # as after training, so that every gradient counts
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return StageEngine(model, build_optimizer(model, lr=1e-2, weight_decay=0.1))


def step(engine: StageEngine) -> None:
    engine.optimizer.zero_grad()
    F.cross_entropy(engine(**tiny_batch(engine.model.config)), LABELS).backward()
    engine.optimizer.step()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("policy", EMBEDDING_POLICIES)
def test_exactly_the_methods_parameters_in_the_stages_blocks_train_and_move(method, schedule, policy):
    engine = engine_of(method)
    model = engine.model
    for stage in make_schedule(schedule, 4, 4, policy).stages:
        engine.enter(stage)
        expected = expected_names(method, stage)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
        held = [p for group in engine.optimizer.param_groups for p in group["params"]]
        assert len(held) == len(expected) and set(held) == {model.get_parameter(name) for name in expected}
        before = {name: p.clone() for name, p in model.named_parameters()}
        step(engine)
        assert set(gradients(model)) == expected
        assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("boundary", range(5))
def test_from_the_loss_nothing_frozen_and_no_op_of_the_prefix_is_reachable(method, boundary):
    engine = engine_of(method)
    stage = Stage(0, 4, boundary, embeddings=False)
    engine.enter(stage)
    lowest = next((i for i in stage.blocks if BLOCKS[method][i]), 4)
    assert engine.cut == lowest
    parameters, nodes = reachable(F.cross_entropy(engine(**tiny_batch(engine.model.config)), LABELS))
    names = {name for name, p in engine.model.named_parameters() if p in parameters}
    assert names == expected_names(method, stage)
    norms = sum("LayerNorm" in node for node in nodes)
    assert norms == 2 * (4 - lowest)  # two a block, and none below the cut
    assert not any("Embedding" in node for node in nodes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("boundary", range(5))
def test_active_gradients_are_bit_identical_to_those_of_the_uncut_model(method, boundary):
    uncut, cut = engine_of(method), engine_of(method)
    cut.enter(Stage(0, 4, boundary, embeddings=False))
    for run in (uncut.model, cut):
        F.cross_entropy(run(**tiny_batch(cut.model.config)), LABELS).backward()
    whole, active = gradients(uncut.model), gradients(cut.model)
    assert active and all(torch.equal(gradient, whole[name]) for name, gradient in active.items())


@pytest.mark.parametrize("method", METHODS)
def test_the_optimizer_memory_of_what_leaves_is_given_back(method):
    engine = engine_of(method)
    first, second = make_schedule("shrinking", 4, 2).stages
    engine.enter(first)
    step(engine)
    leaving = expected_names(method, first) - expected_names(method, second)
    references = [
        weakref.ref(tensor)
        for name in leaving
        for tensor in engine.optimizer.state[engine.model.get_parameter(name)].values()
    ]
    assert len(references) == 3 * len(leaving) > 0 and all(reference() is not None for reference in references)
    engine.enter(second)
    gc.collect()
    assert not any(reference() is not None for reference in references)
    size = sum(t.numel() for state in engine.optimizer.state.values() for t in state.values())
    names = expected_names(method, second)
    assert size == sum(2 * engine.model.get_parameter(name).numel() + 1 for name in names)


VARIATIONS = [
    *SETTINGS.values(),
    PeftConfig(),
    PeftConfig("adapter", adapter_size=2, adapter_layer_norms=False),
    PeftConfig("bitfit", bitfit_biases="query,intermediate"),
    PeftConfig("lora", lora_r=3, lora_targets=tuple(BLOCK_LINEARS)),
    PeftConfig("lora", lora_r=1, lora_targets=("output", "attention-output")),
    PeftConfig("spafit", lora_r=2),
    PeftConfig("spafit", lora_r=2, spafit_bounds=(0, 0), lora_targets=("key", "output")),
    PeftConfig("spafit", lora_r=2, spafit_bounds=(2, 4)),
]


@pytest.mark.parametrize("peft", VARIATIONS, ids=str)
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
@pytest.mark.parametrize("head", [*HEADS, None])
def test_names_shapes_and_trainable_parameters_are_those_of_the_closed_forms(peft, model_type, head):
    model = tiny_model(model_type=model_type, head=head)
    apply_peft(model, peft)
    forms = units(model.config, peft)
    shapes = {unit.prefix + name: shape for unit in forms for name, shape in unit.shapes.items()}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == forms.trainable == trainable_names(model, peft)
    assert sum(p.numel() for p in trained.values()) == forms.num_trainable


@pytest.mark.parametrize(
    "peft, forward, backward",
    [
        (PeftConfig("lora", lora_r=8), 179_391_455_232, 180_976_926_720),
        (PeftConfig("bitfit"), 178_787_475_456, 183_619_338_240),
    ],
)
def test_bert_base_takes_the_flops_of_the_design(peft, forward, backward):
    with torch.device("meta"):  # shapes are all that counts
        model = Model(ARCHITECTURES["bert-base-uncased"].with_head("classification", ("no", "yes")))
        input_ids = torch.zeros(8, 128, dtype=torch.long)
    apply_peft(model, peft)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(input_ids)
        counted = [counter.get_total_flops()]
        logits.sum().backward()
    assert [*counted, counter.get_total_flops() - counted[0]] == [forward, backward]


def test_roberta_base_lora_trains_294912_in_blocks_and_the_whole_head():
    with torch.device("meta"):
        model = Model(ARCHITECTURES["roberta-base"].with_head("classification", ("no", "yes")))
    apply_peft(model, PeftConfig("lora", lora_r=8))
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(size for name, size in sizes.items() if not name.startswith("encoder."))
    assert (sum(sizes.values()) - head, head) == (294_912, 768 * 768 + 768 + 2 * 768 + 2)


TASKS = ("cola", "sst-2", "mrpc", "sts-b", "qqp", "mnli", "qnli", "rte")
PAPER_LORA = {  # Hu et al. 2021, Table 9: learning rate, epochs
    "mnli": (5e-4, 30),
    "sst-2": (5e-4, 60),
    "mrpc": (4e-4, 30),
    "cola": (4e-4, 80),
    "qnli": (4e-4, 25),
    "qqp": (5e-4, 25),
    "rte": (5e-4, 80),
    "sts-b": (4e-4, 40),
}


@pytest.mark.parametrize("task", TASKS)
def test_recipes_are_the_papers_and_fit_the_settings(task):
    full, adapter, bitfit, lora = (recipe(method, task) for method in ("none", "adapter", "bitfit", "lora"))
    dps = recipe("none", task, "mix")
    assert (full["lr"], full["batch_size"], full["epochs"]) == (2e-5, 32, 3)
    assert (adapter["adapter_size"], adapter["lr"]) == (64, 3e-4)
    assert (bitfit["lr"], bitfit["epochs"], bitfit["batch_size"]) == (1e-3, 16, 8)
    assert (lora["lora_r"], lora["lora_alpha"], lora["warmup"], lora["weight_decay"]) == (8, 16, 0.06, 0.1)
    assert (lora["lr"], lora["epochs"]) == PAPER_LORA[task]
    assert (dps["lr"], dps["batch_size"], dps["dps_p"], dps["dps_update_ratio"]) == (2e-5, 16, 0.3, 0.05)
    for values in (full, adapter, bitfit, lora, dps):
        model = {key: values.pop(key) for key in list(values) if key.endswith("_prob")}
        peft = {key: values.pop(key) for key in list(values) if key.startswith(("lora_", "adapter_"))}
        chosen = {key.removeprefix("dps_"): values.pop(key) for key in list(values) if key.startswith("dps_")}
        TrainConfig(**values, peft=PeftConfig(**peft), dps=DPSConfig(**chosen))
        tiny_model(**model)


def test_a_recipe_can_be_changed_without_changing_the_next_one():
    recipe("none", "mrpc")["lr"] = 1.0
    recipe("none", "squad")["lr"] = 1.0
    assert recipe("none", "mrpc")["lr"] == 2e-5 and recipe("none", "squad")["lr"] == 5e-5


@pytest.mark.parametrize(
    "method, task, dps",
    [("spafit", "rte", "off"), ("lora", "squad", "off"), ("bitfit", "squad_v2", "off"), ("none", "squad", "mix")],
)
def test_where_the_authors_give_no_values_there_is_no_recipe(method, task, dps):
    with pytest.raises(InputError, match=f"--recipe paper has values for .* it has none for .* on {task}$"):
        recipe(method, task, dps)
