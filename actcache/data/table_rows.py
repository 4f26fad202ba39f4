"""One row of a table of any format, of which a column is read, and what belongs to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

Columns = str | tuple[str, ...]
"""The column to read, or several: then a value is a dict, without those that a row lacks."""
DOCUMENT = ""
"""Name of the first of several columns in such a dict; the others have their own."""


class Row(NamedTuple):
    """The asked column in one row."""

    value: object
    """As the file holds it; None for null, and where the row lacks the column."""
    line: int
    """Line of the file that the row begins at, from 1; of a Parquet file, the row."""
    replaced: bool = False
    """Whether something in the value was no text, and is U+FFFD now."""
    differs: bool = False
    """Whether earlier versions read another document here."""


class NoColumnError(Exception):
    """No row of the file has the column.

    Args:
        names: columns that it has.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        super().__init__(*self.names)


def joined(columns: tuple[str, ...], values: Iterable[object]) -> dict[str, object]:
    """Return the values of several columns in one row as a dict, nulls left out."""
    names = (DOCUMENT, *columns[1:])
    return {k: v for k, v in zip(names, values, strict=True) if v is not None}


def without_nulls(value: Any) -> Any:
    """Take keys whose value is null out of objects at any depth.

    Arrow gives an object the keys of all objects of its column, with null for those it lacks.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
