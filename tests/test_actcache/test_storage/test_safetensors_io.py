from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from actcache.errors import CorruptShardError
from actcache.filesystem.atomic import digest_file
from actcache.storage.safetensors_io import ALIGNMENT, locate, read, write

ROWS = np.arange(12, dtype="<f4").reshape(3, 4)
IDS = np.arange(5, dtype="<i4")
EXPECTED = {"rows": ((3, 4), "<f4", "F32"), "ids": ((5,), "<i4", "I32")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    write(path, {"rows": (ROWS, None), "ids": (IDS, None)})
    return path


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return length, json.loads(data[8 : 8 + length])


def put_header(path: Path, header: object, length: int | None = None) -> None:
    """Replace the header, leaving the data unchanged."""
    old, _ = header_of(path)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = path.read_bytes()[8 + old :]
    claimed = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", claimed) + text + body)


def test_tensors_are_found_and_read_back(path: Path) -> None:
    rows, ids = locate(path, EXPECTED)
    np.testing.assert_array_equal(read([rows])[0], ROWS)
    np.testing.assert_array_equal(read([ids])[0], IDS)
    read([rows])[0][:] = 0  # memory of its own, and writable


def test_the_data_begin_on_a_page(path: Path) -> None:
    length, _ = header_of(path)
    assert (8 + length) % ALIGNMENT == 0
    assert locate(path, EXPECTED)[0].offset == ALIGNMENT == 4096


def test_a_long_header_keeps_the_alignment(tmp_path: Path) -> None:
    tensors = {f"{'n' * 100}{i}": (IDS, None) for i in range(60)}
    write(tmp_path / "x", tensors)
    length, _ = header_of(tmp_path / "x")
    assert length > ALIGNMENT
    assert (8 + length) % ALIGNMENT == 0


def test_any_safetensors_library_opens_the_file(path: Path) -> None:
    tensors = safetensors.numpy.load_file(path)
    assert sorted(tensors) == ["ids", "rows"]
    np.testing.assert_array_equal(tensors["rows"], ROWS)
    np.testing.assert_array_equal(tensors["ids"], IDS)


def test_the_returned_digest_is_that_of_the_file(tmp_path: Path) -> None:
    receipt = write(tmp_path / "x", {"rows": (ROWS, None)})
    assert receipt == digest_file(tmp_path / "x")
    assert receipt.bytes == 4096 + ROWS.nbytes


def test_a_tensor_without_elements_is_stored(tmp_path: Path) -> None:
    empty = np.empty((0, 4), dtype="<f4")
    write(tmp_path / "x", {"rows": (empty, None), "ids": (IDS, None)})
    rows, ids = locate(tmp_path / "x", EXPECTED | {"rows": ((0, 4), "<f4", "F32")})
    assert read([rows])[0].shape == (0, 4)
    np.testing.assert_array_equal(read([ids])[0], IDS)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": {"shape": [4, 3]}},
        {"rows": {"shape": [3]}},
        {"rows": {"shape": [2**40, 2**40]}},
        {"rows": {"shape": [-3, -4]}},
        {"rows": {"dtype": "F16"}},
        {"rows": {"dtype": "I32"}},
        {"rows": {"data_offsets": [4, 52]}},
        {"rows": {"data_offsets": [0, 2**60]}},
        {"rows": {"data_offsets": [-48, 0]}},
        {"ids": {"data_offsets": [0, 20]}},
        {"ids": {"extra": 1}},
    ],
)
def test_a_header_other_than_the_expected_one_is_refused(path: Path, change: dict) -> None:
    _, header = header_of(path)
    for name, fields in change.items():
        header[name] |= fields
    put_header(path, header)
    with pytest.raises(CorruptShardError, match=r"x\.safetensors is not the file"):
        locate(path, EXPECTED)


@pytest.mark.parametrize(
    "header", [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 50_000, b'{"rows": 1}', b'{"a": NaN}']
)
def test_an_invalid_header_is_refused(path: Path, header: bytes) -> None:
    put_header(path, header)
    with pytest.raises(CorruptShardError):
        locate(path, EXPECTED)


@pytest.mark.parametrize("length", [0, 5_000, 1 << 20, 1 << 21, 2**63, 2**64 - 1])
def test_a_header_length_beyond_the_file_is_refused(path: Path, length: int) -> None:
    _, header = header_of(path)
    put_header(path, header, length)
    with pytest.raises(CorruptShardError):
        locate(path, EXPECTED)


@pytest.mark.parametrize("size", [0, 7, 8, 100, 4096, 4096 + 48, 4096 + 67, 4096 + 69, 10_000])
def test_a_truncated_or_extended_file_is_refused(path: Path, size: int) -> None:
    os.truncate(path, size)
    with pytest.raises(CorruptShardError):
        locate(path, EXPECTED)


def test_a_file_truncated_after_locate_is_refused(path: Path) -> None:
    rows, _ = locate(path, EXPECTED)
    os.truncate(path, 4100)
    with pytest.raises(CorruptShardError, match="48 bytes of data"):
        read([rows])


def test_a_missing_file_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "x", tmp_path / "file" / "x"):
        with pytest.raises(CorruptShardError, match=r"(?s)expected: a file.*got: +nothing.*remedy"):
            locate(path, EXPECTED)


def test_a_link_a_folder_or_a_pipe_is_refused_unopened(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "dangling", "folder", "pipe"):
        with pytest.raises(CorruptShardError, match="expected: a plain file"):
            locate(tmp_path / name, EXPECTED)


def test_a_shape_beyond_all_integers_does_not_wrap_round(path: Path) -> None:
    expected = {"rows": ((2**40, 2**24), "<f4", "F32")}  # 2^66 bytes: 0 in 64 bits
    claim = {"rows": {"dtype": "F32", "shape": [2**40, 2**24], "data_offsets": [0, 0]}}
    put_header(path, claim)
    os.truncate(path, 8 + len(json.dumps(claim)))
    with pytest.raises(CorruptShardError):
        locate(path, expected)
