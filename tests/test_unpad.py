"""The unpadded encoder: the same states and gradients at real tokens, and padding never passes a block."""

import pytest
import torch
from torch.nn import functional as F

from progtuning.base.errors import InputError
from progtuning.engine import StageEngine
from progtuning.speed import unpad as unpadded
from progtuning.speed.unpad import replace_attention, unpad
from progtuning.stages import Stage
from tests.models import gradients, tiny_batch, tiny_model


def row_by_row(query, key, value, query_offsets, key_offsets, longest_query, longest_key):
    """What varlen_attn computes, by plain attention on each row: (T, H, D/H)."""
    assert query_offsets.dtype == torch.int32 and torch.equal(query_offsets, key_offsets)
    assert int(query_offsets.diff().max()) <= longest_query == longest_key and len(query) == query_offsets[-1]
    rows = []
    for start, end in zip(query_offsets.tolist(), query_offsets[1:].tolist()):
        row = (x[start:end].transpose(0, 1) for x in (query, key, value))
        rows.append(F.scaled_dot_product_attention(*row).transpose(0, 1))
    return torch.cat(rows)


@pytest.fixture
def on_cpu(monkeypatch):
    """Run the unpadded path on a CPU, in fp32, by attention row by row."""
    monkeypatch.setattr(unpadded, "varlen_attn", row_by_row)
    monkeypatch.setattr(unpadded, "kernel_takes", lambda x: True)


@pytest.mark.parametrize("head", ["classification", "question-answering"])
@pytest.mark.parametrize("boundary", [0, 2, 4])
def test_outputs_and_gradients_are_those_of_the_padded_model(boundary, head, on_cpu):
    engines = [StageEngine(tiny_model(head=head)) for _ in range(2)]
    replace_attention(engines[1].model)
    seen = []
    for block in engines[1].model.encoder.layer:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    inputs = tiny_batch(engines[0].model.config)
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


def test_blocks_that_drop_attention_out_and_batches_without_padding_run_as_before(on_cpu, monkeypatch):
    monkeypatch.setattr(unpadded, "varlen_attn", None)
    model, other = (tiny_model(attention_probs_dropout_prob=0.3) for _ in range(2))
    replace_attention(other)
    inputs = tiny_batch(model.config)
    found = []
    for each in (model, other):
        torch.manual_seed(0)
        found.append(each(**inputs))
    assert torch.equal(*found)
    for each in (model, other):
        each.eval()
    assert torch.equal(*(each(inputs["input_ids"]) for each in (model, other)))


def test_a_cpu_or_an_old_pytorch_is_refused(monkeypatch):
    with pytest.raises(InputError, match="--unpadded needs CUDA and PyTorch 2.10 or later, got cpu and "):
        unpad(tiny_model(), torch.device("cpu"))
    monkeypatch.setattr(unpadded, "varlen_attn", None)
    with pytest.raises(InputError, match="--unpadded needs CUDA and PyTorch 2.10 or later, got cuda and "):
        unpad(tiny_model(), torch.device("cuda"))


@pytest.mark.skipif(
    not torch.cuda.is_available() or unpadded.varlen_attn is None, reason="varlen attention needs CUDA and PyTorch 2.10"
)
def test_on_cuda_logits_are_those_of_the_padded_model():
    device = torch.device("cuda")
    model, other = (tiny_model(hidden_size=64, intermediate_size=96).to(device) for _ in range(2))
    unpad(other, device)
    inputs = {name: value.to(device) for name, value in tiny_batch(model.config).items()}
    with torch.autocast("cuda", torch.bfloat16):
        expected, found = model(**inputs), other(**inputs)
    torch.testing.assert_close(found.float(), expected.float(), rtol=3e-2, atol=3e-2)
    found.float().square().sum().backward()
    assert set(gradients(other)) == {name for name, _ in other.named_parameters()}
