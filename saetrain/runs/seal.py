"""Seals: a JSON file of a run holds a digest over all of its own bytes, under the key `seal`.

The digest is that of the file with `seal` null. A file has exactly the bytes that `seal_json`
writes for its values, so a flip that leaves the values alone is found too. It is no protection
against someone who computes another seal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from actcache.core.json_codec import decode_json, to_json, truncated_repr
from actcache.errors import FormatError
from saetrain.runs.own_files import read_plain

SEAL = "seal"


def seal_json(obj: object) -> bytes:
    """Return the JSON of a dataclass or plain object, with its seal."""
    plain = json.loads(to_json(obj))
    return to_json(plain | {SEAL: _digest(plain)})


def read_sealed(path: Path) -> tuple[Any, bool]:
    """Read a JSON file and compare it with its seal, if it has one.

    Returns:
        The contents without the seal, and whether there was one.

    Raises:
        FormatError: the file is no plain file, not JSON, or differs from its seal.
        OSError: it cannot be read.
    """
    data = read_plain(path)
    try:
        obj: Any = decode_json(data)
        seal = obj.pop(SEAL, None) if isinstance(obj, dict) else None
        if seal is None:
            return obj, False
        found, same = _digest(obj), to_json(obj | {SEAL: seal})
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path} is not JSON", got=str(error), remedy="it is damaged; restore it from a copy"
        ) from error
    if seal != found:
        raise _damaged(path, f"digest {truncated_repr(seal)}", found)
    if data != same:
        raise _damaged(path, "the bytes that were sealed", "others of the same values")
    return obj, True


def require_seal(path: Path, sealed: bool, format_version: int) -> None:
    """Raise `FormatError` unless a file is sealed from format 2 on, and not before."""
    if sealed != (format_version >= 2):
        kinds = ("no seal", "a seal")
        raise _damaged(path, f"{kinds[not sealed]}, in format {format_version}", kinds[sealed])


def _digest(plain: dict[str, Any]) -> str:
    return xxhash.xxh3_128(to_json(plain | {SEAL: None})).hexdigest()


def _damaged(path: Path, expected: str, got: str) -> FormatError:
    return FormatError(
        f"{path} is damaged",
        expected=expected,
        got=got,
        remedy="restore it from a copy",
    )
