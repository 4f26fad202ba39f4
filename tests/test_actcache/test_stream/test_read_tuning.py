"""The probe: what it reads, and what follows from what it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from actcache.cache.reader import Cache
from actcache.errors import CorruptShardError
from actcache.storage.preadv import WHOLE
from actcache.stream import read_tuning as tuning
from actcache.stream.order import OrderPlan, Span, make_plan
from actcache.stream.read_tuning import ProbeResult, probe_read_settings
from actcache.stream.verified_reads import ReadSettings


@pytest.fixture
def cache(make_cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(tuning, "_ROUND", 4 * 4 * 16 * 4)  # four blocks of four rows
    return Cache.open(make_cache(hookpoints={"layers.0": 16}))


def plan_of(cache: Cache) -> OrderPlan:
    shards = [(shard, receipt.rows) for shard, receipt in cache.receipts.items()]
    return make_plan(shards, 4, 32, 0)


@pytest.mark.parametrize(
    ("speeds", "best"),
    [
        ((1, 1.05, 1.05, 1.05), ReadSettings()),
        ((1, 2, 2, 2), ReadSettings(4)),
        ((3, 1, 1, 4), ReadSettings(readahead=True)),
        ((1, 1, 2, 2), ReadSettings(max_read_bytes=WHOLE)),
        ((1, 2, 3, 4), ReadSettings(4, WHOLE, readahead=True)),
    ],
)
def test_what_takes_more_is_chosen_where_it_reads_faster(
    cache: Cache, speeds: Sequence[float], best: ReadSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Span] = []
    found = iter(speeds)

    def speed(
        _cache: Cache, _names: Sequence[str], spans: Sequence[Span], _: ReadSettings
    ) -> float:
        seen.extend(spans)
        return next(found)

    monkeypatch.setattr(tuning, "_speed", speed)
    assert probe_read_settings(cache, ["layers.0"], plan_of(cache)).reading == best
    assert len(set(seen)) == len(seen) == 4 * 4  # no block is read twice: it would be in memory


def test_it_reads_for_real_and_tells_the_speed(cache: Cache) -> None:
    found = probe_read_settings(cache, ["layers.0"], plan_of(cache))
    assert found.reading.threads in (2, 4)
    assert found.bytes_per_second is not None
    assert found.bytes_per_second > 0


def test_a_small_cache_is_not_probed(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_ROUND", 1 << 20)
    assert probe_read_settings(cache, ["layers.0"], plan_of(cache)) == ProbeResult(
        ReadSettings(), None
    )


def test_a_file_that_is_gone_is_told(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise CorruptShardError("it is gone")

    monkeypatch.setattr(cache, "read_views", gone)
    with pytest.raises(CorruptShardError, match="gone"):
        probe_read_settings(cache, ["layers.0"], plan_of(cache))
