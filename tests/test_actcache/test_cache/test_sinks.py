from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.cache import sinks
from actcache.cache.reader import Cache
from actcache.cache.sinks import (
    SinkRows,
    as_lines,
    find_sinks,
    may_have_sinks,
    position_words,
)

MakeCache = Callable[..., Path]


def rows_with_sinks(every: int, factor: float) -> Callable[[str, int, int, int], Any]:
    """Return rows of layers.1 of which each `every`-th has `factor` times the norm."""

    def rows(hookpoint: str, shard: int, count: int, width: int) -> Any:
        made = np.random.RandomState(shard).standard_normal((count, width)).astype(np.float32)
        if hookpoint == "layers.1":
            made[::every] *= factor
        return made

    return rows


def all_rows(cache: Cache, name: str) -> tuple[Any, Any]:
    """Return the rows of a cache and their positions."""
    stored = [cache.row_dtype.to_float32(cache.read(name, shard)) for shard in cache.shards]
    positions = [cache.tokens(shard).row_position for shard in cache.shards]
    return np.concatenate(stored).astype(float), np.concatenate(positions)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("backend", ["memmap", "zarr"])
def test_count_share_and_positions_are_those_of_all_rows(
    make_cache: MakeCache, dtype: str, backend: str
) -> None:
    # 17 tokens a sequence, none left out: every 17th row is the first of its sequence.
    rows = rows_with_sinks(17, 60.0)
    cache = Cache.open(make_cache(skip_positions=0, rows=rows, dtype=dtype, backend=backend))
    (found,) = find_sinks(cache)
    x, positions = all_rows(cache, "layers.1")
    norms, deviations = np.linalg.norm(x, axis=1), ((x - x.mean(axis=0)) ** 2).sum(axis=1)
    above = norms > 10 * np.median(norms)
    assert 0 < above.sum() < len(x) / 10
    assert (found.hookpoint, found.sinks, found.rows_read) == ("layers.1", above.sum(), len(x))
    assert found.at_first_position == ((positions == 0) & above).sum() == above.sum()
    assert found.variance_share == pytest.approx(deviations[above].sum() / deviations.sum())
    assert str(found) == (
        "32 rows (5.88%) above 10 median norms hold "
        f"{100 * found.variance_share:.3g}% of the variance of layers.1 (32 at position 0): "
        "--max-norm-ratio 10 of saetrain fit leaves them out of training, of actcache harvest "
        "(or its --skip-positions 1) out of a new cache"
    )
    assert found.positions == ((0, 32),)


def test_sinks_at_other_positions_are_not_counted_at_the_first(make_cache: MakeCache) -> None:
    cache = Cache.open(make_cache(rows=rows_with_sinks(100, 60.0)))  # position 1 is left out
    (found,) = find_sinks(cache, ["layers.1", "layers.0"])
    assert (found.sinks, found.at_first_position) == (8, 0)
    at = dict(found.positions)
    assert (sum(at.values()), len(at), 0 in at) == (8, len(found.positions), False)
    assert [*at.values()] == sorted(at.values(), reverse=True)
    assert str(found).endswith(
        f" of layers.1 ({position_words(at, 8)}): --max-norm-ratio 10 of saetrain fit leaves them "
        "out of training, of actcache harvest out of a new cache"
    )


def test_a_single_sink_is_described_in_the_singular(make_cache: MakeCache) -> None:
    cache = Cache.open(make_cache(rows=rows_with_sinks(10**9, 60.0)))
    (found,) = find_sinks(cache)
    one = str(dataclasses.replace(found, sinks=1, positions=((7, 1),)))
    assert re.match(r"1 row \(0\.\d+%\) above 10 median norms holds ", one)
    assert "saetrain fit leaves it out" in one


def test_the_three_commonest_positions_are_named_and_the_others_counted() -> None:
    rows = {102: 1, 1: 5, 37: 1, 300: 1}
    assert position_words(rows, 8) == "5 at position 1, 1 at 37, 1 at 102, 1 elsewhere"
    assert position_words({7: 1_200}, 1_200) == "1,200 at position 7"
    assert position_words({7: 3}, 9) == "3 at position 7, 6 elsewhere"
    assert position_words({}, 9) == "9 at unknown positions"


def test_rows_that_are_left_out_are_no_sinks(make_cache: MakeCache) -> None:
    cache = Cache.open(make_cache(rows=rows_with_sinks(100, 60.0), row_order="sequence"))
    (found,) = find_sinks(cache)
    left_out = {0: np.array([0, 100]), 2: np.array([0])}
    (fewer,) = find_sinks(cache, left_out=left_out)
    assert (fewer.sinks, fewer.rows_read, fewer.rows) == (5, found.rows - 3, found.rows - 3)
    every = {shard: np.arange(0, 128, 100) for shard in cache.shards}
    assert find_sinks(cache, left_out=every) == ()


@pytest.mark.parametrize(
    ("every", "factor"),
    [(10**9, 1.0), (100, 3.0), (2, 60.0)],
    ids=["no large rows", "below the ratio", "half of the rows are large"],
)
def test_nothing_is_reported_where_no_row_is_above_ten_medians(
    make_cache: MakeCache, every: int, factor: float
) -> None:
    path = make_cache(rows=lambda *a: rows_with_sinks(every, factor)(*a)[: a[2]])
    assert find_sinks(Cache.open(path)) == ()


def test_nothing_is_reported_of_sinks_with_a_small_share_of_the_variance(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache.open(make_cache(rows=rows_with_sinks(500, 12.0)))
    share = find_sinks(cache)[0].variance_share
    monkeypatch.setattr(sinks, "LEAST_SHARE", share * 1.01)
    assert find_sinks(cache) == ()


def test_nothing_is_reported_of_a_cache_without_rows_above_the_ratio(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache.open(make_cache(rows=rows_with_sinks(100, 60.0)))
    found = find_sinks(cache)
    for ratio, said in ((8.0, ()), (10.0, ()), (20.0, found)):
        identity = dataclasses.replace(cache.manifest.identity, max_norm_ratio=ratio)
        cache_id = identity.digest()
        manifest = dataclasses.replace(cache.manifest, identity=identity, cache_id=cache_id)
        assert find_sinks(Cache(cache.root, manifest, cache.receipts, None)) == said


def test_rows_are_read_only_where_the_statistics_show_sinks_and_only_up_to_the_budget(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache.open(make_cache(rows=rows_with_sinks(50, 60.0)))
    real, read = Cache.read, []

    def watched(self: Cache, name: str, shard: int, start: int, rows: int) -> Any:
        read.append((name, shard, start, rows))
        return real(self, name, shard, start, rows)

    monkeypatch.setattr(Cache, "read", watched)
    monkeypatch.setattr(sinks, "BUDGET", 200 * 64)  # rows of 64 bytes
    monkeypatch.setattr(sinks, "_PIECE", 100 * 64)
    (found,) = find_sinks(cache)
    assert read == [
        ("layers.1", 0, 0, 100),
        ("layers.1", 0, 100, 28),
        ("layers.1", 1, 0, 72),
    ]
    assert (found.rows_read, found.rows) == (200, 512)
    assert str(found).startswith("in the first 200 rows, ")


def test_the_statistics_never_exclude_a_row_above_the_ratio(make_cache: MakeCache) -> None:
    """Norms at the edges of bins, and one row just above ten times the median."""
    for exponent in np.linspace(0, 0.5, 9):

        def rows(_: str, shard: int, count: int, width: int, size: float = 2**exponent) -> Any:
            made = np.zeros((count, width), np.float32)
            made[:, 0] = size
            made[count // 2, 1] = size * 10.01
            made[count // 2, 0] = 0
            return made

        cache = Cache.open(make_cache(shards=1, rows=rows))
        assert may_have_sinks(cache.statistics("layers.0"))
        assert [found.sinks for found in find_sinks(cache)] == [1, 1]


def test_damaged_or_missing_files_and_rows_that_are_not_finite_are_left_out(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    def rows(*arguments: Any) -> Any:
        made = rows_with_sinks(50, 60.0)(*arguments)
        made[7, 3] = np.nan
        return made

    path = make_cache(tmp_path / "cache", rows=rows)
    (found,) = find_sinks(Cache.open(path))
    assert found.rows_read == found.rows == 4 * 127
    (path / "activations/layers.1/00002.safetensors").unlink()
    (found,) = find_sinks(Cache.open(path))
    assert found.rows_read == 2 * 127
    for file in (path / "stats").iterdir():
        file.write_bytes(b"")
    assert find_sinks(Cache.open(path)) == ()


def test_more_than_a_few_hookpoints_are_counted() -> None:
    found = [SinkRows(f"layers.{i}", 1, 0, 0.5, 9, 9, 1, ((3, 1),)) for i in range(11)]
    lines = as_lines(found)
    assert len(lines) == 9
    assert lines[-1] == "sinks at 3 more hookpoints: actcache inspect CACHE --json"
    assert as_lines(found[:8]) == list(map(str, found[:8]))
