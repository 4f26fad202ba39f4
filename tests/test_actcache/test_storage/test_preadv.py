from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from actcache.errors import CorruptShardError
from actcache.storage.preadv import preadv_into, readahead

BYTES = bytes(range(250))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(BYTES)
    return tmp_path / "file"


@pytest.mark.parametrize("piece", [1, 7, 100, 1 << 62])
def test_views_are_filled_in_order_for_any_read_size(
    path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = os.preadv

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        asked.append(sum(map(len, views)))
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    memory = [bytearray(n) for n in (5, 0, 120, 1, 74)]
    preadv_into(path, [memoryview(m) for m in memory], 30, piece)
    assert b"".join(memory) == BYTES[30:230]
    assert max(asked) == min(piece, 200)
    assert sum(asked) == 200


def test_a_short_read_is_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        return real(fd, [views[0][:3]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    memory: list[Any] = [bytearray(10), bytearray(20)]
    preadv_into(path, [memoryview(m) for m in memory], 0, 8)
    assert b"".join(memory) == BYTES[:30]


def test_a_truncated_file_raises_corrupt_shard_error(path: Path) -> None:
    with pytest.raises(CorruptShardError, match=r"(?s)ends early.*at least 260.*250"):
        preadv_into(path, [memoryview(bytearray(20))], 240, 8)


def test_readahead_of_a_missing_file_does_nothing(path: Path) -> None:
    readahead(path, 0, 10)
    readahead(path.with_name("gone"), 0, 10)
