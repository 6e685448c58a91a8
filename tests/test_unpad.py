"""The unpadded encoder: the same states and gradients at real tokens, and padding meets nothing but attention."""

import pytest
import torch

from progtuning.engine import StageEngine
from progtuning.speed.kernels import compile_blocks
from progtuning.speed.unpad import unpad
from progtuning.stages import Stage
from progtuning.step.device import forward_pass
from progtuning.step.loader import to_device
from tests.models import gradients, tiny_batch, tiny_model


def models(device: torch.device, **changes):
    """A model and one like it that runs unpadded."""
    padded, other = (tiny_model(**changes).to(device) for _ in range(2))
    unpad(other)
    return padded, other


def inputs_of(model) -> dict:
    return to_device(tiny_batch(model.config), next(model.parameters()).device)[0]


def assert_equal_steps(padded, other, rtol: float, atol: float) -> None:
    """Both models have the same output for a batch and the same gradients."""
    found = []
    for model in (padded, other):
        torch.manual_seed(0)
        output = model(**inputs_of(model))
        output.float().square().sum().backward()
        found.append((output, gradients(model)))
    assert set(found[0][1]) == set(found[1][1])
    torch.testing.assert_close(found[1], found[0], rtol=rtol, atol=atol)


@pytest.mark.parametrize("head", ["classification", "question-answering"])
@pytest.mark.parametrize("boundary", [0, 2, 4])
def test_outputs_and_gradients_are_those_of_the_padded_model(boundary, head, device):
    engines = [StageEngine(model) for model in models(device, head=head)]
    seen = []
    for block in engines[1].model.encoder.layer:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    inputs = inputs_of(engines[0].model)
    real = inputs["attention_mask"]
    outputs = []
    for engine in engines:
        engine.enter(Stage(0, 4, boundary, embeddings=boundary == 0))
        output = engine(**inputs)
        output = output[real] if head == "question-answering" else output
        output.square().sum().backward()
        outputs.append(output)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    expected, found = (gradients(engine.model) for engine in engines)
    assert set(expected) == set(found)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
    assert seen == [(1, int(real.sum()), 16)] * 4
    assert set(engines[0].model.state_dict()) == set(engines[1].model.state_dict())


def test_batches_without_padding_run_as_before(device):
    model, other = models(device)
    ids = inputs_of(model)["input_ids"]
    assert torch.equal(*(each.eval()(ids) for each in (model, other)))


def test_attention_drops_out_what_it_drops_in_the_padded_model(device):
    """Attention has the padded shape, so that the same seed draws the same."""
    sizes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.5}
    assert_equal_steps(*models(device, **sizes), rtol=1e-3, atol=1e-4)


def test_bf16_steps_are_those_of_the_padded_model(device):
    with forward_pass(device, "bf16"):
        assert_equal_steps(*models(device, hidden_size=64, intermediate_size=96), rtol=3e-2, atol=3e-2)


def test_compiled_blocks_run_unpadded_too(device):
    model, other = models(device, attention_probs_dropout_prob=0.0, num_hidden_layers=2)
    compile_blocks(other, backend="aot_eager")
    assert_equal_steps(model, other, rtol=1e-3, atol=1e-4)
