"""Eq. 2: the division of the blocks into parts."""

import ast
import doctest
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from progtuning import partition
from progtuning.cost.closed_form import updated_parameters
from progtuning.model.config import ARCHITECTURES
from progtuning.partition import boundaries, parts
from progtuning.settings.peft import PeftConfig
from progtuning.stages import Schedule, Stage, make_schedule

num_blocks = st.integers(1, 200)
num_parts = st.integers(1, 300)


def test_the_worked_example_of_the_docstring_holds():
    assert doctest.testmod(partition).attempted == 3
    assert doctest.testmod(partition).failed == 0


def test_the_picture_of_the_docstring_is_the_shrinking_schedule_of_12_blocks_and_3_parts():
    lines = [line.split() for line in partition.__doc__.splitlines()]
    pictured = [line for line in lines if line[:1] == ["stage"] and len(line) > 10]
    rows = [[mark == "x" for mark in line[2:] if mark in "x."] for line in pictured]
    assert rows == [[block >= low for block in range(12)] for low in boundaries(12, 3)[:-1]]


@settings(max_examples=400, deadline=None)
@given(num_blocks, num_parts)
def test_parts_cover_all_blocks_are_disjoint_and_ordered(L, T):
    assert len(parts(L, T)) == T
    assert [block for part in parts(L, T) for block in part] == list(range(L))


@settings(max_examples=400, deadline=None)
@given(num_blocks, num_parts)
def test_parts_are_balanced_to_one_block(L, T):
    sizes = {len(part) for part in parts(L, T)}
    assert sizes <= {L // T, L // T + 1}


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 200), st.integers(1, 20))
def test_where_T_divides_L_every_part_has_the_papers_floor_of_L_over_T_blocks(size, T):
    assert {len(part) for part in parts(size * T, T)} == {size * T // T}


def test_where_T_exceeds_L_some_parts_are_empty():
    assert [len(part) for part in parts(2, 5)] == [0, 0, 1, 0, 1]


@pytest.mark.parametrize("L, T", [(0, 1), (1, 0), (-3, 2), (3, -2)])
def test_counts_below_one_are_refused_by_name(L, T):
    with pytest.raises(ValueError, match="must be at least 1, got"):
        boundaries(L, T)


@pytest.mark.parametrize("L, T", [(2.0, 1), (1, "2"), (True, 1), (None, 1)])
def test_what_is_not_an_integer_is_refused_by_name(L, T):
    with pytest.raises(TypeError, match="must be an integer, got"):
        boundaries(L, T)


def literal(num_blocks: int, num_parts: int) -> Schedule:
    """The shrinking schedule of the literal Eq. 2: each epoch freezes floor(L / T) blocks more."""
    size = num_blocks // num_parts
    return Schedule(
        "", "never", tuple(Stage(t, num_blocks, t * size, False) for t in range(num_parts)), (1,) * num_parts
    )


@pytest.mark.parametrize("num_epochs, classes, printed", [(80, 2, 60.2), (60, 2, 45.1), (40, 1, 30.1), (25, 2, 18.9)])
def test_lora_cells_of_table_3_follow_from_this_rule_and_not_from_the_literal_floor(num_epochs, classes, printed):
    head = ("classification", ("a", "b")) if classes == 2 else ("regression", ())
    config, lora = ARCHITECTURES["roberta-base"].with_head(*head), PeftConfig("lora")
    ours = updated_parameters(config, make_schedule("shrinking", 12, num_epochs), num_epochs, lora) / 1e6
    assert ours == pytest.approx(printed, abs=0.1)
    floor = updated_parameters(config, literal(12, num_epochs), num_epochs, lora)
    assert floor == updated_parameters(config, make_schedule("full", 12, 1), num_epochs, lora) > 1.1e6 * printed


@pytest.mark.parametrize("num_epochs, printed, ours, floor", [(8, 0.5, 0.49, 0.593), (10, 0.6, 0.61, 0.657)])
def test_bitfit_cells_of_table_3_are_ours_rounded_and_the_literal_floors_cut_off(num_epochs, printed, ours, floor):
    config, bitfit = ARCHITECTURES["bert-base-uncased"].with_head("classification", ("a", "b")), PeftConfig("bitfit")
    schedules = make_schedule("shrinking", 12, num_epochs, "never"), literal(12, num_epochs)
    by_rule, by_floor = (updated_parameters(config, schedule, num_epochs, bitfit) / 1e6 for schedule in schedules)
    assert (round(by_rule, 2), round(by_floor, 3)) == (ours, floor)
    assert round(by_rule, 1) == printed != round(by_floor, 1)
    assert int(10 * by_floor) / 10 == printed
    for words in (f"{ours:g}", f"{floor:g}"):
        assert words in partition.__doc__


@pytest.mark.parametrize("module", ["partition", "stages"])
def test_partition_and_stages_import_no_torch(module):
    tree = ast.parse((Path(partition.__file__).parent / f"{module}.py").read_text())
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported <= {
        *"bisect collections.abc dataclasses fractions functools itertools progtuning.partition".split()
    }
