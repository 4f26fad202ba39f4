from __future__ import annotations

import dataclasses
import zlib

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from actcache.errors import ConfigError, EmptyCacheError, FormatError
from actcache.stream.order import (
    Epoch,
    OrderPlan,
    batch_rows,
    kept_rows,
    lanes_of_rank,
    make_plan,
    split_shards,
)

SMALL = OrderPlan(((0, 10), (2, 7)), block_rows=4, batch_size=4, lanes=2, window=3, seed=3)


@st.composite
def plans(draw: st.DrawFn) -> OrderPlan:
    """Generate plans of up to 200 rows, also with windows longer than lanes, blocks longer than
    shards, and empty shards."""
    sizes = draw(st.lists(st.just(0) | st.integers(1, 50), min_size=1, max_size=4).filter(any))
    shards = tuple((3 * i + 1, n) for i, n in enumerate(sizes))
    lanes = draw(st.integers(1, min(8, sum(sizes))))
    return OrderPlan(
        shards,
        block_rows=draw(st.integers(1, 60)),
        batch_size=lanes * draw(st.integers(1, sum(sizes) // lanes)),
        lanes=lanes,
        window=draw(st.integers(1, 60)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@st.composite
def plans_with_rows_left_out(draw: st.DrawFn) -> OrderPlan:
    """Generate plans that leave rows out, also whole blocks and shards, in windows of one row."""
    plan = draw(plans())
    left_out = {}
    for shard, rows in plan.shards:
        chosen = draw(st.sets(st.integers(0, rows - 1))) if rows else set()
        first = draw(st.integers(0, rows))  # a run of rows: blocks without any are common then
        chosen |= set(range(first, draw(st.integers(first, rows))))
        if chosen:
            left_out[shard] = np.array(sorted(chosen), dtype=np.int64)
    kept = kept_rows(plan.shards, left_out)
    assume(kept)
    lanes = draw(st.integers(1, min(8, kept)))
    return dataclasses.replace(
        plan,
        lanes=lanes,
        batch_size=lanes * draw(st.integers(1, kept // lanes)),
        window=draw(st.just(1) | st.just(plan.window)),
        left_out=left_out,
    )


def spelled_out(plan: OrderPlan, epoch: int) -> np.ndarray:
    """Compute an epoch's batches independently, from the written rule. [steps, B, 2]"""

    def permuted(items: list, purpose: bytes, *numbers: int) -> list:
        key = [zlib.crc32(purpose), plan.seed, epoch, *numbers]
        return [items[i] for i in np.random.RandomState(key).permutation(len(items))]

    blocks = []
    for shard, rows in plan.shards:
        gone = set(plan.left_out.get(shard, np.array([])).tolist())
        addresses = [(shard, row) for row in range(rows)]
        of_shard = [addresses[i : i + plan.block_rows] for i in range(0, rows, plan.block_rows)]
        blocks += [[address for address in block if address[1] not in gone] for block in of_shard]
    line = [row for block in permuted(blocks, b"blocks") for row in block]
    length = len(line) // plan.lanes
    lanes = []
    for number in range(plan.lanes):
        lane, mixed, window = line[number * length : (number + 1) * length], [], 0
        size = max(1, plan.window * (number + 1) // plan.lanes)
        while lane:
            mixed += permuted(lane[:size], b"window", number, window)
            lane, size, window = lane[size:], plan.window, window + 1
        lanes.append(mixed)
    b = plan.batch_size // plan.lanes
    steps = [[lane[i : i + b] for lane in lanes] for i in range(0, length - b + 1, b)]
    return np.array(steps, dtype=np.int64).reshape(len(steps), plan.batch_size, 2)


def epoch_of(plan: OrderPlan, epoch: int) -> np.ndarray:
    return np.stack([batch_rows(plan, epoch, step) for step in range(plan.steps_per_epoch)])


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(0, 5))
def test_the_order_follows_the_written_rule(plan: OrderPlan, epoch: int) -> None:
    np.testing.assert_array_equal(epoch_of(plan, epoch), spelled_out(plan, epoch))


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(0, 5))
def test_every_row_is_read_once_an_epoch_except_for_fewer_than_a_batch(
    plan: OrderPlan, epoch: int
) -> None:
    rows = [tuple(address) for address in spelled_out(plan, epoch).reshape(-1, 2).tolist()]
    everything = {(shard, row) for shard, count in plan.shards for row in range(count)}
    assert len(rows) == len(set(rows))
    assert set(rows) <= everything
    assert len(everything) - len(rows) < plan.batch_size + plan.lanes


@settings(max_examples=150, deadline=None)
@given(plans_with_rows_left_out(), st.integers(0, 5))
def test_rows_left_out_are_missing_from_their_blocks_and_nothing_else_changes(
    plan: OrderPlan, epoch: int
) -> None:
    found = epoch_of(plan, epoch)
    np.testing.assert_array_equal(found, spelled_out(plan, epoch))
    kept = {(shard, row) for shard, rows in plan.shards for row in range(rows)}
    kept -= {(shard, row) for shard, rows in plan.left_out.items() for row in rows.tolist()}
    rows = [tuple(address) for address in found.reshape(-1, 2).tolist()]
    assert len(rows) == len(set(rows))
    assert set(rows) <= kept
    assert plan.rows == len(kept) < len(rows) + plan.batch_size + plan.lanes


@settings(max_examples=60, deadline=None)
@given(plans_with_rows_left_out(), st.integers(0, 3), st.data())
def test_spans_of_a_line_with_rows_left_out_are_never_empty(
    plan: OrderPlan, epoch: int, data: st.DataObject
) -> None:
    line = Epoch(plan, epoch)
    start = data.draw(st.integers(0, plan.rows))
    stop = data.draw(st.integers(start, plan.rows))
    whole, part = list(line.spans(0, plan.rows)), list(line.spans(start, stop))
    assert all(span.rows for span in whole + part)
    rows = [(s.shard, r) for s in whole for r in range(s.start, s.start + s.rows)]
    assert [(s.shard, r) for s in part for r in range(s.start, s.start + s.rows)] == (
        rows[start:stop]
    )


def test_the_number_of_rows_left_out_counts_in_the_choice_of_a_plan() -> None:
    left_out = {2: np.arange(20)}
    plan = make_plan([(0, 30), (2, 30)], 8, 4, seed=0, pool_rows=1 << 20, left_out=left_out)
    assert (plan.rows, plan.lane_rows, plan.window, plan.steps_per_epoch) == (40, 10, 10, 10)
    with pytest.raises(ConfigError, match=r"(?s)larger than the rows.*<= 40"):
        make_plan([(0, 30), (2, 30)], 8, 41, seed=0, left_out=left_out)


def test_seeds_and_epochs_permute_the_same_rows_differently() -> None:
    def plan(seed: int) -> OrderPlan:
        return make_plan([(0, 64), (1, 64)], 8, 16, seed, pool_rows=64)

    orders = [epoch_of(plan(seed), epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({order.tobytes() for order in orders}) == 6
    everything = sorted(orders[0].reshape(-1, 2).tolist())
    assert all(sorted(order.reshape(-1, 2).tolist()) == everything for order in orders)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_epochs_of_any_plan_differ(data: st.DataObject, seed: int, epoch: int) -> None:
    """Plans of a single block in windows of one row are excluded: they have only one order."""
    sizes = data.draw(
        st.lists(st.integers(0, 90), min_size=1, max_size=4).filter(lambda n: sum(n) > 48)
    )
    batch, pool = data.draw(st.integers(1, sum(sizes))), data.draw(st.integers(1, 300))
    plan = make_plan(list(enumerate(sizes)), data.draw(st.integers(1, 4)), batch, seed, pool)
    assert not np.array_equal(spelled_out(plan, epoch), spelled_out(plan, epoch + 1))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=2, max_size=12),
    st.sampled_from([0.5, 0.3, 0.1, 0.01]),
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
)
def test_held_out_shards_are_in_no_batch(
    sizes: list[int], fraction: float, seed: int, batch: int
) -> None:
    training, held_out = split_shards(range(len(sizes)), fraction, seed)
    shards = [(shard, sizes[shard]) for shard in training]
    assume(sum(rows for _, rows in shards) >= batch)
    addresses = epoch_of(make_plan(shards, 8, batch, seed, pool_rows=16), 0)
    assert set(addresses[..., 0].flat) <= {shard for shard, rows in shards if rows}
    assert set(addresses[..., 0].flat).isdisjoint(held_out)


def test_one_batch_mixes_shards_and_blocks() -> None:
    plan = make_plan([(s, 256) for s in range(8)], 16, 64, seed=0)
    batch = batch_rows(plan, 0, 3)
    assert len(np.unique(batch[:, 0])) >= 6
    assert len({(s, r // 16) for s, r in batch.tolist()}) > 40


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(0, 3), st.data())
def test_spans_cover_the_line_without_gap_or_overlap(
    plan: OrderPlan, epoch: int, data: st.DataObject
) -> None:
    line = Epoch(plan, epoch)
    start = data.draw(st.integers(0, plan.rows))
    stop = data.draw(st.integers(start, plan.rows))

    def rows(spans: list) -> list[tuple[int, int]]:
        return [(s.shard, r) for s in spans for r in range(s.start, s.start + s.rows)]

    whole = rows(list(line.spans(0, plan.rows)))
    assert sorted(whole) == [(s, r) for s, n in sorted(plan.shards) for r in range(n)]
    part = list(line.spans(start, stop))
    assert rows(part) == whole[start:stop]
    assert all(span.rows <= plan.block_rows for span in part)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_windows_tile_each_lane_and_turn_over_one_after_another(plan: OrderPlan) -> None:
    line = Epoch(plan, 0)
    for lane in range(plan.lanes):
        end, number = 0, 0
        while end < plan.lane_rows:
            start, stop = line.window(lane, number)
            assert start == end < stop
            assert stop - start <= plan.window
            assert {line.window_at(lane, row) for row in range(start, stop)} == {number}
            assert sorted(line.permutation(lane, number)) == list(range(stop - start))
            end, number = stop, number + 1
    firsts = [line.window(lane, 0)[1] for lane in range(plan.lanes)]
    assert firsts == sorted(firsts)
    expected = [max(1, plan.window * (lane + 1) // plan.lanes) for lane in range(plan.lanes)]
    assert firsts == [min(n, plan.lane_rows) for n in expected]


def test_ranks_share_the_lanes_evenly() -> None:
    for world_size in (1, 2, 3, 6):
        shares = [lanes_of_rank(6, rank, world_size) for rank in range(world_size)]
        assert sorted(lane for share in shares for lane in share) == list(range(6))
        assert {len(share) for share in shares} == {6 // world_size}
        assert all(lane % world_size == rank for rank, s in enumerate(shares) for lane in s)


def test_processes_that_cannot_share_the_lanes_are_rejected_with_valid_numbers() -> None:
    with pytest.raises(ConfigError, match=r"6 lanes .* 4 processes\n  expected: 1, 2, 3, 6"):
        lanes_of_rank(6, 0, 4)


@given(st.integers(1, 300), st.integers(1, 10**6))
def test_lanes_are_the_largest_divisor_of_the_batch_up_to_64(batch: int, pool: int) -> None:
    plan = make_plan([(0, 500), (1, 100)], 8, batch, 0, pool_rows=pool)
    divisors = [n for n in range(1, 65) if batch % n == 0]
    assert plan.lanes == max(divisors)
    assert 1 <= plan.window <= plan.lane_rows
    assert plan.window == min(max(1, pool // plan.lanes), plan.lane_rows)
    assert plan.steps_per_epoch >= 1


def test_a_batch_of_all_rows_is_one_step_and_a_larger_one_is_rejected() -> None:
    assert make_plan([(0, 5), (1, 6)], 4, 11, 0).steps_per_epoch == 1
    with pytest.raises(ConfigError, match=r"(?s)batch is larger.*--batch-size <= 11.*got: +12"):
        make_plan([(0, 5), (1, 6)], 4, 12, 0)
    with pytest.raises(ConfigError, match="--batch-size is too small"):
        make_plan([(0, 5)], 4, 0, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"block_rows": 0},
        {"batch_size": 0},
        {"batch_size": 5},
        {"batch_size": 18},
        {"lanes": 0},
        {"lanes": -2},
        {"window": 0},
        {"seed": -1},
        {"seed": 2**32},
        {"shards": ()},
        {"shards": ((0,),)},
        {"shards": ((0, 10, 1),)},
        {"shards": ((0, -5), (1, 30))},
        {"shards": ((-1, 30),)},
    ],
)
def test_an_invalid_plan_is_rejected(change: dict) -> None:
    with pytest.raises(FormatError):
        dataclasses.replace(SMALL, **change)


@given(st.integers(2, 300), st.floats(0.003, 0.5), st.integers(0, 2**32 - 1), st.integers(0, 100))
def test_held_out_shards_are_a_fraction_and_stay_held_out_as_the_cache_grows(
    count: int, fraction: float, seed: int, more: int
) -> None:
    training, held_out = split_shards(range(count), fraction, seed)
    assert sorted(training + held_out) == list(range(count))
    assert training
    assert held_out
    assert len(held_out) == pytest.approx(count / max(2, round(1 / fraction)), abs=1)
    later_training, later_held_out = split_shards(range(count + more), fraction, seed)
    assert later_training[: len(training)] == training
    assert later_held_out[: len(held_out)] == held_out


def test_the_seed_decides_which_shards_are_held_out() -> None:
    held_out = {tuple(split_shards(range(20), 0.1, seed)[1]) for seed in range(20)}
    assert held_out == {(0, 10), (1, 11)}
    assert split_shards(range(20), 0.1, 0)[1] == [0, 10]  # for ever


def test_a_fraction_of_0_holds_out_no_shard() -> None:
    assert split_shards([0], 0.0, 0) == ([0], [])


def test_splitting_one_shard_is_rejected_with_a_remedy() -> None:
    with pytest.raises(EmptyCacheError, match=r"(?s)one shard.*remedy.*--shard-size.*--val-frac"):
        split_shards([0], 0.1, 0)


@pytest.mark.parametrize("fraction", [-0.1, 0.51, 1.0, float("nan")])
def test_a_fraction_out_of_range_is_rejected(fraction: float) -> None:
    with pytest.raises(ConfigError, match="--val-fraction is out of range"):
        split_shards(range(4), fraction, 0)


@given(st.sets(st.integers(0, 30), min_size=2), st.sampled_from([0.5, 0.1]), st.integers(0, 9))
def test_shards_of_an_unfinished_harvest_are_split_or_rejected(
    shards: set[int], fraction: float, seed: int
) -> None:
    try:
        training, held_out = split_shards(sorted(shards), fraction, seed)
    except EmptyCacheError:
        assert len({shard % max(2, round(1 / fraction)) for shard in shards}) == 1
        return
    assert training
    assert held_out
    assert sorted(training + held_out) == sorted(shards)
