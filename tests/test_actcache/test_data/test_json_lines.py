"""Files with one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import actcache.data.watched_files
from actcache.data.json_lines import IndexedLines, json_lines
from actcache.data.table_rows import NoColumnError
from actcache.errors import DatasetError


def write(path: Path, *rows: bytes | dict[str, Any], end: bytes = b"\n") -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(end.join(lines) + end)
    return path


def both(path: Path, column: str = "text") -> list[object]:
    """Read a file by its index, and from first to last; they must agree."""
    found = IndexedLines(path, column)
    rows = list(json_lines(iter([path.read_bytes().removeprefix(b"\xef\xbb\xbf")]), column, path))
    values = found.fetch(range(found.count))
    assert values == [row.value for row in rows]
    assert found.replaced == sum(row.replaced for row in rows)
    assert [found.place(i) for i in range(found.count)] == [f"{path}, line {r.line}" for r in rows]
    return values


@pytest.mark.parametrize("piece", [1, 3, 64, 1 << 20])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b" \n  \n\t"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_objects_are_found_whatever_lies_between_them(
    mark: bytes, end: bytes, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actcache.data.watched_files, "_PIECE", piece)
    texts = ["one", "", "naïve 🦊", "four\nlines\r\n", "{}"]
    path = write(tmp_path / "a", *({"n": i, "text": t} for i, t in enumerate(texts)), end=end)
    path.write_bytes(mark + path.read_bytes())
    assert both(path) == texts
    path.write_bytes(path.read_bytes().rstrip())  # without a last line end
    assert both(path) == texts


@pytest.mark.parametrize("data", [b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", b"\n", b""])
def test_a_file_without_an_object_has_no_documents(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    assert both(tmp_path / "a") == []


def test_only_the_asked_column_matters(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "other": None},
        {"text": "b", "other": {"deep": [1]}},
        {"text": "c", "other": "x"},
        b'{"text": "d", "other": ' + b"9" * 5000 + b"}",
        b'{"text": "e", "other": NaN, "tab": "\t"}',
        {"other": 1},
        {"text": None},
    ]
    assert both(write(tmp_path / "a", *rows)) == ["a", "b", "c", "d", "e", None, None]


def test_a_nested_column_is_named_by_its_path_and_a_key_with_dots_comes_first(
    tmp_path: Path,
) -> None:
    rows = [
        {"doc": {"text": "inner"}},
        {"doc": {"text": "inner"}, "doc.text": "literal"},
        {"doc": None},
        {"doc": {"other": 1}},
    ]
    assert both(write(tmp_path / "a", *rows), "doc.text") == ["inner", "literal", None, None]


def test_what_is_no_text_is_replaced_and_counted_in_the_asked_column_only(tmp_path: Path) -> None:
    rows = [
        b'{"text": "caf\xe9 here"}',
        b'{"text": "cut \xe2\x82 here"}',
        b'{"text": "lone \\ud800 here"}',
        b'{"text": "pair \\ud83e\\udd8a"}',
        b'{"text": "low \\udc00 \\ude00"}',
        b'{"text": "fine", "other": "\xff \\ud800"}',
        b'{"text": "backslash \\\\ud800"}',
        b'{"text": "genuine \xef\xbf\xbd"}',
    ]
    path = write(tmp_path / "a", *rows)
    assert both(path) == [
        "caf\ufffd here",
        "cut \ufffd here",
        "lone \ufffd here",
        "pair 🦊",
        "low \ufffd \ufffd",
        "fine",
        "backslash \\ud800",
        "genuine \ufffd",
    ]
    assert IndexedLines(path, "text").replaced == 4


@pytest.mark.parametrize(
    "broken",
    [
        b"no json",
        b'{"text": "cut',
        b'["text"]',
        b"3",
        b'{"text": "a" "b"}',
        b'{"text": 1}{"text": 2}',
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    ],
)
def test_a_line_that_is_no_object_is_refused_with_its_number(broken: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a"}, b"", broken, {"text": "b"})
    message = r"(?s)a\.jsonl, line 3: no JSON object.*remedy"
    with pytest.raises(DatasetError, match=message):
        list(json_lines(iter([path.read_bytes()]), "text", path))
    with pytest.raises(DatasetError, match=message):
        IndexedLines(path, "text").fetch([0, 1])


def test_a_column_that_no_object_has_is_refused_with_those_that_are_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"body": 1}, {"title": 2, "body": 3})
    for opened in (
        lambda: IndexedLines(path, "text"),
        lambda: list(json_lines(iter([path.read_bytes()]), "text", path)),
    ):
        with pytest.raises(NoColumnError) as error:
            opened()
        assert error.value.names == ("body", "title")


def test_rows_before_the_first_with_the_column_are_empty_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "a", *({"n": n} for n in range(3000)), {"text": "late"})
    assert both(path) == [None] * 3000 + ["late"]


def test_a_file_that_is_cut_while_it_is_read_has_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "a", *({"text": f"text {n}"} for n in range(100)))
    found = IndexedLines(path, "text")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DatasetError, match="has changed"):
        found.fetch([99])
