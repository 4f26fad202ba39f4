"""Fuzz test with 20,000 mutated caches (2,000 by default): each must be refused, detected, or read
as the original.

A tiny cache is opened, read in full and verified after every mutation of one of its files. The
result must be one of our errors, a finding of `verify`, or the original rows, tokens and
statistics. No path outside the cache may be opened, and no large buffer allocated.
"""

from __future__ import annotations

import builtins
import dataclasses
import io
import json
import os
import random
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from actcache.cache.reader import Cache
from actcache.cache.verify import verify
from actcache.errors import ActcacheError
from actcache.format.manifest import Hookpoint, Identity

BATCHES = 20  # in the soak, of 1,000 mutations each; by default, one for each kind of cache
LARGEST = 1 << 20  # bytes that any one buffer may have: the whole cache has some 60 kB

HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, 2**31, 2**53, 2**53 + 1, 2**63, -(2**63),
    10**400, "", "x", "..", "../..", "/etc/passwd", "layers/../../x", "layers.0\0", "\ud800",
    "A" * 100_000, [], {}, [[]], [None], {"": 0}, {"__class__": "os.system"}, "NaN", "float64",
    "pickle", float("nan"), float("inf"), float("-inf"), [0] * 5000,
]  # fmt: skip


KINDS = [
    {"dtype": "float32"},
    {"dtype": "int8"},
    {"dtype": "float8_e4m3", "backend": "zarr"},
    {"dtype": "bfloat16", "backend": "zarr", "compression": "zstd"},
    {"dtype": "bfloat16", "backend": "zarr", "shards": 1, "last_sequences": 2, "extended_by": 1},
]


@pytest.fixture(scope="module")
def small(make_cache: Callable[..., Path]) -> Callable[[int], Path]:
    """Create sealed caches of every kind, by number: two shards, two hookpoints of width 2."""
    hookpoints = {"layers.0": 2, "layers.1:in": 2}
    shape = {"shards": 2, "sequences": 2, "ctx_len": 4, "last_sequences": 1}
    caches = [make_cache(hookpoints=hookpoints, **(shape | kind)) for kind in KINDS]
    return lambda number: caches[number % len(caches)]


def contents(root: Path) -> dict[str, bytes]:
    """Read everything that a cache contains, as bytes."""
    cache = Cache.open(root)
    found = {"hookpoints": repr(cache.manifest.identity.hookpoints).encode()}
    found["complete"] = repr((cache.shards, cache.complete)).encode()
    for shard in cache.shards:
        words = cache.tokens(shard)
        for field in dataclasses.fields(words):
            found[f"{field.name} {shard}"] = getattr(words, field.name).tobytes()
        for hookpoint in cache.hookpoints:
            for part, array in cache.read(hookpoint, shard).parts.items():
                found[f"{hookpoint} {shard} {part}"] = array.tobytes()
            statistics = cache.statistics(hookpoint, [shard])
            found[f"{hookpoint} {shard} sums"] = statistics.total.tobytes()
            found[f"{hookpoint} {shard} squares"] = statistics.total_squares.tobytes()
            found[f"{hookpoint} {shard} norms"] = statistics.norm_histogram.tobytes()
            found[f"{hookpoint} {shard} largest"] = statistics.abs_max.tobytes()
    return found


# Mutations of bytes.


def flipped(data: bytes, state: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(state.choice([1, 1, 1, 2, 8])):
        out[state.randrange(len(out))] ^= state.choice([1, 0x80, 0xFF, state.randrange(1, 256)])
    return bytes(out)


def truncated(data: bytes, state: random.Random) -> bytes:
    return data[: state.choice([0, 1, 7, 8, state.randrange(len(data)), len(data) - 1])]


def inserted(data: bytes, state: random.Random) -> bytes:
    offset = state.choice([0, 8, len(data), state.randrange(len(data))])
    return data[:offset] + state.randbytes(state.choice([1, 2, 100])) + data[offset:]


def repeated(data: bytes, state: random.Random) -> bytes:
    """Copy a piece of the file to another offset, which duplicates keys, brackets or tensors."""
    begin = state.randrange(len(data))
    offset = state.randrange(len(data))
    return data[:offset] + data[begin : begin + state.randrange(1, 80)] + data[offset:]


BYTES = [flipped, truncated, inserted, repeated]


# Mutations of JSON.


def offsets(obj: Any) -> Iterator[tuple[Any, Any]]:
    """List every (container, key) within a decoded value."""
    items = obj.items() if isinstance(obj, dict) else enumerate(obj)
    for key, value in list(items):
        yield obj, key
        if isinstance(value, dict | list):
            yield from offsets(value)


def hostile(state: random.Random, value: Any) -> Any:
    """Replace a value by another one."""
    number = type(value) is int
    choice = state.randrange(4)
    if choice == 0 and number:
        return state.choice([value + 1, value - 1, -value, value * 2, float(value), str(value)])
    if choice == 1 and isinstance(value, str):
        return state.choice([value + "0", value[:-1], value.upper(), "../" + value, "/" + value])
    if choice == 2:
        return state.choice([[value], {"x": value}, str(value)])
    return state.choice(HOSTILE)


def changed_json(text: bytes, state: random.Random) -> bytes:
    obj = json.loads(text)
    container, key = state.choice(list(offsets(obj)))
    action = state.randrange(8)
    if action < 4:
        container[key] = hostile(state, container[key])
    elif action == 4:
        del container[key]
    elif action == 5 and isinstance(container, dict):
        container[state.choice(["", "..", "/x", "extra", "layers.9", "\0"])] = container[key]
    elif action == 6:
        text = json.dumps(obj).encode()  # with a duplicate key
        inner = json.dumps({str(key): state.choice(HOSTILE)})[1:-1].encode()
        return text[:1] + inner + b", " + text[1:]
    else:
        depth = state.choice([50, 900, 940, 960, 980, 990, 100_000])
        container[key] = "DEEP"
        deep = state.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth])
        return json.dumps(obj).encode().replace(b'"DEEP"', deep)
    return json.dumps(obj).encode()


def changed_header(data: bytes, state: random.Random) -> bytes:
    """Mutate the header of a safetensors file, with or without correcting its length."""
    (length,) = struct.unpack("<Q", data[:8])
    action = state.randrange(5)
    if action == 0:
        sizes = [0, 1, length - 1, length + 1, len(data), 1 << 20, 1 << 40, 2**63, 2**64 - 1]
        return struct.pack("<Q", state.choice(sizes)) + data[8:]
    header = changed_json(data[8 : 8 + length], state)
    if action < 3:  # padded to the old length where it fits, so that the size stays
        header = header.ljust(length)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def mutate(path: Path, data: bytes, state: random.Random) -> None:
    """Replace a file by other bytes, or by a link to a path outside the cache."""
    if state.random() < 0.01:
        path.unlink()
        path.symlink_to(state.choice(["/etc/passwd", "/dev/zero", "../../secret", "."]))
    elif path.suffix not in (".json", ".safetensors") or state.random() < 0.4:
        path.write_bytes(state.choice(BYTES)(data, state))
    else:
        if path.suffix != ".json":
            path.write_bytes(changed_header(data, state))
            return
        text = changed_json(data, state)
        path.write_bytes(resealed(text) if state.random() < 0.7 else text)


def restore(path: Path, data: bytes) -> None:
    if path.is_symlink():
        path.unlink()
    path.write_bytes(data)


def resealed(text: bytes) -> bytes:
    """Correct the seal of a mutated file, so that its contents are what must be refused."""
    found = re.search(rb'"seal": "([0-9a-f]{32})"', text)
    if found is None:
        return text
    before, after = text[: found.start(1)], text[found.end(1) :]
    return before + xxhash.xxh3_128_hexdigest(before + after).encode() + after


def consistent(root: Path) -> None:
    """Make ids and digests of the other files consistent with a mutated manifest."""
    try:
        manifest = json.loads((root / "manifest.json").read_bytes())
        identity = dict(manifest["identity"])
        identity["hookpoints"] = tuple(Hookpoint(**h) for h in identity["hookpoints"])
        cache_id = Identity(**identity).digest()
        text = json.dumps(manifest | {"cache_id": cache_id}).encode()
        (root / "manifest.json").write_bytes(resealed(text))
        for path in [*(root / "shards").iterdir(), *root.glob("extensions/*")]:
            obj = json.loads(path.read_bytes())
            path.write_bytes(resealed(json.dumps(obj | {"cache_id": cache_id}).encode()))
    except (ActcacheError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # then it stays inconsistent, which is hostile too


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    """Folder for the mutated caches, in memory (/dev/shm) if available."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="actcache-tests-") as folder:
        yield Path(folder)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make opening a path outside `root`, and allocating a large array, an error."""

    class Escape(BaseException):
        pass

    def watch(root: Path) -> None:
        inside = str(root.resolve())

        def checked(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(path: Any, *rest: Any, **named: Any) -> Any:
                if not isinstance(path, int):
                    folder = named.get("dir_fd")
                    base = "" if folder is None else os.readlink(f"/proc/self/fd/{folder}")  # noqa: PTH115
                    found = os.path.abspath(os.path.join(base, path))  # noqa: PTH100, PTH118 (without following links)
                    if not (found + os.sep).startswith(inside + os.sep) or os.path.islink(found):  # noqa: PTH114
                        raise Escape(f"{path} was opened")
                return real(path, *rest, **named)

            return call

        def bounded(shape: Any, *rest: Any, real: Any = np.empty, **named: Any) -> Any:
            if np.prod([float(n) for n in np.atleast_1d(shape)]) * 8 > LARGEST:
                raise Escape(f"an array of {shape} was made")
            return real(shape, *rest, **named)

        for module, name in ((os, "open"), (builtins, "open"), (io, "open"), (os, "scandir")):
            monkeypatch.setattr(module, name, checked(getattr(module, name)))
        monkeypatch.setattr(os, "listdir", checked(os.listdir))
        monkeypatch.setattr(np, "empty", bounded)

    return watch


@pytest.mark.parametrize(
    ("batch", "mutations"),
    [
        *((batch, 400) for batch in range(len(KINDS))),
        *(pytest.param(batch, 1000, marks=pytest.mark.soak) for batch in range(BATCHES)),
    ],
)
def test_every_mutation_is_refused_detected_or_harmless(
    batch: int,
    mutations: int,
    small: Callable[[int], Path],
    workplace: Path,
    watched: Callable[[Path], None],
) -> None:
    root = workplace / "cache"
    shutil.copytree(small(batch), root)
    original = {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    truth = contents(root)
    paths = list(original)
    watched(root)
    state = random.Random(batch)
    outcomes = dict.fromkeys(("refused", "found", "harmless"), 0)
    for number in range(mutations):
        path = paths[number % len(paths)]
        mutate(path, original[path], state)
        touched = [path]
        if path.name == "manifest.json" and not path.is_symlink() and state.random() < 0.7:
            consistent(root)
            touched = [p for p in paths if p.suffix == ".json"]
        what = f"batch {batch}, mutation {number} of {path}"
        outcomes[outcome(root, truth, what, verify_refused=number % 4 == 0)] += 1
        for each in touched:
            restore(each, original[each])
    assert contents(root) == truth
    assert outcomes["refused"] > 0
    if mutations == 1000:  # verify alone finds one in some hundreds
        assert min(outcomes.values()) > 0
    assert outcomes["harmless"] < mutations / 4


def outcome(root: Path, truth: dict[str, bytes], what: str, *, verify_refused: bool = True) -> str:
    """Classify a mutated cache: refused, found or harmless; anything else fails."""
    got, message = None, ""
    try:
        got = contents(root)
    except ActcacheError as error:
        message = str(error)
    assert len(message) < 20_000, what
    if got is None and not verify_refused:
        return "refused"
    try:
        sound = verify(root, threads=1).is_sound
    except ActcacheError:
        sound = False
    if not sound:
        return "refused" if got is None else "found"
    assert got == truth, what
    return "harmless"


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_no_mutation_takes_more_memory_than_the_files_are_large(
    number: int, small: Callable[[int], Path], tmp_path: Path
) -> None:
    import tracemalloc

    root = tmp_path / "cache"
    shutil.copytree(small(number), root)
    paths = sorted(p for p in root.rglob("*") if p.is_file())
    original = {p: p.read_bytes() for p in paths}
    truth = contents(root)
    verify(root, threads=1)
    state = random.Random(99 + number)
    for each in range(40):
        path = paths[each % len(paths)]
        mutate(path, original[path], state)
        tracemalloc.start()
        outcome(root, truth, f"mutation {each} of {path}")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < LARGEST + (32 << 20), path  # 16 MiB at a time are read and hashed
        restore(path, original[path])
