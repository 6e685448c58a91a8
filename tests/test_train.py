"""The training loop: Algorithm 1 runs as written, learns, and accounts for what it did."""

import io
import math
import re
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from progtuning.base.errors import InputError, RunError
from progtuning.cost import closed_form, plan
from progtuning.data.batching import EncodedRows
from progtuning.data.task import Classes, Numbers
from progtuning.data.tokenization import Encoding
from progtuning.methods.apply import apply_peft
from progtuning.model.bert import build_model
from progtuning.model.heads import CLASSES
from progtuning.model.names import EMBEDDINGS, HEAD, unit_of
from progtuning.run.build import build_trainer
from progtuning.run.evaluate import measure_splits, predict
from progtuning.run.state import state_dict
from progtuning.settings.peft import PEFT_METHODS, PeftConfig
from progtuning.settings.train import DPSConfig, TrainConfig
from progtuning.stages import EMBEDDING_POLICIES, SCHEDULES
from progtuning.step import ledger
from progtuning.step.loader import Loader, collate_inputs
from progtuning.step.processes import World
from progtuning.train import Trainer
from tests.models import TINY, tiny_model
from tests.test_cli import call

CPU = torch.device("cpu")
SETTINGS = TrainConfig(epochs=3, batch_size=8, lr=1e-3, evaluate="end", seed=3)


def rows(count: int = 40, seed: int = 0, regression: bool = False) -> EncodedRows:
    """Random rows of 3 to 9 words from one half of the vocabulary: the class is which half, the score its sign."""
    generator = np.random.default_rng(seed)
    encodings, labels = [], []
    for _ in range(count):
        half = int(generator.integers(2))
        ids = generator.integers(1 + 29 * half, 30 + 29 * half, generator.integers(3, 10)).astype(np.int32)
        encodings.append(Encoding(ids, np.zeros_like(ids)))
        labels.append(half - 0.5 if regression else half)
    return EncodedRows(encodings, labels, TINY.pad_token_id)


def trainer(data=None, log=lambda row: None, model=None, **changes) -> Trainer:
    return build_trainer(model or tiny_model(), data or rows(), replace(SETTINGS, **changes), CPU, log)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_epoch_moves_exactly_the_units_of_its_stage(schedule):
    run = trainer(schedule=schedule)
    seen, before = [], weights(run.engine.model)

    def after_epoch(epoch):
        now = weights(run.engine.model)
        seen.append({unit_of(name) for name in now if not torch.equal(now[name], before[name])})
        before.update(now)

    run.fit(after_epoch)
    expected = []
    for stage in run.schedule.stages:
        expected.append({HEAD, *stage.blocks, *([EMBEDDINGS] if stage.embeddings else [])})
    assert seen == expected


def test_a_run_is_a_pure_function_of_its_seed():
    runs = [trainer(model=tiny_model(hidden_dropout_prob=0.2), seed=seed) for seed in (5, 5, 6)]
    for run in runs:
        run.fit()
    first, again, other = (weights(run.engine.model) for run in runs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_log_counts_epochs_and_stages_from_1_and_each_end_of_a_stage_is_told():
    log, ends = [], []
    run = trainer(log=log.append, schedule="shrinking")  # 5 steps an epoch, a row every 10 and at the end
    run.fit(after_step=lambda stage_ends: ends.append((run.step, stage_ends)))
    assert [(row["step"], row["epoch"], row["stage"]) for row in log] == [(10, 2, 2), (15, 3, 3)]
    between = [(step, False) for step in range(1, 15)]
    assert sorted(ends) == sorted([*between, (5, True), (10, True), (15, True)])


def test_on_a_terminal_the_bar_has_the_speed_of_the_stage_so_far(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for peak, shown in ((None, r"TFLOP/s=[\d.e-]+\]"), (0.001, r"TFLOP/s=[\d.e-]+, of peak=\d\.\d\d\]")):
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        trainer(matmul_peak=peak).fit()
        last = terminal.getvalue().split("\r")[-1]
        assert re.search(rf"stage=3, loss=\d\.\d+, tokens/s=[\d,]+, padding=\d+%, {shown}", last), last


def test_gradients_are_summed_over_processes_after_the_last_piece_alone_and_their_bytes_are_added_up():
    run, told = trainer(accumulation_steps=3), []

    @contextmanager
    def reducing(last):
        told.append(last)
        yield

    run.replica.reducing, run.replica.take_bytes = reducing, lambda: 7
    run.fit()
    assert told == [False, False, True] * run.num_steps
    assert [stage.allreduced_bytes for stage in run.ledger.account()["stages"]] == [7 * 5] * 3


@pytest.mark.parametrize("pieces", [2, 3, 8])
def test_accumulation_in_pieces_gives_the_update_of_the_whole_batch(pieces, monkeypatch):
    # SGD: where a gradient is zero, as a key's bias's is, AdamW divides rounding errors by their own size.
    monkeypatch.setattr(
        "progtuning.run.build.build_optimizer", lambda model, lr, *_: torch.optim.SGD(model.parameters(), lr, 0.9)
    )
    whole, parts = trainer(lr=0.01), trainer(lr=0.01, accumulation_steps=pieces)
    whole.fit()
    parts.fit()
    for name, weight in weights(whole.engine.model).items():
        torch.testing.assert_close(weights(parts.engine.model)[name], weight, rtol=1e-5, atol=1e-6)


def test_the_full_schedule_equals_a_plain_pytorch_loop_bit_for_bit():
    run = trainer(schedule="full", max_grad_norm=0.5)
    run.fit()
    other = trainer(schedule="full")
    model = other.engine.model.train()
    step = 0
    for epoch in range(3):
        for batch in other.loader.batches.epoch(epoch):
            data = other.loader.data.collate(batch)
            logits = model(data["input_ids"], data["attention_mask"], data["token_type_ids"])
            torch.nn.functional.cross_entropy(logits, data["labels"]).backward()
            torch.nn.utils.clip_grad_norm_([p for group in other.optimizer.param_groups for p in group["params"]], 0.5)
            other.optimizer.step()
            other.lr_schedule.step()
            other.optimizer.zero_grad()
            step += 1
    assert step == run.num_steps == 15
    for a, b in zip(run.engine.model.parameters(), model.parameters()):
        assert torch.equal(a, b)


def test_one_learning_rate_schedule_spans_all_stages():
    logged = []
    run = trainer(log=logged.append, epochs=6, stages=3, batch_size=4)
    run.fit()
    assert [row["step"] for row in logged] == [10, 20, 30, 40, 50, 60]
    warmup = math.ceil(0.1 * 60)
    expected = [1e-3 * (60 - step) / (60 - warmup) for step in range(10, 61, 10)]
    assert [row["lr"] for row in logged] == pytest.approx(expected)
    assert [row["stage"] for row in logged] == [1, 1, 2, 2, 3, 3]


def test_a_constant_learning_rate_rises_over_the_warm_up_and_stays_over_all_stages():
    rates, logged = [], []
    run = trainer(log=logged.append, epochs=6, stages=3, batch_size=4, lr_schedule="constant")
    run.fit(after_step=lambda ends: rates.append(run.optimizer.param_groups[0]["lr"]))
    assert rates[: math.ceil(0.1 * 60)] == pytest.approx([1e-3 * step / 6 for step in range(1, 7)])
    assert set(rates[6:]) == {1e-3} and {row["stage"] for row in logged} == {1, 2, 3}


def test_the_epsilon_of_adam_is_that_of_the_settings():
    assert {group["eps"] for group in trainer(adam_epsilon=1e-3).optimizer.param_groups} == {1e-3}
    assert {group["eps"] for group in trainer().optimizer.param_groups} == {1e-8}


def test_the_logged_loss_is_the_mean_over_the_steps_since_the_last_row():
    logged, seen = [], []
    run = trainer(log=logged.append, batch_size=4)
    original = run.loss
    run.loss = lambda *batch: seen.append(original(*batch)) or seen[-1]
    run.fit()
    expected = [torch.stack(seen[i : i + 10]).mean().item() for i in range(0, 30, 10)]
    assert [row["loss"] for row in logged] == pytest.approx(expected)


def test_under_a_token_budget_stages_change_with_epochs_and_the_schedule_ends_with_the_last_step():
    logged = []
    run = trainer(log=logged.append, batch_tokens=30, accumulation_steps=2)
    run.fit()
    stages = run.ledger.account()["stages"]
    assert [stage.steps for stage in stages] == [len(run.loader.batches)] * 3
    assert sum(stage.steps for stage in stages) == run.num_steps == logged[-1]["step"] and logged[-1]["lr"] == 0
    assert run.ledger.account()["updated_parameters"] == closed_form.updated_parameters(TINY, run.schedule, 3)
    with pytest.raises(InputError, match="--batch-tokens must be at least 9, the longest row's tokens, got 8"):
        trainer(batch_tokens=8)


@pytest.mark.parametrize("policy", ["with-block-1", "always", "never"])
@pytest.mark.parametrize("epochs, stages", [(3, None), (2, 4), (4, 2)])
def test_the_account_of_a_run_is_the_closed_form_over_its_batches(policy, epochs, stages):
    run = trainer(embeddings=policy, epochs=epochs, stages=stages, accumulation_steps=2)
    run.fit()
    account = run.ledger.account()
    num_stages = stages or epochs
    assert [stage.stage for stage in account["stages"]] == list(range(1, num_stages + 1))
    assert sum(stage.steps for stage in account["stages"]) == epochs * 5
    forward = backward = step = slots = 0
    for epoch in range(epochs):
        for batch in run.loader.batches.epoch(epoch):
            stage = run.schedule.at_step(step, run.num_steps)
            for piece in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                shape = (len(piece), int(run.loader.data.lengths[piece].max()))
                slots += shape[0] * shape[1]
                forward += closed_form.forward_flops(TINY, PeftConfig(), *shape)
                backward += closed_form.backward_flops(TINY, stage, PeftConfig(), *shape)
            step += 1
    assert sum(stage.forward_flops for stage in account["stages"]) == forward
    assert sum(stage.backward_flops for stage in account["stages"]) == backward
    counts = [sum(getattr(stage, name) for stage in account["stages"]) for name in ("examples", "tokens", "slots")]
    assert counts == [epochs * 40, epochs * run.loader.data.lengths.sum(), slots]
    if run.num_steps % num_stages == 0:
        assert account["updated_parameters"] == closed_form.updated_parameters(TINY, run.schedule, epochs)
    for stage in account["stages"]:
        assert set(stage.seconds) == {"forward", "backward", "optimizer"}
        assert all(seconds > 0 for seconds in stage.seconds.values())


def test_a_row_that_stands_in_for_an_empty_share_is_work_but_no_example():
    runs = [trainer(rows(40), batch_size=3, epochs=1) for _ in range(3)]
    for rank, run in enumerate(runs):
        run.loader.world = World(rank, 3)
        run.enter(run.schedule.at_step(0, run.num_steps))
        for pieces in run.loader.epoch(0):  # the last batch has a row, and two processes have none
            for rows_, weight, tensors in pieces:
                run.ledger.count(rows_, tensors["input_ids"].shape[1], weight)
    counts = [[getattr(run.ledger.now, name) for name in ("examples", "tokens", "slots")] for run in runs]
    lengths = runs[0].loader.data.lengths
    assert list(map(sum, zip(*counts))) == [40, lengths.sum(), lengths.sum()]
    passes = [run.ledger.now.forward_flops for run in runs]
    assert sum(passes) > trainer_flops(runs[0])


def trainer_flops(run: Trainer) -> int:
    """Return the forward FLOPs of each row of the run, by itself and once."""
    config = run.engine.model.config
    active = closed_form.units(config).during(run.schedule.stages[0])
    lengths = run.loader.data.lengths.tolist()
    return sum(closed_form.step_flops(config, active, PeftConfig(), 1, length)[0] for length in lengths)


def test_the_peak_of_a_stage_is_that_of_its_own_steps(monkeypatch):
    """Not of what the optimizer held before, of an evaluation or a checkpoint, or of what was before a resume."""
    memory = {"now": 0, "peak": 0}

    def hold(size: int) -> None:
        memory["now"] = size
        memory["peak"] = max(memory["peak"], size)

    monkeypatch.setattr(ledger, "reset_peak_bytes", lambda device: memory.update(peak=memory["now"]))
    monkeypatch.setattr(ledger, "peak_bytes", lambda device: memory["peak"])
    run = trainer(schedule="shrinking")
    backward, enter = run.backward, run.engine.enter

    def measured(pieces):
        boundary = run.engine.stage.boundary
        hold(100 - 10 * boundary)  # activations
        loss = backward(pieces)
        hold(50 - 10 * boundary)  # moments stay
        return loss

    def entering(stage):
        enter(stage)
        hold(50 - 10 * stage.boundary)  # those of what freezes are given back

    def evaluating(epoch):
        hold(999)
        hold(20)
        run.ledger.reset_peak()

    run.backward, run.engine.enter = measured, entering
    run.fit(evaluating)
    assert [cost.peak_bytes for cost in run.ledger.costs] == [
        100 - 10 * stage.boundary for stage in run.schedule.stages
    ]
    saved = run.ledger.state_dict()
    hold(999)
    hold(20)
    run.ledger.load_state_dict(saved)
    run.ledger.measure_peak()
    assert [cost["peak_bytes"] for cost in run.ledger.state_dict()] == [cost["peak_bytes"] for cost in saved]


@settings(max_examples=50, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    num_blocks=st.integers(1, 4),
    epochs=st.integers(1, 5),
    stages=st.integers(1, 7),
    steps_per_epoch=st.integers(1, 7),
    schedule=st.sampled_from(SCHEDULES),
    embeddings=st.sampled_from(EMBEDDING_POLICIES),
    method=st.sampled_from(PEFT_METHODS),
)
def test_updated_parameters_of_a_run_are_those_of_the_plan_wherever_its_steps_divide_evenly_among_the_stages(
    num_blocks, epochs, stages, steps_per_epoch, schedule, embeddings, method
):
    peft, config = PeftConfig(method, lora_r=2, adapter_size=3), replace(TINY, num_hidden_layers=num_blocks)
    model = build_model(config)
    apply_peft(model, peft)
    run = trainer(
        rows(steps_per_epoch),
        model=model,
        **dict(epochs=epochs, stages=stages, batch_size=1, schedule=schedule, embeddings=embeddings, peft=peft),
    )
    for step in range(run.num_steps):
        stage = run.schedule.at_step(step, run.num_steps)
        if stage != run.engine.stage:
            run.enter(stage)
        run.ledger.costs[-1].steps += 1
    account, planned = run.ledger.account(), plan.plan(config, run.schedule, epochs, peft, batch=1, length=1)
    of_run = [stage.updated_parameters for stage in account["stages"]]
    of_plan = [stage["updated_parameters"] for stage in planned["stages"]]
    if run.num_steps % stages == 0:
        assert of_run == of_plan
    exact = sum(Fraction(cost.trainable_parameters * cost.steps, steps_per_epoch) for cost in run.ledger.costs)
    assert sum(of_run) == account["updated_parameters"] == round(exact)
    assert account["updated_parameters_full"] == planned["updated_parameters_full"]


def test_the_flops_of_a_run_are_those_of_what_trains_also_where_its_method_would_train_more():
    model = tiny_model()
    for name, parameter in model.named_parameters():  # all but E, block 1's attention and the value projections
        parameter.requires_grad_(not name.startswith(("embeddings", "encoder.layer.0.att")) and "value" not in name)
    run = trainer(model=model, epochs=1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run.fit()
    [stage] = run.ledger.account()["stages"]
    assert counter.get_total_flops() == stage.forward_flops + stage.backward_flops
    assert stage.active_blocks == [1, 4] and not stage.embeddings


def test_stages_name_their_active_blocks_from_1_and_null_where_the_head_trains_alone():
    run = trainer(schedule="without-low-blocks")
    run.fit()
    assert [stage.active_blocks for stage in run.ledger.account()["stages"]] == [[2, 4], [3, 4], None]


def test_training_learns_a_separable_task():
    data, held_out = rows(200), rows(100, seed=1)
    task = Classes("halves", ("low", "high", "neither"), ("accuracy",))
    run = trainer(data, epochs=6, stages=3, lr=3e-3)
    before = measure_splits(run.engine.model, {"dev": held_out}, task, 8, CPU, "fp32").metrics["accuracy"]
    run.fit()
    after = measure_splits(run.engine.model, {"dev": held_out}, task, 8, CPU, "fp32").metrics["accuracy"]
    assert after > 0.9 > before


def test_regression_learns_with_mean_squared_error():
    model = tiny_model(head="regression", labels=("LABEL_0",))
    data = rows(200, regression=True)
    run = trainer(data, model=model, epochs=6, stages=2, lr=3e-3)
    run.fit()
    task = Numbers("halves", (), ("pearson", "spearman"))
    assert measure_splits(model, {"dev": data}, task, 16, CPU, "fp32").metrics["pearson"] > 0.8
    scores, labels = torch.tensor([[0.5], [1.0]]), torch.tensor([0.0, 3.0])
    assert CLASSES["regression"].loss(scores, labels).item() == pytest.approx((0.25 + 4.0) / 2)


def test_a_run_of_one_step_trains_although_a_warm_up_begins_at_0():
    run = trainer(rows(8), epochs=1)
    before = weights(run.engine.model)
    run.fit()
    assert run.num_steps == 1
    assert all(
        not torch.equal(before[name], now) for name, now in weights(run.engine.model).items() if "weight" in name
    )


def test_predictions_come_in_the_order_of_the_rows_whatever_the_batch_size():
    model, data = tiny_model(), rows(23)
    one_by_one = np.concatenate([predict(model, EncodedRows([e], None, 0), 1, CPU) for e in data.encodings])
    for batch_size in (1, 4, 23, 100):
        np.testing.assert_allclose(predict(model, data, batch_size, CPU), one_by_one, rtol=1e-5, atol=1e-5)


def test_an_output_that_is_not_finite_is_an_error_and_never_a_prediction():
    model = tiny_model()
    with torch.no_grad():
        model.classifier.bias[1] = float("nan")
    with pytest.raises(RunError, match="the model's output for row 1 is not finite"):
        predict(model, rows(5), 2, CPU)


def test_metrics_of_several_splits_carry_the_splits_name():
    task = Classes("t", ("a", "b", "c"), ("accuracy",))
    values = measure_splits(
        tiny_model(), {"dev_matched": rows(9), "dev_mismatched": rows(9, 1)}, task, 8, CPU, "fp32"
    ).metrics
    assert set(values) == {"dev_matched/accuracy", "dev_mismatched/accuracy"}


def test_bf16_trains_fp32_weights_under_autocast():
    logged = []
    run = trainer(log=logged.append, precision="bf16")
    run.fit()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.engine.model.parameters())
    assert all(math.isfinite(row["loss"]) for row in logged)


def poison(run: Trainer, *steps: int) -> None:
    """Make the loss of these 0-based steps infinite."""
    loss = run.loss
    run.loss = lambda *batch: loss(*batch) * (math.inf if run.step in steps else 1)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_loss_that_is_not_finite_ends_the_run_with_step_stage_and_rows(at_once):
    data = rows()
    data.ids = [f"row-{i}" for i in range(40)]
    run = trainer(data)
    run.guard.at_once = at_once  # as on a GPU where False: the loss is read every 10 steps
    poison(run, 6)
    expected = ", ".join(f"row-{i}" for i in run.loader.batches.epoch(1)[1])
    with pytest.raises(RunError) as error:
        run.fit()
    line = f"step 7 (stage 2, rows {expected}): the loss is inf, the norm of the gradient nan"
    assert str(error.value) == f"{line}: try a lower --lr, or --skip-nonfinite"
    assert run.step == (6 if at_once else 10)


@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_not_finite_is_never_given_out_as_the_state_of_the_run(at_once):
    run = trainer()
    run.guard.at_once = at_once
    poison(run, 6)
    steps = []

    def save(stage_ends):
        assert all(tensor.isfinite().all() for tensor in state_dict(run)["weights"].values())
        steps.append(run.step)

    with pytest.raises(RunError, match=r"^step 7 \(stage 2"):
        run.fit(after_step=save)
    assert steps == [1, 2, 3, 4, 5, 5, 6]  # 5 twice: there stage 1 ends


def test_what_is_not_finite_is_found_before_an_evaluation():
    run = trainer()
    run.guard.at_once = False
    poison(run, 3)
    epochs = []
    with pytest.raises(RunError, match=r"^step 4 \(stage 1"):
        run.fit(epochs.append)
    assert not epochs and run.step == 5


def test_a_gradient_that_is_not_finite_under_a_finite_loss_ends_the_run():
    run = trainer()
    run.engine.model.classifier.bias.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(RunError, match=r"^step 1 .*: the loss is \d.*, the norm of the gradient nan"):
        run.fit()


@pytest.mark.parametrize("changes", [{}, {"schedule": "adaptive"}, {"dps": DPSConfig("dense", update_ratio=0.2)}])
def test_a_skipped_batch_moves_nothing_is_logged_and_counted(changes):
    logged, kept = [], []
    run = trainer(log=logged.append, skip_nonfinite=True, epochs=2, **changes)
    poison(run, 2, 3)
    run.fit(after_step=lambda stage_ends: kept.append((run.step, weights(run.engine.model), len(run.optimizer.state))))
    by_step = {step: tensors for step, tensors, _ in kept}
    for step in (3, 4):
        assert all(torch.equal(by_step[step][name], by_step[2][name]) for name in by_step[2])
    assert any(not torch.equal(by_step[5][name], by_step[4][name]) for name in by_step[4])
    assert [row["step"] for row in logged if "skipped_rows" in row] == [3, 4]
    assert logged[0]["skipped_rows"] == [str(row) for row in run.loader.batches.epoch(0)[2]]
    assert all(math.isfinite(row["loss"]) for row in logged if "loss" in row)
    stages = run.ledger.account()["stages"]
    assert stages[0].skipped_steps == 2
    assert sum(stage.steps + stage.skipped_steps for stage in stages) == run.num_steps
    assert all(p.isfinite().all() for p in run.engine.model.parameters())


def test_a_skipped_batch_of_dps_mix_leaves_the_weights_without_the_mixture():
    run = trainer(skip_nonfinite=True, dps=DPSConfig("mix", update_ratio=0.2))
    before = weights(run.engine.model)
    poison(run, 0)

    def check(stage_ends):
        if run.step == 1:
            assert all(torch.equal(now, before[name]) for name, now in weights(run.engine.model).items())
            assert run.masks.step == 0 and not run.masks.score

    run.fit(after_step=check)
    assert run.masks.step == run.num_steps - 1


def test_batch_after_batch_that_is_not_finite_ends_the_run_although_they_are_skipped():
    run = trainer(skip_nonfinite=True)
    poison(run, *range(1, 15))
    with pytest.raises(RunError, match=r"^step 12 \(stage 3.*\): the loss is inf, .* as in 10 batches before it$"):
        run.fit()
    run = trainer(skip_nonfinite=True)
    poison(run, *range(1, 11), *range(12, 15))
    run.fit()


class Watch:
    """Makes every synchronisation with the device an error, but inside functions wrapped by `unwatched`."""

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")
        return self

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")

    def unwatched(self, function):
        def call(*arguments):
            torch.cuda.set_sync_debug_mode("default")
            try:
                return function(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("error")

        return call


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, so no host synchronisation to observe")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16", "accumulation_steps": 2},
        {"schedule": "adaptive"},
        {"cache": "memory", "stages": 2, "epochs": 4},
        {"dps": DPSConfig("mix", update_ratio=0.2)},
    ],
)
def test_no_step_on_cuda_waits_for_the_device(changes, monkeypatch):
    run = build_trainer(tiny_model(hidden_dropout_prob=0.1), rows(), replace(SETTINGS, **changes), torch.device("cuda"))
    with Watch() as watch:
        run.enter = watch.unwatched(run.enter)
        monkeypatch.setattr(type(run.schedule), "at_step", watch.unwatched(type(run.schedule).at_step))
        run.progress.write = watch.unwatched(run.progress.write)  # reads the loss, every LOG_EVERY steps
        run.guard.check = watch.unwatched(run.guard.check)
        run.fit()


def test_a_run_with_prefetched_batches_is_the_run_without(monkeypatch):
    runs = [trainer(accumulation_steps=3), trainer(accumulation_steps=3)]
    runs[0].fit()
    monkeypatch.setattr(
        "progtuning.step.loader.collate_inputs", lambda data, rows, length, pin: collate_inputs(data, rows)
    )
    collated = []

    def on_cuda(self, epoch, start=0):
        device, self.device = self.device, torch.device("cuda")
        collated.append(Loader.epoch(self, epoch, start))
        self.device = device
        return collated[-1]

    runs[1].loader.epoch = on_cuda.__get__(runs[1].loader)
    runs[1].fit()
    assert len(collated) == 3 and all(batches.__name__ == "prefetch" for batches in collated)
    first, second = (weights(run.engine.model) for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"schedule": "down"},
            "--schedule must be one of full, shrinking, growing, without-low-blocks, adaptive, got 'down'",
        ),
        ({"embeddings": "yes"}, "--embeddings must be one of with-block-1, always, never, got 'yes'"),
        ({"epochs": 0}, "--epochs must be an integer in 1..100000, got 0"),
        ({"stages": 0}, "--stages must be an integer in 1..100000, got 0"),
        ({"batch_size": 2.5}, "--batch-size must be an integer in 1..16777216, got 2.5"),
        ({"batch_tokens": 0}, "--batch-tokens must be an integer in 1..16777216, got 0"),
        ({"accumulation_steps": 9}, "--accumulation-steps must be at most --batch-size, got 9 and 8"),
        ({"lr": float("nan")}, "--lr must be a number of at least 0, got nan"),
        ({"lr": float("inf")}, "--lr must be a number of at least 0, got inf"),
        ({"warmup": 1.5}, "--warmup must be a number in 0..1, got 1.5"),
        ({"lr_schedule": "cosine"}, "--lr-schedule must be one of linear, constant, got 'cosine'"),
        ({"adam_epsilon": 0}, "--adam-epsilon must be a number of at least 1e-30, got 0"),
        ({"precision": "fp16"}, "--precision must be one of fp32, bf16, got 'fp16'"),
        ({"seed": -1}, "--seed must be an integer in 0..9223372036854775807, got -1"),
        ({"evaluate": "never"}, "--evaluate must be one of epoch, end, got 'never'"),
        (
            {"schedule": "adaptive", "stages": 2},
            "--schedule adaptive freezes after two intervals that it compares: --stages must be at least 3, got 2",
        ),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_option(change, message):
    with pytest.raises(InputError) as error:
        replace(SETTINGS, **change)
    assert str(error.value) == message


def test_a_run_that_passed_over_all_its_batches_fails_and_one_of_some_says_so(tiny_folder, tmp_path):
    texts = "".join(f"film {i}\t{1e38 * (i % 3)}\n" for i in range(30))
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + texts)
    run = ["--model", tiny_folder, "--task", "regression", "--data", tmp_path / "rows.tsv", "--device", "cpu"]
    run += ["--skip-nonfinite", "--output-dir", tmp_path / "run", "--epochs", "1", "--batch-size", "8"]
    status, _, error = call("train", *run)
    assert status == 1
    assert error.splitlines()[-1].endswith("--skip-nonfinite passed over all 3 batches: nothing was trained")
    assert not (tmp_path / "run" / "summary.json").exists()
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + texts + "".join(f"good {i}\t{i % 3}\n" for i in range(60)))
    status, output, _ = call(
        "train", *run[:-6], "--output-dir", tmp_path / "other", "--batch-size", "4", "--epochs", "1"
    )
    assert status == 0 and re.search(r"\d+ of 18 batches were passed over", output)
