from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from actcache.cache.folder import tokens_path
from actcache.cache.reader import Cache
from actcache.core.json_codec import to_json
from actcache.errors import (
    ActcacheError,
    CorruptShardError,
    EmptyCacheError,
    FormatError,
    HookpointError,
)
from actcache.filesystem.atomic import digest_file, write_atomic
from actcache.format.manifest import FILTERS, read_manifest
from actcache.format.receipts import publish_receipt, receipt_path
from actcache.format.statistics import compute
from actcache.storage import ROW_DTYPES, StoredRows
from actcache.storage import safetensors_io as safetensors_file

NOTHING_DROPPED = dict.fromkeys(FILTERS, 0)
FILES = ["activations/layers.1/00001", "tokens/00001", "stats/00001"]


def numbered(hookpoint: str, shard: int, count: int, width: int) -> np.ndarray:
    """Build rows that encode their hookpoint, shard and index."""
    rows = np.zeros((count, width), dtype=np.float32)
    rows[:, 0], rows[:, 1], rows[:, 2] = int(hookpoint[-1]), shard, np.arange(count)
    return rows


@pytest.fixture
def root(make_cache: Callable[..., Path]) -> Path:
    return make_cache(shards=3, sequences=4, last_sequences=2, rows=numbered)


def read_all(root: Path) -> None:
    """Read every file of shard 1."""
    cache = Cache.open(root)
    cache.statistics("layers.1")
    cache.tokens(1)
    cache.read("layers.1", 1)


def test_a_cache_lists_its_hookpoints_shards_and_rows(root: Path) -> None:
    cache = Cache.open(str(root))
    assert cache.hookpoints == ["layers.0", "layers.1"]
    assert cache.shards == [0, 1, 2]
    assert cache.rows == 64 + 64 + 32
    assert cache.complete


def test_row_j_is_the_same_token_at_every_hookpoint(root: Path) -> None:
    cache = Cache.open(root)
    for shard in cache.shards:
        words = cache.tokens(shard)
        natural = words.row_sequence * 16 + words.row_position - 1
        for number, hookpoint in enumerate(cache.hookpoints):
            rows = cache.read(hookpoint, shard).values
            assert (rows[:, 0] == number).all()
            assert (rows[:, 1] == shard).all()
            np.testing.assert_array_equal(rows[:, 2], natural)


def test_a_range_of_a_shard_is_read_exactly(root: Path) -> None:
    cache = Cache.open(root)
    whole = cache.read("layers.1", 1).values
    np.testing.assert_array_equal(cache.read("layers.1", 1, 10, 7).values, whole[10:17])
    np.testing.assert_array_equal(cache.read("layers.1", 1, 60).values, whole[60:])
    assert cache.read("layers.1", 1, 64).values.shape == (0, 16)
    out = cache.row_dtype.empty(5, 16)
    cache.read_into("layers.1", 1, 59, out)
    np.testing.assert_array_equal(out.values, whole[59:])


def test_rows_come_in_the_type_on_disk(make_cache: Callable[..., Path]) -> None:
    exact = Cache.open(make_cache(shards=1, dtype="float32"))
    for dtype in ROW_DTYPES:
        cache = Cache.open(make_cache(shards=1, dtype=dtype))
        rows = cache.row_dtype.to_torch(cache.read("layers.0", 0))
        scaled = dtype in ("int8", "float8_e4m3")
        assert rows.dtype == (torch.float32 if scaled else getattr(torch, dtype))
        np.testing.assert_allclose(
            rows.float().numpy(), exact.read("layers.0", 0).values, atol=0.02, rtol=0.07
        )


def test_the_former_name_of_the_type_on_disk_still_works(root: Path) -> None:
    cache = Cache.open(root)
    assert cache.codec is cache.row_dtype


def test_statistics_cover_the_requested_shards(root: Path) -> None:
    cache = Cache.open(root)
    for shards in ([0], [2, 0], None):
        rows = np.concatenate([cache.read("layers.1", s).values for s in shards or cache.shards])
        expected = compute(StoredRows({"activations": rows}), cache.row_dtype)
        found = cache.statistics("layers.1", shards)
        np.testing.assert_allclose(found.total, expected.total, rtol=1e-12)
        np.testing.assert_array_equal(found.norm_histogram, expected.norm_histogram)
        assert found.count == expected.count == len(rows)
        assert found.norm_max == expected.norm_max


def test_statistics_of_an_empty_list_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="not enough values"):
        Cache.open(root).statistics("layers.1", [])


def test_statistics_count_non_finite_rows(make_cache: Callable[..., Path]) -> None:
    def rows(hookpoint: str, shard: int, count: int, width: int) -> np.ndarray:
        x = numbered(hookpoint, shard, count, width)
        x[: shard + 1, 1] = np.inf if hookpoint == "layers.1" else 0
        return x

    cache = Cache.open(make_cache(shards=2, rows=rows))
    assert cache.statistics("layers.0").non_finite == 0
    assert cache.statistics("layers.1").non_finite == 3
    assert cache.statistics("layers.1").count == cache.rows - 3


def test_an_unknown_hookpoint_is_refused_and_the_known_ones_listed(root: Path) -> None:
    cache = Cache.open(root)
    for read in (cache.statistics, lambda name: cache.read(name, 0)):
        with pytest.raises(HookpointError, match=r"(?s)layers\.7.*layers\.0 \| layers\.1"):
            read("layers.7")


def test_an_error_about_a_cache_without_shards_names_the_remedy(
    make_cache: Callable[..., Path],
) -> None:
    cache = Cache.open(make_cache(shards=0, end=False))
    assert (cache.shards, cache.rows, cache.complete) == ([], 0, False)
    with pytest.raises(EmptyCacheError, match=r"remedy: .*harvest command again"):
        cache.require_shards()
    with pytest.raises(EmptyCacheError):
        cache.statistics("layers.0")


def test_a_shard_without_its_receipt_does_not_exist(root: Path) -> None:
    receipt_path(root, 1).unlink()
    cache = Cache.open(root)
    assert cache.shards == [0, 2]
    assert cache.rows == 96
    assert cache.statistics("layers.0").count == 96


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage", ["missing", "cut", "extended", "empty", "link", "folder", "pipe"]
)
def test_a_changed_data_file_is_refused_and_its_path_named(
    file: str, damage: str, root: Path, tmp_path: Path
) -> None:
    path = root / f"{file}.safetensors"
    size = path.stat().st_size
    if damage in ("cut", "extended", "empty"):
        os.truncate(path, {"cut": size - 1, "extended": size + 1, "empty": 0}[damage])
    else:
        path.rename(tmp_path / "elsewhere")
    if damage == "link":
        path.symlink_to(tmp_path / "elsewhere")
    if damage == "folder":
        path.mkdir()
    if damage == "pipe":
        os.mkfifo(path)
    with pytest.raises(CorruptShardError, match=rf"(?s){file}.*expected.*got.*remedy"):
        read_all(root)


@pytest.mark.parametrize("file", FILES[1:])
def test_a_flipped_bit_in_tokens_or_statistics_is_detected(file: str, root: Path) -> None:
    path = root / f"{file}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShardError, match=r"(?s)differs from the receipt.*xxh3_128"):
        read_all(root)


def test_a_file_truncated_during_reading_is_detected(root: Path) -> None:
    cache = Cache.open(root)
    cache.read("layers.1", 1, 0, 1)
    os.truncate(root / "activations/layers.1/00001.safetensors", 4096 + 100)
    with pytest.raises(CorruptShardError, match="ends early"):
        cache.read("layers.1", 1)


def rewrite_receipt(root: Path, shard: int, **changes: object) -> None:
    path = receipt_path(root, shard)
    path.write_bytes(to_json(json.loads(path.read_text()) | changes, sealed=True))


def test_a_receipt_with_another_row_count_than_the_file_is_refused(root: Path) -> None:
    rewrite_receipt(root, 1, sequences=3, rows=48, dropped=NOTHING_DROPPED | {"skip_positions": 3})
    cache = Cache.open(root)
    with pytest.raises(CorruptShardError, match=r"activations/layers\.1/00001"):
        cache.read("layers.1", 1)


def test_a_receipt_cannot_cause_a_large_allocation(root: Path) -> None:
    manifest = read_manifest(root)
    identity = dataclasses.replace(manifest.identity, ctx_len=2**31 - 1)
    huge = dataclasses.replace(
        manifest,
        identity=identity,
        cache_id=identity.digest(),
        sequences_per_shard=2**21,
        planned_sequences=None,
    )
    write_atomic(root / "manifest.json", [to_json(huge, sealed=True)])
    for shard in (1, 2):
        receipt_path(root, shard).unlink()
    (root / "shards" / "END.json").unlink()
    sequences = 2**21
    rewrite_receipt(
        root,
        0,
        cache_id=huge.cache_id,
        sequences=sequences,
        rows=sequences * (2**31 - 2),
        dropped=NOTHING_DROPPED | {"skip_positions": sequences},
    )
    cache = Cache.open(root)
    assert cache.rows > 2**51
    with pytest.raises(CorruptShardError):
        cache.read("layers.0", 0)
    with pytest.raises(CorruptShardError):
        cache.tokens(0)


@pytest.mark.parametrize("tensor", ["row_sequence", "row_position"])
@pytest.mark.parametrize("value", [-1, 17, 2**31 - 1])
def test_row_addresses_outside_the_shard_are_refused(tensor: str, value: int, root: Path) -> None:
    cache = Cache.open(root)
    words = dataclasses.asdict(cache.tokens(1))
    words[tensor][3] = value
    file = safetensors_file.write(
        tokens_path(root, 1), {name: (array, None) for name, array in words.items()}
    )
    receipt = dataclasses.replace(
        cache.receipts[1], files=cache.receipts[1].files | {"tokens": file}
    )
    publish_receipt(root, cache.manifest, receipt)
    with pytest.raises(CorruptShardError, match=f"holds {tensor} out of range"):
        Cache.open(root).tokens(1)


def test_any_damaged_byte_of_a_cache_raises_only_our_errors(root: Path) -> None:
    """Damage every file at a dozen offsets: a byte 0xff, truncation, or an appended byte."""
    state = np.random.RandomState(0)
    codes = set()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        data = path.read_bytes()
        offsets = {0, 7, 8, len(data) - 1, *state.randint(len(data), size=8)}
        for offset in offsets:
            flipped = data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :]
            for damaged in (flipped, data[:offset], data[:offset] + b"1" + data[offset:]):
                path.write_bytes(damaged)
                try:
                    read_all(root)
                except ActcacheError as error:
                    codes.add(error.exit_code)
        path.write_bytes(data)
    read_all(root)
    assert {FormatError.exit_code, CorruptShardError.exit_code} <= codes


def test_reading_changes_nothing(root: Path) -> None:
    before = {p: digest_file(p) for p in root.rglob("*") if p.is_file()}
    read_all(root)
    assert {p: digest_file(p) for p in root.rglob("*") if p.is_file()} == before
