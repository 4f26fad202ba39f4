"""Verified reads: files that match their receipts, files that change meanwhile, and the probe."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import actcache.cache.reader
from actcache.cache.reader import Cache
from actcache.errors import CorruptShardError
from actcache.filesystem.atomic import digest_file
from actcache.storage import BACKENDS
from actcache.storage.preadv import WHOLE
from actcache.stream import verified_reads
from actcache.stream.order import OrderPlan, Span, make_plan
from actcache.stream.verified_reads import (
    ProbeResult,
    ReadSettings,
    VerifiedReader,
    Verify,
    probe_read_settings,
)

HOOKPOINTS = {"layers.0": 6, "layers.1": 10}
SPANS = (Span(1, 16, 16), Span(0, 0, 8), Span(1, 0, 16))


@pytest.fixture(params=["memmap", "zarr"])
def cache(request: pytest.FixtureRequest, make_cache: Callable[..., Path]) -> Cache:
    root = make_cache(hookpoints=HOOKPOINTS, sequences=4, dtype="int8", backend=request.param)
    return Cache.open(root)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the files that were read completely and compared, in order."""
    paths: list[str] = []

    def digest(path: Path) -> object:
        paths.append(str(path))
        return digest_file(path)

    monkeypatch.setattr(actcache.cache.reader, "digest_file", digest)
    return paths


def load(reader: VerifiedReader, cache: Cache, spans: tuple[Span, ...] = SPANS) -> None:
    """Load the spans of layers.1, and compare them with the cache's rows."""
    out = cache.row_dtype.empty(sum(span.rows for span in spans), 10)
    reader.load(spans, {"layers.1": out})
    parts = [cache.read("layers.1", s.shard, s.start, s.rows) for s in spans]
    for name, found in out.parts.items():
        np.testing.assert_array_equal(found, np.concatenate([p.parts[name] for p in parts]))


def values_path(cache: Cache, shard: int) -> Path:
    return BACKENDS[cache.manifest.backend].path(cache.root, "layers.1", shard)


def change(path: Path) -> None:
    """Change the last byte, and restore size and mtime: only the bytes and `ctime` differ."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_only_files_that_are_read_are_compared_and_each_only_once(
    cache: Cache, compared: list[str]
) -> None:
    reader = VerifiedReader(cache, "first-read")
    assert compared == []
    for _ in range(3):
        load(reader, cache)
    expected = [str(p) for s in (1, 0) for p in cache.files_of("layers.1", s).values()]
    assert compared == expected
    assert len(expected) == (2 if cache.manifest.backend == "memmap" else 4)


def test_mode_always_compares_a_file_once_for_every_window(
    cache: Cache, compared: list[str]
) -> None:
    reader = VerifiedReader(cache, "always")
    for windows in (1, 2):
        load(reader, cache)
        each = [path for s in (1, 0) for path in cache.files_of("layers.1", s).values()]
        assert len(compared) == windows * len(each)


def test_mode_never_compares_no_file_and_raises_for_a_missing_one(
    cache: Cache, compared: list[str]
) -> None:
    reader = VerifiedReader(cache, "never")
    load(reader, cache)
    change(values_path(cache, 1))
    reader.load(SPANS, {"layers.1": cache.row_dtype.empty(40, 10)})
    assert compared == []
    values_path(cache, 1).unlink()
    with pytest.raises(CorruptShardError, match="is gone"):
        reader.load(SPANS, {"layers.1": cache.row_dtype.empty(40, 10)})


@pytest.mark.parametrize("verify", ["first-read", "always"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_changed_bytes_raise_with_the_shard_before_and_after_the_first_read(
    cache: Cache, verify: Verify, when: str
) -> None:
    reader = VerifiedReader(cache, verify)
    if when == "after":
        load(reader, cache)
    change(values_path(cache, 1))
    with pytest.raises(CorruptShardError, match=r"differs from the receipt of shard 1"):
        load(reader, cache)


@pytest.mark.parametrize("verify", ["first-read", "always", "never"])
def test_a_deleted_file_raises_an_error_with_its_path(cache: Cache, verify: Verify) -> None:
    reader = VerifiedReader(cache, verify)
    load(reader, cache)
    values_path(cache, 0).unlink()
    with pytest.raises(CorruptShardError) as caught:
        load(reader, cache)
    assert str(values_path(cache, 0)) in str(caught.value)
    assert "is gone" in str(caught.value)


def test_a_file_replaced_by_a_copy_is_compared_again_and_read(
    cache: Cache, compared: list[str]
) -> None:
    reader, path = VerifiedReader(cache, "first-read"), values_path(cache, 1)
    load(reader, cache)
    before = len(compared)
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").replace(path)
    load(reader, cache)
    assert compared[before:] == [str(path)]


def test_rows_of_a_file_that_changes_during_the_read_are_not_returned(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, real = VerifiedReader(cache, "first-read"), cache.read_views

    def read_late(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        change(values_path(cache, 1))

    monkeypatch.setattr(cache, "read_views", read_late)
    with pytest.raises(CorruptShardError, match="receipt of shard 1"):
        reader.load(SPANS[:1], {"layers.1": cache.row_dtype.empty(16, 10)})


def test_a_symlink_in_place_of_a_file_is_rejected(cache: Cache) -> None:
    reader, path = VerifiedReader(cache, "first-read"), values_path(cache, 1)
    load(reader, cache)
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")
    with pytest.raises(CorruptShardError, match="differs from the receipt"):
        load(reader, cache)


# The probe.


@pytest.fixture
def probed(make_cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(verified_reads, "_ROUND", 4 * 4 * 16 * 4)  # four blocks of four rows
    return Cache.open(make_cache(hookpoints={"layers.0": 16}))


def plan_of(cache: Cache) -> OrderPlan:
    shards = [(shard, receipt.rows) for shard, receipt in cache.receipts.items()]
    return make_plan(shards, 4, 32, 0)


@pytest.mark.parametrize(
    ("speeds", "best"),
    [
        ((1, 1.05, 1.05, 1.05), ReadSettings()),
        ((1, 2, 2, 2), ReadSettings(4)),
        ((3, 1, 1, 4), ReadSettings(readahead=True)),
        ((1, 1, 2, 2), ReadSettings(max_read_bytes=WHOLE)),
        ((1, 2, 3, 4), ReadSettings(4, WHOLE, readahead=True)),
    ],
)
def test_the_probe_keeps_a_change_that_reads_faster(
    probed: Cache, speeds: Sequence[float], best: ReadSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Span] = []
    found = iter(speeds)

    def speed(
        _probed: Cache, _names: Sequence[str], spans: Sequence[Span], _: ReadSettings
    ) -> float:
        seen.extend(spans)
        return next(found)

    monkeypatch.setattr(verified_reads, "_rows_per_second", speed)
    assert probe_read_settings(probed, ["layers.0"], plan_of(probed)).reading == best
    assert len(set(seen)) == len(seen) == 4 * 4  # a block read twice would come from the page cache


def test_the_probe_reads_the_cache_and_reports_the_speed(probed: Cache) -> None:
    found = probe_read_settings(probed, ["layers.0"], plan_of(probed))
    assert found.reading.threads in (2, 4)
    assert found.bytes_per_second is not None
    assert found.bytes_per_second > 0


def test_a_small_cache_is_not_probed(probed: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified_reads, "_ROUND", 1 << 20)
    assert probe_read_settings(probed, ["layers.0"], plan_of(probed)) == ProbeResult(
        ReadSettings(), None
    )


def test_the_probe_raises_for_a_missing_file(
    probed: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise CorruptShardError("it is gone")

    monkeypatch.setattr(probed, "read_views", gone)
    with pytest.raises(CorruptShardError, match="gone"):
        probe_read_settings(probed, ["layers.0"], plan_of(probed))
