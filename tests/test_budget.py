"""Calendars and budgets: what any calendar trains when, and that a run costs what its budget pays."""

import doctest
import json
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from progtuning.base.errors import InputError
from progtuning.cost.budget import even_forecast
from progtuning.methods.apply import apply_peft
from progtuning.methods.schedules import build_schedule
from progtuning.run.build import forecast
from progtuning.settings import train as settings_module
from progtuning.settings.peft import PeftConfig
from progtuning.settings.train import TrainConfig, parse_calendar
from progtuning.stages import SCHEDULES, make_calendar, make_schedule
from progtuning.step.processes import World
from tests.models import TINY, tiny_model
from tests.test_cli import call
from tests.test_train import SETTINGS, rows, trainer, weights

PEFT = {
    "none": PeftConfig(),
    "adapter": PeftConfig("adapter", adapter_size=2),
    "bitfit": PeftConfig("bitfit"),
    "lora": PeftConfig("lora", lora_r=2),
}


def cost(run) -> int:
    return sum(one.forward_flops + one.backward_flops for one in run.ledger.costs)


def fitted(model=None, data=None, **changes):
    run = trainer(data, model=model, **changes)
    run.fit()
    return run


def full_cost(peft: PeftConfig, data, **changes) -> int:
    model = tiny_model()
    apply_peft(model, peft)
    return cost(fitted(model, data, schedule="full", peft=peft, **changes))


def test_the_doctests_of_the_settings_hold():
    assert doctest.testmod(settings_module).failed == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_calendar_of_equal_shares_is_the_named_schedule_bit_for_bit(name):
    named = fitted(schedule=name)
    text = ",".join(f"{stage.boundary}:2.5" for stage in make_schedule(name, 4, 3).stages)
    free = fitted(calendar=text)
    assert all(torch.equal(a, b) for a, b in zip(*(weights(run.engine.model).values() for run in (named, free))))
    assert [replace(stage, seconds={}, peak_bytes=None) for stage in named.ledger.account()["stages"]] == [
        replace(stage, seconds={}, peak_bytes=None) for stage in free.ledger.account()["stages"]
    ]


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 30)), min_size=1, max_size=6),
    st.integers(1, 400),
)
def test_the_stages_of_a_calendar_follow_in_order_and_have_their_shares_to_a_step(calendar, num_steps):
    schedule = make_calendar("any", calendar, num_blocks=6)
    indices = [schedule.at_step(step, num_steps).index for step in range(num_steps)]
    assert indices == sorted(indices)
    total = sum(share for _, share in calendar)
    for index, (boundary, share) in enumerate(calendar):
        assert abs(indices.count(index) - Fraction(share * num_steps, total)) < 1
        assert schedule.stages[index].boundary == boundary


def test_a_static_calendar_freezes_the_lowest_blocks_in_every_step():
    before, run = weights(tiny_model()), fitted(calendar="3")
    moved = {name for name, after in weights(run.engine.model).items() if not torch.equal(before[name], after)}
    assert {name.split(".")[2] for name in moved if name.startswith("encoder")} == {"3"}
    assert not any(name.startswith("embeddings") for name in moved) and "classifier.weight" in moved
    assert [cost.stage.boundary for cost in run.ledger.costs] == [3]


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1:", "0:2,4", "0:2,,4:1", "0:0", "0:2;4:1", "1.5", "0:1e3", "4:1:1", "٤"]
)
def test_a_calendar_in_another_form_is_refused(text):
    with pytest.raises(InputError, match="^--calendar must "):
        TrainConfig(calendar=text)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"calendar": "1", "schedule": "growing"}, "--calendar takes the place of --schedule and --stages"),
        ({"calendar": "1", "stages": 3}, "--calendar takes the place of --schedule and --stages"),
        ({"budget": 0.0}, "--budget must be a number in "),
        ({"budget": 0.5, "batch_tokens": 64}, "--budget .+ leave out --batch-tokens"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**changes)


def test_a_calendar_beyond_the_models_blocks_and_a_budget_below_a_step_are_refused():
    with pytest.raises(InputError, match="^--calendar 5 freezes more blocks than the model has, 4$"):
        trainer(calendar="5")
    with pytest.raises(InputError, match="^--budget 0.001 pays no step"):
        trainer(budget=0.001)


def test_a_schedule_that_decides_has_the_steps_of_full_fine_tuning_and_costs_at_most_the_budget():
    steps = trainer(schedule="full", budget=0.7).num_steps
    examples = rows()
    run = fitted(tiny_model(), examples, schedule="adaptive", budget=0.7, freeze_percentile=100.0)
    assert run.step == run.num_steps == steps
    assert cost(run) < Fraction("0.7") * full_cost(SETTINGS.peft, examples)


@pytest.mark.parametrize("peft", PEFT)
def test_a_budget_of_1_with_the_schedule_full_is_the_plain_run_bit_for_bit(peft):
    runs = []
    for budget in (None, 1.0):
        model, log = tiny_model(), []
        apply_peft(model, PEFT[peft])
        run = trainer(model=model, log=log.append, schedule="full", peft=PEFT[peft], budget=budget)
        run.fit()
        runs.append((log, weights(model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, runs[1][1][name]) for name, a in runs[0][1].items())


@settings(max_examples=15, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_the_counted_cost_of_a_run_is_within_one_step_of_its_budget_and_that_of_the_forecast(data):
    peft = data.draw(st.sampled_from(list(PEFT)))
    changes = {
        "budget": data.draw(st.sampled_from([0.2, 0.37, 0.5, 0.75, 1.0, 1.4, 2.3])),
        "embeddings": data.draw(st.sampled_from(["with-block-1", "always", "never"])),
        "batch_size": data.draw(st.sampled_from([3, 7, 8])),
        "accumulation_steps": data.draw(st.sampled_from([1, 2])),
        "epochs": data.draw(st.sampled_from([1, 2, 3])),
    }
    calendar = data.draw(st.sampled_from([None, "2", "0:2,1:1,3:1", "4", "1:3,4:1", "4:1,2:2,3:1"]))
    changes |= {"calendar": calendar} if calendar else {"schedule": data.draw(st.sampled_from(SCHEDULES))}
    if (calendar or changes["schedule"] != "full") and changes["embeddings"] != "always" and data.draw(st.booleans()):
        changes |= {"cache": "memory"}
    if calendar is None:
        changes |= {"stages": data.draw(st.sampled_from([2, 3, 5]))}
    examples, model = rows(data.draw(st.sampled_from([17, 29, 40]))), tiny_model()
    apply_peft(model, PEFT[peft])
    try:
        run = fitted(model, examples, peft=PEFT[peft], **changes)
    except InputError as error:
        assert "nothing to keep" in str(error) or "pays no step" in str(error)
        return
    limit = Fraction(str(changes["budget"])) * full_cost(PEFT[peft], examples, **plain(changes))
    prices = forecast(model.config, run.loader, replace(SETTINGS, peft=PEFT[peft], **changes))
    assert run.step == run.num_steps == sum(one.steps for one in run.ledger.costs)
    assert cost(run) == prices.flops(run.schedule, run.num_steps) <= limit
    assert prices.flops(run.schedule, run.num_steps + 1) > limit
    # The step that was not taken costs at most as much as the dearest one of full fine-tuning.
    dearest = max(
        prices.flops(make_schedule("full", 4, 1), n) - prices.flops(make_schedule("full", 4, 1), n - 1)
        for n in range(1, 30)
    )
    assert limit - cost(run) < 2 * dearest
    assert run.lr_schedule.get_last_lr()[0] == 0


def plain(changes: dict) -> dict:
    """What full fine-tuning over the same batches takes over."""
    return {name: changes[name] for name in ("batch_size", "accumulation_steps", "epochs")}


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_the_forecast_for_several_processes_is_the_sum_of_their_shares(cache):
    config = replace(SETTINGS, batch_size=7, accumulation_steps=2, cache=cache)
    run = trainer(rows(23), **{"batch_size": 7, "accumulation_steps": 2})
    run.loader.world = World(0, 3)
    prices = forecast(run.engine.model.config, run.loader, config)
    for epoch in range(2):
        for batch, pieces in zip(run.loader.batches.epoch(epoch), prices.batches(epoch), strict=True):
            assert {row for piece in pieces for row in piece.rows} == set(batch)
            for rank in range(3):
                taken = [list(rows) for rows, _ in World(rank, 3).pieces(batch, 2)]
                assert [list(piece.rows) for piece in pieces if piece.process == rank] == taken
    if cache == "memory":
        assert prices.keeper == [row % 3 for row in range(23)]
        stages = make_schedule("shrinking", 4, 2)
        off = replace(prices, keeper=None, _epochs={})
        assert prices.flops(stages, 12) < off.flops(stages, 12)


def test_a_budgeted_run_of_train_says_its_steps_resumes_and_keeps_its_calendar(tiny_folder, tiny_task, tmp_path):
    task = ["--task", "classification", "--data", tiny_task, "--epochs", 2, "--batch-size", 8, "--lr", "1e-3"]
    train = ["train", "--model", tiny_folder, *task, "--calendar", "0:1,1:2", "--budget", "1.3", "--device", "cpu"]
    status, _, err = call(*train, "--output-dir", tmp_path / "run", "--save-every", 1)
    assert status == 0 and "The budget of 1.3 pays " in err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["settings"]["calendar"], summary["settings"]["budget"]) == ("0:1,1:2", 1.3)
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = sum(stage["steps"] for stage in summary["stages"])
    assert [row["step"] for row in log if "loss" in row][-1] == steps and "metrics" in log[-1]
    assert "Schedule 0:1,1:2 in 2 stages" in (tmp_path / "run" / "README.md").read_text()
    status, _, err = call(*train[:-2], "--budget", "1.2", "--output-dir", tmp_path / "run", "--resume")
    assert status == 2 and "--budget" in err
    status, out, _ = call("report", tmp_path / "run", "-o", tmp_path / "page.md")
    assert status == 0 and "| 0:1,1:2 " in (tmp_path / "page.md").read_text()


def test_parse_calendar_scales_shares_to_integers():
    assert parse_calendar("0:0.25, 3:1.5") == [(0, 1), (3, 6)]
    assert build_schedule(TrainConfig(calendar="2"), 4).shares == (1,)


@pytest.mark.parametrize("schedule", ["full", "shrinking", "adaptive"])
def test_the_stages_of_a_plan_with_a_budget_are_those_of_the_run_that_it_pays(schedule, tmp_path):
    asked = f"--model minilm-l6 --schedule {schedule} --budget 0.5 --rows 64 --length 16 --batch-size 8".split()
    document = json.loads(call("plan", *asked, "--json")[1])
    run, stages = document["run"], document["stages"]
    assert sum(stage["epochs"] for stage in stages) == pytest.approx(run["epochs"])
    updated = [stage["epochs"] * stage["trainable_parameters"] for stage in stages]
    assert document["updated_parameters"] == pytest.approx(sum(updated), abs=1)
    assert run["steps"] == {"full": 12, "shrinking": 15, "adaptive": 12}[schedule]  # of the 24 of three epochs
    if schedule == "full":
        assert document["updated_share_of_full"] == run["flops_share_of_full"] == 0.5
    page = tmp_path / "page.html"
    assert call("explain", *asked, "-o", page)[0] == 0 and page.stat().st_size > 10_000


def test_a_plan_refuses_a_cache_that_a_run_would_refuse():
    status, _, error = call("plan", "--model", "minilm-l6", "--schedule", "full", "--cache", "memory")
    assert status == 2 and "--cache memory has nothing to keep" in error


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(1, 20),
    st.integers(1, 7),
    st.integers(1, 60),
    st.booleans(),
)
def test_where_batches_stay_whole_epochs_are_counted_as_their_steps_are_one_by_one(calendar, rows, batch, steps, cache):
    schedule = make_calendar("any", calendar, num_blocks=4)
    quick = even_forecast(TINY, rows, batch, length=7, cache=cache)
    assert quick.by_stage(schedule, steps) == replace(quick, batches_stay=False).by_stage(schedule, steps)


def test_a_plan_of_steps_that_cost_next_to_nothing_ends_and_a_run_of_them_is_refused():
    """The head alone above a cache: a thousandth of full fine-tuning, or less."""
    asked = "--model bert-base-uncased --calendar 12 --cache memory --budget 0.5"
    run = json.loads(call("plan", *asked.split(), "--json")[1])["run"]
    assert run["epochs"] > 10_000 and run["flops_share_of_full"] == pytest.approx(0.5, abs=1e-6)
    forecast_of_run = replace(even_forecast(TINY, 8, 4, length=7, cache=True), batches_stay=False)
    head = make_calendar("4", [(4, 1)], num_blocks=4)
    with pytest.raises(InputError, match="^--budget 900 pays more than 200 times the steps of --epochs: give fewer$"):
        forecast_of_run.num_steps(head, 900, 1)
