"""safetensors files of checkpoints and SAEs: read once, and checked before torch loads them.

The bytes that are compared with a digest are those that are loaded. They are not mapped: a file
that is cut meanwhile would end the process with SIGBUS.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from actcache.core.json_codec import decode_json, truncated_repr
from actcache.errors import FormatError
from actcache.filesystem.rooted import RootedPath, open_file

Header = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype, such as F32, of each tensor of a file."""

_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
"""Types that are loaded; torch lacks operations of others, such as floats of 8 bits."""


def read_tensors_file(path: Path) -> bytes:
    """Read a safetensors file whole; raises `FormatError` for a pipe, a device or a folder.

    A path without a root, of an SAE that the user names, may be a link, as in the Hub's cache.
    """
    try:
        plain = path if isinstance(path, RootedPath) else path.resolve()
        with os.fdopen(open_file(plain), "rb") as file:
            return file.read()
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
        raise FormatError(f"cannot read {path}", got=str(error)) from error


def load_tensors(
    path: Path, data: bytes, require: Callable[[Header], None] = lambda _: None
) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file that was read.

    Args:
        path: the file, for errors.
        data: its bytes.
        require: raises `FormatError` for a header that is not as expected.

    Raises:
        FormatError: the file is damaged, or of a kind that is not loaded.
    """
    require(read_header(path, data))
    try:
        return load(data)
    except MemoryError:
        raise
    except (SafetensorError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise _damaged(path, "tensors", error) from error


def read_header(path: Path, data: bytes) -> Header:
    """Return shapes and dtypes of the tensors of a file; raises `FormatError`."""
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= len(data) - 8:
        raise _damaged(path, f"a header of at most {len(data)} bytes", length)
    try:
        obj = decode_json(data[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "a header in JSON", error) from error
    if not isinstance(obj, dict):
        raise _damaged(path, "a JSON object", obj)
    return {
        name: _parse(path, name, entry, len(data))
        for name, entry in obj.items()
        if name != "__metadata__"
    }


def _parse(path: Path, name: str, entry: object, size: int) -> tuple[tuple[int, ...], str]:
    """Parse one entry of a header; the offsets are left to the library."""
    of = truncated_repr(name)
    if not isinstance(entry, dict):
        raise _damaged(path, f"an object for {of}", entry)
    shape, dtype = entry.get("shape"), entry.get("dtype")
    # No dimension exceeds the file, so that no product of empty tensors overflows.
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n <= size for n in shape):
        raise _damaged(path, f"a shape of {of} that the file can hold", shape)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise FormatError(
            f"{path}: dtype of {of}", expected=" | ".join(_DTYPES), got=truncated_repr(dtype)
        )
    return tuple(shape), dtype


def _damaged(path: Path, expected: str, got: object) -> FormatError:
    return FormatError(
        f"{path} is no safetensors file, or damaged",
        expected=expected,
        got=str(got) if isinstance(got, Exception) else truncated_repr(got),
        remedy="restore it from a copy",
    )
