"""The benchmark: rows and bytes that it reads, and the speeds that it reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from actcache.cache.reader import Cache
from actcache.errors import EmptyCacheError, HookpointError
from actcache.stream.benchmark import benchmark_reads
from actcache.stream.verified_reads import ReadSettings

HOOKPOINTS = {"layers.0": 16, "layers.1": 8}


@pytest.mark.parametrize("backend", ["memmap", "zarr"])
def test_every_way_of_reading_is_measured(backend: str, make_cache: Callable[..., Path]) -> None:
    cache = Cache.open(make_cache(hookpoints=HOOKPOINTS, dtype="int8", backend=backend))
    found = benchmark_reads(cache, batch_size=64)
    assert found.hookpoints == ("layers.0", "layers.1")
    assert (found.rows, found.bytes) == (4 * 128, 4 * 128 * (16 + 8 + 4 + 4))
    assert [speed.what for speed in found.speeds] == [
        f"{name}, from {where}"
        for name in ("files, front to back", "batches in order", "batches mixed")
        for where in ("disk", "memory")
    ]
    for speed in found.speeds:
        assert speed.bytes_per_second == pytest.approx(32 * speed.rows_per_second)
        assert speed.rows_per_second > 0


def test_only_the_given_hookpoints_and_bytes_are_read(make_cache: Callable[..., Path]) -> None:
    root = make_cache(hookpoints=HOOKPOINTS)
    for path in (root / "activations" / "layers.1").iterdir():
        path.unlink()
    cache = Cache.open(root)
    found = benchmark_reads(cache, ["layers.0"], max_bytes=2 * 128 * 64, threads=3)
    assert (found.rows, found.reading, found.batch_size) == (256, ReadSettings(3), 256)
    assert benchmark_reads(cache, ["layers.0"], max_bytes=1).rows == 128  # one shard at least
    with pytest.raises(HookpointError):
        benchmark_reads(cache, ["layers.7"])


def test_a_cache_without_shards_is_rejected(make_cache: Callable[..., Path]) -> None:
    with pytest.raises(EmptyCacheError):
        benchmark_reads(Cache.open(make_cache(shards=0, end=False)))
