"""One flipped bit in any file of a cache is found by `verify`, which names the file."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actcache.cache.reader import Cache
from actcache.cache.repair import retract
from actcache.cache.verify import verify
from actcache.errors import ActcacheError
from actcache.format.manifest import read_manifest

SHAPE: dict[str, Any] = {"shards": 2, "sequences": 2, "ctx_len": 4, "last_sequences": 1}
KINDS: dict[str, dict[str, Any]] = {
    "memmap": {"dtype": "float32"},
    "int8": {"dtype": "int8", "shards": 1},
    "zarr": {"dtype": "float8_e4m3", "backend": "zarr"},
    "zstd": {"dtype": "bfloat16", "backend": "zarr", "compression": "zstd", "shards": 1},
    "extended": {"dtype": "bfloat16", "backend": "zarr", "last_sequences": 2, "extended_by": 1},
    "unfinished": {"dtype": "bfloat16", "end": False},
}


@pytest.fixture(params=KINDS)
def root(request: pytest.FixtureRequest, make_cache: Callable[..., Path], tmp_path: Path) -> Path:
    """Make a small cache. That of kind 'unfinished' has a retracted shard."""
    hookpoints = {"layers.0": 2, "layers.1:in": 2}
    made = make_cache(hookpoints=hookpoints, **(SHAPE | KINDS[request.param]))
    root = tmp_path / "cache"
    shutil.copytree(made, root)
    if request.param == "unfinished":
        retract(root, read_manifest(root), 1)
    assert verify(root).is_sound
    return root


def checked_files(root: Path) -> list[Path]:
    """List the files of a cache, without those of shards that do not exist."""
    retracted = {f"{shard:05d}" for shard in verify(root).retracted}
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return [p for p in found if p.suffix == ".json" or p.stem not in retracted]


def positions(path: Path, most: int) -> list[int]:
    """Return byte positions of a file: all, or its ends and others evenly spread."""
    size = path.stat().st_size
    if size <= most:
        return list(range(size))
    ends = [*range(8), *range(size - 8, size)]
    return sorted({*ends, *(size * n // most for n in range(most))})


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def undetected(root: Path, flips: Iterator[tuple[Path, int, int]]) -> tuple[int, list[str]]:
    """Flip one bit after another; return how many, and those that verify does not name."""
    count, missed = 0, []
    for path, position, bit in flips:
        flip(path, position, bit)
        found = {damage.file for damage in verify(root, threads=1).damages}
        if str(path.relative_to(root)) not in found:
            missed.append(f"bit {bit} of byte {position} of {path.relative_to(root)}: {found}")
        flip(path, position, bit)
        count += 1
    return count, missed


def test_a_flipped_bit_is_found_and_named(root: Path) -> None:
    state = random.Random(13)
    files = checked_files(root)
    flips = (
        (path, position, state.randrange(8))
        for path in files
        for position in state.sample(positions(path, 200), 6)
    )
    count, missed = undetected(root, flips)
    assert missed == []
    assert count == 6 * len(files)
    assert verify(root).is_sound


def test_no_flipped_bit_of_the_format_version_removes_the_seals(root: Path) -> None:
    path = root / "manifest.json"
    text = path.read_bytes()
    begin = text.index(b'"format_version"')
    places = [*range(begin, text.index(b"\n", begin)), text.index(b'"seal"') + 1]
    flips = ((path, position, bit) for position in places for bit in range(8))
    assert undetected(root, flips) == (8 * len(places), [])
    for position in places:
        flip(path, position, 0)
        with pytest.raises(ActcacheError, match=r"manifest\.json"):
            Cache.open(root)
        flip(path, position, 0)


@pytest.mark.soak
def test_a_flipped_bit_at_every_place_is_found_and_named(root: Path) -> None:
    flips = (
        (path, position, bit)
        for path in checked_files(root)
        for number, position in enumerate(positions(path, 500 if path.suffix == ".json" else 40))
        for bit in ([number % 8] if path.suffix == ".json" else [0, number % 7 + 1])
    )
    count, missed = undetected(root, flips)
    assert missed == []
    assert count > 1500  # of each kind; with those of runs, more than 20,000 in all
