"""The unpadded encoder: the same states and gradients at real tokens, and padding never passes a block.

On a CPU PyTorch computes attention within rows by plain products, on CUDA by the kernels that a run takes.
"""

import warnings

import pytest
import torch

from progtuning.base.errors import InputError
from progtuning.engine import StageEngine
from progtuning.speed import unpad as unpadded
from progtuning.speed.kernels import compile_blocks
from progtuning.speed.unpad import attend_rows, replace_attention, unpad
from progtuning.stages import Stage
from progtuning.step.device import forward_pass
from progtuning.step.loader import to_device
from tests.conftest import DEVICES
from tests.models import gradients, tiny_batch, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need CUDA")


def models(device: str, **changes):
    """A model and one like it that runs unpadded."""
    padded, other = (tiny_model(**changes).to(device) for _ in range(2))
    replace_attention(other)
    return padded, other


def inputs_of(model) -> dict:
    return to_device(tiny_batch(model.config), next(model.parameters()).device)[0]


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("head", ["classification", "question-answering"])
@pytest.mark.parametrize("boundary", [0, 2, 4])
def test_outputs_and_gradients_are_those_of_the_padded_model(boundary, head, name):
    engines = [StageEngine(model) for model in models(name, head=head)]
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


def test_batches_without_padding_run_as_before():
    model, other = models("cpu")
    ids = inputs_of(model)["input_ids"]
    assert torch.equal(*(each.eval()(ids) for each in (model, other)))


@pytest.mark.parametrize("name", DEVICES)
def test_attention_drops_out_the_share_asked_for_and_scales_the_rest(name):
    """With rows of the identity as values, attention gives its probabilities."""
    lengths, width, share = [5, 16, 1, 9], 16, 0.25
    dtype = torch.bfloat16 if name == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(sum(lengths), 64, width, generator=generator).to(name, dtype) for _ in range(2))
    value = (
        torch.cat([torch.eye(width)[:length] for length in lengths])[:, None]
        .expand(-1, 64, -1)
        .contiguous()
        .to(name, dtype)
    )
    offsets = torch.tensor([0, *lengths]).cumsum(0).int().to(name)
    torch.manual_seed(0)
    whole, dropped = (attend_rows(query, key, value, offsets, 16, dropout).float() for dropout in (0.0, share))
    row_of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    inside = (torch.arange(width) < torch.tensor(lengths)[row_of, None])[:, None].expand(-1, 64, -1).to(name)
    assert whole[~inside].abs().max() == 0 and torch.allclose(whole.sum(-1), torch.ones(()).to(name), atol=2e-2)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / (1 - share), rtol=2e-2, atol=1e-3)
    assert (~kept[inside]).float().mean().item() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("name", DEVICES)
def test_compiled_blocks_run_unpadded_too(name):
    model, other = models(name, attention_probs_dropout_prob=0.0, num_hidden_layers=2)
    compile_blocks(other, backend="aot_eager")
    inputs = inputs_of(model)
    found = []
    for each in (model, other):
        output = each(**inputs)
        output.square().sum().backward()
        found.append((output, gradients(each)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_a_cpu_is_refused():
    with pytest.raises(InputError, match="^--unpadded needs CUDA, got cpu$"):
        unpad(tiny_model(), torch.device("cpu"))


@CUDA
@pytest.mark.parametrize("kernel", ["varlen", "nested tensors"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_on_cuda_bf16_logits_are_those_of_the_padded_model_by_either_kernel(kernel, dropout, monkeypatch):
    if kernel == "nested tensors":
        monkeypatch.setattr(unpadded, "varlen_attn", None)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "attention_probs_dropout_prob": dropout}
    model, other = models("cuda", **sizes)
    inputs = inputs_of(model)
    with forward_pass(torch.device("cuda"), "bf16"), warnings.catch_warnings():
        warnings.simplefilter("error")
        other(**inputs).float().square().sum().backward()
        assert set(gradients(other)) == {name for name, _ in other.named_parameters()}
        expected, found = (each.eval()(**inputs) for each in (model, other))
    torch.testing.assert_close(found.float(), expected.float(), rtol=3e-2, atol=3e-2)
