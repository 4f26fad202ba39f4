"""A cache in an object store gives the same summary, batches and findings as in a folder."""

from __future__ import annotations

import dataclasses
import fcntl
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import xxhash

from actcache.cache.convert import convert
from actcache.cache.reader import Cache
from actcache.cache.verify import verify
from actcache.config import ConvertConfig
from actcache.errors import CorruptShardError, EmptyCacheError
from actcache.inspection import read_sequences, render_page, summarize
from actcache.stream.activation_stream import ActivationStream
from actcache.stream.benchmark import benchmark_reads
from actcache.stream.order import make_plan
from actcache.stream.verified_reads import ReadSettings

Make = Callable[..., tuple[Path, str]]


def batches(cache: Cache, verify_: str = "first-read", threads: int = 3) -> list[bytes]:
    shards = [(shard, receipt.rows) for shard, receipt in cache.receipts.items()]
    plan = make_plan(shards, cache.manifest.block_rows, 64, 0, 128)
    with ActivationStream(
        cache, cache.hookpoints, plan, verify=verify_, reading=ReadSettings(threads), text=True
    ) as stream:
        return [
            b"".join(
                [
                    np.ascontiguousarray(batch.addresses).tobytes(),
                    batch.text.tokens.tobytes(),
                    *(x.numpy().tobytes() for x in batch.activations.values()),
                ]
            )
            for batch in islice(stream, plan.steps_per_epoch + 3)
        ]


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "memmap", "dtype": "float32"},
        {"backend": "memmap", "dtype": "int8"},
        {"backend": "zarr", "dtype": "int8"},
        {"backend": "zarr", "dtype": "float32", "compression": "zstd"},
    ],
    ids=lambda o: "-".join(o.values()),
)
def test_a_stream_from_a_store_equals_that_of_the_folder(
    in_memory: Make, options: dict[str, str]
) -> None:
    root, url = in_memory(**options)
    expected = batches(Cache.open(root))
    assert batches(Cache.open(url)) == expected  # out of the store
    assert batches(Cache.open(url), "never") == expected  # out of blocks that are here
    assert batches(Cache.open(url, block_cache_bytes=0), "always", threads=1) == expected


def test_a_cache_larger_than_the_block_cache_streams_the_same_bits(
    in_memory: Make, own_blocks: Path
) -> None:
    root, memory = in_memory(hookpoints={"layers.0": 4096}, sequences=16)  # 4 MiB a shard
    bound = 6 << 20
    cache = Cache.open(memory, block_cache_bytes=bound)
    seen: list[int] = []
    put = cache.root.files.blocks.put

    def watched(name: str, data: bytes) -> None:
        put(name, data)
        with (own_blocks / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            seen.append(sum(path.stat().st_size for path in own_blocks.glob("??/*")))

    cache.root.files.blocks.put = watched
    assert batches(cache) == batches(Cache.open(root))
    assert bound // 2 < max(seen) <= bound
    assert sum(path.stat().st_size for path in root.rglob("*.safetensors")) > 2 * bound


def test_summary_and_samples_equal_those_of_the_folder(in_memory: Make) -> None:
    root, url = in_memory(extended_by=8)
    (root / "logs").mkdir(exist_ok=True)
    facts = []
    for cache in (Cache.open(root), Cache.open(url)):
        summary = dataclasses.replace(summarize(cache), cache="", speed=())
        shown = list(islice(read_sequences(cache, "layers.1", None), 2))
        facts.append((summary, shown, render_page(summary, shown, shard=None)))
    assert facts[0] == facts[1]
    assert Cache.open(url).complete


def test_the_benchmark_measures_the_store_and_the_block_cache(in_memory: Make) -> None:
    _, url = in_memory()
    found = benchmark_reads(Cache.open(url))
    assert [s.what for s in found.speeds[:2]] == [
        "files, front to back, from the store",
        "files, front to back, from kept blocks",
    ]


def test_a_cache_is_converted_from_a_store(in_memory: Make, tmp_path: Path) -> None:
    root, url = in_memory()
    convert(ConvertConfig(url, str(tmp_path / "new"), backend="zarr"))
    assert batches(Cache.open(tmp_path / "new")) == batches(Cache.open(root))


def test_verify_bypasses_the_block_cache_and_names_damaged_files(
    in_memory: Make, own_blocks: Path
) -> None:
    _, url = in_memory(backend="zarr")
    Cache.open(url)
    assert verify(url).is_sound
    fs, base = fsspec.core.url_to_fs(url)
    bad, gone = (f"activations/layers.1/c/{shard}/0" for shard in (1, 2))
    data = bytearray(fs.cat_file(f"{base}/{bad}"))
    data[5] ^= 1
    fs.pipe_file(f"{base}/{bad}", bytes(data))
    fs.rm_file(f"{base}/{gone}")
    found = verify(url)
    assert [(d.file, d.shard) for d in found.damages] == [(bad, 1), (gone, 2)]


def test_a_missing_url_is_no_cache(memory: str) -> None:
    with pytest.raises(EmptyCacheError, match="is not a cache"):
        Cache.open(memory)


def test_an_object_that_changes_or_vanishes_during_a_stream_is_reported(in_memory: Make) -> None:
    root, url = in_memory()
    fs, base = fsspec.core.url_to_fs(url)
    key = "activations/layers.0/00001.safetensors"
    cache = Cache.open(url, block_cache_bytes=0)
    path = cache.compare_file(1, "activations/layers.0")
    rows = cache.read("layers.0", 1)
    data = bytearray(fs.cat_file(f"{base}/{key}"))
    data[-1] ^= 1
    fs.pipe_file(f"{base}/{key}", bytes(data))
    with pytest.raises(CorruptShardError, match="has changed since it was compared"):
        cache.read("layers.0", 1)
    with pytest.raises(CorruptShardError, match="receipt of shard 1"):
        batches(Cache.open(url))
    fs.rm_file(f"{base}/{key}")
    with pytest.raises(CorruptShardError, match="is gone"):
        cache.read("layers.0", 1)
    assert str(path) == f"{url}/{key}"
    fs.pipe_file(f"{base}/{key}", (root / key).read_bytes())
    np.testing.assert_array_equal(cache.read("layers.0", 1).values, rows.values)


def test_blocks_of_a_replaced_object_and_damaged_blocks_are_not_used(
    in_memory: Make, own_blocks: Path, make_cache: Callable[..., Path]
) -> None:
    _, url = in_memory()
    expected = batches(Cache.open(url))
    spoiled = 0
    for path in own_blocks.glob("??/*"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        spoiled += 1
    assert spoiled
    assert batches(Cache.open(url), "never") == expected
    for path in own_blocks.glob("??/*"):
        if b'"activations"' in (data := path.read_bytes()):  # whole, and not what was promised
            data = data[16:-1] + b"x"
            path.write_bytes(xxhash.xxh3_128(data).digest() + data)
    assert batches(Cache.open(url)) == expected
    other = make_cache(seed=7, rows=lambda *a: np.full((a[2], a[3]), a[1], dtype=np.float32))
    fs, base = fsspec.core.url_to_fs(url)
    for path in other.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{base}/{path.relative_to(other)}", path.read_bytes())
    assert batches(Cache.open(url), "never") == batches(Cache.open(other))
