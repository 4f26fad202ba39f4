"""Parse JSON into frozen dataclasses (exact keys, exact types), and encode them canonically.

Every JSON file of this project (manifest, receipt, run, training state) goes through
`parse_dataclass`. Each dataclass checks ranges and relations of its fields in its own
`__post_init__`, which raises `FormatError`.

`check_fields` checks the same dataclasses where Python code constructs them.

A sealed file has one more key, `seal`: the digest of all its other bytes. `to_json` adds it and
`read_json` compares and removes it, so that no dataclass has such a field.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import numbers
import os
import re
import stat
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from actcache.core.options import option_name
from actcache.errors import ConfigError, FormatError
from actcache.filesystem.paths import CachePath

T = TypeVar("T")

MAX_JSON_BYTES = 64 << 20
"""Largest JSON file that is read."""

NOT_SERIALIZED = {"beside": True}
"""Field metadata: the field is derived, so `to_json` and `parse_dataclass` leave it out."""

OMITTED_BY_DEFAULT = {"omitted": True}
"""Field metadata: `to_json` leaves the field out while it has its default, which means what files
from before the field mean."""

SEAL = "seal"
"""Key of a sealed file's digest: XXH3 128-bit of the file without the digest's own digits."""

_SEAL = re.compile("[0-9a-f]{32}")
_MAX_INT = 2**53
"""Largest integer magnitude that every JSON reader represents exactly."""


def parse_dataclass(cls: type[T], obj: object, where: str) -> T:
    """Build `cls` from a decoded JSON object whose keys are exactly the fields of `cls`.

    Args:
        cls: a dataclass of int, float, str, bool, Literal, None-able, tuple[X, ...],
            dict[str, X] and dataclass fields.
        obj: the result of `json.loads`.
        where: file, and path within it, that errors name.

    Raises:
        FormatError: a key is missing or unknown, a value has another type, or `__post_init__`
            rejects the values.
    """
    parsed: T = parse_value(cls, obj, where)
    return parsed


def parse_value(hint: Any, obj: object, where: str) -> Any:
    """Check `obj` against one type hint, converting JSON lists to tuples; see `parse_dataclass`."""
    try:
        return _parser(hint)(obj)
    except _InvalidError as error:
        keys = "".join(reversed(error.keys))
        raise FormatError(
            f"{where}{keys}{error.what}",
            expected=error.expected,
            got=error.got,
            remedy=error.remedy,
        ) from None


class _InvalidError(Exception):
    """A value that does not fit its type. Every enclosing parser appends its key to `keys`."""

    def __init__(
        self, what: str, expected: str | None = None, got: str | None = None, remedy: str = ""
    ) -> None:
        self.what, self.expected, self.got, self.remedy = what, expected, got, remedy or None
        self.keys: list[str] = []


_Parser = Callable[[Any], Any]


@functools.cache  # opening a cache parses thousands of receipts of one type
def _parser(hint: Any) -> _Parser:
    """Return the function that checks and converts values of a type hint."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        members = tuple(_parser(a) for a in args if a is not type(None))
        inner = members[0] if len(members) == 1 else functools.partial(_parse_one_of, members)
        optional = type(None) in args
        return lambda obj: None if obj is None and optional else inner(obj)
    if origin is Literal:
        return functools.partial(_parse_literal, args)
    if origin is tuple:
        return functools.partial(_parse_list, _parser(args[0]))
    if origin is dict:
        return functools.partial(_parse_dict, _parser(args[1]))
    if dataclasses.is_dataclass(hint):
        return _dataclass_parser(hint)
    return functools.partial(_parse_scalar, hint)


def _parse_one_of(parsers: tuple[_Parser, ...], obj: Any) -> Any:
    for parse in parsers[:-1]:
        with suppress(_InvalidError):
            return parse(obj)
    return parsers[-1](obj)


def _parse_literal(choices: tuple[str, ...], obj: Any) -> Any:
    if not isinstance(obj, str) or obj not in choices:
        raise _InvalidError(" has an unknown value", " | ".join(choices), truncated_repr(obj))
    return obj


def _parse_list(inner: _Parser, obj: Any) -> tuple[Any, ...]:
    if not isinstance(obj, list):
        raise _InvalidError(" is not a list", "[...]", truncated_repr(obj))
    return tuple(_parse_items(inner, obj, range(len(obj)), "[{}]"))


def _parse_dict(inner: _Parser, obj: Any) -> dict[str, Any]:
    _require_object(obj)
    return dict(zip(obj, _parse_items(inner, obj.values(), obj, "[{!r}]"), strict=True))


def _require_object(obj: Any) -> None:
    if not isinstance(obj, dict):
        raise _InvalidError(" is not an object", "{...}", truncated_repr(obj))


def _parse_items(
    inner: _Parser, items: Collection[Any], keys: Iterable[Any], form: str
) -> list[Any]:
    """Parse all items; add the key of one that fails, formatted, to its error."""
    all_int = inner is _parser(int) and {*map(type, items)} == {int}
    if all_int and min(items) >= -_MAX_INT and max(items) <= _MAX_INT:
        return [*items]  # one check for all: receipts hold thousands of counts
    values: list[Any] = []
    try:
        for item in items:
            values.append(inner(item))  # noqa: PERF401 (the length locates an error)
    except _InvalidError as error:
        error.keys.append(form.format(next(islice(keys, len(values), None))))
        raise
    return values


def _dataclass_parser(cls: Any) -> _Parser:
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.metadata != NOT_SERIALIZED}
    parsers = {name: _parser(hints[name]) for name in fields}
    text = {name: str if hints[name] is str else None for name in fields}  # needs no parser call
    unset = dataclasses.MISSING
    required = {
        name for name, f in fields.items() if f.default is unset and f.default_factory is unset
    }
    omitted = {name for name, f in fields.items() if is_omitted(f)}

    def parse(obj: Any) -> Any:
        _require_object(obj)
        if obj.keys() != parsers.keys() and not required <= obj.keys() <= parsers.keys():
            missing = [name for name in fields if name in required and name not in obj]
            raise _InvalidError(
                " has other keys than this format",
                f"keys {', '.join(fields)}",
                f"missing {missing}, unknown {sorted(obj.keys() - fields)}",
                "it was written by another version or damaged",
            )
        values, key = {}, ""
        try:
            for key, item in obj.items():
                values[key] = item if type(item) is text[key] else parsers[key](item)
        except _InvalidError as error:
            error.keys.append(f": {key}")
            raise
        for key in omitted & obj.keys():
            if values[key] == _default(fields[key]):
                raise _InvalidError(
                    f" has the key {key!r} with the value that its absence means",
                    "no such key",
                    truncated_repr(obj[key]),
                )
        try:
            return cls(**values)
        except FormatError as error:
            raise _InvalidError(f": {error}") from None

    return parse


def _parse_scalar(hint: Any, obj: Any) -> Any:
    # `type(...) is`: a bool is an int to isinstance, and must not be one here.

    if type(obj) is hint and (
        (hint is not int or -_MAX_INT <= obj <= _MAX_INT)
        and (hint is not float or math.isfinite(obj))  # JSON's 1e999 decodes to inf
    ):
        return obj
    if hint is float and type(obj) is int and abs(obj) <= _MAX_INT:
        return float(obj)
    raise _InvalidError(" has another type", hint.__name__, truncated_repr(obj))


def check_fields(config: Any, **parsers: _Parser) -> None:
    """Check and normalise the fields of a frozen dataclass by their type hints.

    Every `__post_init__` of a configuration calls this first. Python code may give more than JSON
    holds: a path for a text, integers and real numbers of any library (such as `np.int64`), a list
    for a tuple, one item for a tuple of one. A field then holds the type that its hint names.

    Args:
        config: the dataclass; hints as in `parse_dataclass`.
        parsers: functions for fields with rules of their own; each returns the normalised value.

    Raises:
        ConfigError: a value has another type, is none of the choices, or is no finite number.
    """
    cls: Any = type(config)
    for name, shown, parser in _field_parsers(cls):
        value = getattr(config, name)
        try:
            parsed = parsers.get(name, parser)(value)
        except _InvalidError as error:
            what = f"{shown}{''.join(reversed(error.keys))}{error.what}"
            raise ConfigError(what, expected=error.expected, got=error.got) from None
        if parsed is not value:
            object.__setattr__(config, name, parsed)


def check_argument(name: str, hint: Any, value: Any) -> Any:
    """Check and normalise an argument of a public function, as `check_fields` does a field.

    Beside those hints it takes unions, sequences, paths, protocols and classes.
    """
    try:
        return _given_parser(hint)(value)
    except _InvalidError as error:
        what = f"{name}{''.join(reversed(error.keys))}{error.what}"
        raise ConfigError(what, expected=error.expected, got=error.got) from None


@functools.cache
def _field_parsers(cls: Any) -> list[tuple[str, str, _Parser]]:
    """List the name, the name in errors, and the parser of every field of a dataclass."""
    hints = get_type_hints(cls)
    return [(f.name, option_name(f), _given_parser(hints[f.name])) for f in dataclasses.fields(cls)]


@functools.cache
def _given_parser(hint: Any) -> _Parser:
    """Return the function that checks and normalises values that Python code gives."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: value
    if origin in (Union, types.UnionType):
        optional, kinds = type(None) in args, [a for a in args if a is not type(None)]
        # Classes first: a path of a class, such as `RootedPath`, stays what it is.
        kinds.sort(key=lambda kind: kind is str or get_origin(kind) is not None)
        inner = functools.partial(_given_one, [_given_parser(kind) for kind in kinds])
        return lambda value: None if value is None and optional else inner(value)
    if origin is Literal:
        return lambda value: str.__str__(_parse_literal(args, value))  # also of a StrEnum
    if origin in (tuple, Sequence):
        return functools.partial(_given_tuple, _given_parser(args[0]))
    if origin in (dict, Mapping):
        return functools.partial(_given_dict, _given_parser(args[1]))
    if origin is os.PathLike:
        return _given_path
    return {str: _given_text, int: _given_int, float: _given_float}.get(
        hint, functools.partial(_given_instance, hint)
    )


def _given_one(parsers: list[_Parser], value: Any) -> Any:
    """Parse by the first parser that takes the value."""
    kinds: dict[str, None] = {}
    for parser in parsers:
        try:
            return parser(value)
        except _InvalidError as error:
            kinds |= dict.fromkeys((error.expected or "").split(" | "))
            if parser is parsers[-1] and (isinstance(value, str) or len(parsers) == 1):
                error.expected = " | ".join(kinds) or None
                raise
    raise _InvalidError(" has another type", " | ".join(kinds), truncated_repr(value))


def _given_tuple(inner: _Parser, value: Any) -> tuple[Any, ...]:
    """Parse a list or tuple; anything else is the only item of one."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return tuple(_given_items(inner, value, range(len(value))))
    try:
        return (inner(value),)
    except _InvalidError as error:
        error.expected = f"{error.expected} | a list" if error.expected else None
        raise


def _given_dict(inner: _Parser, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _InvalidError(" has another type", "a dict", truncated_repr(value))
    keys = _given_items(_given_text, value, value)
    return dict(zip(keys, _given_items(inner, value.values(), keys), strict=True))


def _given_items(inner: _Parser, items: Iterable[Any], keys: Iterable[Any]) -> list[Any]:
    values = []
    for key, item in zip(keys, items, strict=True):
        try:
            values.append(inner(item))
        except _InvalidError as error:
            error.keys.append(f"[{truncated_repr(key)}]")
            raise
    return values


def _given_text(value: Any) -> str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise _InvalidError(" has another type", "a text", truncated_repr(value))
    if "\0" in text:
        raise _InvalidError(" holds a NUL character", got=truncated_repr(text))
    return str.__str__(text)


def _given_path(value: Any) -> Path:
    """Check a path. One of a class of its own, such as `RootedPath`, stays what it is."""
    if not isinstance(value, os.PathLike):
        raise _InvalidError(" has another type", "a path", truncated_repr(value))
    text = _given_text(value)
    return value if isinstance(value, Path) else Path(text)


def _given_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _InvalidError(" has another type", "an integer", truncated_repr(value))
    number = int(value)
    if not -_MAX_INT <= number <= _MAX_INT:  # smaller bounds, where there are any, come later
        raise _InvalidError(" is out of range", "-2**53 to 2**53", truncated_repr(value))
    return number


def _given_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _InvalidError(" has another type", "a number", truncated_repr(value))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _InvalidError(" is out of range", "a finite number", truncated_repr(value))
    return number


def _given_instance(kind: Any, value: Any) -> Any:
    if getattr(kind, "_is_protocol", False):
        is_one = all(hasattr(value, name) for name in _members(kind))
    elif dataclasses.is_dataclass(kind):
        is_one = type(value) is kind  # a subclass has fields that JSON would not keep
    else:
        is_one = isinstance(value, kind)
    if not is_one:
        raise _InvalidError(" has another type", kind.__name__, truncated_repr(value))
    return value


@functools.cache
def _members(protocol: Any) -> list[str]:
    """List the names that a protocol requires."""
    names = vars(protocol).keys() | protocol.__annotations__.keys()
    return [name for name in names if not name.startswith("_")]


def read_json(
    path: CachePath,
    limit: int = MAX_JSON_BYTES,
    *,
    links: bool = True,
    sealed: bool | Callable[[object], bool] = False,
) -> object:
    """Decode a JSON file.

    Args:
        path: the file.
        limit: largest size, bytes.
        links: follow a symbolic link. Files of a cache are read with False: a copied cache must
            not make this process read outside the cache's folder.
        sealed: require the seal, compare it, and leave it out of the result. A function decides by
            the decoded JSON, where the file itself holds its format's version.

    Raises:
        FormatError: the path is no plain file, larger than `limit` bytes, or not JSON; its seal is
            missing or is not the digest of the file.
        OSError: the file cannot be read.
    """
    found = path.stat() if links else path.lstat()
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would block for ever
        raise FormatError(f"{path} is not a plain file", remedy="restore it from a copy")
    size = found.st_size
    if size > limit:
        raise FormatError(f"{path} is too large", expected=f"<= {limit} bytes", got=f"{size} bytes")
    try:
        text = path.read_bytes()
        obj = decode_json(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path} is not JSON", got=str(error), remedy="it is damaged; restore it from a copy"
        ) from error
    if sealed(obj) if callable(sealed) else sealed:
        return _without_seal(path, text, obj)
    return obj


def sealed_unless(key: str, value: object) -> Callable[[object], bool]:
    """Return the argument `sealed` of `read_json` for files that have no seal if `key` is `value`.

    Whatever else the file holds, such as a damaged key, it must be sealed.
    """
    return lambda obj: not (isinstance(obj, dict) and key in obj and obj[key] == value)


def _without_seal(path: CachePath, text: bytes, obj: object) -> object:
    """Compare the seal of a decoded file with its text, and return the other keys."""
    seal = obj.get(SEAL) if isinstance(obj, dict) else None
    if not isinstance(seal, str) or not _SEAL.fullmatch(seal):
        raise FormatError(
            f"{path} has no seal",
            expected=f"the key {SEAL!r}, a digest of the file",
            got=truncated_repr(seal),
            remedy="it is damaged; restore it from a copy",
        )
    if (got := _digest_without(text, seal)) != seal:
        raise FormatError(
            f"{path} differs from its seal",
            expected=f"XXH3-128 {seal}",
            got=f"XXH3-128 {got}",
            remedy="it is damaged; restore it from a copy",
        )
    assert isinstance(obj, dict)
    return {key: value for key, value in obj.items() if key != SEAL}


def _digest_without(text: bytes, seal: str) -> str:
    """Compute the digest of a file's text without the digits of its seal."""
    return _digest(text.replace(seal.encode(), b"", 1))


def _digest(text: bytes) -> str:
    import xxhash  # --help reads this module, and needs the standard library only

    return xxhash.xxh3_128_hexdigest(text)


def decode_json(text: bytes) -> object:
    """Decode JSON, refusing what readers interpret differently.

    That is NaN, infinities, duplicate keys, and encodings other than UTF-8.

    Raises:
        ValueError: the text is not such JSON.
        RecursionError: it is nested too deeply.
    """
    return json.loads(
        text.decode(), parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicate_keys
    )


def to_json(obj: Any, *, sealed: bool = False) -> bytes:
    """Encode a dataclass (or plain object) as JSON: sorted keys, two spaces, final newline.

    Args:
        obj: a dataclass, or what `json` encodes. Sealed: one that becomes a JSON object.
        sealed: add the key `seal` (see `SEAL`), which `read_json` compares.
    """
    plain = {**_fields(obj), SEAL: ""} if sealed else obj
    encoded = json.dumps(plain, indent=2, sort_keys=True, allow_nan=False, default=_fields)
    text = (encoded + "\n").encode()
    if not sealed:
        return text
    empty = f'\n  "{SEAL}": "'.encode()  # two spaces: no key of an inner object
    before, _, after = text.partition(empty)
    return before + empty + _digest(text).encode() + after


def _fields(obj: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are serialised; of an object, its own items."""
    if isinstance(obj, dict):
        return obj
    if not dataclasses.is_dataclass(obj):
        raise TypeError(f"Object of type {type(obj).__name__} is not JSON serializable")
    found = {}
    for field in dataclasses.fields(obj):
        item = getattr(obj, field.name)
        if field.metadata == NOT_SERIALIZED:
            continue
        if is_omitted(field) and item == _default(field):
            continue
        found[field.name] = item
    return found


def is_omitted(field: dataclasses.Field[Any]) -> bool:
    """Return whether `to_json` leaves a field out while it has its default."""
    return field.metadata.get("omitted", False) is True


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return field.default_factory()


def _refuse_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def _refuse_duplicate_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    obj = dict(pairs)
    if len(obj) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return obj


def truncated_repr(obj: object, limit: int = 80) -> str:
    """Return `repr(obj)` cut to `limit` characters, for error messages about untrusted values."""
    try:
        text = repr(obj)
    except RecursionError:  # decoding had a little more stack left than this call
        return "a value nested too deeply to show"
    except ValueError:  # an integer of more digits than Python shows
        return f"a value of type {type(obj).__name__} that is too long to show"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
