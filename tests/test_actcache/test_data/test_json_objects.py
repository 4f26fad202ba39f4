"""Arrays of JSON objects, and objects one after another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from actcache.data.json_objects import json_objects
from actcache.data.table_rows import NoColumnError, Row
from actcache.errors import DatasetError

TEXTS = ["one", "", "naïve 🦊", 'quoted "]," {', "long " * 3000, "last\n"]
OBJECTS = [{"n": [1, {"deep": None}], "text": text} for text in TEXTS]


def rows(data: bytes, size: int = 1 << 20) -> list[Row]:
    pieces: Iterator[bytes] = (data[i : i + size] for i in range(0, len(data), size))
    return list(json_objects(pieces, "text", Path("a.json")))


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(OBJECTS),
        json.dumps(OBJECTS, indent=2, ensure_ascii=False),
        "\n".join(map(json.dumps, OBJECTS)),
        " \r\n".join(json.dumps(o, indent=1) for o in OBJECTS),
        "".join(map(json.dumps, OBJECTS)),
    ],
    ids=["array", "indented array", "lines", "indented objects", "joined objects"],
)
def test_objects_are_read_from_arrays_and_one_after_another(text: str, size: int) -> None:
    size = size if size > 1 else 11
    assert [row.value for row in rows(text.encode(), size)] == TEXTS


def test_an_empty_array_has_no_rows() -> None:
    assert rows(b" [ ] \n") == rows(b"") == []


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"{", 1),
        (b"[", 1),
        (b'[{"text": "a"}', 1),
        (b'[{"text": "a"},', 1),
        (b'[{"text": "a"},]', 1),
        (b'[{"text": "a"}] more', 1),
        (b'[{"text": "a"}\n{"text": "b"}]', 2),
        (b'[{"text": "a"},\n\n{"text": "b]', 3),
        (b'{"text": "a"}\n]', 2),
        (b'[{"text": "a"},\n["b"]]', 2),
        (b'"text"', 1),
        (b"text", 1),
        (b'[{"text": ' + b"[" * 100_000, 1),
    ],
)
def test_a_broken_file_is_refused_with_the_line(data: bytes, line: int) -> None:
    with pytest.raises(DatasetError, match=rf"a\.json, line {line}: no JSON object"):
        rows(data)


def test_a_broken_object_is_refused_without_reading_the_rest() -> None:
    def pieces() -> Iterator[bytes]:
        yield b'[{"text" "a"},' + b" " * 100
        raise AssertionError("read on")

    with pytest.raises(DatasetError, match="line 1: no JSON object"):
        list(json_objects(pieces(), "text", Path("a.json")))


def test_what_is_no_text_is_replaced_and_counted() -> None:
    found = rows(b'[{"text": "caf\xe9"}, {"text": "\\ud800"}, {"text": "fine"}]')
    assert [(row.value, row.replaced) for row in found] == [
        ("caf\ufffd", True),
        ("\ufffd", True),
        ("fine", False),
    ]


def test_a_missing_column_is_refused_with_the_existing_ones() -> None:
    with pytest.raises(NoColumnError) as error:
        rows(b'[{"body": 1}, {"title": ' + b"9" * 5000 + b"}]")
    assert error.value.names == ("body", "title")
