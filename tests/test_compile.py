"""Compiled blocks: every stage trains what it trains without, to the same losses, and few graphs serve all stages."""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from progtuning.base.errors import InputError
from progtuning.engine import StageEngine
from progtuning.methods.apply import apply_peft
from progtuning.run.build import build_trainer
from progtuning.settings.peft import PeftConfig
from progtuning.speed.kernels import check_compiler, compile_blocks, reporting_compiler
from progtuning.stages import Stage, make_schedule
from progtuning.step.loader import to_device
from progtuning.step.optim import build_optimizer
from tests.models import gradients, tiny_batch, tiny_model
from tests.test_cli import call, refused
from tests.test_train import CPU, SETTINGS, rows

METHODS = {
    "none": PeftConfig(),
    "lora": PeftConfig("lora", lora_r=2),
    "spafit": PeftConfig("spafit", spafit_bounds=(1, 2), lora_r=2),
}


@pytest.fixture(autouse=True)
def no_graphs():
    """Each test begins without compiled graphs."""
    torch._dynamo.reset()
    counters.clear()


def engine_of(method: str, prefix_dropout: bool, device: torch.device) -> StageEngine:
    model = tiny_model().to(device)
    apply_peft(model, METHODS[method])
    return StageEngine(model, build_optimizer(model, lr=1e-3), prefix_dropout)


@pytest.mark.parametrize(
    "schedule, embeddings, method, prefix_dropout, most_graphs, backend",
    [
        # with a gradient for the input; the lowest active; frozen; each with padding and without
        ("shrinking", "with-block-1", "none", True, 6, "aot_eager"),  # derives the backward pass, and generates no code
        ("shrinking", "with-block-1", "none", False, 6, "eager"),  # traces, and generates no code
        ("shrinking", "always", "none", True, 4, "eager"),  # no block is without a gradient for its input
        ("growing", "with-block-1", "none", True, 6, "eager"),
        ("shrinking", "with-block-1", "lora", True, 6, "eager"),
        ("shrinking", "with-block-1", "spafit", True, 18, "eager"),
    ],
)
def test_after_every_stage_change_active_parameters_get_gradients_and_frozen_none_as_eager(
    schedule, embeddings, method, prefix_dropout, most_graphs, backend, device
):
    """By "aot_eager", which runs AOTAutograd, too: under it freezing has stopped training in silence elsewhere, and
    "eager" cannot show that (pytorch #139476).
    """
    eager, compiled = (engine_of(method, prefix_dropout, device) for _ in range(2))
    compile_blocks(compiled.model, backend)
    for stage in make_schedule(schedule, 4, 3, embeddings).stages:
        for engine in (eager, compiled):
            engine.enter(stage)
            engine.train()
        for seed, (batch, length) in enumerate([(5, 9), (3, 6), (5, 7)]):
            inputs, _ = to_device(tiny_batch(eager.model.config, batch, length, seed), device)
            if seed == 2:
                inputs["attention_mask"] = None
            labels = torch.arange(batch, device=device) % 3
            losses = [F.cross_entropy(engine(**inputs), labels) for engine in (eager, compiled)]
            torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
            for loss in losses:
                loss.backward()
            expected, found = gradients(eager.model), gradients(compiled.model)
            assert set(expected) == set(found) == compiled.trainable_names(stage)
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
            for engine in (eager, compiled):
                engine.optimizer.step()
                engine.optimizer.zero_grad()
            for ours, theirs in zip(compiled.model.parameters(), eager.model.parameters()):
                ours.data.copy_(theirs)  # or AdamW would divide rounding errors by their own size
    assert 0 < counters["stats"]["unique_graphs"] <= most_graphs


def test_a_compiled_run_with_a_cache_has_the_losses_of_the_run_without_either(monkeypatch):
    monkeypatch.setattr("progtuning.run.build.compile_blocks", partial(compile_blocks, backend="eager"))
    logged = []
    for compiled in (False, True):
        settings = replace(SETTINGS, batch_size=10, stages=2, lr=1e-4, compile=compiled, prefix_dropout=False)
        settings = replace(settings, cache="memory" if compiled else "off")
        run, losses = build_trainer(tiny_model(), rows(), settings, CPU), []
        original = run.loss
        run.loss = lambda *batch: losses.append(original(*batch)) or losses[-1]
        run.fit()
        logged.append(torch.stack(losses).tolist())
        assert (counters["stats"]["unique_graphs"] > 0) == compiled
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)
    assert set(run.engine.model.state_dict()) == set(tiny_model().state_dict())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++")
@torch._inductor.config.patch({"compile_threads": 1})  # for one graph no pool of compilers need be started
def test_generated_code_computes_the_same(device):
    eager, compiled = (StageEngine(tiny_model(num_hidden_layers=1).to(device)) for _ in range(2))
    compile_blocks(compiled.model)
    counters.clear()  # of the check for a compiler
    inputs, _ = to_device(tiny_batch(eager.model.config), device)
    for engine in (eager, compiled):
        engine.enter(Stage(0, 1, 0, embeddings=False))
        F.cross_entropy(engine(**inputs), torch.arange(5, device=device) % 3).backward()
    for name, gradient in gradients(eager.model).items():
        torch.testing.assert_close(gradients(compiled.model)[name], gradient, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


def arguments(tiny_folder, tiny_task, output) -> list:
    fixed = (
        "--task classification --epochs 3 --batch-size 32 --max-train-rows 64 --max-length 16 --device cpu --compile"
    )
    return ["train", "--model", tiny_folder, "--data", tiny_task, "--output-dir", output, *fixed.split()]


@pytest.fixture
def without_compiled_code(tmp_path, monkeypatch):
    """A machine on which nothing has been compiled yet."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    check_compiler.cache_clear()


# A compiler that says its version, and finds no header of Python's.
BROKEN = """#!/bin/sh
[ "$1" = --version ] && echo g++ 13 && exit 0
echo "In file included from x.cpp:
x.cpp:1:10: fatal error: Python.h: No such file" >&2
exit 1
"""


@pytest.mark.parametrize(
    "script, message", [(None, "No working C++ compiler found in"), (BROKEN, "x.cpp:1:10: fatal error: Python.h: No")]
)
def test_where_no_code_can_be_compiled_one_line_says_so_before_anything_is_read_or_made(
    script, message, tiny_task, tmp_path, without_compiled_code
):
    compiler = tmp_path / "g++"
    if script:
        compiler.write_text(script)
        compiler.chmod(0o755)
    with torch._inductor.config.patch({"cpp.cxx": (None, str(compiler)), "compile_threads": 1}):
        line = refused(*call(*arguments("org/never-asked-for", tiny_task, tmp_path / "run")))
        check_compiler.cache_clear()
        compared = ["--task", "classification", "--data", tiny_task, "--output-dir", tmp_path / "run"]
        grid = refused(*call("compare", "--model", "org/never-asked-for", *compared, "--compile", "--device", "cpu"))
    assert line.startswith(f"progtuning: error: --compile: torch.compile does not work here: {message}")
    assert grid == line and not (tmp_path / "run").exists()


def test_without_triton_the_line_is_that_of_pytorch(monkeypatch, without_compiled_code):
    def compiled(function):
        raise RuntimeError("\nCannot find a working triton installation. Either it is too old\nor not there.")

    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(
        InputError,
        match="^--compile: torch.compile does not work here: Cannot find a working triton installation[^\n]+old$",
    ):
        compile_blocks(tiny_model())


def test_a_compiler_that_fails_in_a_later_stage_ends_the_run_with_one_line(
    tiny_folder, tiny_task, tmp_path, monkeypatch
):
    made = []

    def backend(graph, inputs):
        made.append(graph)
        if len(made) > 2:
            raise RuntimeError("C++ compile error\n\nCommand:\ng++ x.cpp\n\nOutput:\nx.cpp:9:1: error: no room\nmore")
        return graph.forward

    monkeypatch.setattr("progtuning.speed.kernels.check_compiler", lambda device: None)
    monkeypatch.setattr("progtuning.run.build.compile_blocks", partial(compile_blocks, backend=backend))
    status, out, err = call(*arguments(tiny_folder, tiny_task, tmp_path / "run"))
    assert (status, out) == (1, "") and "Traceback" not in err
    assert err.splitlines()[-1] == "progtuning: error: --compile: torch.compile failed: x.cpp:9:1: error: no room"
    assert len(made) == 3 and err.count("error: ") == 2


def test_an_error_that_is_not_the_compilers_passes():
    with pytest.raises(RuntimeError, match="out of memory"), reporting_compiler():
        raise torch.OutOfMemoryError("out of memory")
