"""The laws hold of our own parts and schedules, and each has a counterexample that it finds."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from progtuning.cost import laws
from progtuning.cost.budget import even_forecast
from progtuning.cost.closed_form import PLAIN, step_flops, units
from progtuning.cost.laws import BrokenLaw
from progtuning.partition import parts
from progtuning.settings.peft import PeftConfig
from progtuning.stages import SCHEDULES, Schedule, Stage, make_calendar, make_schedule
from tests.models import TINY

sizes = st.integers(1, 60)
calendars = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(sizes, sizes)
def test_the_parts_of_eq_2_cover_are_disjoint_ordered_and_balanced(num_blocks, num_parts):
    divided = parts(num_blocks, num_parts)
    laws.cover(divided, num_blocks)
    for law in (laws.disjoint, laws.ordered, laws.balanced):
        law(divided)


@settings(max_examples=100, deadline=None)
@given(sizes, sizes, st.integers(1, 150))
def test_the_named_schedules_are_bounded_nested_or_mirrored_and_share_the_steps(num_blocks, num_stages, num_steps):
    named = {name: make_schedule(name, num_blocks, num_stages) for name in SCHEDULES}
    laws.mirrored(named["growing"], named["shrinking"])
    laws.mirrored(named["full"], named["full"])
    for name, schedule in named.items():
        laws.bounded(schedule)
        laws.monotone(schedule, num_steps)
        laws.shared(schedule, num_steps)
        if name != "growing":
            laws.nested(schedule)


@settings(max_examples=30, deadline=None)
@given(calendars, st.integers(1, 60), st.sampled_from(["none", "lora", "bitfit"]), st.integers(1, 24))
def test_the_costs_of_any_calendar_add_up_to_its_forecast(calendar, num_steps, method, length):
    schedule, peft = make_calendar("any", calendar, 4), PLAIN if method == "none" else PeftConfig(method, lora_r=2)
    config = TINY.with_head("classification", ("a", "b"))
    forecast = even_forecast(config, rows=12, batch=4, length=length, peft=peft)

    def cost(stage: Stage) -> int:
        return sum(step_flops(config, units(config, peft).during(stage), peft, 4, length))

    laws.costs_add_up(schedule, num_steps, cost, forecast.flops(schedule, num_steps))
    laws.monotone(schedule, num_steps)
    laws.shared(schedule, num_steps)


class Backwards(Schedule):
    def at_step(self, step, num_steps):
        return self.stages[-1 - step * len(self.stages) // num_steps]


ONE, TWO = Stage(0, 4, 0, True), Stage(1, 4, 2, False)


@pytest.mark.parametrize(
    "law, arguments, counterexample",
    [
        (laws.cover, ([range(1), range(2, 4)], 4), "block [1] of 4 is in no part"),
        (laws.cover, ([range(5)], 4), "a part has block [4], and there are 4"),
        (laws.disjoint, ([range(2), range(1, 4)],), "block 1 is in parts 0 and 1"),
        (laws.ordered, ([range(2, 4), range(2)],), "block 3 of part 0 stands before block 0 of part 1"),
        (laws.balanced, ([range(1), range(1, 4)],), "parts have 1 and 3 blocks"),
        (laws.bounded, (Schedule("x", "never", (Stage(0, 4, 5, False),), (1,)),), "stage 0 freezes 5 of 4 blocks"),
        (laws.bounded, (Schedule("x", "never", (TWO,), (1,)),), "stage 0 calls itself 1"),
        (laws.nested, (make_schedule("growing", 4, 2),), "stage 1 trains block [0], which stage 0 did not"),
        (
            laws.mirrored,
            (make_schedule("growing", 4, 2), make_schedule("growing", 4, 2)),
            "stage 0 trains [2, 3] for 1",
        ),
        (laws.mirrored, (make_schedule("full", 4, 2), make_schedule("full", 4, 3)), "there are 2 and 3 stages"),
        (laws.monotone, (Backwards("x", "never", (ONE, TWO), (1, 1)), 4), "step 1 of 4 is in stage 1, step 2 in 0"),
        (laws.shared, (Backwards("x", "never", (ONE, TWO), (3, 1)), 8), "stage 0 has 4 of 8 steps, its share is 6"),
        (laws.costs_add_up, (make_schedule("full", 4, 1), 3, lambda stage: 7, 20), "3 steps cost 21, the total is 20"),
    ],
)
def test_what_breaks_a_law_is_named_with_a_counterexample(law, arguments, counterexample):
    with pytest.raises(BrokenLaw, match=rf"^{law.__name__}: {re.escape(counterexample)}"):
        law(*arguments)
