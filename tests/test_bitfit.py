"""BitFit: exactly the biases train, and nothing is added."""

import pytest
import torch

from progtuning.base.errors import InputError
from progtuning.engine import StageEngine
from progtuning.methods.apply import apply_peft
from progtuning.model.bert import Model
from progtuning.model.config import ARCHITECTURES, FAMILIES
from progtuning.model.names import EMBEDDINGS, HEAD, unit_of
from progtuning.settings.peft import PeftConfig
from progtuning.stages import EMBEDDING_POLICIES, Stage, embeddings_train
from tests.models import tiny_batch, tiny_model


def trainable(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("head", ["classification", "regression", "question-answering", None])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_bias_and_the_last_layers_of_the_head_train(model_type, head):
    model = tiny_model(model_type=model_type, pad_token_id=1, head=head)
    names = {name for name, _ in model.named_parameters()}
    apply_peft(model, PeftConfig("bitfit"))
    assert {name for name, _ in model.named_parameters()} == names
    assert trainable(model) == {n for n in names if n.endswith("bias") or n.startswith(("classifier.", "qa_outputs."))}


def test_query_intermediate_trains_two_biases_a_block_the_poolers_and_the_classifier():
    model = tiny_model()
    apply_peft(model, PeftConfig("bitfit", bitfit_biases="query,intermediate"))
    layers = ("attention.self.query", "intermediate.dense")
    blocks = {f"encoder.layer.{i}.{layer}.bias" for i in range(4) for layer in layers}
    assert trainable(model) == blocks | {"pooler.dense.bias", "classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("biases, in_blocks, in_embeddings", [("all", 101_376, 768), ("query,intermediate", 46_080, 0)])
def test_bert_base_counts(biases, in_blocks, in_embeddings):
    with torch.device("meta"):
        model = Model(ARCHITECTURES["bert-base-uncased"].with_head("classification", ("no", "yes")))
    apply_peft(model, PeftConfig("bitfit", bitfit_biases=biases))
    sizes = {}
    for name, parameter in model.named_parameters():
        unit = unit_of(name) if isinstance(unit_of(name), str) else "block"
        sizes[unit] = sizes.get(unit, 0) + parameter.numel() * parameter.requires_grad
    assert sizes == {"block": in_blocks, EMBEDDINGS: in_embeddings, HEAD: 768 + 2 * 768 + 2}


@pytest.mark.parametrize("policy", EMBEDDING_POLICIES)
@pytest.mark.parametrize("boundary", range(5))
def test_the_bias_of_the_embeddings_layer_norm_follows_the_policy(policy, boundary):
    model = tiny_model()
    apply_peft(model, PeftConfig("bitfit"))
    engine = StageEngine(model)
    trains = embeddings_train(policy, boundary)
    engine.enter(Stage(0, 4, boundary, trains))
    model_gradients = torch.autograd.grad(
        engine(**tiny_batch(model.config)).sum(), [p for p in model.parameters() if p.requires_grad]
    )
    assert ("embeddings.LayerNorm.bias" in trainable(model)) == trains
    assert all(gradient.isfinite().all() for gradient in model_gradients)
    assert engine.cut == (None if trains else boundary)


def test_the_models_output_is_not_changed():
    base, model = tiny_model(), tiny_model()
    apply_peft(model, PeftConfig("bitfit"))
    batch = tiny_batch(base.config)
    assert torch.equal(model(**batch), base(**batch))


def test_other_biases_are_refused():
    with pytest.raises(InputError, match="--bitfit-biases must be one of all, query,intermediate, got 'query'"):
        PeftConfig("bitfit", bitfit_biases="query")
