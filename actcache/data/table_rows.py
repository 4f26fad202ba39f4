"""One row of a table of any format, of which a single column is read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


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
