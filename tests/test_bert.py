"""The encoder against transformers: the same logits and the same gradients."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import progtuning.model.bert
from progtuning.model.bert import ACTIVATIONS, build_model
from progtuning.model.config import FAMILIES, BertConfig
from progtuning.model.weights import key_of
from tests.models import TINY, config_of, tiny_batch, tiny_model

HF_CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "distilbert": "DistilBert",
    "electra": "Electra",
}
HF_HEADS = {
    "classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "question-answering": "ForQuestionAnswering",
}


@st.composite
def configs(draw, model_type: str) -> BertConfig:
    heads = draw(st.integers(1, 4))
    head = draw(st.sampled_from(["classification", "regression", "question-answering"]))
    config = config_of(
        model_type,
        vocab_size=draw(st.integers(10, 80)),
        hidden_size=heads * draw(st.integers(1, 12)),
        num_hidden_layers=draw(st.integers(1, 4)),
        num_attention_heads=heads,
        intermediate_size=draw(st.integers(1, 64)),
        max_position_embeddings=draw(st.integers(16, 40)),
        type_vocab_size=draw(st.integers(1, 3)),
        embedding_size=draw(st.integers(4, 12)),
        hidden_act=draw(st.sampled_from(sorted(ACTIVATIONS))),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
        qa_dropout=0.0,
        initializer_range=draw(st.floats(0.01, 0.5)),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-5])),
        pad_token_id=draw(st.integers(0, 3)),
    )
    return config.with_head(head, tuple(f"class {i}" for i in range(draw(st.integers(2, 5)))))


def transformers_twin(config: BertConfig, model: torch.nn.Module):
    """Return transformers' model of the same architecture and the same weights."""
    transformers = pytest.importorskip("transformers")
    values = config.to_dict()
    values.pop("architectures")
    hf_config = transformers.AutoConfig.for_model(values.pop("model_type"), **values, attn_implementation="eager")
    twin = getattr(transformers, HF_CLASSES[config.model_type] + HF_HEADS[config.head])(hf_config)
    twin.load_state_dict({key_of(name, config): tensor for name, tensor in model.state_dict().items()})
    return twin.train()


def transformers_output(twin, config: BertConfig, batch: dict) -> torch.Tensor:
    out = twin(**{key: value.long() for key, value in batch.items()})
    if config.head == "question-answering":
        return torch.stack((out.start_logits, out.end_logits), dim=-1)
    return out.logits


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_and_all_gradients_equal_transformers_over_random_configurations(model_type):
    errors = []

    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(configs(model_type), st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**31))
    def check(config, rows, length, seed):
        model = build_model(config, seed=seed).train().double()  # in fp32 a steep LayerNorm makes much of rounding
        twin = transformers_twin(config, model).double()
        batch = tiny_batch(config, rows, length, seed)
        ours, theirs = model(**batch), transformers_output(twin, config, batch)
        real = batch["attention_mask"] if config.head == "question-answering" else slice(None)
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(theirs[real].shape, generator=generator, dtype=torch.float64) / theirs[real].numel()
        (ours[real] * weights).sum().backward()
        (theirs[real] * weights).sum().backward()
        expected = {name: p.grad for name, p in twin.named_parameters()}
        worst = (ours - theirs)[real].abs().max().item()
        for name, parameter in model.named_parameters():
            error = (parameter.grad - expected[key_of(name, config)]).abs().max()
            worst = max(worst, error.item() / max(1, parameter.grad.abs().max().item()))
        errors.append(worst)
        assert worst < 1e-9

    check()
    print(f"{model_type}: largest parity error over {len(errors)} configurations: {max(errors):.1e}")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_padding_does_not_change_the_logits_of_a_row(model_type):
    model = tiny_model(model_type=model_type)
    batch = tiny_batch(model.config)
    together = model(**batch)
    for row, real in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        alone = model(batch["input_ids"][row : row + 1, :real], None, batch["token_type_ids"][row : row + 1, :real])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)


def test_a_mask_of_real_tokens_alone_equals_no_mask():
    model = tiny_model()
    batch = tiny_batch(model.config, rows=1)
    assert batch["attention_mask"].all()
    torch.testing.assert_close(model(**batch), model(batch["input_ids"], None, batch["token_type_ids"]))


@pytest.mark.parametrize("split", range(5))
def test_running_two_ranges_of_blocks_equals_running_all(split):
    model = tiny_model()
    batch = tiny_batch(model.config)
    x = model.embeddings(batch["input_ids"], batch["token_type_ids"])
    whole = model.encoder(x, batch["attention_mask"])
    low = model.encoder(x, batch["attention_mask"], range(split))
    assert torch.equal(model.encoder(low, batch["attention_mask"], range(split, 4)), whole)


def test_without_a_head_the_model_returns_the_last_hidden_states():
    model = build_model(replace(TINY, head=None))
    assert model(**tiny_batch(model.config)).shape == (5, 9, 16)
    assert {name.split(".")[0] for name in model.state_dict()} == {"embeddings", "encoder"}


def test_initial_weights_depend_on_the_seed_alone_and_leave_the_global_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, third = (build_model(TINY, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(first.classifier.weight, third.classifier.weight)


def test_initial_weights_have_berts_distribution():
    model = build_model(replace(TINY, hidden_size=64, vocab_size=4000, initializer_range=0.02))
    weight = model.embeddings.word_embeddings.weight
    assert weight[0].abs().sum() == 0  # padding
    assert abs(weight[1:].std().item() - 0.02) < 1e-4
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().sum() == 0
        if name.endswith("LayerNorm.weight"):
            assert (parameter == 1).all()


def test_the_model_imports_only_torch_and_its_config():
    for module, expected in (
        (progtuning.model.bert, {"progtuning.model.config", "progtuning.model.heads"}),
        (progtuning.model.heads, {"progtuning.model.config"}),
    ):
        tree = ast.parse(Path(module.__file__).read_text())
        froms = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert {name for name in froms if "progtuning" in name} == expected
