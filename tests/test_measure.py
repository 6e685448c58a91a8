"""What is measured: the kernel of attention by name, phases by the clock."""

import time
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from progtuning.measure import Clock, attention_backends
from tests.models import TINY, tiny_batch, tiny_model

CPU = torch.device("cpu")
KERNELS = {
    "math": "aten::_scaled_dot_product_attention_math",
    "flash_attention": "aten::_scaled_dot_product_flash_attention_for_cpu",
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout_prob", [0.0, 0.1])
def test_the_backends_named_are_the_kernels_that_ran(dropout_prob, precision):
    config = replace(TINY, attention_probs_dropout_prob=dropout_prob)
    named = attention_backends(config, CPU, precision)
    model = tiny_model(attention_probs_dropout_prob=dropout_prob)
    batch = tiny_batch(config)
    for mode, backends in named.items():
        model.train(mode == "training")
        for padding, backend in backends.items():
            inputs = batch if padding == "padded" else batch | {"attention_mask": None}
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
            with profile(activities=[ProfilerActivity.CPU]) as profiler, autocast:
                with torch.set_grad_enabled(mode == "training"):
                    model(**inputs)
            ran = {event.key for event in profiler.key_averages()} & set(KERNELS.values())
            assert ran == {KERNELS[backend]}, (mode, padding)
    if dropout_prob == 0:
        assert named["training"]["padded"] == "flash_attention"  # a mask alone does not block the fused kernel


def test_the_clock_adds_up_each_phase():
    clock = Clock(CPU)
    for seconds in (0.01, 0.02):
        with clock.phase("a"):
            time.sleep(seconds)
    with clock.phase("b"):
        pass
    seconds = clock.seconds()
    assert set(seconds) == {"a", "b"} and 0.03 <= seconds["a"] < 0.5 and seconds["b"] < 0.01
