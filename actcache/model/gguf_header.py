"""Check of a GGUF file before it is parsed: every count, length and offset lies in the file.

The parser checks none: it maps the file, loops over counts and multiplies sizes. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from actcache.errors import ModelError

_FORMATS = ("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d")
"""Formats of the types of values, as of `struct`; the two empty ones are _STRING and _ARRAY."""
_STRING, _ARRAY = 8, 9
_MOST_DEEP = 4  # arrays in arrays
_MOST_DIMENSIONS = 8
_MOST_KEPT = 1 << 16  # numbers of an array that are checked; longer ones describe no layers
_MOST_NAME = 1 << 16  # bytes
_MOST_LAYERS = 10_000
_MOST_SIZE = 1 << 24
_SIZES = re.compile(r"(length|count|count_kv|size|dim|rank)")
_BLOCK = re.compile(r"blk\.([0-9]{1,9})\.")


@dataclass(frozen=True)
class GgufHeader:
    """Number of weights, from the checked header of a GGUF file."""

    elements: int
    """Numbers in all tensors."""


class _Reader:
    """Reader of a file from its start, which reads nothing beyond its end."""

    def __init__(self, file: IO[bytes], path: Path, size: int) -> None:
        self._file, self._path, self._size = file, path, size
        self.at = 0

    def refuse(self, what: str, expected: object, got: object) -> ModelError:
        return ModelError(
            f"{self._path} is damaged: {what}",
            expected=expected,
            got=got,
            remedy="restore it, or download it again",
        )

    def take(self, count: int, what: str) -> bytes:
        self._require(count, what)
        return self._file.read(count)

    def skip(self, count: int, what: str) -> None:
        self._require(count, what)
        self._file.seek(count, 1)

    def _require(self, count: int, what: str) -> None:
        left = self._size - self.at
        if count > left:
            raise self.refuse(f"{what} would end after the file", f"at most {left} bytes", count)
        self.at += count

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        length = self.number("Q", what)
        if length > _MOST_NAME:
            raise self.refuse(f"the length of {what}", f"at most {_MOST_NAME} bytes", length)
        return self.take(length, what).decode(errors="replace")

    def value(self, kind: int, what: str, deep: int = 0) -> Any:
        """Read a value; return a number, a list of them, or None for anything else."""
        if kind == _STRING:
            self.skip(self.number("Q", what), what)
            return None
        if kind == _ARRAY:
            return self._array(what, deep + 1)
        if kind >= len(_FORMATS):
            raise self.refuse(f"the type of {what}", f"0 to {len(_FORMATS) - 1}", kind)
        return self.number(_FORMATS[kind], what)

    def _array(self, what: str, deep: int) -> list[Any] | None:
        if deep > _MOST_DEEP:
            raise self.refuse(what, f"arrays nested at most {_MOST_DEEP} times", "more")
        kind, count = self.number("I", what), self.number("Q", what)
        if kind in (_STRING, _ARRAY):
            self._require_count(count, 8, what)
            for _ in range(count):
                self.value(kind, what, deep)
            return None
        code = _FORMATS[kind] if kind < len(_FORMATS) else "B"
        self._require_count(count, struct.calcsize(code), what)
        if kind >= len(_FORMATS) or count > _MOST_KEPT:
            self.skip(count * struct.calcsize(code), what)
            return None
        return [self.number(code, what) for _ in range(count)]

    def _require_count(self, count: int, each: int, what: str) -> None:
        self.require(count, (self._size - self.at) // each, f"the count of {what}")

    def require(self, found: float, most: int, what: str, least: int = 0) -> None:
        if not least <= found <= most:
            raise self.refuse(what, f"{least} to {most:,}", found)


def read_gguf_header(path: Path) -> GgufHeader:
    """Check the header of a GGUF file.

    Raises:
        ModelError: a count, size or offset is that of no model, or leads out of the file.
    """
    found = path.stat()
    return _read(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=4)  # configuration, tokenizer and weights are loaded one by one
def _read(path: Path, size: int, _changed: int) -> GgufHeader:
    with path.open("rb") as file:
        reader = _Reader(file, path, size)
        if (magic := reader.take(4, "the magic number")) != b"GGUF":
            raise reader.refuse("the magic number", b"GGUF", magic)
        if (version := reader.number("I", "the version")) not in (2, 3):
            raise reader.refuse("the version", "2 or 3, little-endian", version)
        tensors, keys = reader.number("Q", "the counts"), reader.number("Q", "the counts")
        reader.require(keys, size // 12, "the count of keys")
        reader.require(tensors, size // 24, "the count of tensors")
        values: dict[str, Any] = {}
        for _ in range(keys):
            name = reader.string("a key")
            values[name] = reader.value(reader.number("I", name), name)
        _require_sizes(reader, values)
        return _tensors(reader, tensors, values, size)


def _require_sizes(reader: _Reader, values: Mapping[str, Any]) -> None:
    """Check the sizes of the model, whose keys begin with its architecture."""
    for name, value in values.items():
        key = name.rpartition(".")[2]
        end = key.rpartition("_")[2] if key != "count_kv" else key
        is_size = _SIZES.fullmatch(end) or key.endswith("count_kv")
        if name.startswith(("general.", "tokenizer.", "split.")) or not is_size:
            continue
        most = _MOST_LAYERS if key == "block_count" else _MOST_SIZE
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float):
                reader.require(number, most, name)


def _tensors(reader: _Reader, count: int, values: Mapping[str, Any], size: int) -> GgufHeader:
    elements, blocks, ends = 0, 0, [0]
    for _ in range(count):
        name = reader.string("the name of a tensor")
        dimensions = reader.number("I", name)
        reader.require(dimensions, _MOST_DIMENSIONS, f"the count of dimensions of {name}")
        shape = [reader.number("Q", name) for _ in range(dimensions)]
        kind, offset = reader.number("I", name), reader.number("Q", name)
        here = math.prod(shape)
        ends.append(offset + _bytes(reader, name, kind, here))
        elements += here
        if found := _BLOCK.match(name):
            blocks = max(blocks, int(found[1]) + 1)
        if name == "token_embd.weight" and shape:
            _require_width(reader, values, shape[0])
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise reader.refuse("general.alignment", "a power of two", alignment)
    begin = -(-reader.at // alignment) * alignment
    if begin + max(ends) > size:
        raise reader.refuse("its tensors end after the file", f"{size} bytes", begin + max(ends))
    layers = next((value for name, value in values.items() if name.endswith(".block_count")), 0)
    if isinstance(layers, int) and blocks and layers > blocks:
        raise reader.refuse("it lacks weights of some layers", f"{layers} layers", blocks)
    return GgufHeader(elements)


def _bytes(reader: _Reader, name: str, kind: int, elements: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, each = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise reader.refuse(f"the type of {name}", "one that gguf supports", kind) from None
    return int(-(-elements // block) * each)


def _require_width(reader: _Reader, values: Mapping[str, Any], width: int) -> None:
    for name, value in values.items():
        if name.endswith(".embedding_length") and value != width:
            raise reader.refuse(f"{name} differs from the embedding", width, value)
