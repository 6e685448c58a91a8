"""Every fine-tuning method under every schedule: trainable sets, the cut, the optimizer's memory, the closed forms."""

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from progtuning.base.errors import InputError
from progtuning.cost.closed_form import units
from progtuning.engine import StageEngine
from progtuning.methods.apply import apply_peft, trainable_names
from progtuning.model.bert import Model
from progtuning.model.config import ARCHITECTURES, FAMILIES, HEADS
from progtuning.model.names import BLOCK_LINEARS
from progtuning.settings.peft import PEFT_METHODS, PeftConfig
from progtuning.settings.recipes import recipe
from progtuning.settings.train import DPSConfig, TrainConfig
from progtuning.stages import EMBEDDING_POLICIES, SCHEDULES, Stage, make_schedule
from progtuning.step.optim import build_optimizer
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
    PeftConfig("adapter", adapter_size=2, adapter_embedding_layer_norm=True),
    PeftConfig("bitfit", bitfit_biases="query,intermediate"),
    PeftConfig("lora", lora_r=3, lora_targets=tuple(BLOCK_LINEARS)),
    PeftConfig("lora", lora_r=1, lora_targets=("output", "attention-output")),
    PeftConfig("lora", lora_r=2, lora_pooler=True),
    PeftConfig("spafit", lora_r=2),
    PeftConfig("spafit", lora_r=2, spafit_bounds=(0, 0), lora_targets=("key", "output")),
    PeftConfig("spafit", lora_r=2, spafit_bounds=(2, 4)),
]


@pytest.mark.parametrize("peft", VARIATIONS, ids=str)
@pytest.mark.parametrize("model_type", FAMILIES)
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


@pytest.mark.parametrize("name, pooler", [("roberta-base", False), ("bert-base-uncased", True)])
def test_lora_trains_294912_in_blocks_and_592130_in_robertas_head_or_in_berts_with_its_pooler(name, pooler):
    with torch.device("meta"):
        model = Model(ARCHITECTURES[name].with_head("classification", ("no", "yes")))
    apply_peft(model, PeftConfig("lora", lora_r=8, lora_pooler=pooler))
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(size for name, size in sizes.items() if not name.startswith("encoder."))
    assert (sum(sizes.values()) - head, head) == (294_912, 592_130)


TASKS = ("cola", "sst-2", "mrpc", "sts-b", "qqp", "mnli", "qnli", "rte")
# microsoft/LoRA, examples/NLU/roberta_base_*.sh: learning rate, epochs, batch of a GPU and GPUs.
LORA_SCRIPTS = {
    "mnli": (5e-4, 30, 16, 8),
    "sst-2": (5e-4, 60, 16, 8),
    "mrpc": (4e-4, 30, 16, 8),
    "cola": (4e-4, 80, 32, 2),
    "qnli": (4e-4, 25, 32, 8),
    "qqp": (5e-4, 25, 16, 8),
    "rte": (5e-4, 80, 32, 8),
    "sts-b": (4e-4, 40, 16, 8),
}


@pytest.mark.parametrize("task", TASKS)
def test_recipes_are_the_authors_and_fit_the_settings(task):
    full, adapter, bitfit, lora = (recipe(method, task) for method in ("none", "adapter", "bitfit", "lora"))
    dps = recipe("none", task, "mix", num_rows=10**6)
    assert (full["lr"], full["batch_size"], full["epochs"]) == (2e-5, 32, 3)
    assert (adapter["lr"], adapter["batch_size"], adapter["epochs"]) == (3e-4, 32, 5)
    assert (adapter["adapter_activation"], adapter["adapter_init_std"]) == ("gelu_new", 1e-3)
    assert (bitfit["lr"], bitfit["epochs"], bitfit["batch_size"]) == (1e-3, 16, 8)
    assert (bitfit["lr_schedule"], bitfit["warmup"], bitfit["weight_decay"]) == ("constant", 0, 0)
    assert (lora["lora_r"], lora["lora_alpha"], lora["warmup"], lora["weight_decay"]) == (8, 16, 0.06, 0.1)
    lr, epochs, of_gpu, num_gpus = LORA_SCRIPTS[task]
    assert (lora["lr"], lora["epochs"], lora["batch_size"]) == (lr, epochs, of_gpu * num_gpus)
    assert (dps["lr"], dps["batch_size"], dps["dps_p"], dps["dps_update_ratio"]) == (2e-5, 16, 0.3, 0.05)
    assert (dps["warmup"], dps["weight_decay"], dps["epochs"], dps["hidden_dropout_prob"]) == (0.1, 0.01, 3, 0.0)
    epsilons = [values.get("adam_epsilon", 1e-8) for values in (full, adapter, bitfit, lora, dps)]
    assert epsilons == [1e-6, 1e-6, 1e-6, 1e-8, 1e-8]
    for values in (full, adapter, bitfit, lora, dps):
        assert values["embeddings"] == "always"
        model = {key: values.pop(key) for key in list(values) if key.endswith("_prob")}
        peft = {key: values.pop(key) for key in list(values) if key.startswith(("lora_", "adapter_"))}
        chosen = {key.removeprefix("dps_"): values.pop(key) for key in list(values) if key.startswith("dps_")}
        TrainConfig(**values, peft=PeftConfig(**peft), dps=DPSConfig(**chosen))
        tiny_model(**model)


# The training rows of GLUE, and max_steps of script/run_glue.sh, which has the four small tasks alone.
GLUE_ROWS = {"mrpc": 3668, "rte": 2490, "sts-b": 5749, "cola": 8551, "sst-2": 67349}
GLUE_ROWS |= {"qnli": 104743, "qqp": 363846, "mnli": 392702}


@pytest.mark.parametrize("task", TASKS)
def test_dps_dense_drops_out_on_the_four_tasks_of_2000_steps_or_more_and_mix_on_none(task):
    dense, mix = (recipe("none", task, mode, GLUE_ROWS[task]) for mode in ("dense", "mix"))
    dropout = 0.1 if task in ("sst-2", "qnli", "qqp", "mnli") else 0.0
    assert (dense["hidden_dropout_prob"], dense["attention_probs_dropout_prob"]) == (dropout, dropout)
    assert (mix["hidden_dropout_prob"], mix["attention_probs_dropout_prob"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    "num_rows, given, dropout",
    [
        (16 * 666, {}, 0.0),  # 1,998 steps
        (16 * 666 + 1, {}, 0.1),  # 2,001
        (16 * 666 + 1, {"epochs": 2}, 0.0),
        (16 * 666, {"batch_size": 8}, 0.1),
        (10**6, {"batch_size": 10**5}, 0.0),
        (0, {"batch_size": 0}, 0.0),  # refused by the settings
    ],
)
def test_dps_dense_drops_out_by_the_steps_of_the_run_that_is_asked_for(num_rows, given, dropout):
    assert recipe("none", "classification", "dense", num_rows, given)["hidden_dropout_prob"] == dropout


def test_the_recipe_of_adapters_trains_what_table_3_counts_and_leaves_the_cut():
    values = recipe("adapter", "mrpc")
    peft = PeftConfig("adapter", **{key: value for key, value in values.items() if key.startswith("adapter_")})
    model = units(ARCHITECTURES["bert-base-uncased"].with_head("classification", ("no", "yes")), peft)
    assert 16 * model.num_trainable == pytest.approx(28.6e6, abs=1e5)
    assert model.during(Stage(0, 12, 8, embeddings=True)).cut() == 8


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
