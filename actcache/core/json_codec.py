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
import operator
import stat
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from actcache.errors import FormatError
from actcache.filesystem.paths import CachePath

T = TypeVar("T")

MAX_JSON_BYTES = 64 << 20
"""A larger JSON file is refused before it is read: none of ours comes near it."""

NOT_SERIALIZED = {"beside": True}
"""Metadata of a dataclass's field that is not in its file, but follows from others."""

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
    parsed: T = _parser(cls)(obj, where)  # type: ignore[arg-type] # a class can be hashed
    return parsed


def parse_value(hint: Any, obj: object, where: str) -> Any:
    """Check `obj` against one type hint, converting JSON lists to tuples; see `parse_dataclass`."""
    return _parser(hint)(obj, where)


# Ten thousand receipts are parsed when a cache is opened: a type is looked at once, and the place
# of a value becomes text only when there is something wrong with it.

_Where = Any
"""A place: text, or (outer place, format of the last part, its key)."""

_Parser = Callable[[Any, _Where], Any]
_Many = Callable[[list[Any]], "list[Any] | None"]


def _text(where: _Where) -> str:
    if isinstance(where, str):
        return where
    outer, form, key = where
    return _text(outer) + str(form).format(key)


@functools.cache
def _parser(hint: Any) -> _Parser:
    """The function that checks values against a type hint."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (inner,) = (a for a in args if a is not type(None))
        return _optional(_parser(inner), type(None) in args)
    if origin is Literal:
        return _literal(args)
    if origin is tuple:
        return _tuple(_parser(args[0]))
    if origin is dict:
        return _dict(_parser(args[1]), _many(args[1]))
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint)
    return _scalar(hint)


def _optional(inner: _Parser, may_be_none: bool) -> _Parser:
    def parse(obj: Any, where: _Where) -> Any:
        return None if obj is None and may_be_none else inner(obj, where)

    return parse


def _literal(choices: tuple[str, ...]) -> _Parser:
    def parse(obj: Any, where: _Where) -> Any:
        if not isinstance(obj, str) or obj not in choices:
            raise FormatError(
                f"{_text(where)} has an unknown value",
                expected=" | ".join(choices),
                got=truncated_repr(obj),
            )
        return obj

    return parse


def _tuple(inner: _Parser) -> _Parser:
    def parse(obj: Any, where: _Where) -> Any:
        if not isinstance(obj, list):
            raise FormatError(
                f"{_text(where)} is not a list", expected="[...]", got=truncated_repr(obj)
            )
        return tuple([inner(item, (where, "[{}]", i)) for i, item in enumerate(obj)])

    return parse


def _dict(inner: _Parser, many: _Many | None) -> _Parser:
    def parse(obj: Any, where: _Where) -> Any:
        if not isinstance(obj, dict):
            raise FormatError(
                f"{_text(where)} is not an object", expected="{...}", got=truncated_repr(obj)
            )
        if many is not None and (found := many(list(obj.values()))) is not None:
            return dict(zip(obj, found, strict=True))
        return {key: inner(item, (where, "[{!r}]", key)) for key, item in obj.items()}

    return parse


def _many(hint: Any) -> _Many | None:
    """A short way for many values of one kind, of which a cache's receipts may hold a million.

    It gives None for what is not as it should be: the long way then says what is wrong. None:
    there is no short way for this kind.
    """
    if hint is int:
        return lambda values: values if _all_whole(values) else None
    if not dataclasses.is_dataclass(hint):
        return None
    make: Any = hint
    hints, names = get_type_hints(hint), [field.name for field in dataclasses.fields(hint)]
    if len(names) < 2 or not {hints[name] for name in names} <= {int, str}:
        return None
    pick = operator.itemgetter(*names)

    def columns(objs: list[Any]) -> list[Any] | None:
        if {*map(type, objs)} != {dict} or {*map(len, objs)} != {len(names)}:
            return None
        try:
            rows = [*map(pick, objs)]
        except KeyError:
            return None
        for name, column in zip(names, zip(*rows, strict=True), strict=True):
            fits = _all_whole if hints[name] is int else _all_text
            if not fits(column):
                return None
        try:
            return [make(*row) for row in rows]
        except FormatError:
            return None

    return columns


def _all_whole(values: Sequence[Any]) -> bool:
    """Whether all are integers that a file may hold; at least one."""
    return {*map(type, values)} == {int} and min(values) >= -_MAX_INT and max(values) <= _MAX_INT


def _all_text(values: Sequence[Any]) -> bool:
    return {*map(type, values)} == {str}


def _dataclass(cls: Any) -> _Parser:
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.metadata != NOT_SERIALIZED}
    parsers = {name: _parser(hints[name]) for name in fields}
    nothing = dataclasses.MISSING
    required = {
        name for name, f in fields.items() if f.default is nothing and f.default_factory is nothing
    }

    def parse(obj: Any, where: _Where) -> Any:
        if not isinstance(obj, dict):
            raise FormatError(
                f"{_text(where)} is not an object", expected="{...}", got=truncated_repr(obj)
            )
        if not required <= obj.keys() <= parsers.keys():
            missing = [name for name in fields if name in required and name not in obj]
            raise FormatError(
                f"{_text(where)} has other keys than this format",
                expected=f"keys {', '.join(fields)}",
                got=f"missing {missing}, unknown {sorted(obj.keys() - fields)}",
                remedy="it was written by another version or damaged",
            )
        values = {key: parsers[key](item, (where, ": {}", key)) for key, item in obj.items()}
        try:
            return cls(**values)
        except FormatError as error:  # the class knows what is wrong, not in which file
            raise FormatError(f"{_text(where)}: {error}") from None

    return parse


def _scalar(hint: Any) -> _Parser:
    def parse(obj: Any, where: _Where) -> Any:
        # `type(...) is`: a bool is an int to isinstance, and must not be one here.
        if type(obj) is hint and (
            (hint is not int or -_MAX_INT <= obj <= _MAX_INT)
            and (hint is not float or math.isfinite(obj))  # JSON's 1e999 decodes to inf
        ):
            return obj
        if hint is float and type(obj) is int and abs(obj) <= _MAX_INT:
            return float(obj)
        raise FormatError(
            f"{_text(where)} has another type", expected=hint.__name__, got=truncated_repr(obj)
        )

    return parse


def read_json(path: CachePath, limit: int = MAX_JSON_BYTES, *, links: bool = True) -> object:
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
    plain = obj
    if dataclasses.is_dataclass(obj):
        beside = {f.name for f in dataclasses.fields(obj) if f.metadata == NOT_SERIALIZED}
        inside = dataclasses.asdict(obj)  # type: ignore[arg-type]
        plain = {name: value for name, value in inside.items() if name not in beside}
    return (json.dumps(plain, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _refuse_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def _refuse_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    obj = dict(pairs)
    if len(obj) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return obj


def truncated_repr(obj: object, limit: int = 80) -> str:
    """What an error shows of a value from outside: of bounded length, whatever it is."""
    try:
        text = repr(obj)
    except RecursionError:  # decoding had a little more stack left than we have here
        return "something nested too deeply to show"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
