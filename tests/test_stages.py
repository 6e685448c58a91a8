"""Eq. 3 to 5: what trains in each stage, and when a stage begins."""

import doctest
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from progtuning import stages
from progtuning.partition import parts
from progtuning.settings.train import SCHEDULE_KINDS
from progtuning.stages import EMBEDDING_POLICIES, SCHEDULES, embeddings_train, make_schedule

num_blocks = st.integers(1, 200)
num_stages = st.integers(1, 300)
wide = settings(max_examples=400, deadline=None)


def blocks(name, L, T):
    return [list(stage.blocks) for stage in make_schedule(name, L, T).stages]


def test_the_doctest_of_make_schedule_holds():
    assert doctest.testmod(stages).failed == 0 and doctest.testmod(stages).attempted == 1


@wide
@given(num_blocks, num_stages)
def test_shrinking_stage_t_trains_the_parts_t_to_T(L, T):
    p = parts(L, T)
    assert blocks("shrinking", L, T) == [[b for part in p[t:] for b in part] for t in range(T)]  # Eq. 3, t from 0


@wide
@given(num_blocks, num_stages)
def test_without_low_blocks_stage_t_trains_the_parts_after_t_and_ends_with_the_head_alone(L, T):
    p = parts(L, T)
    assert blocks("without-low-blocks", L, T) == [[b for part in p[t + 1 :] for b in part] for t in range(T)]  # Eq. 4
    assert blocks("without-low-blocks", L, T)[-1] == []


@wide
@given(num_blocks, num_stages)
def test_growing_is_the_mirror_of_shrinking(L, T):
    assert blocks("growing", L, T) == blocks("shrinking", L, T)[::-1]  # Eq. 5


@wide
@given(num_blocks, num_stages)
def test_shrinking_stages_are_nested_and_end_with_the_last_part(L, T):
    stages = [set(stage) for stage in blocks("shrinking", L, T)]
    assert all(low >= high for low, high in zip(stages, stages[1:]))
    assert stages[0] == set(range(L))
    assert stages[-1] == set(parts(L, T)[-1]) and L - 1 in stages[-1]


@wide
@given(num_blocks, num_stages)
def test_the_active_blocks_of_epoch_e_are_L_minus_floor_of_e_L_over_T(L, T):
    schedule = make_schedule("shrinking", L, T)
    assert [len(schedule.at_epoch(e, T).blocks) for e in range(T)] == [L - e * L // T for e in range(T)]


@wide
@given(st.integers(1, 40), st.integers(1, 12))
def test_where_T_divides_L_a_stage_freezes_the_papers_floor_of_L_over_T_blocks(size, T):
    lengths = [len(stage) for stage in blocks("shrinking", size * T, T)]
    assert lengths == [size * T - t * size for t in range(T)]


@given(num_blocks, num_stages)
def test_full_trains_every_block_in_every_stage(L, T):
    assert blocks("full", L, T) == [list(range(L))] * T


@wide
@given(st.sampled_from(SCHEDULES), num_blocks, num_stages, st.sampled_from(EMBEDDING_POLICIES))
def test_embeddings_train_as_their_policy_says(name, L, T, policy):
    for stage in make_schedule(name, L, T, policy).stages:
        assert stage.embeddings == {"always": True, "never": False, "with-block-1": 0 in stage.blocks}[policy]


@wide
@given(st.sampled_from(SCHEDULES), st.integers(1, 12), st.integers(1, 30), st.integers(1, 50))
def test_stages_follow_the_steps_in_order_and_share_them_to_one_step(name, T, epochs, steps_per_epoch):
    schedule = make_schedule(name, 12, T)
    num_steps = epochs * steps_per_epoch
    seen = [schedule.at_step(step, num_steps).index for step in range(num_steps)]
    assert seen == sorted(seen)
    counts = [seen.count(t) for t in range(T)]
    assert sum(counts) == num_steps and max(counts) - min(counts) <= 1
    for epoch in range(epochs):
        assert schedule.at_epoch(epoch, epochs) == schedule.at_step(epoch * steps_per_epoch, num_steps)


def test_30_epochs_in_3_stages_change_every_10_epochs():
    schedule = make_schedule("shrinking", 12, 3)
    assert [schedule.at_epoch(e, 30).index for e in range(30)] == [0] * 10 + [1] * 10 + [2] * 10
    assert [schedule.at_step(s, 30 * 7).index for s in (69, 70, 139, 140)] == [0, 1, 1, 2]


def test_a_step_outside_the_run_is_refused():
    schedule = make_schedule("shrinking", 12, 3)
    for step in (-1, 9):
        with pytest.raises(ValueError, match=r"step must be in 0\.\.8"):
            schedule.at_step(step, 9)


def test_unknown_schedules_and_policies_are_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match="schedule must be one of full, shrinking.*got 'shrink'"):
        make_schedule("shrink", 12, 3)
    with pytest.raises(ValueError, match="embeddings must be one of with-block-1, always, never, got 'no'"):
        embeddings_train("no", 0)


def test_the_settings_know_every_schedule():
    assert tuple(SCHEDULE_KINDS) == (*SCHEDULES, "adaptive")


def test_a_calendar_decides_by_nothing_keeps_nothing_and_a_stage_does_not_change():
    schedule = make_schedule("shrinking", 4, 2)
    assert schedule.sums_gradients is False and schedule.state_bytes(["a", "b"]) == 0
    assert schedule.summary() == schedule.state_dict() == {}
    for frozen, name in ((schedule.stages[0], "boundary"), (schedule, "name")):
        with pytest.raises(FrozenInstanceError):
            setattr(frozen, name, 1)
