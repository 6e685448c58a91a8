"""Recorded blocks: every run ends as without, bit for bit, and only what comes again in one stage is recorded.

On a CPU a stand-in runs anew what CUDA replays, on the same tensors; what CUDA records itself is tested where it is.
"""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from progtuning.base.errors import InputError, RunError
from progtuning.engine import StageEngine
from progtuning.methods.apply import apply_peft
from progtuning.model.bert import Encoder
from progtuning.run.build import build_loader, build_trainer, forecast, lay_out
from progtuning.run.state import load_state_dict, state_dict
from progtuning.settings.train import DPSConfig, TrainConfig
from progtuning.speed import graphs
from progtuning.speed.graphs import RecordedEncoder, Recorder
from progtuning.speed.kernels import compile_blocks, reporting_compiler
from progtuning.stages import Stage
from progtuning.step.device import forward_pass
from progtuning.step.loader import to_device
from progtuning.step.processes import World
from progtuning.train import Trainer
from tests.models import gradients, reachable, tiny_batch, tiny_model
from tests.test_cli import call, refused
from tests.test_devices import PEFT
from tests.test_train import SETTINGS, rows, weights

RUNS = {  # 9 steps: 24 rows in batches of 8, 3 epochs
    "shrinking": {},
    "growing": {"schedule": "growing"},
    "E always": {"embeddings": "always"},
    "without dropout in the prefix": {"prefix_dropout": False},
    "the head alone": {"calendar": "4"},
    "batches in pieces": {"accumulation_steps": 2},
    "adaptive": {"schedule": "adaptive", "stages": 3},
    "DPS mix": {"dps": DPSConfig("mix", update_ratio=0.23)},
    "cache": {"cache": "memory"},
    **{name: {"peft": peft} for name, peft in PEFT.items()},
}
made: list = []  # what was recorded


class Counted(Recorder):
    def record(self, work):
        made.append(work)
        return super().record(work)


class Rerun:
    """In place of a recorder, where there is no CUDA: the work runs anew each time, on the same tensors.

    It runs in the grad mode and the autocast in which CUDA would have recorded it.
    """

    def forget(self):
        pass

    def rehearse(self, work):
        work()

    def record(self, work):
        made.append(work)
        keeps, is_cast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

        def rerun() -> None:
            with torch.set_grad_enabled(keeps), torch.autocast("cpu", enabled=is_cast):
                work()

        return rerun


@pytest.fixture(autouse=True)
def recorded_from_the_second_pass_on(monkeypatch):
    monkeypatch.setattr(graphs, "UNRECORDED", 1)
    made.clear()


def graph_blocks(model) -> None:
    on_cuda = next(model.parameters()).is_cuda
    model.encoder.forward = RecordedEncoder(model.encoder, Counted if on_cuda else Rerun)


def trainer(device: torch.device, recorded: bool, dropout: float = 0.1, **changes) -> Trainer:
    """A run whose batches are padded as of one that is recorded, and that is or is not."""
    settings = replace(SETTINGS, **changes)
    model = tiny_model(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    apply_peft(model, settings.peft, seed=1)
    run = build_trainer(model, rows(24), settings, device)
    run.loader.multiple = graphs.MULTIPLE
    if recorded:
        graph_blocks(model)
    return run


def assert_equal_weights(runs) -> None:
    expected, found = (weights(run.engine.model) for run in runs)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_run_ends_as_one_that_is_not_bit_for_bit(name, device):
    runs = [trainer(device, recorded, **RUNS[name]) for recorded in (False, True)]
    for run in runs:
        run.fit()
    assert_equal_weights(runs)
    assert made, "nothing was recorded"
    costs = [[(cost.steps, cost.slots, cost.forward_flops) for cost in run.ledger.costs] for run in runs]
    assert costs[0] == costs[1]


@pytest.mark.parametrize("name", ["shrinking", "batches in pieces", "cache"])
def test_a_recorded_run_that_is_taken_up_within_a_stage_ends_as_one_that_was_not_bit_for_bit(name, device):
    whole, kept = trainer(device, True, **RUNS[name]), []

    def keep(stage_ends: bool) -> None:
        if whole.step == 5 and not kept:
            kept.append(tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state_dict(whole)))

    whole.fit(after_step=keep)
    resumed = trainer(device, True, **RUNS[name])
    load_state_dict(resumed, kept[0])
    resumed.fit()
    assert_equal_weights((whole, resumed))


def test_bf16_steps_are_those_that_are_not_recorded_bit_for_bit(device):
    runs = [trainer(device, recorded, precision="bf16") for recorded in (False, True)]
    for run in runs:
        run.fit()
    assert made
    assert_equal_weights(runs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_blocks_are_recorded_too(backend, device):
    outputs, num_graphs = [], []
    for recorded in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = tiny_model().to(device)
        compile_blocks(model, backend)
        if recorded:
            graph_blocks(model)
        engine = StageEngine(model)
        for stage in (Stage(0, 4, 0, True), Stage(1, 4, 2, False)):
            engine.enter(stage)
            for seed in range(3):
                inputs, _ = to_device(tiny_batch(model.config, seed=seed), device)
                engine.zero_grad()
                loss = F.cross_entropy(engine(**inputs), torch.arange(5, device=device) % 3)
                loss.backward()
            outputs.append((loss.detach(), gradients(model)))
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert made and num_graphs[1] == num_graphs[0], "to record compiles nothing anew"
    torch.testing.assert_close(outputs[2:], outputs[:2], rtol=1e-5, atol=1e-6)


def test_a_stage_records_what_comes_again_in_it_and_nothing_is_left_of_the_stage_before(device):
    model = tiny_model().to(device)
    graph_blocks(model)
    encoder, engine = model.encoder.forward, StageEngine(model)

    def step(rows: int, length: int) -> int:
        inputs, _ = to_device(tiny_batch(model.config, rows, length), device)
        engine(**inputs).sum().backward()
        return len(encoder.recordings)

    engine.enter(Stage(0, 4, 0, embeddings=True))
    assert [step(5, 9), step(5, 8), step(5, 9), step(5, 9), step(3, 9), step(5, 8)] == [0, 0, 1, 1, 1, 2]
    engine.enter(Stage(1, 4, 2, embeddings=False))
    engine.zero_grad()
    assert [step(5, 9), step(5, 9)] == [0, 2], "the frozen blocks, and those above"
    trained = {name for name, parameter in model.encoder.named_parameters() if parameter in encoder.gradients}
    assert trained == {name for name, parameter in model.encoder.named_parameters() if parameter.requires_grad}
    assert set(gradients(model)) == engine.trainable_names(engine.stage)
    assert len(made) == 2 * 2 + 1 + 2, "forward and backward, of the frozen blocks forward alone"


@pytest.mark.parametrize("lengths", [(8, 16, 8), (16, 8, 16), (8, 8, 16)])
def test_the_gradients_of_the_pieces_of_a_batch_add_up_whichever_are_recorded(lengths, device):
    """A piece may be recorded while the gradients of the one before lie where it writes its own."""
    models = [tiny_model().to(device) for _ in range(2)]
    graph_blocks(models[1])
    for _ in range(3):
        found = []
        for model in models:
            model.zero_grad()
            for length in lengths:
                inputs, _ = to_device(tiny_batch(model.config, length=length, seed=length), device)
                model(**inputs).square().sum().backward()
            found.append(gradients(model))
        assert all(torch.equal(found[1][name], found[0][name]) for name in found[0])
    assert made


def test_evaluation_is_not_recorded(device):
    model = tiny_model().to(device)
    graph_blocks(model)
    inputs, _ = to_device(tiny_batch(model.config), device)
    model.eval()
    with torch.no_grad():
        outputs = [model(**inputs) for _ in range(4)]
    assert not made and not model.encoder.forward.recordings
    assert torch.equal(outputs[0], outputs[3])


def test_recording_takes_nothing_of_the_random_numbers_of_dropout(device):
    """Resumed, a run records at other steps, and must draw the same."""
    model = tiny_model(hidden_dropout_prob=0.5).to(device)
    graph_blocks(model)
    inputs, _ = to_device(tiny_batch(model.config), device)
    found = []
    for _ in range(4):  # not recorded; recorded; replayed
        torch.manual_seed(7)
        with forward_pass(device, "fp32"):
            found.append(model(**inputs))
        found[-1].sum().backward()
    assert made
    assert all(torch.equal(output, found[0]) for output in found)


def test_a_loss_that_is_kept_stands_in_no_recordings_way(device):
    """Its graph ties the model's parameters to the stream that it ran in, for which a recording may not wait."""
    model, losses = tiny_model().to(device), []
    graph_blocks(model)
    inputs, _ = to_device(tiny_batch(model.config), device)
    for _ in range(4):
        losses.append(model(**inputs).sum())
        losses[-1].backward()
    (recording,) = model.encoder.forward.recordings.values()
    assert torch.equal(losses[3], losses[0])
    if device.type == "cpu":  # the stand-in has still its graph
        parameters = reachable(recording.output)[0]
        assert parameters and not parameters & set(model.parameters())


@pytest.mark.parametrize(
    "failure, message",
    [
        (
            RuntimeError("CUDA error: no\nCompile with ..."),
            "--cuda-graphs: the blocks could not be recorded: CUDA error: no",
        ),
        (NotImplementedError(), "--cuda-graphs: the blocks could not be recorded: NotImplementedError"),
        (torch._dynamo.exc.TorchRuntimeError("no space left"), "--compile: torch.compile failed: no space left"),
    ],
)
def test_what_cannot_be_recorded_ends_the_run_with_one_line(failure, message):
    class Broken(Rerun):
        def record(self, work):
            raise failure

    model = tiny_model()
    model.encoder.forward = RecordedEncoder(model.encoder, Broken)
    model(**tiny_batch(model.config))
    with pytest.raises(RunError) as error, reporting_compiler():
        model(**tiny_batch(model.config))
    assert str(error.value) == message


def test_what_the_frozen_blocks_give_is_not_written_over_by_their_next_pass(device):
    """The rows of a batch may come to the same blocks in two groups, as far as the prefix of each is kept."""
    model = tiny_model().to(device)
    graph_blocks(model)
    states = [torch.randn(4, 8, 16, device=device) for _ in range(5)]
    with torch.no_grad():
        outputs = [model.encoder(x, None, range(2)) for x in states]
        assert made
        expected = [Encoder.forward(model.encoder, x, None, range(2)) for x in states]
    assert all(torch.equal(found, one) for found, one in zip(outputs, expected, strict=True))


def test_a_model_with_recordings_is_given_back_without_the_garbage_collector():
    class Forgotten(Rerun):
        def record(self, work):
            made.append(work.__name__)
            return lambda: None

    model = tiny_model()
    model.encoder.forward = RecordedEncoder(model.encoder, Forgotten)
    gc.collect()
    gc.disable()
    try:
        loss = [model(**tiny_batch(model.config)).sum() for _ in range(3)][-1]
        loss.backward()
        kept = [weakref.ref(one) for one in (model.encoder, model.encoder.layer[0].output.dense.weight)]
        kept += [weakref.ref(one) for one in model.encoder.forward.recordings.values()]
        del model
        assert len(kept) == 3 and made and [one() for one in (kept[0], kept[2])] == [None, None]
    finally:
        gc.enable()


def test_batches_are_padded_to_a_multiple_but_never_beyond_what_the_model_takes():
    config, data = tiny_model().config, rows(24)  # of 3 to 9 tokens; it takes 24
    loader = build_loader(config, data, replace(SETTINGS, cuda_graphs=True), torch.device("cpu"))
    assert {piece.tensors["input_ids"].shape[1] for batch in loader.epoch(0) for piece in batch} == {8, 16}
    assert {loader.padded_length([row]) for row in range(24)} == {8, 16}
    loader.most = 12
    assert {loader.padded_length([row]) for row in range(24)} == {8, 12}
    loader.most = 8
    assert {loader.padded_length([row]) for row in range(24)} == {8, 9}, "a row is never cut"
    plain = build_loader(config, data, SETTINGS, torch.device("cpu"))
    assert {plain.padded_length([row]) for row in range(24)} == set(data.lengths.tolist())


def test_the_account_and_the_forecast_count_the_padding(device):
    run = trainer(device, True)
    run.fit()
    prices = forecast(run.engine.model.config, run.loader, replace(SETTINGS, cuda_graphs=True))
    assert prices.shapes(9) == {(8, 8), (8, 16)}
    flops = sum(cost.forward_flops + cost.backward_flops for cost in run.ledger.costs)
    assert flops == prices.flops(run.schedule, run.num_steps)
    batches = [batch for epoch in range(3) for batch in run.loader.batches.epoch(epoch)]
    slots = sum(len(batch) * (8 if run.loader.data.lengths[batch].max() <= 8 else 16) for batch in batches)
    assert sum(cost.slots for cost in run.ledger.costs) == slots


@pytest.mark.skipif(not torch.cuda.is_available(), reason="what CUDA records needs a CUDA device")
def test_a_run_on_cuda_with_the_option_records_and_pads():
    run = build_trainer(tiny_model(), rows(24), replace(SETTINGS, cuda_graphs=True), torch.device("cuda"))
    run.fit()
    encoder = run.engine.model.encoder.forward
    assert encoder.recordings and {shape.size[1] for shape in encoder.recordings} <= {8, 16}


@pytest.mark.parametrize(
    "more, name",
    [
        ({"unpadded": True}, "--unpadded"),
        ({"checkpoint_activations": True}, "--checkpoint-activations"),
        ({"batch_tokens": 64}, "--batch-tokens"),
    ],
)
def test_what_makes_passes_that_are_not_alike_excludes_recording(more, name):
    with pytest.raises(InputError, match=f"--cuda-graphs records passes that are alike, which {name} does not make"):
        TrainConfig(cuda_graphs=True, **more)


def test_it_is_for_one_process_on_a_cuda_device():
    config, settings = tiny_model().config, replace(SETTINGS, cuda_graphs=True)
    with pytest.raises(InputError, match="for one process on a CUDA device, got cpu"):
        lay_out(config, rows(24), settings, torch.device("cpu"), World())
    with pytest.raises(InputError, match="for one process on a CUDA device, got 2 processes"):
        lay_out(config, rows(24), settings, torch.device("cuda"), World(0, 2))


@pytest.mark.parametrize("command", ["train", "train --dry-run", "compare --epochs 3", "probe"])
def test_without_cuda_one_line_says_so_and_nothing_is_made(command, tiny_folder, tiny_task, tmp_path):
    output = tmp_path / "run"
    arguments = [*command.split(), "--model", tiny_folder, "--task", "classification", "--data", tiny_task]
    line = refused(*call(*arguments, "--device", "cpu", "--cuda-graphs", "--output-dir", output))
    assert line.endswith("--cuda-graphs is for one process on a CUDA device, got cpu")
    assert not output.exists()
