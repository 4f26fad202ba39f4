"""Correction of one flipped bit in sealed files, and the bound on the work."""

from __future__ import annotations

from pathlib import Path

from actcache.cache import flipped_bits
from actcache.cache.flipped_bits import BitSearch
from actcache.core.json_codec import to_json

CONTENTS = {"a": "a name", "numbers": [1, 22, 333], "zeta": {"seal": "no seal"}}


def test_every_flipped_bit_is_corrected(tmp_path: Path) -> None:
    text = to_json(CONTENTS, sealed=True)
    path = tmp_path / "00000.json"
    for position in range(len(text)):
        for bit in range(8):
            damaged = bytearray(text)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            assert BitSearch().corrected(path) == text, (position, bit)


def test_other_damage_is_left_alone(tmp_path: Path) -> None:
    text = to_json(CONTENTS, sealed=True)
    path = tmp_path / "00000.json"
    two = bytearray(text)
    two[5] ^= 1
    two[9] ^= 1
    for damaged in (b"", b"[]", bytes(two), text[:-1], text + b"\n", b"\xff" * 99):
        path.write_bytes(damaged)
        assert BitSearch().corrected(path) is None


def test_the_work_on_many_files_is_bounded_and_the_rest_counted(tmp_path: Path) -> None:
    text = to_json(CONTENTS, sealed=True)
    each = sum(len(flipped_bits._FLIPS[byte]) for byte in b"#" + text[1:]) * (len(text) + 4096)
    search = BitSearch(max_work=3 * each)
    paths = [tmp_path / f"{number:05d}.json" for number in range(9)]
    for path in paths:
        path.write_bytes(b"#" + text[1:])  # two bits: it is searched to the end
    assert [search.corrected(path) for path in paths] == [None] * 9
    assert search.untried == set(paths[3:])
    paths[0].write_bytes(text)
    assert search.corrected(paths[0]) is None  # searched once


def test_a_damaged_receipt_of_usual_size_is_searched_with_little_of_the_work(
    tmp_path: Path,
) -> None:
    """So that thousands of them are searched by one command."""
    path = tmp_path / "00000.json"
    path.write_bytes(b"#" * 4096)
    search = BitSearch()
    before = search._left
    assert search.corrected(path) is None
    assert 1000 < before / (before - search._left) < 100_000
