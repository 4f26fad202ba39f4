"""JSON from outside into frozen dataclasses: exact keys, exact types, nothing assumed.

Every file of this project that is JSON (manifest, receipt, run, training state) goes through
`parse_dataclass`. Ranges and relations between fields are checked by each dataclass's own
`__post_init__`, which raises `FormatError`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import stat
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from actcache.errors import FormatError

T = TypeVar("T")

MAX_JSON_BYTES = 64 << 20
"""A larger JSON file is refused before it is read: none of ours comes near it."""

_MAX_INT = 2**53
"""Integers beyond this do not survive every JSON reader."""


def parse_dataclass(cls: type[T], obj: object, where: str) -> T:
    """Build `cls` from a decoded JSON object whose keys are exactly the fields of `cls`.

    Args:
        cls: a dataclass of int, float, str, bool, Literal, None-able, tuple[X, ...],
            dict[str, X] and dataclass fields.
        obj: what `json.loads` returned.
        where: the file (and place in it) that errors name.

    Raises:
        FormatError: a key is missing or unknown, a value has another type, or the class itself
            refuses its values.
    """
    if not isinstance(obj, dict):
        raise FormatError(f"{where} is not an object", expected="{...}", got=short(obj))
    hints, fields = _schema(cls)  # type: ignore[arg-type]
    missing = [
        name
        for name, f in fields.items()
        if name not in obj
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    unknown = sorted(set(obj) - set(fields))
    if missing or unknown:
        raise FormatError(
            f"{where} has other keys than this format",
            expected=f"keys {', '.join(fields)}",
            got=f"missing {missing}, unknown {unknown}",
            remedy="it was written by another version or damaged",
        )
    values = {key: parse_value(hints[key], obj[key], f"{where}: {key}") for key in obj}
    try:
        return cls(**values)
    except FormatError as error:  # the class knows what is wrong, not in which file
        raise FormatError(f"{where}: {error}") from None


@functools.cache
def _schema(cls: type[Any]) -> tuple[dict[str, Any], dict[str, dataclasses.Field[Any]]]:
    return get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}


def parse_value(hint: Any, obj: object, where: str) -> Any:
    """Check `obj` against one type hint, converting JSON lists to tuples; see `parse_dataclass`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if obj is None and type(None) in args:
            return None
        (inner,) = (a for a in args if a is not type(None))
        return parse_value(inner, obj, where)
    if origin is Literal:
        if not isinstance(obj, str) or obj not in args:
            raise FormatError(
                f"{where} has an unknown value", expected=" | ".join(args), got=short(obj)
            )
        return obj
    if origin is tuple:
        if not isinstance(obj, list):
            raise FormatError(f"{where} is not a list", expected="[...]", got=short(obj))
        return tuple(parse_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(obj))
    if origin is dict:
        if not isinstance(obj, dict):
            raise FormatError(f"{where} is not an object", expected="{...}", got=short(obj))
        return {key: parse_value(args[1], item, f"{where}[{key!r}]") for key, item in obj.items()}
    if dataclasses.is_dataclass(hint):
        return parse_dataclass(hint, obj, where)  # type: ignore[arg-type]
    return _parse_scalar(hint, obj, where)


def _parse_scalar(hint: type, obj: object, where: str) -> object:
    # `type(...) is`: a bool is an int to isinstance, and must not be one here.
    too_large = type(obj) is int and abs(obj) > _MAX_INT
    if hint is float and type(obj) is int and not too_large:
        obj = float(obj)
    too_large |= type(obj) is float and not math.isfinite(obj)  # JSON's 1e999 decodes to inf
    if type(obj) is not hint or too_large:
        raise FormatError(f"{where} has another type", expected=hint.__name__, got=short(obj))
    return obj


def read_json(path: Path, limit: int = MAX_JSON_BYTES, *, links: bool = True) -> object:
    """Decode a JSON file.

    Args:
        path: the file.
        limit: largest size, bytes.
        links: whether the file may be a symbolic link. Those of a cache may not: what came from
            elsewhere must not make us read outside its folder.

    Raises:
        FormatError: it is no plain file, larger than `limit` bytes, or not JSON.
        OSError: it cannot be read.
    """
    found = path.stat() if links else path.lstat()
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
        raise FormatError(f"{path} is not a plain file", remedy="restore it from a copy")
    size = found.st_size
    if size > limit:
        raise FormatError(f"{path} is too large", expected=f"<= {limit} bytes", got=f"{size} bytes")
    try:
        return decode_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path} is not JSON", got=str(error), remedy="it is damaged; restore it from a copy"
        ) from error


def decode_json(text: bytes) -> object:
    """JSON without what two readers may take differently: NaN, infinities, a key that stands twice.

    Raises:
        ValueError: it is not such JSON.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_twice)


def to_json(obj: Any) -> bytes:
    """Encode a dataclass (or plain object) as JSON: sorted keys, two spaces, final newline."""
    plain = dataclasses.asdict(obj) if dataclasses.is_dataclass(obj) else obj  # type: ignore[arg-type]
    return (json.dumps(plain, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _refuse_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def _refuse_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    obj = dict(pairs)
    if len(obj) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return obj


def short(obj: object, limit: int = 80) -> str:
    """What an error shows of a value from outside: of bounded length, whatever it is."""
    try:
        text = repr(obj)
    except RecursionError:  # decoding had a little more stack left than we have here
        return "something nested too deeply to show"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
