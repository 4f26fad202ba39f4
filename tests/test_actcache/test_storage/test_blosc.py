from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.errors import CorruptShardError
from actcache.storage import blosc as blosc_chunk
from actcache.storage.blosc import BLOCK, CompressedExtent, encode, locate
from actcache.storage.safetensors_io import TensorExtent, read

NUMBERS = BLOCK // 2  # of bfloat16 in a block


def rows(count: int, kind: str = "normal") -> np.ndarray:
    """Return bfloat16 values as uint16. [count]"""
    state = np.random.RandomState(count)
    if kind == "noise":
        return np.frombuffer(state.bytes(2 * count), dtype="<u2")
    if kind == "zero":
        return np.zeros(count, dtype="<u2")
    return (state.standard_normal(count).astype("<f4").view("<u4") >> 16).astype("<u2")


def write_and_locate(path: Path, chunk: np.ndarray) -> TensorExtent | CompressedExtent:
    encoded = encode(chunk)
    path.write_bytes(encoded)
    return locate(path, len(encoded), chunk.nbytes, chunk.shape, "<u2")


SIZES = [500, NUMBERS - 1, NUMBERS, NUMBERS + 1, 3 * NUMBERS, 20 * NUMBERS + 77]


@pytest.mark.parametrize("kind", ["normal", "zero"])
@pytest.mark.parametrize("size", SIZES)
def test_any_range_of_a_chunk_is_decoded_exactly(size: int, kind: str, tmp_path: Path) -> None:
    chunk = rows(size, kind)
    extent, whole = write_and_locate(tmp_path / "0", chunk), chunk.tobytes()
    assert isinstance(extent, CompressedExtent)
    assert extent.bytes == len(whole)
    state = np.random.RandomState(0)
    offsets = [(0, len(whole)), (len(whole) - 1, len(whole)), (5, 5), (0, 1)]
    offsets += [tuple(sorted(state.randint(0, len(whole) + 1, 2))) for _ in range(10)]
    for start, stop in offsets:
        out = bytearray(stop - start)
        extent.read_into(memoryview(out), start)
        assert out == whole[start:stop]


@pytest.mark.parametrize("size", [1, 5, 5000, 3 * NUMBERS + 1])
def test_an_incompressible_chunk_is_read_without_blosc(size: int, tmp_path: Path) -> None:
    chunk = rows(size, "noise")
    extent = write_and_locate(tmp_path / "0", chunk)
    assert isinstance(extent, TensorExtent)
    np.testing.assert_array_equal(read([extent])[0], chunk)


def test_an_incompressible_block_among_others_is_decoded(tmp_path: Path) -> None:
    parts = [rows(n * NUMBERS + 3, kind) for n, kind in ((2, "normal"), (4, "noise"), (1, "zero"))]
    chunk = np.concatenate(parts)
    extent = write_and_locate(tmp_path / "0", chunk)
    assert isinstance(extent, CompressedExtent)
    assert np.diff(extent.starts).max() == BLOCK + 4
    out = np.empty_like(chunk)
    extent.read_into(out.view(np.uint8).data, 0)
    np.testing.assert_array_equal(out, chunk)


def test_a_read_fetches_only_its_blocks_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = rows(64 * NUMBERS)
    extent = write_and_locate(tmp_path / "0", chunk)
    assert isinstance(extent, CompressedExtent)
    sizes: list[int] = []
    exactly = blosc_chunk.read_exactly

    def record(path: Path, view: memoryview, offset: int) -> None:
        sizes.append(len(view))
        exactly(path, view, offset)

    monkeypatch.setattr(blosc_chunk, "read_exactly", record)
    out = np.empty(4 * BLOCK, dtype=np.uint8)
    extent.read_into(out.data, 10 * BLOCK + 6)
    assert len(sizes) == 1
    assert sizes[0] < 5 * BLOCK  # five blocks hold four that begin within one
    sizes.clear()
    extent.read_into(np.empty(extent.bytes, dtype=np.uint8).data, 0)
    assert max(sizes) < 8 * BLOCK
    assert sum(sizes) < extent.bytes


def test_the_bytes_are_a_function_of_the_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from numcodecs import blosc

    chunk = rows(40 * NUMBERS)
    first = encode(chunk)
    monkeypatch.setattr(blosc, "use_threads", None)  # as numcodecs has it when it is imported
    blosc.set_nthreads(2)
    assert encode(chunk) == first
    assert blosc.decompress(first) == chunk.tobytes()


HEADER = {
    "version": (0, "B", 3),
    "flags": (2, "B", 0x92),
    "itemsize": (3, "B", 4),
    "decoded size": (4, "I", 2**31 - 2),
    "block": (8, "I", 2**31 - 2),
    "encoded size": (12, "I", 17),
    "first offset": (16, "I", 0),
    "second offset": (20, "I", 2**32 - 1),
}


@pytest.mark.parametrize("field", HEADER)
def test_a_header_of_another_chunk_is_refused(field: str, tmp_path: Path) -> None:
    chunk = rows(3 * NUMBERS)
    data = bytearray(encode(chunk))
    offset, kind, value = HEADER[field]
    struct.pack_into(f"<{kind}", data, offset, value)
    path = tmp_path / "0"
    path.write_bytes(data)
    with pytest.raises(CorruptShardError, match="is not the compressed chunk"):
        locate(path, len(data), chunk.nbytes, chunk.shape, "<u2")


def test_a_header_cannot_cause_a_large_allocation(tmp_path: Path) -> None:
    path = tmp_path / "0"
    claimed = 2**31 - 2
    path.write_bytes(struct.pack("<BBBBIII", 2, 1, 0x91, 2, claimed, BLOCK, 20) + bytes(4))
    with pytest.raises(CorruptShardError, match=r"(?s)at least 16400 bytes.*20 bytes"):
        locate(path, 20, claimed, (claimed // 2,), "<u2")
    path.write_bytes(b"short")
    with pytest.raises(CorruptShardError, match="at least 16 bytes"):
        locate(path, 5, 100, (50,), "<u2")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_raises_our_errors_or_changes_values_only(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    chunk = rows(2 * NUMBERS + 9)
    encoded = bytearray(encode(chunk))
    for _ in range(data.draw(st.integers(1, 3))):
        offset = data.draw(st.integers(0, len(encoded) - 1) | st.integers(0, 60))
        encoded[offset] = data.draw(st.integers(0, 255))
    encoded = encoded[: data.draw(st.just(len(encoded)) | st.integers(0, len(encoded)))]
    path = tmp_path_factory.getbasetemp() / "damaged-chunk"
    path.write_bytes(encoded)
    try:
        extent = locate(path, len(encoded), chunk.nbytes, chunk.shape, "<u2")
        if isinstance(extent, CompressedExtent):
            extent.read_into(np.empty(chunk.nbytes, dtype=np.uint8).data, 0)
    except CorruptShardError:
        pass


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 99)])
def test_a_chunk_deleted_or_truncated_during_reading_is_detected(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    extent = write_and_locate(tmp_path / "0", rows(2 * NUMBERS))
    assert isinstance(extent, CompressedExtent)
    damage(tmp_path / "0")
    with pytest.raises(CorruptShardError, match=r"is gone|ends early"):
        extent.read_into(np.empty(100, dtype=np.uint8).data, 0)


def test_a_chunk_for_which_there_is_no_memory_is_reported_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("Error -1 while compressing data")

    monkeypatch.setattr(blosc_chunk._blosc(), "compress", fail)
    with pytest.raises(MemoryError, match="blosc cannot compress 64 bytes"):
        encode(np.zeros(64, dtype=np.uint8))
