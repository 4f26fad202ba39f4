"""Compare `ShardPlan` with a naive partition of a list of sequences."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.errors import FormatError
from actcache.format.manifest import ShardPlan, ShardRange

SIZES = st.integers(1, 7)
GOALS = st.lists(st.integers(1, 20), min_size=1, max_size=5).map(
    lambda steps: [*itertools.accumulate(steps)]
)


def plan_of(size: int, goals: list[int | None]) -> ShardPlan:
    plan = ShardPlan(size, (ShardRange(0, 0, goals[0]),))
    for goal in goals[1:]:
        plan = plan.extended(goal)
    return plan


def by_hand(size: int, goals: list[int], text: int) -> list[list[int]]:
    """Partition the sequences of a dataset of this length: one list for each shard."""
    shards: list[list[int]] = []
    begin = 0
    for goal in goals:
        end = min(goal, text)
        shards += [list(range(s, min(s + size, end))) for s in range(begin, end, size)]
        begin = end
    return shards


@given(SIZES, GOALS, st.integers(0, 120))
def test_shards_equal_a_naive_partition(size: int, goals: list[int], text: int) -> None:
    plan = plan_of(size, [*goals])
    whole = by_hand(size, goals, goals[-1])
    assert (plan.goal, plan.shards) == (goals[-1], len(whole))
    for shard, group in enumerate(whole):
        assert plan.first_sequence(shard) == group[0]
        assert plan.max_sequences(shard) == len(group)
        assert plan.is_in_last_range(shard) == (group[0] >= ([0, *goals])[-2])
    assert plan.max_sequences(len(whole)) == 0
    groups = dict(plan.iter_shards(iter(range(text))))
    assert list(groups.values()) == by_hand(size, goals, text)
    assert list(groups) == list(range(len(groups)))
    if text:
        assert plan.shards_of(min(text, goals[-1])) == len(groups)


@given(SIZES, GOALS, st.data())
def test_a_range_continues_where_the_previous_one_ends(
    size: int, goals: list[int], data: st.DataObject
) -> None:
    plan = plan_of(size, [*goals])
    part = data.draw(st.integers(0, len(goals) - 1))
    line = iter(range(1000))
    before = plan_of(size, goals[:part]).iter_shards(line) if part else iter(())
    assert [*before, *plan.iter_shards(line, part)] == list(plan.iter_shards(iter(range(1000))))
    assert next(line) == goals[-1]  # and nothing beyond the goal was taken


@given(SIZES, GOALS, st.integers(1, 50))
def test_an_extension_does_not_move_earlier_shards(size: int, goals: list[int], more: int) -> None:
    before = plan_of(size, [*goals])
    after = before.extended(goals[-1] + more)
    assert before.shards is not None
    for shard in range(before.shards):
        assert after.first_sequence(shard) == before.first_sequence(shard)
        assert after.max_sequences(shard) == before.max_sequences(shard)
    for sequences in range(1, goals[-1] + 1):
        assert after.shards_of(sequences) == before.shards_of(sequences)


@given(SIZES, GOALS)
def test_a_plan_without_a_goal_covers_the_whole_dataset(size: int, goals: list[int]) -> None:
    plan = plan_of(size, [*goals, None])
    assert plan.goal is plan.shards is None
    assert list(plan.iter_shards(iter(range(500)))) == list(
        plan_of(size, [*goals, 500]).iter_shards(iter(range(500)))
    )
    assert plan.max_sequences(10**9) == size


@given(SIZES, GOALS, st.integers(-2, 2), st.integers(-2, 2))
def test_ranges_that_are_not_contiguous_are_refused(
    size: int, goals: list[int], shard: int, sequence: int
) -> None:
    plan = plan_of(size, [*goals])
    assert plan.shards is not None
    part = ShardRange(plan.shards + shard, goals[-1] + sequence, goals[-1] + 30)
    if (shard, sequence) == (0, 0):
        ShardPlan(size, (*plan.parts, part))
        return
    with pytest.raises(FormatError, match="does not begin where"):
        ShardPlan(size, (*plan.parts, part))


@pytest.mark.parametrize("goal", [0, 9, 10])
def test_a_goal_that_is_not_larger_is_refused(goal: int) -> None:
    with pytest.raises(FormatError, match="not beyond"):
        ShardPlan(4, (ShardRange(0, 0, 10), ShardRange(3, 10, goal)))
    with pytest.raises(FormatError, match="after the end of the dataset"):
        ShardPlan(4, (ShardRange(0, 0, None), ShardRange(3, 10, 20)))
