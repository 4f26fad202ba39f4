from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from actcache.cache.reader import Cache
from actcache.core.json_codec import to_json
from actcache.errors import ActcacheError, CorruptShardError, FormatError
from actcache.filesystem.atomic import digest_file
from actcache.format.manifest import FILTERS, read_manifest
from actcache.storage import BACKENDS, ROW_DTYPES, StoredRows
from actcache.storage.zarr import document

Make = Callable[..., Path]

HOOKPOINTS = {"layers.0": 6, "layers.1.mlp:in": 10}
COMPRESSIONS = ["none", "zstd"]


@pytest.fixture(params=COMPRESSIONS)
def root(request: pytest.FixtureRequest, make_cache: Make) -> Path:
    """Create a zarr cache of three shards with 64, 64 and 32 rows."""
    return make_cache(
        shards=3,
        sequences=4,
        last_sequences=2,
        hookpoints=HOOKPOINTS,
        dtype="bfloat16",
        backend="zarr",
        compression=request.param,
    )


def chunk(root: Path, shard: int = 1, hookpoint: str = "layers.0") -> Path:
    return BACKENDS["zarr"].path(root, hookpoint, shard)


def test_a_shard_is_a_chunk_of_the_array_of_its_hookpoint(tmp_path: Path) -> None:
    expected = tmp_path / "activations" / "layers.9.mlp:in" / "c" / "12" / "0"
    assert chunk(tmp_path, 12, "layers.9.mlp:in") == expected


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_zarr_opens_the_arrays_and_both_backends_hold_the_same_rows(
    dtype: str, compression: str, make_cache: Make
) -> None:
    shape: dict[str, Any] = {"shards": 3, "sequences": 4, "last_sequences": 2, "dtype": dtype}
    memmap = Cache.open(make_cache(hookpoints=HOOKPOINTS, **shape))
    path = make_cache(hookpoints=HOOKPOINTS, backend="zarr", compression=compression, **shape)
    cache = Cache.open(path)
    assert cache.manifest.cache_id == memmap.manifest.cache_id
    for hookpoint, width in HOOKPOINTS.items():
        array = zarr.open(path / "activations" / hookpoint, mode="r")
        assert isinstance(array, zarr.Array)
        assert (array.shape, array.chunks) == ((3 * 64, width), (64, width))
        assert array.dtype == np.dtype(ROW_DTYPES[dtype].storage)
        assert array.attrs["actcache_dtype"] == dtype
        for shard in memmap.shards:
            rows = memmap.read(hookpoint, shard)
            whole, some = cache.read(hookpoint, shard), cache.read(hookpoint, shard, 7, 9)
            for part, truth in rows.parts.items():
                np.testing.assert_array_equal(whole.parts[part], truth)
                np.testing.assert_array_equal(some.parts[part], truth[7:16])
            there = np.asarray(array[64 * shard : 64 * (shard + 1)])
            np.testing.assert_array_equal(there[: len(rows)], rows.values)
            assert not there[len(rows) :].any()
    for shard, receipt in memmap.receipts.items():
        other = cache.receipts[shard]
        assert (receipt.rows, receipt.non_finite) == (other.rows, other.non_finite)
        for name in ("tokens", "stats"):
            assert receipt.files[name] == other.files[name]


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_zarr_reads_8_bit_rows_and_their_scales(
    compression: str, dtype: str, make_cache: Make
) -> None:
    path = make_cache(
        shards=3,
        sequences=4,
        last_sequences=2,
        hookpoints=HOOKPOINTS,
        dtype=dtype,
        backend="zarr",
        compression=compression,
    )
    cache = Cache.open(path)
    for hookpoint in HOOKPOINTS:
        values = zarr.open(path / "activations" / hookpoint, mode="r")
        scales = zarr.open(path / "scales" / hookpoint, mode="r")
        assert isinstance(values, zarr.Array)
        assert isinstance(scales, zarr.Array)
        assert values.dtype == {"int8": np.int8, "float8_e4m3": np.uint8}[dtype]
        assert values.attrs["actcache_dtype"] == dtype
        assert (scales.shape, scales.chunks, scales.dtype) == ((192,), (64,), np.float32)
        numbers = torch.from_numpy(np.asarray(values[:160]))
        if dtype == "float8_e4m3":
            numbers = numbers.view(torch.float8_e4m3fn)
        decoded = numbers.float() * torch.from_numpy(np.asarray(scales[:160]))[:, None]
        truth = [cache.row_dtype.to_float32(cache.read(hookpoint, s)) for s in cache.shards]
        np.testing.assert_array_equal(decoded.numpy(), np.concatenate(truth))
        assert not np.asarray(scales[160:]).any()


def test_bfloat16_is_uint16_to_zarr(root: Path) -> None:
    array = zarr.open(root / "activations" / "layers.0", mode="r")
    assert isinstance(array, zarr.Array)
    assert array.dtype == np.uint16
    cache = Cache.open(root)
    first = cache.row_dtype.to_float32(StoredRows({"activations": np.asarray(array[:64])}))
    np.testing.assert_array_equal(first, cache.row_dtype.to_float32(cache.read("layers.0", 0)))


TYPES = {"bfloat16": "uint16", "float32": "float32", "int8": "int8", "float8_e4m3": "uint8"}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("part", ["activations", "scales"])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_metadata_equals_that_of_the_zarr_library(
    dtype: str, part: str, compression: str, make_cache: Make, tmp_path: Path
) -> None:
    if part == "scales" and dtype not in ("int8", "float8_e4m3"):
        return
    shape: dict[str, Any] = {"shards": 3, "sequences": 4, "dtype": dtype, "end": False}
    path = make_cache(hookpoints=HOOKPOINTS, backend="zarr", compression=compression, **shape)
    expected = document(read_manifest(path), "layers.0", part)
    kind = np.dtype("float32" if part == "scales" else TYPES[dtype])
    row_dtype = zarr.codecs.BloscCodec(
        typesize=kind.itemsize, cname="zstd", clevel=1, shuffle="shuffle", blocksize=1 << 19
    )
    zarr.create_array(
        tmp_path / "theirs",
        shape=(192,) if part == "scales" else (192, 6),
        chunks=(64,) if part == "scales" else (64, 6),
        dtype=kind.name,
        compressors=row_dtype if len(expected["codecs"]) > 1 else None,  # type: ignore[arg-type]
        fill_value=0,
        attributes={"actcache_dtype": "float32" if part == "scales" else dtype},
    )
    theirs = json.loads((tmp_path / "theirs" / "zarr.json").read_text())
    assert theirs.pop("storage_transformers") == []
    assert theirs == expected


def test_a_short_shard_is_padded_to_a_whole_chunk(make_cache: Make) -> None:
    root = make_cache(shards=2, sequences=4, last_sequences=1, backend="zarr")
    for shard, rows in ((0, 64), (1, 16)):
        data = chunk(root, shard).read_bytes()
        assert len(data) == 64 * 16 * 4
        assert data[: rows * 64] == Cache.open(root).read("layers.0", shard).values.tobytes()
        assert not any(data[rows * 64 :])


def test_receipts_hold_size_and_digest_of_the_chunks(root: Path) -> None:
    for shard, receipt in Cache.open(root).receipts.items():
        for name in HOOKPOINTS:
            assert receipt.files[f"activations/{name}"] == digest_file(chunk(root, shard, name))


def test_initialize_is_idempotent_and_restores_missing_metadata(root: Path) -> None:
    manifest, path = read_manifest(root), root / "activations" / "layers.0" / "zarr.json"
    data, mtime = path.read_bytes(), path.stat().st_mtime_ns
    BACKENDS["zarr"].initialize(root, manifest)
    assert path.stat().st_mtime_ns == mtime
    path.unlink()
    BACKENDS["zarr"].initialize(root, manifest)
    assert path.read_bytes() == data
    path.write_bytes(data.replace(b"192", b"193"))
    with pytest.raises(CorruptShardError, match=r"(?s)zarr\.json is not.*manifest.*delete it"):
        BACKENDS["zarr"].initialize(root, manifest)


def damaged_documents(data: bytes) -> dict[str, bytes]:
    return {
        "longer": data.replace(b"192", b"1920"),
        "other type": data.replace(b"uint16", b"uint8"),
        "true for one": data.replace(b'"zarr_format": 3', b'"zarr_format": true'),
        "other codec": data.replace(b"little", b"pickle"),
        "not JSON": b"{",
        "empty": b"",
        "deep": b"[" * 100_000,
        "infinite": data.replace(b'"fill_value": 0', b'"fill_value": 1e999'),
    }


@pytest.mark.parametrize("damage", damaged_documents(b""))
def test_an_array_of_another_manifest_is_refused_before_a_chunk_is_read(
    damage: str, root: Path
) -> None:
    path = root / "activations" / "layers.0" / "zarr.json"
    path.write_bytes(damaged_documents(path.read_bytes())[damage])
    chunk(root).unlink()  # so that the error is not about the chunk
    with pytest.raises(CorruptShardError, match=r"zarr\.json"):
        Cache.open(root).read("layers.0", 1)
    Cache.open(root).read("layers.1.mlp:in", 1)


def link(path: Path) -> None:
    """Move a file or folder and replace it by a symbolic link."""
    elsewhere = path.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda root: chunk(root).unlink(),
    "short": lambda root: os.truncate(chunk(root), 20),
    "long": lambda root: chunk(root).write_bytes(chunk(root).read_bytes() + b"0"),
    "empty": lambda root: chunk(root).write_bytes(b""),
    "linked": lambda root: link(chunk(root)),
    "in a linked folder": lambda root: link(chunk(root).parent),
    "in linked chunks": lambda root: link(chunk(root).parent.parent),
    "a folder": lambda root: (chunk(root).unlink(), chunk(root).mkdir()),
    "a pipe": lambda root: (chunk(root).unlink(), os.mkfifo(chunk(root))),
    "described by a link": lambda root: link(root / "activations" / "layers.0" / "zarr.json"),
    "not described": lambda root: (root / "activations" / "layers.0" / "zarr.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_missing_resized_or_linked_chunk_is_refused(damage: str, root: Path) -> None:
    DAMAGES[damage](root)
    # A linked folder is refused when the cache is opened, all else when the chunk is located.
    with pytest.raises((CorruptShardError, FormatError), match=r"activations/layers\.0"):
        Cache.open(root).read("layers.0", 1)


def test_a_receipt_of_more_rows_than_a_chunk_holds_is_refused(root: Path) -> None:
    path = root / "shards" / "00001.json"
    receipt = json.loads(path.read_text()) | {"rows": 68, "dropped": dict.fromkeys(FILTERS, 0)}
    path.write_bytes(to_json(receipt, sealed=True))
    with pytest.raises(CorruptShardError, match=r"(?s)at most 64 rows.*68 in the receipt"):
        Cache.open(root).read("layers.0", 1)


def test_any_damaged_byte_of_an_array_raises_only_our_errors(root: Path) -> None:
    state = np.random.RandomState(0)
    for path in (chunk(root), root / "activations" / "layers.0" / "zarr.json"):
        data = path.read_bytes()
        for offset in {*range(min(40, len(data))), *state.randint(len(data), size=40).tolist()}:
            flipped = data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :]
            for damaged in (flipped, data[:offset], data[:offset] + b"1" + data[offset:]):
                path.write_bytes(damaged)
                try:
                    Cache.open(root).read("layers.0", 1)
                except ActcacheError:
                    continue
                assert path.name == "0"  # other numbers: the receipt's digest finds them
        path.write_bytes(data)
    Cache.open(root).read("layers.0", 1)
