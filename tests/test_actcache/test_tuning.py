"""The probe: what it reads, and what follows from what it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from actcache import tuning
from actcache.errors import CorruptShardError
from actcache.order import OrderPlan, Span, make_plan
from actcache.reader import Cache
from actcache.tuning import DEFAULT_THREADS, THREADS, Tuning, tune


@pytest.fixture
def cache(make_cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(tuning, "_ROUND", 4 * 4 * 16 * 4)  # four blocks of four rows
    return Cache.open(make_cache(hookpoints={"layers.0": 16}))


def plan_of(cache: Cache) -> OrderPlan:
    shards = [(shard, receipt.rows) for shard, receipt in cache.receipts.items()]
    return make_plan(shards, 4, 32, 0)


@pytest.mark.parametrize(
    ("speeds", "threads"), [((1, 1), 2), ((1, 1.05), 2), ((1, 2), 4), ((3, 1), 2)]
)
def test_more_threads_are_taken_where_they_read_faster(
    cache: Cache, speeds: Sequence[float], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Span] = []

    def speed(_cache: Cache, _names: Sequence[str], spans: Sequence[Span], count: int) -> float:
        seen.extend(spans)
        return speeds[THREADS.index(count)]

    monkeypatch.setattr(tuning, "_speed", speed)
    assert tune(cache, ["layers.0"], plan_of(cache)).threads == threads
    assert len(set(seen)) == len(seen) == 2 * 4  # no block is read twice: it would be in memory


def test_it_reads_for_real_and_tells_the_speed(cache: Cache) -> None:
    found = tune(cache, ["layers.0"], plan_of(cache))
    assert found.threads in THREADS
    assert found.bytes_per_second is not None
    assert found.bytes_per_second > 0


def test_a_small_cache_is_not_probed(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_ROUND", 1 << 20)
    assert tune(cache, ["layers.0"], plan_of(cache)) == Tuning(DEFAULT_THREADS, None)


def test_a_file_that_is_gone_is_told(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise CorruptShardError("it is gone")

    monkeypatch.setattr(cache, "read_into", gone)
    with pytest.raises(CorruptShardError, match="gone"):
        tune(cache, ["layers.0"], plan_of(cache))
