"""Documents, whatever they come from, behind a few small classes.

`IndexedDocuments` are known by number; a `DocumentStream` can only be iterated; a `Mixture` draws
from several; a `TokenFile` is one long run of token ids. Each carries a fingerprint, so that a
cache records what it was made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from actcache.errors import DatasetError

Kind = Literal["text", "chat", "ids"]
Record = Any
"""A document as it came: str, a list of messages, or a list of token ids."""


@dataclass(frozen=True)
class Column:
    """Where documents stand in a table, and what they are."""

    name: str
    """Empty for a .txt file."""
    kind: Kind

    def check(self, record: object, number: int) -> Record:
        """A document that is what its column promises; one that is missing is empty.

        Raises:
            DatasetError: it is something else.
        """
        if record is None:
            return "" if self.kind == "text" else []
        if not _CHECKS[self.kind](record):
            wanted, remedy = _WANTED[self.kind]
            raise DatasetError(
                f"column {self.name!r} does not hold {wanted}",
                expected=wanted,
                got=f"{_describe(record)} in document {number}",
                remedy=remedy,
            )
        return record


_CHECKS: dict[Kind, Callable[[Any], bool]] = {
    "text": lambda record: isinstance(record, str),
    "chat": lambda record: (
        isinstance(record, list) and all(isinstance(m, dict) and "role" in m for m in record)
    ),
    "ids": lambda record: isinstance(record, list) and all(type(i) is int for i in record),
}
_WANTED: dict[Kind, tuple[str, str]] = {
    "text": ("text", "name another column with --text-column"),
    "chat": ("lists of messages, each with a role", "name another column with --chat-column"),
    "ids": ("lists of token ids", "name another column with --token-column"),
}


def _describe(record: object) -> str:
    inner = f" of {type(record[0]).__name__}" if isinstance(record, list) and record else ""
    return f"{type(record).__name__}{inner}"


@dataclass(frozen=True)
class IndexedDocuments:
    """Documents by number."""

    fetch: Callable[[list[int]], Sequence[object]]
    """Function from a list of numbers to the records."""
    count: int
    """How many."""
    column: Column
    fingerprint: str
    """Digest of the text."""
    bytes: int | None = None
    """Size of the file they came from, which bounds their tokens; None: not from one file."""

    def batch(self, numbers: Sequence[int]) -> list[Record]:
        """Documents with these numbers.

        Raises:
            DatasetError: one of them is not what the column promises.
        """
        records = self.fetch(list(numbers))
        pairs = zip(numbers, records, strict=True)
        return [self.column.check(record, number) for number, record in pairs]


@dataclass(frozen=True)
class DocumentStream:
    """Documents one after another, from the first, as often as asked."""

    walk: Callable[[], Iterator[Record]]
    column: Column
    fingerprint: str
    """Digest of the names and of the first documents, or of the file."""


@dataclass(frozen=True)
class Mixture:
    """Several datasets, of which documents are drawn by weight."""

    parts: tuple[IndexedDocuments | DocumentStream, ...]
    weights: tuple[float, ...]
    """Share of each part in the documents drawn; any scale."""

    @property
    def column(self) -> Column:
        """Where the documents of every part stand."""
        return self.parts[0].column

    @property
    def fingerprint(self) -> str:
        """Digest of the parts' fingerprints."""
        joined = " ".join(part.fingerprint for part in self.parts)
        return f"{xxhash.xxh3_128(joined.encode()).hexdigest()}-mixed"


@dataclass(frozen=True)
class TokenFile:
    """Token ids as they are."""

    ids: np.memmap[Any, Any]
    """All of them, in order."""
    path: Path
    fingerprint: str
    """Digest of the file and of the type its ids are read as."""


Source = IndexedDocuments | DocumentStream | Mixture | TokenFile


def document_kind(source: Source) -> Kind:
    """What the documents are."""
    return "ids" if isinstance(source, TokenFile) else source.column.kind
