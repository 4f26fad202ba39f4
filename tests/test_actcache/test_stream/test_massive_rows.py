from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.cache.reader import Cache
from actcache.errors import ConfigError, CorruptShardError
from actcache.format.statistics import Statistics
from actcache.stream import massive_rows
from actcache.stream.massive_rows import MassiveRows, find_massive_rows, keep_rows, norm_limits

MakeCache = Callable[..., Path]
NAMES = ["layers.0", "layers.1"]
PLANTED = {("layers.0", 1): [5, 90], ("layers.1", 1): [5, 7], ("layers.1", 3): [0, 1, 127]}
"""Rows of 100 times the norm, by hookpoint and shard."""


def planted(hookpoint: str, shard: int, count: int, width: int) -> Any:
    made = np.random.RandomState([shard, len(hookpoint)]).standard_normal((count, width))
    made = (made + (np.arange(width) == 3)).astype(np.float32)
    made[PLANTED.get((hookpoint, shard), [])] *= 100
    return made


def all_statistics(cache: Cache) -> dict[str, Statistics]:
    return {name: cache.statistics(name) for name in NAMES}


def rows_of(cache: Cache, name: str, shards: list[int], left_out: Any = None) -> Any:
    """Return the rows of shards, decoded to float64, without some of them."""
    kept = []
    for shard in shards:
        rows = cache.row_dtype.to_float32(cache.read(name, shard)).astype(float)
        kept.append(np.delete(rows, (left_out or {}).get(shard, []), axis=0))
    return np.concatenate(kept)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("backend", ["memmap", "zarr"])
def test_rows_above_the_limit_at_any_hookpoint_are_left_out_at_all(
    make_cache: MakeCache, dtype: str, backend: str
) -> None:
    cache = Cache.open(make_cache(row_order="sequence", rows=planted, dtype=dtype, backend=backend))
    limits = norm_limits(all_statistics(cache), 10)
    kept = keep_rows(cache, NAMES, cache.shards, limits)
    assert {shard: rows.tolist() for shard, rows in kept.left_out.items()} == {
        1: [5, 7, 90],
        3: [0, 1, 127],
    }
    assert (kept.rows, kept.count) == (512 - 6, 6)
    for name in NAMES:
        x = rows_of(cache, name, cache.shards, kept.left_out)
        found, whole = kept.statistics[name], kept.whole[name]
        assert (found.count, whole.count) == (506, 512)
        np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-6, atol=1e-7)
        variance = float(((x - x.mean(axis=0)) ** 2).sum(axis=1).mean())
        assert found.variance == pytest.approx(variance, rel=1e-6)
        assert found.norm_max == pytest.approx(np.linalg.norm(x, axis=1).max(), rel=1e-6)
        np.testing.assert_array_equal(whole.total, cache.statistics(name).total)
        gone = 1 - variance * 506 / (whole.variance * 512)
        assert kept.variance_share(name) == pytest.approx(gone, rel=1e-6)
    assert kept.variance_share("layers.1") > 0.9


def test_the_statistics_of_shards_without_such_rows_are_those_of_their_files(
    make_cache: MakeCache,
) -> None:
    cache = Cache.open(make_cache(row_order="sequence", rows=planted))
    limits = norm_limits(all_statistics(cache), 10)
    kept = keep_rows(cache, NAMES, [0, 2], limits)
    assert (kept.count, kept.left_out, kept.rows) == (0, {}, 256)
    for name in NAMES:
        expected = cache.statistics(name, [0, 2])
        for field in dataclasses.fields(Statistics):
            found = getattr(kept.statistics[name], field.name)
            np.testing.assert_array_equal(found, getattr(expected, field.name))


def test_only_shards_whose_statistics_show_a_large_norm_are_read(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache.open(make_cache(row_order="sequence", rows=planted))
    limits = norm_limits(all_statistics(cache), 10)
    read, real = set(), massive_rows._load

    def watched(cache: Cache, reader: Any, name: str, shard: int) -> Any:
        read.add((name, shard))
        return real(cache, reader, name, shard)

    monkeypatch.setattr(massive_rows, "_load", watched)
    keep_rows(cache, NAMES, cache.shards, limits)
    assert read == {(name, shard) for name in NAMES for shard in (1, 3)}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 7e4])
def test_the_limit_is_the_ratio_times_the_median_norm_within_a_tenth(
    make_cache: MakeCache, scale: float
) -> None:
    cache = Cache.open(make_cache(rows=lambda *a: planted(*a) * np.float32(scale)))
    for name, limit in norm_limits(all_statistics(cache), 30).items():
        median = np.median(np.linalg.norm(rows_of(cache, name, cache.shards), axis=1))
        assert limit == pytest.approx(30 * median, rel=0.1)


def test_a_hookpoint_of_zeros_has_no_limit(make_cache: MakeCache) -> None:
    def mostly_zero(*arguments: Any) -> Any:
        made = planted(*arguments)
        made[1:] *= arguments[0] != "layers.0"
        return made

    cache = Cache.open(make_cache(row_order="sequence", rows=mostly_zero))
    assert [*norm_limits(all_statistics(cache), 10)] == ["layers.1"]


def test_rows_that_are_not_finite_are_not_left_out(make_cache: MakeCache) -> None:
    def broken(*arguments: Any) -> Any:
        made = planted(*arguments)
        made[64, 2] = np.nan if arguments[1] == 1 else np.inf
        return made

    cache = Cache.open(make_cache(row_order="sequence", rows=broken))
    kept = keep_rows(cache, NAMES, cache.shards, norm_limits(all_statistics(cache), 10))
    assert {shard: rows.tolist() for shard, rows in kept.left_out.items()} == {
        1: [5, 7, 90],
        3: [0, 1, 127],
    }
    assert [kept.statistics[name].non_finite for name in NAMES] == [4, 4]


def test_a_damaged_shard_is_an_error(make_cache: MakeCache, tmp_path: Path) -> None:
    cache = Cache.open(make_cache(tmp_path / "cache", row_order="sequence", rows=planted))
    limits = norm_limits(all_statistics(cache), 10)
    path = cache.root / "activations/layers.1/00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShardError, match="00003"):
        keep_rows(cache, NAMES, cache.shards, limits)


def found_in(cache: Cache, ratio: float) -> MassiveRows:
    statistics = {name: cache.statistics(name, [0, 1, 2]) for name in NAMES}
    return find_massive_rows(cache, NAMES, [0, 1, 2], [3], norm_limits(statistics, ratio))


def test_the_digest_pins_shards_and_rows_of_both_parts(make_cache: MakeCache) -> None:
    cache = Cache.open(make_cache(row_order="sequence", rows=planted))
    found = found_in(cache, 10)
    assert (found.training.count, found.held_out.count) == (3, 3)
    assert found.digest == found_in(cache, 12).digest
    others = [
        dataclasses.replace(found, **{part: dataclasses.replace(kept, left_out=rows)})
        for part, kept in (("training", found.training), ("held_out", found.held_out))
        for rows in (
            {},
            {1: np.array([5, 7])},
            {2: np.array([5, 7, 90])},
            {1: np.array([5, 7, 91])},
        )
    ]
    assert len({found.digest, *(other.digest for other in others)}) == 9


def test_a_sentence_says_how_many_rows_where_and_of_what_share(make_cache: MakeCache) -> None:
    cache = Cache.open(make_cache(row_order="sequence", rows=planted))
    found = found_in(cache, 10)
    positions = cache.tokens(1).row_position[[5, 7, 90]].tolist()
    said = found.describe(cache)
    assert said.startswith("leaves 3 of 384 rows out (")
    assert all(f" {position}" in said for position in positions)
    share, name = max((found.training.variance_share(name), name) for name in NAMES)
    assert said.endswith(f"with {100 * share:.3g}% of the variance of {name}")
    assert found_in(cache, 500).describe(cache) == "leaves none of 384 rows out"


def test_more_than_a_few_rows_are_refused(make_cache: MakeCache) -> None:
    cache = Cache.open(make_cache(row_order="sequence", rows=planted))
    found_in(cache, 10).require_few(10)
    few = found_in(cache, 1.1)
    assert few.training.count > 4
    with pytest.raises(
        ConfigError, match=rf"(?s)--max-norm-ratio 1.1.*at most 1%.*{few.training.count} of 384"
    ):
        few.require_few(1.1)
