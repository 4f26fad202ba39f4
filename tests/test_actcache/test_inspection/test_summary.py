from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from actcache.cache.reader import Cache
from actcache.core.json_codec import to_json
from actcache.errors import ConfigError, CorruptShardError, EmptyCacheError
from actcache.format.manifest import read_manifest
from actcache.format.receipts import receipt_path
from actcache.inspection import summarize


def some_not_finite(hookpoint: str, shard: int, count: int, width: int) -> np.ndarray:
    state = np.random.RandomState([shard, int(hookpoint[-1])])
    rows = state.standard_normal((count, width)).astype(np.float32) * 3
    if hookpoint == "layers.1":
        rows[: shard + 1, 2] = np.nan
    return rows


def test_norms_of_a_hookpoint_are_computed_from_its_finite_rows(
    make_cache: Callable[..., Path],
) -> None:
    widths = {"layers.0": 6, "layers.1": 10}
    root = make_cache(shards=3, hookpoints=widths, dtype="bfloat16", rows=some_not_finite)
    cache = Cache.open(root)
    summary = summarize(cache)
    for found in summary.hookpoints:
        stored = [cache.read(found.hookpoint, s) for s in cache.shards]
        rows = np.concatenate([cache.row_dtype.to_float32(s) for s in stored]).astype(np.float64)
        norms = np.linalg.norm(rows[np.isfinite(rows).all(axis=1)], axis=1)
        assert found.rows == len(rows) == 3 * 128
        assert found.width == widths[found.hookpoint]
        assert found.dtype == "bfloat16"
        assert found.non_finite == len(rows) - len(norms)
        numbers = (found.mean_norm, found.rms_norm, found.max_norm)
        expected = (norms.mean(), np.sqrt((norms**2).mean()), norms.max())
        np.testing.assert_allclose(numbers, expected, rtol=1e-6)
        folder = root / "activations" / found.hookpoint
        assert found.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert [h.non_finite for h in summary.hookpoints] == [0, 1 + 2 + 3]


def test_a_cache_is_summarised(make_cache: Callable[..., Path]) -> None:
    root = make_cache(shards=3, sequences=4, last_sequences=1)
    summary = summarize(Cache.open(root))
    assert (summary.shards, summary.sequences, summary.tokens) == (3, 9, 153)
    assert summary.rows == 144
    assert summary.bytes == sum(p.stat().st_size for p in root.rglob("*.safetensors"))
    assert (summary.complete, summary.state) == (True, "complete (goal reached)")
    assert summary.model == "synthetic (None, float32)"
    assert summary.dataset == "synthetic, split train"
    assert summary.filters == "left out: positions below 1"
    assert summary.text == (
        "documents joined by token 0, cut to 17 tokens, in the order of seed 0, no BOS; "
        "rows shuffled"
    )
    assert json.loads(json.dumps(dataclasses.asdict(summary)))["cache"] == str(root)


def test_missing_shards_are_counted(make_cache: Callable[..., Path]) -> None:
    root = make_cache(shards=4, end=False)
    receipt_path(root, 3).unlink()
    assert summarize(Cache.open(root)).state == "incomplete: 1 of 4 shards are missing"
    sealed = make_cache(shards=4)
    for shard in (1, 2):
        receipt_path(sealed, shard).unlink()
    summary = summarize(Cache.open(sealed))
    assert (summary.complete, summary.state) == (False, "2 shards are missing")


def test_a_harvest_without_a_goal_is_incomplete_until_its_completion_marker(
    make_cache: Callable[..., Path],
) -> None:
    root = make_cache(shards=2, end=False)
    manifest = dataclasses.replace(read_manifest(root), planned_sequences=None)
    (root / "manifest.json").write_bytes(to_json(manifest, sealed=True))
    assert "has not reached the end of the text" in summarize(Cache.open(root)).state


def test_the_state_reports_a_text_that_ended(make_cache: Callable[..., Path]) -> None:
    root = make_cache(shards=2)
    end = json.loads((root / "shards" / "END.json").read_text())
    (root / "shards" / "END.json").write_bytes(to_json(end | {"reason": "text"}, sealed=True))
    assert summarize(Cache.open(root)).state == "complete (the text ended)"


def test_a_cache_without_filters_reports_none(make_cache: Callable[..., Path]) -> None:
    summary = summarize(Cache.open(make_cache(shards=1, skip_positions=0)))
    assert summary.filters == "none"


def test_a_cache_without_a_complete_shard_is_rejected(make_cache: Callable[..., Path]) -> None:
    cache = Cache.open(make_cache(shards=0, end=False))
    with pytest.raises(EmptyCacheError, match="holds no complete shard"):
        summarize(cache)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"cut")])
def test_a_cache_with_missing_files_is_incomplete(
    damage: Callable[[Path], object], make_cache: Callable[..., Path]
) -> None:
    root = make_cache()
    assert summarize(Cache.open(root)).complete
    damage(root / "activations" / "layers.1" / "00002.safetensors")
    summary = summarize(Cache.open(root))
    assert not summary.complete
    assert "1 files are missing or cut: see actcache verify" in summary.state


def test_one_shard_is_summarised_alone(make_cache: Callable[..., Path]) -> None:
    cache = Cache.open(make_cache(shards=3, hookpoints={"layers.1": 6}, rows=some_not_finite))
    parts = [summarize(cache, [shard]) for shard in cache.shards]
    assert [p.hookpoints[0].non_finite for p in parts] == [1, 2, 3]
    assert [p.shards for p in parts] == [1, 1, 1]
    assert sum(p.bytes for p in parts) == summarize(cache).bytes
    assert {p.state for p in parts} == {"complete (goal reached)"}
    assert parts[1].hookpoints[0].max_norm == cache.statistics("layers.1", [1]).norm_max
    with pytest.raises(ConfigError, match="has no shard 3"):
        summarize(cache, [3])


def test_shards_without_statistics_are_left_out_and_counted(
    make_cache: Callable[..., Path],
) -> None:
    cache = Cache.open(make_cache(shards=3))
    (cache.root / "stats" / "00001.safetensors").unlink()
    (cache.root / "stats" / "00002.safetensors").write_bytes(b"cut")
    summary = summarize(cache)
    assert summary.without_statistics == 2
    assert summary.hookpoints[0].mean_norm == cache.statistics("layers.0", [0]).mean_norm
    assert summary.rows == 3 * 128
    (cache.root / "stats" / "00000.safetensors").unlink()
    with pytest.raises(CorruptShardError, match="stats"):
        summarize(Cache.open(cache.root))


def test_statistics_merged_shard_by_shard_equal_those_merged_at_once(
    make_cache: Callable[..., Path],
) -> None:
    cache = Cache.open(make_cache(shards=4))
    for found in summarize(cache).hookpoints:
        at_once = cache.statistics(found.hookpoint)
        assert found.mean_norm == at_once.mean_norm
        assert found.rms_norm == at_once.rms_norm
        assert found.abs_max == at_once.abs_max.max()


def test_names_from_the_manifest_are_escaped_and_cut(
    make_cache: Callable[..., Path],
) -> None:
    root = make_cache(shards=1)
    hostile = dataclasses.replace(
        read_manifest(root), model="\x1b[2Jgone", dataset="A" * 10**6, split="\u202etxt"
    )
    (root / "manifest.json").write_bytes(to_json(hostile, sealed=True))
    summary = summarize(Cache.open(root))
    assert summary.model.startswith("\\x1b[2Jgone")
    assert len(summary.dataset) <= 300
    assert (summary.model + summary.dataset).isprintable()


def test_a_summary_is_json(make_cache: Callable[..., Path]) -> None:
    summary = summarize(Cache.open(make_cache(shards=2)))
    again = json.loads(json.dumps(dataclasses.asdict(summary), allow_nan=False))
    assert again["hookpoints"][0]["norms"]["counts"] == list(summary.hookpoints[0].norms.counts)
    assert again["mean_cosines"][0][0] == pytest.approx(1)
    assert again["excluded"] == [{"name": "skip_positions", "positions": 16, "fraction": 1 / 17}]


@pytest.mark.parametrize("backend", ["memmap", "zarr"])
def test_scales_of_8_bit_rows_count_as_bytes_of_their_hookpoint(
    backend: str, make_cache: Callable[..., Path]
) -> None:
    root = make_cache(shards=2, dtype="int8", backend=backend)
    summary = summarize(Cache.open(root))
    beside = sum((root / name).stat().st_size for s in (0, 1) for name in others(s))
    assert sum(h.bytes for h in summary.hookpoints) == summary.bytes - beside


def others(shard: int) -> list[str]:
    """Files that belong to no hookpoint."""
    return [f"{folder}/{shard:05d}.safetensors" for folder in ("tokens", "stats")]


def test_sinks_are_those_of_the_chosen_shards(sinks_path: Path) -> None:
    cache = Cache.open(sinks_path)
    (found,) = summarize(cache).sinks
    assert (found.hookpoint, found.sinks, found.rows) == ("layers.1", 12, 512)
    (found,) = summarize(cache, [2]).sinks
    assert (found.sinks, found.rows) == (3, 128)


def test_a_cache_without_sinks_has_none(make_cache: Callable[..., Path]) -> None:
    assert summarize(Cache.open(make_cache())).sinks == ()
