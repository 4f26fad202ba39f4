"""Bytes of plain files as UTF-8."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from actcache.data.plain_bytes import (
    decoded_pieces,
    lines,
    utf8_pieces,
    without_surrogates,
)
from actcache.errors import DatasetError

TEXT = "naïve — café 漢字 🦊\r\nsecond line\n" * 50


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_a_text_is_read_as_utf8_by_its_byte_order_mark(
    encoding: str, compression: str, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    path.write_bytes(COMPRESS[compression]((mark + TEXT).encode(encoding)))
    assert b"".join(utf8_pieces(path, compression)).decode() == TEXT


@pytest.mark.parametrize("compression", [name for name in COMPRESS if name])
def test_parts_that_were_compressed_one_by_one_are_read_as_one(
    compression: str, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    path.write_bytes(COMPRESS[compression](b"one\n") + COMPRESS[compression](b"two\n"))
    assert b"".join(utf8_pieces(path, compression)) == b"one\ntwo\n"


@pytest.mark.parametrize("damage", ["cut", "flipped"])
@pytest.mark.parametrize("compression", [name for name in COMPRESS if name])
def test_a_damaged_compressed_file_is_refused_with_path_and_line(
    compression: str, damage: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.txt{compression}"
    data = bytearray(COMPRESS[compression](b"".join(b"line %d\n" % n for n in range(20_000))))
    if damage == "cut":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=rf"(?s)a\.txt{compression} .*line \d+.*remedy"):
        list(utf8_pieces(path, compression))


@pytest.mark.parametrize(
    ("name", "data", "remedy"),
    [
        ("a.txt.gz", b"plain text, no more", r"not compressed: remove \.gz from its name"),
        ("a.txt.xz", gzip.compress(b"text", mtime=0), r"it is a \.gz file"),
        ("a.txt.gz", zstd(b"text"), r"it is a \.zst file"),
        ("a.txt.gz", bytes(2000), r"cut or damaged"),
        ("a.txt.gz", gzip.compress(lzma.compress(b"text"), mtime=0), r"no text.*got: +a \.xz file"),
        ("a.txt", gzip.compress(b"text", mtime=0), r"got: +a \.gz file.*add \.gz to its name"),
        ("a.txt", zstd(b"text"), r"add \.zst to its name"),
    ],
    ids=range(7),
)
def test_a_file_of_another_compression_than_its_name_says_is_refused(
    name: str, data: bytes, remedy: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=rf"(?s){name} .*{remedy}"):
        list(utf8_pieces(path, path.suffix.removesuffix(".txt")))


def test_a_long_window_of_zstd_is_refused_with_the_command_that_shortens_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    # Magic, frame header without sizes, window of 2 GiB, last block of 4 bytes as they are.
    path.write_bytes(b"(\xb5/\xfd" + b"\x00\xa8" + (4 << 3 | 1).to_bytes(3, "little") + b"text")
    with pytest.raises(DatasetError, match=r"(?s)zstd -dc --long=31 .*a\.txt\.zst \| zstd"):
        list(utf8_pieces(path, ".zst"))


def test_an_unpaired_half_of_utf16_is_a_byte_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\xff\xfea\0\x00\xd8b\0c")  # a half pair, and half of a last character
    found = list(decoded_pieces(utf8_pieces(path)))
    assert "".join(text for text, _ in found) == "a\ufffdb\ufffd"
    assert any(damaged for _, damaged in found)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_pieces_may_end_within_a_character(size: int) -> None:
    data = TEXT.encode() + b"caf\xe9 \xe2\x82 end"
    found = list(decoded_pieces(data[i : i + size] for i in range(0, len(data), size)))
    assert "".join(text for text, _ in found) == data.decode(errors="replace")
    assert any(damaged for _, damaged in found)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_lines_keep_their_ends_wherever_pieces_end(size: int) -> None:
    data = b"one\r\n\n\nfour\nlast"
    found = list(lines(data[i : i + size] for i in range(0, len(data), size)))
    assert found == [b"one\r\n", b"\n", b"\n", b"four\n", b"last"]


def test_lone_surrogates_are_replaced_at_any_depth() -> None:
    value = {"a\udc00": ["b", {"c": "\ud800d"}], "e": 1}
    assert without_surrogates(value) == ({"a\ufffd": ["b", {"c": "\ufffdd"}], "e": 1}, True)
    assert without_surrogates(["plain", "naïve"]) == (["plain", "naïve"], False)
