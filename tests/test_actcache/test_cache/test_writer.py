from __future__ import annotations

import dataclasses
import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from actcache.cache.reader import Cache
from actcache.cache.writer import (
    RowLayout,
    ShardData,
    ShardText,
    norm_outliers,
    publish_shard,
    row_norms,
)
from actcache.errors import DiskFullError
from actcache.format.manifest import FILTERS, Manifest, kept_positions, read_manifest
from actcache.format.receipts import receipt_path
from actcache.format.statistics import compute

Tree = Callable[[Path], dict[str, str]]


@pytest.fixture
def manifest(make_cache: Callable[..., Path]) -> Manifest:
    return read_manifest(make_cache(shards=1, sequences=32, ctx_len=17))


def with_identity(manifest: Manifest, **changes: Any) -> Manifest:
    identity = dataclasses.replace(manifest.identity, **changes)
    return dataclasses.replace(manifest, identity=identity, cache_id=identity.digest())


def layout_of(manifest: Manifest, shard: int, sequences: int, skip: int = 1) -> RowLayout:
    kept = np.ones((sequences, 17), dtype=bool)
    kept[:, :skip] = False
    return RowLayout.of(manifest.identity, shard, kept, np.zeros(kept.sum(), dtype=bool))


@pytest.mark.parametrize("order", ["shuffled", "sequence"])
def test_every_kept_position_except_outliers_has_one_row(order: str, manifest: Manifest) -> None:
    state = np.random.RandomState(0)
    kept = state.random_sample((6, 17)) < 0.7
    outliers = state.random_sample(kept.sum()) < 0.2
    layout = RowLayout.of(with_identity(manifest, row_order=order).identity, 3, kept, outliers)
    natural = list(zip(*(position.tolist() for position in np.nonzero(kept)), strict=True))
    places = list(zip(layout.sequence.tolist(), layout.position.tolist(), strict=True))
    assert [natural[row] for row in layout.source] == places
    remaining = [position for position, out in zip(natural, outliers, strict=True) if not out]
    assert sorted(places) == remaining
    assert (places == remaining) == (order == "sequence")


def test_a_contiguous_block_mixes_the_sequences_of_its_shard(manifest: Manifest) -> None:
    layout = layout_of(manifest, 0, 32)
    same = (layout.sequence[1:] == layout.sequence[:-1]).mean()
    assert same < 3 / 32  # 1/32 by chance, 15/16 unshuffled
    for block in layout.sequence.reshape(-1, 64):
        assert len(np.unique(block)) > 20


def test_the_shuffle_depends_on_seed_and_shard_alone(manifest: Manifest) -> None:
    def order(shard: int, **changes: Any) -> bytes:
        return layout_of(with_identity(manifest, **changes), shard, 8).source.tobytes()

    assert order(0) == order(0, dtype="bfloat16", model_fingerprint="other")
    assert len({order(0), order(1), order(0, seed=1), order(1, seed=1)}) == 4


def test_the_shuffle_of_a_shard_never_changes(manifest: Manifest) -> None:
    kept = np.ones((3, 4), dtype=bool)
    kept[:, 0] = False
    layout = RowLayout.of(manifest.identity, 2, kept, np.zeros(9, dtype=bool))
    assert layout.sequence.tolist() == [1, 1, 0, 2, 0, 0, 1, 2, 2]
    assert layout.position.tolist() == [2, 3, 2, 2, 1, 3, 1, 1, 3]


@pytest.fixture
def filled(make_cache: Callable[..., Path]) -> tuple[Path, ShardData]:
    """Create a cache with one of two shards published, and the data of the second."""
    root = make_cache(shards=2, sequences=4, row_order="sequence", end=False)
    cache = Cache.open(root)
    words = cache.tokens(1)
    text = ShardText(words.tokens, words.lengths, words.documents, words.starts)
    kept, dropped = kept_positions(cache.manifest.identity, text.tokens, text.lengths)
    rows = {name: cache.read(name, 1) for name in cache.hookpoints}
    return root, ShardData(1, text, kept, dropped, rows, {})


def unpublish(root: Path, shard: int) -> None:
    for path in root.rglob(f"{shard:05d}.*"):
        path.unlink()


def test_the_receipt_comes_after_every_file(
    filled: tuple[Path, ShardData], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, shard = filled
    unpublish(root, 1)
    published: list[str] = []
    replace = os.replace

    def record(source: str, target: str, **folders: int) -> None:
        folder = Path(f"/proc/self/fd/{folders['dst_dir_fd']}").resolve()
        published.append(str((folder / target).relative_to(root.resolve())))
        replace(source, target, **folders)

    monkeypatch.setattr(os, "replace", record)
    receipt = publish_shard(root, read_manifest(root), shard)
    *files, last = published
    assert last == "shards/00001.json"
    assert sorted(files) == [
        "activations/layers.0/00001.safetensors",
        "activations/layers.1/00001.safetensors",
        "stats/00001.safetensors",
        "tokens/00001.safetensors",
    ]
    assert Cache.open(root).receipts[1] == receipt


def test_the_receipt_counts_what_the_shard_holds(filled: tuple[Path, ShardData]) -> None:
    root, shard = filled
    shard.rows["layers.1"].values[5, 3] = np.nan
    shard.rows["layers.0"].values[6:8, 3] = 40_000
    receipt = publish_shard(root, read_manifest(root), shard)
    assert (receipt.shard, receipt.first_sequence, receipt.sequences) == (1, 4, 4)
    assert receipt.rows == 64
    assert receipt.dropped == dict.fromkeys(FILTERS, 0) | {"skip_positions": 4}
    assert receipt.non_finite == {"layers.0": 0, "layers.1": 1}
    assert receipt.near_overflow == {"layers.0": 2, "layers.1": 0}
    for name, file in receipt.files.items():
        folder, _, hookpoint = name.partition("/")
        path = root / folder / hookpoint / "00001.safetensors"
        assert path.stat().st_size == file.bytes


def test_statistics_and_tokens_are_readable_by_the_safetensors_library(
    filled: tuple[Path, ShardData],
) -> None:
    root, shard = filled
    stats = safetensors.numpy.load_file(root / "stats" / "00001.safetensors")
    expected = compute(shard.rows["layers.0"], Cache.open(root).row_dtype)
    np.testing.assert_array_equal(stats["layers.0/sum"], expected.total)
    np.testing.assert_array_equal(stats["layers.0/sum_squares"], expected.total_squares)
    np.testing.assert_array_equal(stats["layers.0/abs_max"], expected.abs_max)
    norms = [expected.norm_total, expected.norm_max]
    np.testing.assert_array_equal(stats["layers.0/norm_sum_max"], norms)
    np.testing.assert_array_equal(stats["layers.0/norm_histogram"], expected.norm_histogram)
    words = safetensors.numpy.load_file(root / "tokens" / "00001.safetensors")
    np.testing.assert_array_equal(words["tokens"], shard.text.tokens)
    np.testing.assert_array_equal(words["lengths"], [17] * 4)
    np.testing.assert_array_equal(words["row_position"], np.tile(np.arange(1, 17), 4))


def test_a_crash_at_any_call_leaves_a_valid_cache_that_the_same_shard_completes(
    filled: tuple[Path, ShardData], faults: Any, tree: Tree
) -> None:
    root, shard = filled
    manifest, whole = read_manifest(root), tree(root)
    for number in itertools.count():
        unpublish(root, 1)
        before = tree(root)
        try:
            with faults.at(number):
                publish_shard(root, manifest, shard)
        except faults.Crash:
            cache = Cache.open(root)
            assert 0 in cache.shards
            assert {name: tree(root)[name] for name in before} == before
            for s in cache.shards:  # 1 only if it crashed while the receipt's name was synced
                assert cache.read("layers.1", s).values.shape == (64, 16)
                assert cache.tokens(s).tokens.shape == (4, 17)
                assert cache.statistics("layers.0", [s]).count == 64
            for partial in root.rglob(".*.partial-*"):
                partial.unlink()
        else:
            break
        publish_shard(root, manifest, shard)
        assert tree(root) == whole
    assert number > 30


def test_a_full_disk_at_any_call_leaves_no_shard_and_no_partial_file(
    filled: tuple[Path, ShardData], faults: Any
) -> None:
    root, shard = filled
    manifest = read_manifest(root)
    for number in itertools.count():
        unpublish(root, 1)
        try:
            with faults.at(number, OSError(errno.ENOSPC, "No space left on device")):
                publish_shard(root, manifest, shard)
        except DiskFullError:
            assert not list(root.rglob("*.partial-*"))
            is_published = receipt_path(root, 1).exists()
            assert Cache.open(root).shards == ([0, 1] if is_published else [0])
        else:
            break
    assert number > 30


def test_a_row_over_the_median_at_one_hookpoint_is_an_outlier() -> None:
    norms = {"a": np.array([1.0, 2, 3, 30, 2]), "b": np.array([50.0, 5, 5, 5, 5])}
    assert norm_outliers(norms, 10).tolist() == [False, False, False, True, False]
    assert norm_outliers(norms, 9.9).tolist() == [True, False, False, True, False]


def test_a_non_finite_row_is_an_outlier_and_excluded_from_the_median() -> None:
    norms = {"a": np.array([1.0, np.inf, np.nan, 2, 3, np.inf, np.nan])}
    assert norm_outliers(norms, 2).tolist() == [False, True, True, False, False, True, True]
    assert norm_outliers({"a": np.array([np.nan, np.inf])}, 5).all()
    assert norm_outliers({"a": np.empty(0)}, 5).shape == (0,)


def test_norms_are_euclidean_and_do_not_overflow_float32() -> None:
    rows = np.array([[3, 4], [0, 0], [2e38, 2e38], [np.inf, 0]], dtype=np.float32)
    expected = [5, 0, np.sqrt(2) * float(np.float32(2e38)), np.inf]
    np.testing.assert_allclose(row_norms(rows), expected, rtol=1e-12)
