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
def test_views_are_filled_one_after_another_however_much_a_call_asks_for(
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


def test_a_read_that_gives_less_than_it_was_asked_for_is_gone_on_with(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        return real(fd, [views[0][:3]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    memory: list[Any] = [bytearray(10), bytearray(20)]
    preadv_into(path, [memoryview(m) for m in memory], 0, 8)
    assert b"".join(memory) == BYTES[:30]


def test_a_file_that_ends_early_is_told(path: Path) -> None:
    with pytest.raises(CorruptShardError, match=r"(?s)ends early.*at least 260.*250"):
        preadv_into(path, [memoryview(bytearray(20))], 240, 8)


def test_announcing_what_is_not_there_does_nothing(path: Path) -> None:
    readahead(path, 0, 10)
    readahead(path.with_name("gone"), 0, 10)
