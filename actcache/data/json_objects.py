"""JSON files that are an array of objects, or objects one after another on any lines."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from actcache.data.json_lines import DECODER, LENIENT, RowsOfObjects, not_json
from actcache.data.plain_bytes import decoded_pieces
from actcache.data.table_rows import Columns, Row

_SPACE = re.compile(r"[ \t\r\n]*")
_CUT = 16  # characters before the end within which an error may come from the end itself


def json_objects(pieces: Iterator[bytes], column: Columns, path: Path) -> Generator[Row]:
    """Yield the rows of an array of objects, or of objects that follow one another.

    Raises:
        DatasetError: something else is there.
        NoColumnError: no object has the column.
    """
    rows, text = RowsOfObjects(column), _Text(pieces, path)
    is_array = text.peek() == "["
    if is_array:
        text.take()
    while (first := text.peek()) not in {"", "]"}:
        line = text.line
        row, escaped = text.parse()
        yield from rows.add(row, line, damaged=text.damaged, escaped=escaped)
        if is_array and text.peek() == ",":
            text.take()
            if text.peek() != "{":
                raise not_json(path, text.line, ValueError("no object after a comma"))
        elif is_array and text.peek() != "]":
            raise not_json(path, text.line, ValueError("neither a comma nor the end of the array"))
    if is_array and first != "]":
        raise not_json(path, text.line, ValueError("the array does not end"))
    if is_array:
        text.take()
    if (not is_array and first == "]") or text.peek():
        raise not_json(path, text.line, ValueError("text after the end"))
    rows.end()


class _Text:
    """Text of a file that is parsed from the front. What has been parsed is dropped."""

    def __init__(self, pieces: Iterator[bytes], path: Path) -> None:
        self._pieces, self._path = decoded_pieces(pieces), path
        self._text, self._at = "", 0
        self.line = 1
        """Number of the line that is reached."""
        self.damaged = False
        """Whether bytes of the text that is held were not UTF-8."""

    def peek(self) -> str:
        """Skip white space, and return the next character; the empty string at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._move(found.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def take(self) -> None:
        """Move behind one character."""
        self._move(self._at + 1)

    def parse(self) -> tuple[dict[str, Any], bool]:
        """Parse an object; return it, and whether its text holds a Unicode escape."""
        while True:
            try:
                row, end = self._decode()
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _CUT
                if cut and self._read_on():
                    continue
                raise not_json(self._path, self.line, error) from error
            except RecursionError as error:
                raise not_json(self._path, self.line, ValueError("nested too deep")) from error
            if not isinstance(row, dict):
                what = ValueError(f"{type(row).__name__} instead of an object")
                raise not_json(self._path, self.line, what)
            escaped = self._text.find("\\u", self._at, end) >= 0
            self._move(end)
            return row, escaped

    def _decode(self) -> tuple[Any, int]:
        try:
            return DECODER.raw_decode(self._text, self._at)
        except json.JSONDecodeError:
            raise
        except ValueError:  # a number of thousands of digits
            return LENIENT.raw_decode(self._text, self._at)

    def _move(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _read_on(self) -> bool:
        """Read as much as is held, so that an object of any size is tried a few times only."""
        rest = self._text[self._at :]
        self.damaged = self.damaged and "\ufffd" in rest
        texts, size = [rest], 0
        for text, damaged in self._pieces:
            texts.append(text)
            size += len(text)
            self.damaged = self.damaged or damaged
            if size >= len(rest):
                break
        self._text, self._at = "".join(texts), 0
        return size > 0
