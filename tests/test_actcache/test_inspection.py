from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from actcache.errors import EmptyCacheError
from actcache.inspection import sample_rows, summarise
from actcache.manifest import read_manifest
from actcache.parse import to_json
from actcache.reader import Cache
from actcache.receipt import receipt_path


class Letters:
    """A tokenizer that decodes id n to '<n>'."""

    def decode(self, ids: list[int]) -> str:
        assert all(type(i) is int for i in ids)
        return "".join(f"<{i}>" for i in ids)


def some_not_finite(hookpoint: str, shard: int, count: int, width: int) -> np.ndarray:
    state = np.random.RandomState([shard, int(hookpoint[-1])])
    rows = state.standard_normal((count, width)).astype(np.float32) * 3
    if hookpoint == "layers.1":
        rows[: shard + 1, 2] = np.nan
    return rows


def test_the_numbers_of_a_hookpoint_are_those_of_its_finite_rows(
    make_cache: Callable[..., Path],
) -> None:
    widths = {"layers.0": 6, "layers.1": 10}
    root = make_cache(shards=3, hookpoints=widths, dtype="bfloat16", rows=some_not_finite)
    cache = Cache.open(root)
    summary = summarise(cache)
    for found in summary.hookpoints:
        stored = [cache.read(found.hookpoint, s) for s in cache.shards]
        rows = np.concatenate([cache.codec.to_float32(s) for s in stored]).astype(np.float64)
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


def test_a_cache_is_summed_up(make_cache: Callable[..., Path]) -> None:
    root = make_cache(shards=3, sequences=4, last_sequences=1)
    summary = summarise(Cache.open(root))
    assert (summary.shards, summary.sequences, summary.tokens) == (3, 9, 153)
    assert summary.rows == 144
    assert summary.bytes == sum(p.stat().st_size for p in root.rglob("*.safetensors"))
    assert (summary.complete, summary.state) == (True, "complete (goal reached)")
    assert summary.model == "synthetic (None, float32)"
    assert summary.dataset == "synthetic, split train"
    assert summary.filters == "left out: positions below 1"
    assert summary.text == (
        "documents joined by EOS, cut to 17 tokens, in the order of seed 0, no BOS; rows shuffled"
    )
    assert json.loads(json.dumps(dataclasses.asdict(summary)))["cache"] == str(root)


def test_what_is_missing_is_counted(make_cache: Callable[..., Path]) -> None:
    root = make_cache(shards=4, end=False)
    receipt_path(root, 3).unlink()
    assert summarise(Cache.open(root)).state == "incomplete: 1 of 4 shards are missing"
    sealed = make_cache(shards=4)
    for shard in (1, 2):
        receipt_path(sealed, shard).unlink()
    summary = summarise(Cache.open(sealed))
    assert (summary.complete, summary.state) == (False, "2 shards are missing")


def test_a_harvest_without_a_goal_is_incomplete_until_it_is_sealed(
    make_cache: Callable[..., Path],
) -> None:
    root = make_cache(shards=2, end=False)
    manifest = dataclasses.replace(read_manifest(root), planned_sequences=None)
    (root / "manifest.json").write_bytes(to_json(manifest))
    assert "has not reached the end of the text" in summarise(Cache.open(root)).state


def test_a_text_that_ended_is_said_so(make_cache: Callable[..., Path]) -> None:
    root = make_cache(shards=2)
    end = json.loads((root / "shards" / "END.json").read_text())
    (root / "shards" / "END.json").write_text(json.dumps(end | {"reason": "text"}))
    assert summarise(Cache.open(root)).state == "complete (the text ended)"


def test_a_cache_without_a_filter_says_none(make_cache: Callable[..., Path]) -> None:
    summary = summarise(Cache.open(make_cache(shards=1, skip_positions=0)))
    assert summary.filters == "none"


def test_a_cache_without_a_complete_shard_is_refused(make_cache: Callable[..., Path]) -> None:
    cache = Cache.open(make_cache(shards=0, end=False))
    for look in (summarise, lambda cache: sample_rows(cache, 1, None)):
        with pytest.raises(EmptyCacheError, match="holds no complete shard"):
            look(cache)


def test_a_sample_shows_a_row_in_its_text(make_cache: Callable[..., Path]) -> None:
    cache = Cache.open(make_cache(shards=3))
    samples = sample_rows(cache, 20, Letters(), context=3)
    assert len({(s.shard, s.row) for s in samples}) > 15
    for sample in samples:
        words = cache.tokens(sample.shard)
        assert sample.sequence == words.row_sequence[sample.row]
        assert sample.position == words.row_position[sample.row]
        ids = [f"<{i}>" for i in words.tokens[sample.sequence]]
        place = sample.position
        assert sample.before == "".join(ids[max(0, place - 3) : place])
        assert sample.token == ids[place]
        assert sample.after == "".join(ids[place + 1 : place + 4])
        for name, norm in sample.norms.items():
            row = cache.read(name, sample.shard, sample.row, 1)
            assert norm == pytest.approx(np.linalg.norm(row.values.astype(np.float64)))
    assert json.dumps([dataclasses.asdict(s) for s in samples])


def test_the_same_rows_are_sampled_every_time(make_cache: Callable[..., Path]) -> None:
    cache = Cache.open(make_cache(shards=3))
    assert sample_rows(cache, 5, None) == sample_rows(cache, 7, None)[:5]


def test_without_a_tokenizer_ids_are_shown(make_cache: Callable[..., Path]) -> None:
    cache = Cache.open(make_cache(shards=1))
    (sample,) = sample_rows(cache, 1, None)
    words = cache.tokens(0).tokens[sample.sequence]
    assert sample.token == str(words[sample.position])


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"cut")])
def test_a_cache_without_all_its_files_is_not_called_complete(
    damage: Callable[[Path], object], make_cache: Callable[..., Path]
) -> None:
    root = make_cache()
    assert summarise(Cache.open(root)).complete
    damage(root / "activations" / "layers.1" / "00002.safetensors")
    summary = summarise(Cache.open(root))
    assert not summary.complete
    assert "1 files are missing or cut: see actcache verify" in summary.state
