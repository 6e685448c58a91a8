"""Where the time of a full training step goes on a GPU: the device at work, and its kernels by kind.

    python benchmarks/where_time_goes.py > profile.txt

For each model a line with the time of a step, by the clock and until the host has given it out, and PyTorch's two
tables of three steps: by time of the device, by time of the host. bf16, no padding, AdamW fused, a head of two classes.
"""

import argparse
import time
from collections.abc import Sequence

import harness
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from progtuning.base.errors import InputError
from progtuning.engine import StageEngine
from progtuning.model.bert import build_model
from progtuning.model.config import ARCHITECTURES
from progtuning.stages import Stage
from progtuning.step.optim import build_optimizer

SHAPES = {"minilm-l6": (16, 32), "bert-base-uncased": (32, 128), "bert-large-uncased": (32, 384)}  # rows, tokens


def main(arguments: Sequence[str]) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    if not torch.cuda.is_available():
        raise InputError("it is about a GPU, and there is none")
    torch.backends.cuda.enable_cudnn_sdp(False)  # as a run has it
    for name, (rows, tokens) in SHAPES.items():
        model = build_model(ARCHITECTURES[name].with_head("classification", ("no", "yes"))).to("cuda").train()
        optimizer = build_optimizer(model, lr=1e-5)
        engine = StageEngine(model, optimizer)
        engine.train().enter(Stage(0, engine.num_blocks, 0, True))
        ids = torch.randint(1, 1000, (rows, tokens), device="cuda")

        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(engine(ids, None).float(), ids[:, 0] % 2)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(5):
            step()
        torch.cuda.synchronize()
        begin = time.monotonic()
        for _ in range(10):
            step()
        host = time.monotonic() - begin
        torch.cuda.synchronize()
        whole = time.monotonic() - begin
        print(f"{name}, {rows} x {tokens}: {100 * whole:.1f} ms a step, given out in {100 * host:.1f} ms", flush=True)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            for _ in range(3):
                step()
            torch.cuda.synchronize()
        kinds = profiled.key_averages()
        print(kinds.table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=90))
        print(kinds.table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=60))


if __name__ == "__main__":
    harness.run_script(main)
