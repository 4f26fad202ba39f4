from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.cache.reader import Cache
from actcache.errors import ConfigError
from actcache.stream.order import batch_rows, make_plan, split_shards
from actcache.stream.segments import Segmentation, default_shards_each, goal_rows

CUT = Segmentation(
    shards_each=3, block_rows=4, batch_size=8, seed=5, pool_rows=32, val_fraction=0.25
)


@given(st.integers(1, 9), st.integers(0, 40))
def test_segments_cover_the_shards_without_gap_or_overlap(each: int, last: int) -> None:
    cut = Segmentation(each, 4, 8, 0, 32, 0.0)
    segments = [cut.shards(number, last) for number in range(last + 2)]
    assert [shard for shards in segments for shard in shards] == list(range(last + 1))
    whole = (last + 1) // each
    assert all(segments[n] == cut.shards(n) and len(segments[n]) == each for n in range(whole))
    assert not any(segments[-(-(last + 1) // each) :])


@given(st.integers(2, 60), st.sampled_from([0.0, 0.05, 0.25, 0.5]), st.integers(0, 9))
def test_held_out_shards_are_those_of_a_run_without_segments(
    count: int, fraction: float, seed: int
) -> None:
    cut = Segmentation(3, 4, 8, seed, 32, fraction)
    held_out = [shard for shard in range(count) if cut.is_held_out(shard)]
    assert held_out == split_shards(range(count), fraction, seed)[1]


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=10),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.1, 0.3, 0.5]),
    st.integers(0, 2**32 - 1),
)
def test_an_epoch_has_every_training_row_once_except_for_fewer_than_a_batch_a_segment(
    sizes: list[int], each: int, fraction: float, seed: int
) -> None:
    cut = Segmentation(each, 4, 8, seed, 32, fraction)
    for number in range(-(-len(sizes) // each)):
        rows = {shard: sizes[shard] for shard in cut.shards(number, len(sizes) - 1)}
        everything = {(s, r) for s, n in rows.items() if not cut.is_held_out(s) for r in range(n)}
        plan = cut.plan(number, rows)
        steps = range(plan.steps_per_epoch) if plan else ()
        seen = [(s, r) for t in steps for s, r in batch_rows(plan, 0, t).tolist()]
        assert len(seen) == len(set(seen))
        assert set(seen) <= everything
        assert len(everything) - len(seen) < 16  # B + L


def test_each_segment_has_its_own_plan_and_the_first_that_of_no_segments() -> None:
    training, _ = split_shards(range(3), 0.25, 5)
    assert CUT.plan(0, dict.fromkeys(range(3), 20)) == make_plan(
        [(s, 20) for s in training], 4, 8, 5, 32
    )
    second = CUT.plan(1, {3: 20, 4: 20, 5: 7})
    assert second is not None
    assert second.shards == tuple((s, n) for s, n in ((3, 20), (4, 20), (5, 7)) if s % 4 != 1)
    assert (second.seed, second.lanes) == (6, 8)


def test_seeds_of_segments_stay_in_range() -> None:
    cut = Segmentation(1, 4, 8, 2**32 - 1, 32, 0.0)
    plan = cut.plan(1, {1: 20})
    assert plan is not None
    assert plan.seed == 0


def test_a_segment_with_fewer_rows_than_a_batch_has_no_plan() -> None:
    assert CUT.plan(2, {6: 7}) is None
    assert CUT.plan(0, {}) is None
    held_out = Segmentation(1, 4, 8, 0, 32, 0.5)
    assert [held_out.plan(n, {n: 100}) is None for n in range(4)] in (
        [True, False] * 2,
        [False, True] * 2,
    )


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 5))
def test_steps_of_an_epoch_are_summed_over_its_segments(sizes: list[int], each: int) -> None:
    cut = Segmentation(each, 4, 8, 0, 32, 0.0)
    expected = 0
    for start in range(0, len(sizes), each):
        expected += sum(sizes[start : start + each]) // 8  # L = B = 8: a batch is a row of each
    assert cut.steps(dict(enumerate(sizes))) == expected


def test_a_fraction_out_of_range_is_rejected() -> None:
    with pytest.raises(ConfigError, match="--val-fraction"):
        Segmentation(2, 4, 8, 0, 32, 0.7).is_held_out(0)


def test_a_default_segment_fills_the_pool_and_holds_64_batches(
    make_cache: Callable[..., Path],
) -> None:
    manifest = Cache.open(make_cache(shards=1)).manifest
    assert manifest.shard_rows == 128
    for batch, pool, expected in ((1, 1, 2), (1, 1000, 8), (32, 1000, 16), (33, 1, 17)):
        assert default_shards_each(manifest, batch, pool) == expected


def test_goal_rows_are_those_of_a_complete_harvest(
    make_cache: Callable[..., Path],
) -> None:
    for last in (3, 8):
        cache = Cache.open(make_cache(shards=3, last_sequences=last))
        assert cache.end is not None
        rows = goal_rows(cache.manifest, cache.end.sequences)
        assert rows == {s: receipt.rows for s, receipt in cache.receipts.items()}
        assert np.sum(list(rows.values())) == cache.rows
