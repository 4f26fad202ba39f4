"""Files with one JSON object a line: read by index in place, or from first to last.

An index holds where each object begins. Lines are parsed when they are read; when a file is opened,
each is only seen to begin with { and end with }, and looked through for what is no text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.data.plain_bytes import (
    decoded,
    encoding_of,
    holds_replacement,
    lines,
    without_surrogates,
)
from actcache.data.table_rows import Columns, NoColumnError, Row, joined
from actcache.data.watched_files import WatchedFile, read_at
from actcache.errors import DatasetError

MISSING = object()
"""Value of a column that an object lacks."""

_NAMED = 1000  # objects whose keys an error message lists
_LONG = 4000  # digits that `int` converts in any Python
_OPEN, _CLOSE, _END, _RETURN = b"{}\n\r"
_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
DECODER = json.JSONDecoder(strict=False)
LENIENT = json.JSONDecoder(
    strict=False, parse_int=lambda digits: int(digits) if len(digits) < _LONG else float(digits)
)


class IndexedLines:
    """Documents of an uncompressed UTF-8 file, each read from its place.

    Args:
        path: the file.
        column: the column to read, or several.

    Raises:
        DatasetError: a line is no JSON object.
        NoColumnError: no object has the column.
    """

    def __init__(self, path: Path, column: Columns) -> None:
        self._column = column
        index = _Index(path, column)
        self.file = WatchedFile(path, held=False, observe=index.add)
        self._starts = index.end()
        self.count, self.bytes = len(self._starts) - 1, self.file.bytes
        self.replaced = index.replaced
        self.differs = False
        self._require_column()

    def fetch(self, indices: Sequence[int]) -> list[object]:
        """Read documents of ascending indices.

        Raises:
            DatasetError: the file has changed, or a line is no JSON object.
        """
        values: list[object] = []
        try:
            fd = os.open(self.file.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for index in indices:
                    start, end = self._starts[index : index + 2].tolist()
                    data = os.pread(fd, end - start, start)
                    if len(data) < end - start:
                        data = read_at(fd, start, end - start)
                    value, _ = json_value(data, self._column)
                    values.append(None if value is MISSING else value)
            finally:
                os.close(fd)
        except (ValueError, OSError) as error:
            self.file.check()
            if isinstance(error, OSError):
                raise
            raise not_json(self.file.path, self._line(indices[len(values)]), error) from error
        self.file.check()
        return values

    def place(self, index: int) -> str:
        """Describe where a document is."""
        return f"{self.file.path}, line {self._line(index)}"

    def _line(self, index: int) -> int:
        """Return the number of a document's line, counting blank lines too."""
        start, line, offset = int(self._starts[index]), 1, 0
        with self.file.path.open("rb") as file:
            while offset < start and (piece := file.read(min(1 << 20, start - offset))):
                line, offset = line + piece.count(b"\n"), offset + len(piece)
        return line

    def _require_column(self) -> None:
        names: dict[str, None] = {}
        fd = os.open(self.file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for index in range(self.count):
                start, end = self._starts[index : index + 2].tolist()
                try:
                    row = parsed(decoded(read_at(fd, start, end - start))[0])
                except ValueError as error:
                    self.file.check()
                    raise not_json(self.file.path, self._line(index), error) from error
                if column_of(row, self._column) is not MISSING:
                    return
                if index < _NAMED:
                    names |= dict.fromkeys(row)
        finally:
            os.close(fd)
        if self.count:
            raise NoColumnError(names)


class _Index:
    """Collects the places of lines while a file is read in pieces."""

    def __init__(self, path: Path, column: Columns) -> None:
        self._path, self._column = path, column
        self._tail: list[bytes] = []  # the line that the next piece continues
        self._starts: list[NDArray[np.uint64]] = []
        self._offset = 0  # of the tail in the file
        self._line = 1  # number of that line
        self.replaced = 0
        """Documents in which something was no text."""

    def add(self, piece: bytes) -> None:
        """Index the lines that end in a piece."""
        end = piece.rfind(b"\n") + 1
        if end:
            self._add_lines(b"".join([*self._tail, piece[:end]]))
            self._tail = []
        self._tail.append(piece[end:])

    def end(self) -> NDArray[np.uint64]:
        """Index the last line; return where each object begins, and where the last one ends."""
        if last := b"".join(self._tail):
            self._add_lines(last)
        return np.concatenate([*self._starts, np.array([self._offset], np.uint64)])

    def _add_lines(self, block: bytes) -> None:
        skipped = encoding_of(block[:4])[1] if self._offset == 0 else 0
        if len(block) == skipped:
            self._offset += skipped
            return
        data = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(data == _END) + 1
        if not len(ends) or ends[-1] < len(block):
            ends = np.append(ends, len(block))
        starts = np.concatenate([[skipped], ends[:-1]])
        last = ends - 1 - (data[ends - 1] == _END)  # before \n
        last -= data[last] == _RETURN
        usual = (data[starts] == _OPEN) & (data[last] == _CLOSE)
        for number in np.flatnonzero(~usual).tolist():
            line = block[starts[number] : ends[number]].strip()
            if line and not (line.startswith(b"{") and line.endswith(b"}")):
                error = ValueError(f"a line that begins with {decoded(line[:40])[0]!r}")
                if line.startswith(b"{"):
                    error = ValueError("a line that does not end with }")
                raise not_json(self._path, self._line + number, error)
            usual[number] = bool(line)
        self._count_replaced(block, starts, ends)
        self._starts.append((starts[usual] + self._offset).astype(np.uint64))
        self._offset += len(block)
        self._line += len(ends)

    def _count_replaced(
        self, block: bytes, starts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> None:
        suspects: set[int] = set()
        try:
            block.decode()
        except UnicodeDecodeError:
            for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
                if decoded(block[start:end])[1]:
                    suspects.add(number)
        if b"\\ud" in block or b"\\uD" in block:
            places = [found.start() for found in _LONE_SURROGATE.finditer(block)]
            suspects |= set((np.searchsorted(starts, places, side="right") - 1).tolist())
        for number in sorted(suspects):
            try:
                _, replaced = json_value(block[starts[number] : ends[number]], self._column)
            except ValueError as error:
                raise not_json(self._path, self._line + number, error) from error
            self.replaced += replaced


def json_lines(pieces: Iterator[bytes], column: Columns, path: Path) -> Generator[Row]:
    """Yield the rows of a file with one object a line; blank lines are skipped.

    Raises:
        DatasetError: a line is no JSON object.
        NoColumnError: no object has the column.
    """
    rows = RowsOfObjects(column)
    for number, line in enumerate(lines(pieces), start=1):
        if line.isspace():
            continue
        text, damaged = decoded(line)
        try:
            row = parsed(text)
        except ValueError as error:
            raise not_json(path, number, error) from error
        yield from rows.add(row, number, damaged=damaged, escaped="\\u" in text)
    rows.end()


class RowsOfObjects:
    """Makes rows of JSON objects; holds them back until one of them has the column.

    So a file whose objects all lack it is refused before its first document.
    """

    def __init__(self, column: Columns) -> None:
        self._column = column
        self._names: dict[str, None] = {}
        self._held: list[Row] = []
        self._found = False

    def add(self, row: dict[str, Any], line: int, *, damaged: bool, escaped: bool) -> list[Row]:
        """Return the rows that may be used now.

        Args:
            row: the object.
            line: the line that it begins at.
            damaged: whether it was decoded from bytes that are not UTF-8.
            escaped: whether its text held a Unicode escape.
        """
        value, replaced = _value(row, self._column, damaged=damaged, escaped=escaped)
        if value is not MISSING:
            held, self._held, self._found = self._held, [], True
            return [*held, Row(value, line, replaced)]
        if self._found:
            return [Row(None, line)]
        if len(self._held) < _NAMED:
            self._names |= dict.fromkeys(row)
        self._held.append(Row(None, line))
        return []

    def end(self) -> None:
        """Raise `NoColumnError` if no object had the column."""
        if self._held:
            raise NoColumnError(self._names)


def json_value(line: bytes, column: Columns) -> tuple[object, bool]:
    """Return a column's value in a line, or MISSING, and whether something in it was replaced.

    Raises:
        ValueError: the line is no JSON object.
    """
    damaged = False
    try:
        text = line.decode()
    except UnicodeDecodeError:
        text, damaged = decoded(line)
    return _value(parsed(text), column, damaged=damaged, escaped="\\u" in text)


def _value(
    row: dict[str, Any], column: Columns, *, damaged: bool, escaped: bool
) -> tuple[object, bool]:
    value, replaced = column_of(row, column), False
    if damaged:
        replaced = holds_replacement(value)
    if escaped:
        value, found = without_surrogates(value)
        replaced = replaced or found
    return value, replaced


def column_of(row: dict[str, Any], column: Columns) -> object:
    """Return the value of a column, or of a nested one by its path with dots; else MISSING."""
    if isinstance(column, tuple):
        found = [column_of(row, name) for name in column]
        if found[0] is MISSING:
            return MISSING
        return joined(column, (None if value is MISSING else value for value in found))
    if column in row or "." not in column:
        return row.get(column, MISSING)
    value: Any = row
    for key in column.split("."):
        value = value.get(key, MISSING) if isinstance(value, dict) else MISSING
    return value


def parsed(text: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        row = DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    except json.JSONDecodeError:
        raise
    except ValueError:  # a number of thousands of digits, in whatever field
        row = LENIENT.decode(text)
    if not isinstance(row, dict):
        raise ValueError(f"{type(row).__name__} instead of an object")  # noqa: TRY004
    return row


def not_json(path: Path, line: int, error: Exception) -> DatasetError:
    """Return the error for something that is no JSON object."""
    return DatasetError(
        f"{path}, line {line}: no JSON object",
        expected="one JSON object a line, or in a .json file an array of objects",
        got=str(error),
        remedy="mend or remove it; if the file is cut, copy or download it again",
    )
