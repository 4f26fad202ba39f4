"""Rows out of files that are as promised, and out of files that change while they are read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import actcache.cache.reader
from actcache.cache.reader import Cache
from actcache.errors import CorruptShardError
from actcache.filesystem.atomic import digest_file
from actcache.storage import BACKENDS
from actcache.stream.order import Span
from actcache.stream.verified_reads import VerifiedReader, Verify

HOOKPOINTS = {"layers.0": 6, "layers.1": 10}
SPANS = (Span(1, 16, 16), Span(0, 0, 8), Span(1, 0, 16))


@pytest.fixture(params=["memmap", "zarr"])
def cache(request: pytest.FixtureRequest, make_cache: Callable[..., Path]) -> Cache:
    root = make_cache(hookpoints=HOOKPOINTS, sequences=4, dtype="int8", backend=request.param)
    return Cache.open(root)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that were read in full and compared, in order."""
    paths: list[str] = []

    def digest(path: Path) -> object:
        paths.append(str(path))
        return digest_file(path)

    monkeypatch.setattr(actcache.cache.reader, "digest_file", digest)
    return paths


def load(reads: VerifiedReader, cache: Cache, spans: tuple[Span, ...] = SPANS) -> None:
    """Load the spans of layers.1, and compare them with the cache's rows."""
    out = cache.row_dtype.empty(sum(span.rows for span in spans), 10)
    reads.load(spans, {"layers.1": out})
    parts = [cache.read("layers.1", s.shard, s.start, s.rows) for s in spans]
    for name, found in out.parts.items():
        np.testing.assert_array_equal(found, np.concatenate([p.parts[name] for p in parts]))


def values_path(cache: Cache, shard: int) -> Path:
    return BACKENDS[cache.manifest.backend].path(cache.root, "layers.1", shard)


def change(path: Path) -> None:
    """Another last byte, and the size and time of before: only the bytes and `ctime` tell."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_file_is_compared_once_before_its_first_rows_and_no_other_is(
    cache: Cache, compared: list[str]
) -> None:
    reads = VerifiedReader(cache, "first-read")
    assert compared == []
    for _ in range(3):
        load(reads, cache)
    expected = [str(p) for s in (1, 0) for p in cache.files_of("layers.1", s).values()]
    assert compared == expected
    assert len(expected) == (2 if cache.manifest.backend == "memmap" else 4)


def test_always_compares_a_file_once_for_every_window(cache: Cache, compared: list[str]) -> None:
    reads = VerifiedReader(cache, "always")
    for windows in (1, 2):
        load(reads, cache)
        each = [path for s in (1, 0) for path in cache.files_of("layers.1", s).values()]
        assert len(compared) == windows * len(each)


def test_never_compares_nothing_and_still_tells_a_file_that_is_gone(
    cache: Cache, compared: list[str]
) -> None:
    reads = VerifiedReader(cache, "never")
    load(reads, cache)
    change(values_path(cache, 1))
    reads.load(SPANS, {"layers.1": cache.row_dtype.empty(40, 10)})
    assert compared == []
    values_path(cache, 1).unlink()
    with pytest.raises(CorruptShardError, match="is gone"):
        reads.load(SPANS, {"layers.1": cache.row_dtype.empty(40, 10)})


@pytest.mark.parametrize("verify", ["first-read", "always"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_bytes_that_change_are_told_with_the_shard_before_and_after_the_first_touch(
    cache: Cache, verify: Verify, when: str
) -> None:
    reads = VerifiedReader(cache, verify)
    if when == "after":
        load(reads, cache)
    change(values_path(cache, 1))
    with pytest.raises(CorruptShardError, match=r"differs from the receipt of shard 1"):
        load(reads, cache)


@pytest.mark.parametrize("verify", ["first-read", "always", "never"])
def test_a_file_that_vanishes_is_told_by_its_name(cache: Cache, verify: Verify) -> None:
    reads = VerifiedReader(cache, verify)
    load(reads, cache)
    values_path(cache, 0).unlink()
    with pytest.raises(CorruptShardError) as caught:
        load(reads, cache)
    assert str(values_path(cache, 0)) in str(caught.value)
    assert "is gone" in str(caught.value)


def test_a_file_that_is_put_back_in_its_own_bytes_is_compared_again_and_read_on(
    cache: Cache, compared: list[str]
) -> None:
    reads, path = VerifiedReader(cache, "first-read"), values_path(cache, 1)
    load(reads, cache)
    before = len(compared)
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").replace(path)
    load(reads, cache)
    assert compared[before:] == [str(path)]


def test_rows_of_a_file_that_changes_between_its_check_and_its_reading_are_not_handed_out(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, real = VerifiedReader(cache, "first-read"), cache.read_views

    def read_late(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        change(values_path(cache, 1))

    monkeypatch.setattr(cache, "read_views", read_late)
    with pytest.raises(CorruptShardError, match="receipt of shard 1"):
        reads.load(SPANS[:1], {"layers.1": cache.row_dtype.empty(16, 10)})


def test_a_link_in_a_files_place_is_refused(cache: Cache) -> None:
    reads, path = VerifiedReader(cache, "first-read"), values_path(cache, 1)
    load(reads, cache)
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")
    with pytest.raises(CorruptShardError, match="promises"):
        load(reads, cache)
