from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.core.json_codec import OMITTED_BY_DEFAULT, parse_dataclass, read_json, to_json
from actcache.errors import FormatError


@dataclass(frozen=True)
class Inner:
    width: int


@dataclass(frozen=True)
class Outer:
    name: str
    ratio: float
    flag: bool
    kind: Literal["a", "b"]
    maybe: int | None
    pairs: tuple[tuple[int, ...], ...]
    inner: tuple[Inner, ...]
    table: dict[str, int]
    extra: int = 3

    def __post_init__(self) -> None:
        if self.extra < 0:
            raise FormatError("extra is negative", got=self.extra)


GOOD = {
    "name": "x",
    "ratio": 0.5,
    "flag": True,
    "kind": "a",
    "maybe": None,
    "pairs": [[1, 2], [3]],
    "inner": [{"width": 4}],
    "table": {"k": 1},
}


def test_a_dataclass_is_equal_after_encoding_and_parsing() -> None:
    outer = Outer("é\ud800", 1.0, False, "b", 7, ((1, 2), ()), (Inner(4),), {"k": 1}, 9)
    assert parse_dataclass(Outer, json.loads(to_json(outer)), "here") == outer


def test_a_field_with_a_default_may_be_missing() -> None:
    assert parse_dataclass(Outer, GOOD, "here").extra == 3


def test_an_integer_serves_as_a_float() -> None:
    assert parse_dataclass(Outer, GOOD | {"ratio": 2}, "here").ratio == 2.0


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": 1}, "name"),
        ({"name": None}, "name"),
        ({"ratio": "1"}, "ratio"),
        ({"ratio": True}, "ratio"),
        ({"ratio": float("inf")}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"ratio": 10**400}, "ratio"),
        ({"flag": 1}, "flag"),
        ({"kind": "c"}, "kind"),
        ({"kind": ["a"]}, "kind"),
        ({"maybe": "1"}, "maybe"),
        ({"maybe": 2**53 + 1}, "maybe"),
        ({"maybe": -(10**30)}, "maybe"),
        ({"maybe": 1.0}, "maybe"),
        ({"pairs": {"0": [1]}}, "pairs"),
        ({"pairs": [1]}, r"pairs\[0\]"),
        ({"pairs": [[1], [2, True]]}, r"pairs\[1\]\[1\]"),
        ({"inner": [{"width": "4"}]}, r"inner\[0\]: width"),
        ({"inner": [[]]}, r"inner\[0\]"),
        ({"inner": [{"width": 4, "other": 1}]}, r"inner\[0\]"),
        ({"table": []}, "table"),
        ({"table": {"k": None}}, r"table\['k'\]"),
        ({"unknown": 1}, "unknown"),
        ({"extra": -1}, "extra"),
    ],
)
def test_an_error_names_the_file_and_the_field(change: dict, field: str) -> None:
    with pytest.raises(FormatError, match=rf"(?s)run\.json.*{field}"):
        parse_dataclass(Outer, GOOD | change, "run.json")


@pytest.mark.parametrize("obj", [None, [], 1, "text", [GOOD]])
def test_a_value_other_than_an_object_is_refused(obj: object) -> None:
    with pytest.raises(FormatError, match="is not an object"):
        parse_dataclass(Outer, obj, "here")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(FormatError, match=r"missing \['flag'\]"):
        parse_dataclass(Outer, {k: v for k, v in GOOD.items() if k != "flag"}, "here")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(st.sampled_from(sorted(GOOD)), JSON_VALUES)
def test_any_json_value_gives_a_dataclass_or_a_format_error(key: str, value: object) -> None:
    try:
        parsed = parse_dataclass(Outer, GOOD | {key: value}, "here")
    except FormatError:
        return
    assert to_json(parsed)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b"\xff\xfe\xfd",
        b'"\xe9"',
        b"[" * 200_000,
        b"1" * 5_000,
        b"{} {}",
    ],
)
def test_an_error_about_invalid_json_names_the_file(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(FormatError, match=r"x\.json is not JSON"):
        read_json(path)


def test_a_file_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"[" + b" " * 100 + b"]")
    assert read_json(path, limit=102) == []
    with pytest.raises(FormatError, match=r"expected: <= 101 bytes\n  got:      102 bytes"):
        read_json(path, limit=101)


def test_a_folder_or_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(FormatError, match="not a plain file"):
            read_json(path)


def test_json_is_encoded_canonically() -> None:
    assert (
        to_json({"b": 1, "a": [1.5, None]})
        == b'{\n  "a": [\n    1.5,\n    null\n  ],\n  "b": 1\n}\n'
    )
    with pytest.raises(ValueError, match="JSON"):
        to_json({"a": float("nan")})


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"b": [{"": 0, "c": 2, "": 1}]}'])
def test_a_duplicate_key_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FormatError, match="a key occurs twice"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32-le", "utf-8-sig"])
def test_json_in_another_encoding_is_refused(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes('{"a": 1}'.encode(encoding))
    with pytest.raises(FormatError, match="is not JSON"):
        read_json(tmp_path / "x.json")


def test_a_link_is_read_unless_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]")
    (tmp_path / "link").symlink_to("x.json")
    assert read_json(tmp_path / "link") == [1]
    with pytest.raises(FormatError, match="not a plain file"):
        read_json(tmp_path / "link", links=False)


def test_a_value_nested_too_deeply_to_show_is_refused() -> None:
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(FormatError, match="nested too deeply to show"):
        parse_dataclass(Inner, {"width": deep}, "here")


SEALED = {"name": "x", "seals": 1, "inner": {"seal": "", "zeal": "0" * 32}, "numbers": [1, -2.5]}


def test_a_sealed_file_is_read_without_its_seal(tmp_path: Path) -> None:
    path = tmp_path / "sealed.json"
    path.write_bytes(to_json(SEALED, sealed=True))
    assert json.loads(path.read_bytes())["inner"] == SEALED["inner"]
    assert read_json(path, sealed=True) == SEALED
    assert read_json(path, sealed=lambda obj: "seal" in obj) == SEALED  # type: ignore[operator]


def test_every_flipped_bit_of_a_sealed_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "sealed.json"
    text = to_json(SEALED, sealed=True)
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(FormatError, match=re.escape(str(path))):
            read_json(path, sealed=True)


@pytest.mark.parametrize("text", [to_json(SEALED), b'{"seal": null}', b'{"seal": ""}', b"[]"])
def test_a_file_without_a_seal_is_refused_where_one_is_required(
    text: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "open.json"
    path.write_bytes(text)
    with pytest.raises(FormatError, match="has no seal"):
        read_json(path, sealed=True)


def test_a_removed_or_added_byte_breaks_the_seal(tmp_path: Path) -> None:
    path = tmp_path / "sealed.json"
    text = to_json(SEALED, sealed=True)
    for changed in (text[:-1], text + b"\n", text.replace(b'"x"', b' "x"')):
        path.write_bytes(changed)
        with pytest.raises(FormatError, match="differs from its seal"):
            read_json(path, sealed=True)


@dataclasses.dataclass(frozen=True)
class WithLaterFields:
    first: int
    later: int | None = dataclasses.field(default=None, metadata=OMITTED_BY_DEFAULT)
    counts: dict[str, int] = dataclasses.field(default_factory=dict, metadata=OMITTED_BY_DEFAULT)


def test_later_fields_are_left_out_while_they_have_their_defaults():
    assert json.loads(to_json(WithLaterFields(1))) == {"first": 1}
    filled = WithLaterFields(1, 0, {"a": 2})
    assert json.loads(to_json(filled)) == {"first": 1, "later": 0, "counts": {"a": 2}}
    for value in (WithLaterFields(1), filled):
        assert parse_dataclass(WithLaterFields, json.loads(to_json(value)), "file") == value
