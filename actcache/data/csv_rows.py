"""Rows of CSV and TSV files with a header. Every value is text: no word, no number is special."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from actcache.data.plain_bytes import decoded, lines
from actcache.data.table_rows import NoColumnError, Row
from actcache.errors import DatasetError

_END = "\0 end of the file \0"
_ONCE_NULL = frozenset(
    [
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
        "n/a",
        "nan",
        "null",
    ]
)
"""Words that earlier versions read as null."""


def csv_rows(pieces: Iterator[bytes], column: str, path: Path, delimiter: str) -> Generator[Row]:
    """Yield the rows below the header; blank lines are skipped.

    If the header has the column only with another delimiter (";", tab, "|"), that one is meant.

    Raises:
        DatasetError: a row has more values than it, or a quote is not closed.
        NoColumnError: the header lacks the column.
    """
    csv.field_size_limit(sys.maxsize)
    source = _Lines(pieces)
    rows = csv.reader(source, delimiter=delimiter, strict=True)
    header: list[str] = []
    while not header:
        source.taken = []
        header = _next(rows, source, delimiter, 0, path)[0]
    if header == [_END]:
        return
    _require_closed(header, path, 1)
    if header.count(column) > 1:
        raise DatasetError(f"{path} has {header.count(column)} columns {column!r}")
    if column not in header:
        delimiter, header = _otherwise_delimited(source.taken[-1], header, column)
        rows = csv.reader(source, delimiter=delimiter, strict=True)
    index, width = header.index(column), len(header)
    while True:
        line, source.damaged, source.taken = source.number + 1, False, []
        row, mended = _next(rows, source, delimiter, width, path)
        if not row:
            continue
        if row == [_END]:
            return
        _require_closed(row, path, line)
        if len(row) > width and any(row[width:]):
            raise DatasetError(
                f"{path}, line {line} has more values than the header",
                expected=f"{width} values: {', '.join(header)}",
                got=len(row),
                remedy="put values that hold the delimiter, quotes or line ends in quotes",
            )
        value = row[index] if index < len(row) else None
        blank = len(row) == 1 and value is not None and value.isspace()
        replaced = source.damaged and value is not None and "\ufffd" in value
        yield Row(value, line, replaced, blank or mended or value in _ONCE_NULL)


_BACKSLASHES = re.compile(r'(?:[^\\]|\\["\\])*')
"""Text in which a backslash only stands before a quote or another one."""


def _next(
    rows: Any, source: _Lines, delimiter: str, width: int, path: Path
) -> tuple[list[str], bool]:
    """Return the next row, and whether a quote in it was mended.

    Text after a closing quote means that quotes are escaped by backslashes, or mean nothing.

    Raises:
        DatasetError: neither makes a row as wide as the header.
    """
    try:
        return next(rows), False
    except csv.Error as error:
        lines, number = source.taken, source.number
        source.put_back()
        if _END in lines:  # within quotes
            return next(csv.reader(source, delimiter=delimiter)), False
        ways: list[dict[str, Any]] = []
        text = "".join(lines)
        if '\\"' in text and _BACKSLASHES.fullmatch(text):
            ways.append({"escapechar": "\\", "doublequote": False})
        if len(lines) == 1:
            ways.append({"quoting": csv.QUOTE_NONE})
        for way in ways:
            with suppress(csv.Error):
                row = next(csv.reader(source, delimiter=delimiter, **way))
                if len(row) == width and _END not in source.taken:
                    return row, True
            source.put_back()
        raise DatasetError(
            f"{path}, line {number}: text follows a closing quote",
            expected='"..." around a whole value, and "" for a quote in it',
            got=text[-80:],
            remedy="write the table with another program, or as .jsonl",
        ) from error


def _otherwise_delimited(line: str, header: list[str], column: str) -> tuple[str, list[str]]:
    """Return the delimiter that makes the column one of the header, and the header.

    Raises:
        NoColumnError: none does.
    """
    for delimiter in ";\t|,":
        found = next(csv.reader([line], delimiter=delimiter))
        if column in found:
            return delimiter, found
    raise NoColumnError(header)


def _require_closed(row: list[str], path: Path, line: int) -> None:
    if row[-1].endswith(_END):
        raise DatasetError(
            f"{path}, line {line}: a quote is not closed",
            expected='"..." around a value, and "" for a quote in it',
            got="the end of the file",
            remedy="close it; if the file is cut, copy or download it again",
        )


class _Lines:
    r"""Lines of text, at \n, \r\n and \r, then a mark, part of a value within quotes."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._lines = lines(pieces)
        self._ready: list[str] = []
        self.number = 0
        """Lines that have been read."""
        self.damaged = False
        """Whether one since this was last reset was not UTF-8."""
        self.taken: list[str] = []
        """Lines since this was last reset."""
        self._ended = False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        text = self._ready.pop() if self._ready else self._read()
        self.taken.append(text)
        self.number += 1
        return text

    def put_back(self) -> None:
        """Let the taken lines be read again."""
        self._ready += self.taken[::-1]
        self.number -= len(self.taken)
        self.taken = []

    def _read(self) -> str:
        data = next(self._lines, None)
        if data is None:
            if self._ended:
                raise StopIteration
            self._ended = True
            return _END
        text, damaged = decoded(data)
        self.damaged = self.damaged or damaged
        if "\r" in text.removesuffix("\r\n"):
            self._ready = list(io.StringIO(text, newline=""))[::-1]
            text = self._ready.pop()
        return text
