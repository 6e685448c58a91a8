"""AutoFreeze: what `--schedule adaptive` sums, how it decides, and that a run decides by just that.

The oracle is `literal`, the authors' procedure (arXiv 2102.01386 and YuhanLiu11/AutoFreeze) written down step by step.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from progtuning.base.errors import InputError
from progtuning.cost.closed_form import gradient_sum_bytes
from progtuning.methods.apply import apply_peft
from progtuning.methods.autofreeze import AdaptiveSchedule, GradientSums, percentile
from progtuning.methods.dps import DPS
from progtuning.model.names import unit_of
from progtuning.run.build import build_trainer
from progtuning.run.state import state_dict
from progtuning.settings.peft import PeftConfig
from progtuning.settings.train import DPSConfig, TrainConfig
from progtuning.stages import Stage
from progtuning.train import Trainer
from tests.models import TINY, tiny_model
from tests.test_cli import call
from tests.test_train import CPU, SETTINGS, poison, rows, trainer

History = Sequence[Sequence[Sequence[Tensor]]]  # by step and block, the gradient of each parameter


def literal(history: History, num_intervals: int, percent: float = 50) -> list[tuple[int, int, dict[int, float]]]:
    """The authors' procedure, slowly: a list of step, lowest active block and scores of each decision.

    A block without a parameter takes no part, nothing thaws, and a score over 0 is infinite: the three places where
    this project says that it differs.
    """
    num_blocks, length = len(history[0]), len(history) // num_intervals
    blocks = [block for block in range(num_blocks) if history[0][block]]
    start, before, decisions = 0, None, []
    sums = {block: [torch.zeros_like(g) for g in history[0][block]] for block in blocks}
    for step, gradients in enumerate(history):
        for block in blocks:
            if block >= start:  # below there is no gradient
                for total, gradient in zip(sums[block], gradients[block]):
                    total += gradient
        if (step + 1) % length:
            continue
        now = {block: sum(torch.norm(total, p=1).item() for total in sums[block]) for block in blocks}
        sums = {block: [torch.zeros_like(g) for g in history[0][block]] for block in blocks}
        if before is not None:
            score = {block: 0.0 for block in blocks}
            for block in blocks:
                if now[block] > 0:
                    change = abs(before[block] - now[block])
                    score[block] = change / before[block] if before[block] else (math.inf if change else 0.0)
            active = {block: value for block, value in score.items() if block >= start}
            threshold = np.percentile([min(value, 1e300) for value in active.values()], percent)  # inf - inf is nan
            for block in blocks:
                if score[block] >= threshold:
                    start = max(start, block) if block != min(active) else start
                    break
            decisions.append((step + 1, start, active))
        before = now
    return [decision for decision in decisions if decision[0] < len(history)]  # the last acts on no step


def decide(history: History, num_intervals: int, percent: float = 50) -> AdaptiveSchedule:
    """Let the package decide on the same history, through parameters that have its gradients."""
    names = {
        f"encoder.layer.{block}.{number}": (block, number)
        for block, gradients in enumerate(history[0])
        for number in range(len(gradients))
    }
    parameters = {name: nn.Parameter(torch.zeros_like(history[0][b][n])) for name, (b, n) in names.items()}
    schedule = AdaptiveSchedule(len(history[0]), num_intervals, percentile=percent)
    sums = GradientSums(parameters | {"embeddings.weight": nn.Parameter(torch.ones(2)), "classifier.bias": None})
    for step, gradients in enumerate(history):
        stage = schedule.at_step(step, len(history))
        for name, (block, number) in names.items():
            parameters[name].grad = gradients[block][number] if block in stage.blocks else None
        sums.add()
        assert {unit_of(name) for name in sums.sums} <= set(stage.blocks)
        if schedule.ends_interval(step, len(history)):
            schedule.observe(sums.take())
            assert not sums.sums
    return schedule


def found(schedule: AdaptiveSchedule) -> list[tuple[int, int, dict[int, float]]]:
    return [(one["step"], one["frozen_blocks"], one["scores"]) for one in schedule.decisions]


def scalars(*blocks: Sequence[float]) -> History:
    """A history of one parameter of one element a block."""
    return [[[torch.tensor([float(value)])] for value in values] for values in zip(*blocks)]


def test_gradients_are_summed_before_a_norm_is_taken_so_that_one_that_turns_has_changed():
    schedule = decide(scalars([1, 1, 1, -0.9, 0, 0], [1, 1, 1.4, 1.4, 0, 0]), 3)
    (decision,) = schedule.decisions
    assert decision["scores"] == pytest.approx({0: 0.95, 1: 0.40})  # norms of each step: 0.05, which freezes block 1
    assert decision["frozen_blocks"] == 0 and len(schedule.stages) == 1


def random_history(seed: int) -> tuple[History, int, float]:
    """Draw a history, with ties, zeros, gradients that cancel, blocks without a parameter; intervals; a percentile."""
    draw = np.random.default_rng(seed)
    num_blocks, num_intervals = int(draw.integers(1, 7)), int(draw.integers(3, 8))
    num_steps = num_intervals * int(draw.integers(2, 4)) + int(draw.integers(0, 2))
    sizes = [
        [int(size) for size in draw.integers(1, 6, draw.integers(0 if seed % 3 == 0 else 1, 3))]
        for _ in range(num_blocks)
    ]
    if not any(sizes):
        sizes[-1] = [3]
    kind = seed % 5
    mean = [draw.normal(size=sum(of_block)) for of_block in sizes]
    history = []
    for step in range(num_steps):
        gradients = []
        for block, of_block in enumerate(sizes):
            value = mean[block] * 0.9 ** (step / (block + 1)) + draw.normal(size=sum(of_block)) * draw.choice([0.05, 1])
            if kind == 1:  # ties, and sums that are 0
                value = draw.integers(-1, 2, sum(of_block)).astype(float)
            if kind == 2 and draw.random() < 0.3:
                value = value * 0
            if kind == 3 and block % 2:
                value = np.zeros_like(value)
            if kind == 4:  # the same in every block of as many elements
                value = np.full(sum(of_block), float(draw.integers(1, 3)))
            gradients.append(list(torch.tensor(value, dtype=torch.float32).split(of_block) if of_block else []))
        history.append(gradients)
    return history, num_intervals, float(draw.choice([50, 50, 50, 25, 75, 90, 33.3, 0, 100]))


def test_decisions_and_scores_are_those_of_the_literal_procedure_on_250_random_histories():
    freezing = several = 0
    for seed in range(250):
        history, num_intervals, percent = random_history(seed)
        schedule = decide(history, num_intervals, percent)
        expected = literal(history, num_intervals, percent)
        assert [one[:2] for one in found(schedule)] == [one[:2] for one in expected], seed
        for (_, _, ours), (_, _, theirs) in zip(found(schedule), expected):
            assert ours == pytest.approx(theirs, rel=1e-12), seed
        freezing += len(schedule.stages) > 1
        several += len(schedule.stages) > 2
    assert freezing > 100 and several > 40  # so the histories have something to decide


def test_equal_scores_freeze_nothing_and_a_block_of_equal_score_stops_the_run_from_below():
    still = scalars(*[[1.0, 1, 2, 2, 3, 3]] * 4)
    assert [stage.boundary for stage in decide(still, 3).stages] == [0]
    tied = scalars([2, 2, 2, 2, 0, 0], [1, 1, 2, 2, 0, 0], [1, 1, 2, 2, 0, 0], [2, 2, 2, 2, 0, 0])
    assert [stage.boundary for stage in decide(tied, 3).stages] == [0, 1]  # scores 0, 1, 1, 0; median 0.5


def test_one_block_never_freezes_and_no_gradient_at_all_decides_nothing():
    assert [stage.boundary for stage in decide(scalars([5, 4, 3, 2, 1, 0, 1, 2]), 4).stages] == [0]
    schedule = decide([[[], []]] * 8, 4)
    assert len(schedule.stages) == 1 and not schedule.decisions


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_the_boundary_never_falls_nor_passes_the_last_block_and_the_order_of_steps_in_an_interval_is_nothing(seed):
    history, num_intervals, percent = random_history(seed)
    history = [[[(8 * g).round() for g in block] for block in step] for step in history]  # so that sums are exact
    schedule = decide(history, num_intervals, percent)
    lowest = [stage.boundary for stage in schedule.stages]
    assert lowest == sorted(set(lowest)) and lowest[0] == 0 and lowest[-1] < len(history[0])
    for decision in schedule.decisions:
        scores = decision["scores"]
        assert all(scores[b] < decision["threshold"] for b in scores if b < decision["frozen_blocks"])
    length, draw = len(history) // num_intervals, np.random.default_rng(seed)
    starts = range(0, len(history), length)
    shuffled = [history[i] for start in starts for i in start + draw.permutation(min(length, len(history) - start))]
    assert found(decide(shuffled, num_intervals, percent)) == found(schedule)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.floats(0, 100))
def test_percentiles_are_numpys_to_the_last_bit(values, percent):
    assert percentile(values, percent) == np.percentile(values, percent)


def test_a_percentile_beside_an_infinite_score_is_infinite_and_of_nan_nan():
    assert percentile([0.0, math.inf], 50) == percentile([math.inf, 1.0, math.inf], 50) == math.inf
    assert percentile([0.0, 1.0, math.inf], 50) == 1.0
    assert math.isnan(percentile([0.0, math.nan, 1.0], 50))


def test_a_norm_that_is_no_number_freezes_nothing_and_an_interval_without_a_step_is_passed_over():
    schedule = AdaptiveSchedule(2, 4)
    given_norms = [{0: 1.0, 1: 1.0}, {0: math.nan, 1: 3.0}, {0: 1.0, 1: 1.0}]
    for step, norms in enumerate(given_norms):
        schedule.at_step(step, 4)
        schedule.observe(norms)
    assert [stage.boundary for stage in schedule.stages] == [0]
    schedule = AdaptiveSchedule(2, 4)
    for step, norms in enumerate([{0: 1.0, 1: 1.0}, {}, {0: 1.1, 1: 3.0}, {}]):
        schedule.at_step(step, 4)
        schedule.observe(norms)
    (decision,) = schedule.decisions
    assert decision["step"] == 3 and decision["scores"] == pytest.approx({0: 0.1, 1: 2.0})


def test_intervals_are_of_equal_length_as_the_authors_have_them():
    schedule = AdaptiveSchedule(2, 15)
    ends = [step + 1 for step in range(282) if schedule.ends_interval(step, 282)]
    assert ends == list(range(18, 282, 18))
    assert all(AdaptiveSchedule(2, 12).ends_interval(step, 5) for step in range(5))  # fewer steps than intervals


# In a run


def watch(run: Trainer) -> list[dict[str, Tensor]]:
    """Keep what is summed at each step."""
    seen, add = [], run.schedule.sums.add

    def spy():
        gradients = {name: p.grad for name, p in run.schedule.sums.parameters.items() if p.grad is not None}
        seen.append({name: gradient.clone() for name, gradient in gradients.items()})
        add()

    run.schedule.sums.add = spy
    return seen


def as_history(seen: Sequence[dict[str, Tensor]], num_blocks: int) -> History:
    """What was summed, as `literal` takes it: 0 for what was frozen."""
    by_block = [[name for name in seen[0] if unit_of(name) == block] for block in range(num_blocks)]
    return [[[step.get(name, 0 * seen[0][name]) for name in names] for names in by_block] for step in seen]


IN_A_RUN = {
    "full": {},
    "clipped hard": {"max_grad_norm": 1e-3},
    "percentile": {"freeze_percentile": 80.0},
    "lora": {"peft": PeftConfig("lora", lora_r=2)},
    "spafit": {"peft": PeftConfig("spafit", spafit_bounds=(2, 3))},
    "dps": {"dps": DPSConfig("dense", update_ratio=0.1)},
}


@pytest.mark.parametrize("case", IN_A_RUN)
def test_a_run_decides_by_the_sums_of_its_gradients_and_records_why(case):
    changed = replace(SETTINGS, schedule="adaptive", epochs=4, stages=7, **IN_A_RUN[case])
    model = tiny_model()
    apply_peft(model, changed.peft, seed=1)
    run = build_trainer(model, rows(), changed, CPU)
    seen = watch(run)
    run.fit()
    schedule, account = run.schedule, run.ledger.account()
    expected = literal(as_history(seen, 4), 7, changed.freeze_percentile)
    assert [one[:2] for one in found(schedule)] == [one[:2] for one in expected]
    for (_, _, ours), (_, _, theirs) in zip(found(schedule), expected):
        assert ours == pytest.approx(theirs, rel=1e-12)
    assert len(seen) == run.num_steps == 20 and len(account["stages"]) > 1
    assert [decision["step"] for decision in account["decisions"]] == list(range(4, 20, 2))
    assert all(set(decision) == {"step", "scores", "threshold", "frozen_blocks"} for decision in account["decisions"])
    lowest = [stage.boundary for stage in schedule.stages]
    assert lowest[-1] == account["decisions"][-1]["frozen_blocks"]


def test_what_is_summed_is_the_batchs_whole_gradient_before_clipping_and_masks_whatever_its_pieces():
    changes = {"schedule": "adaptive", "group_by_length": False}
    runs = [
        trainer(**changes),
        trainer(accumulation_steps=3, max_grad_norm=1e-3, **changes),
        trainer(max_grad_norm=0.0, **changes),
        trainer(dps=DPSConfig("dense", update_ratio=0.1), **changes),
    ]
    seen = []
    for run in runs:
        seen.append(watch(run))
        pieces = next(iter(run.loader.epoch(0)))
        run.enter(run.schedule.at_step(0, run.num_steps))
        if isinstance(run.masks, DPS):
            run.masks.step = run.masks.window  # a window that trains a subnetwork: all of it is masked
            run.masks.kept = {
                name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in run.masks.weights.items()
            }
            run.masks.before_step = lambda: None
        run.update(run.backward(pieces))
    model = tiny_model()
    inputs = runs[0].loader.data.collate(runs[0].loader.batches.epoch(0)[0])
    labels = inputs.pop("labels")
    inputs.pop("index", None)
    nn.functional.cross_entropy(model(**inputs), labels).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if isinstance(unit_of(name), int)}
    for (summed,) in seen:
        assert summed.keys() == expected.keys()
        for name, gradient in summed.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)
    assert all(p.grad is None or not p.grad.any() for p in runs[3].engine.model.parameters())


def test_a_batch_that_is_skipped_is_not_summed():
    run = trainer(schedule="adaptive", skip_nonfinite=True, epochs=2, stages=5)
    seen = watch(run)
    poison(run, 2, 3)
    run.fit()
    assert len(seen) == run.num_steps - 2
    assert all(gradient.isfinite().all() for step in seen for gradient in step.values())
    assert all(math.isfinite(score) for decision in run.schedule.decisions for score in decision["scores"].values())


@pytest.mark.parametrize("method", [PeftConfig(), PeftConfig("lora", lora_r=2), PeftConfig("bitfit")])
def test_the_sums_take_the_bytes_that_plan_and_summary_say_in_every_stage_and_what_froze_leaves_the_checkpoint(method):
    model = tiny_model()
    apply_peft(model, method, seed=1)
    run = build_trainer(model, rows(), replace(SETTINGS, schedule="adaptive", epochs=4, stages=7, peft=method), CPU)
    measured = {}

    def after_step(ends: bool) -> None:
        state = state_dict(run)["gradient_sums"]
        assert {unit_of(name) for name in state} <= set(run.engine.stage.blocks)
        if state:
            measured[run.engine.stage.index] = sum(total.nbytes for total in state.values())

    run.fit(after_step=after_step)
    stages = run.ledger.account()["stages"]
    assert len(stages) > 1 and len(measured) == len(stages)
    for stage, cost in zip(stages, run.ledger.costs):
        assert stage.gradient_sum_bytes == measured[cost.stage.index] > 0
        assert stage.gradient_sum_bytes == gradient_sum_bytes(model.config, cost.stage, method)
    assert {stage.gradient_sum_bytes for stage in trainer().ledger.account()["stages"]} <= {0}


def test_plan_of_adaptive_is_the_most_that_it_can_cost_with_its_sums_and_cache():
    status, out, _ = call("plan", "--model", "bert-base-uncased", "--schedule", "adaptive", "--batch-size", 8, "--json")
    (stage,) = json.loads(out)["stages"]
    assert status == 0 and stage["active_blocks"] == [1, 12] and stage["share_of_full"] == 1
    assert stage["gradient_sum_bytes"] == 4 * 12 * 7_087_872  # BERT-base's parameters a block
    assert stage["cache_bytes"] == 8 * 128 * 768 * 4
    status, out, _ = call("plan", "--model", "bert-base-uncased", "--schedule", "adaptive")
    assert "Gradient sums: 324.5 MiB. adaptive decides while it trains: this is the most it costs." in out
    assert "Gradient sums" not in call("plan", "--model", "bert-base-uncased")[1]


def test_frozen_blocks_of_adaptive_do_not_drop_out_unless_told_to_and_it_has_five_intervals_an_epoch():
    assert not replace(SETTINGS, schedule="adaptive").drops_out_prefix and SETTINGS.drops_out_prefix
    assert replace(SETTINGS, schedule="adaptive", prefix_dropout=True).drops_out_prefix
    assert TrainConfig(schedule="adaptive", epochs=4).num_stages == 20
    with pytest.raises(InputError, match=r"--freeze-percentile must be a number in 0\.\.100, got 101"):
        TrainConfig(freeze_percentile=101)


def test_the_furthest_stage_trains_the_last_block_and_the_head():
    assert [furthest for _, furthest in AdaptiveSchedule(12, 15).planned] == [Stage(0, 12, 11, embeddings=False)]
    assert [furthest for _, furthest in AdaptiveSchedule(1, 15).planned] == [Stage(0, 1, 0, embeddings=True)]
    assert TINY.num_hidden_layers == 4
