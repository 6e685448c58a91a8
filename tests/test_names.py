"""Which unit of M = E . B1 ... BL . H a parameter's name is in. A name that is none of the model's is an error."""

import pytest
import torch
from torch import nn

from progtuning.engine import StageEngine
from progtuning.methods.apply import apply_peft
from progtuning.model.config import FAMILIES, HEADS
from progtuning.model.names import EMBEDDINGS, HEAD, HEAD_MODULES, prefix_of, unit_of
from progtuning.settings.peft import PEFT_METHODS, PeftConfig
from progtuning.stages import Stage
from tests.models import tiny_model


def units_by_module(model: nn.Module) -> dict[str, int | str]:
    """Return the unit of every parameter by the module that holds it, not by its name."""
    inside = {id(p): EMBEDDINGS for p in model.embeddings.parameters()}
    for index, block in enumerate(model.encoder.layer):
        inside |= {id(p): index for p in block.parameters()}
    return {name: inside.get(id(p), HEAD) for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", ["none", "adapter", "lora"])
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("head", [*HEADS, None])
def test_every_parameter_is_in_the_unit_whose_module_holds_it_and_begins_with_the_units_prefix(
    method, model_type, head
):
    model = tiny_model(model_type=model_type, head=head, num_hidden_layers=11)
    apply_peft(model, PeftConfig(method, lora_r=2, adapter_size=2))
    expected = units_by_module(model)
    assert {name: unit_of(name) for name in expected} == expected
    assert set(expected.values()) == {EMBEDDINGS, *range(11), *([HEAD] if head else [])}
    assert all(name.startswith(prefix_of(unit)) for name, unit in expected.items())


def test_the_modules_of_the_head_are_those_that_the_models_heads_are_made_of():
    models = [tiny_model(model_type=kind, head=head) for kind in FAMILIES for head in HEADS]
    names = {
        name.partition(".")[0] for model in models for name, unit in units_by_module(model).items() if unit == HEAD
    }
    assert names == set(HEAD_MODULES)


FOREIGN = """
    transformer.layer.0.attention.q_lin.weight pre_classifier.weight vocab_transform.bias
    embeddings_project.weight embeddings embeddings. embeddingsx.weight
    bert.encoder.layer.0.output.dense.weight roberta.embeddings.word_embeddings.weight bert.pooler.dense.weight
    encoder.layer.x.output.dense.weight encoder.layer encoder.layer. encoder.layer.3 encoder.layer.3.
    encoder.layer.-1.output.dense.weight encoder.layer.٣.output.dense.weight encoder.layers.0.output.dense.weight
    encoder.albert_layer_groups.0.albert_layers.0.ffn.weight encoder.embedding_hidden_mapping_in.weight
    encoder.relative_attention_bias.weight encoder.LayerNorm.weight cls.predictions.bias lm_head.dense.weight
    module.classifier.weight classifiers.weight qa_output.weight classifier_dropout.weight weight head
""".split()


@pytest.mark.parametrize("name", [*FOREIGN, "", " classifier.weight", "classifier .weight"])
def test_a_name_that_is_none_of_the_models_is_an_error_that_says_it(name):
    with pytest.raises(ValueError) as caught:
        unit_of(name)
    assert str(caught.value).startswith(f"parameter {name!r} is none of the model's, whose names begin with")


def test_of_transformers_encoders_berts_names_are_ours_and_the_blocks_of_others_are_refused():
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = transformers.BertModel(transformers.BertConfig(**small, intermediate_size=8))
    assert {unit_of(name) for name, _ in bert.named_parameters()} == {EMBEDDINGS, 0, 1, HEAD}
    others = (
        transformers.DistilBertModel(transformers.DistilBertConfig(vocab_size=30, dim=8, n_layers=2, n_heads=2)),
        transformers.AlbertModel(transformers.AlbertConfig(**small, embedding_size=4, intermediate_size=8)),
        transformers.BertForSequenceClassification(transformers.BertConfig(**small, intermediate_size=8)),
    )
    for model in others:
        blocks = [name for name, _ in model.named_parameters() if "layer" in name.replace("layer_norm", "")]
        assert len(blocks) > 10
        for name in blocks:
            with pytest.raises(ValueError, match="none of the model's"):
                unit_of(name)


def foreign_model() -> nn.Module:
    model = tiny_model()
    model.transformer = nn.ModuleDict({"layer": nn.ModuleList([nn.Linear(2, 2)])})
    return model


def test_the_engine_enters_no_stage_of_a_model_with_a_foreign_parameter_and_leaves_it_as_it_was():
    model = foreign_model()
    engine = StageEngine(model)
    with pytest.raises(ValueError, match=r"parameter 'transformer\.layer\.0\.weight' is none of the model's"):
        engine.enter(Stage(0, 4, 2, embeddings=False))
    assert engine.stage is None and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_no_method_is_applied_to_a_model_with_a_foreign_parameter(method):
    model = foreign_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"parameter 'transformer\.layer\.0\.weight' is none of the model's"):
        apply_peft(model, PeftConfig(method, lora_r=2))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.requires_grad for p in after.values())
