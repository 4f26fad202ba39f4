"""Documents as they are read: a long text in pieces, and a document that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from actcache.errors import DatasetError

Record = Any
"""A document as stored: a text (str or `LongText`), a list of messages, or a list of token ids.

With further columns, a dict of them, in which `table_rows.DOCUMENT` is the document."""

Reason = Literal["type", "undecodable", "chat_template", "tokenizer", "token_id"]
"""Why a document cannot be used: its column's type, bytes that are no text, the chat template
refuses it, the tokenizer refuses it, or a token id is outside the model's vocabulary."""

_SHOWN = 80  # characters of a document in a log


@dataclass(frozen=True)
class LongText:
    """A text that is read while it is tokenised, because it may be larger than memory."""

    pieces: Callable[[], Iterator[str]]
    """Function that reads it from its beginning, in pieces of any size."""


@dataclass(frozen=True)
class Unusable:
    """A document that cannot be used."""

    reason: Reason
    error: DatasetError
    """What is wrong, as it ends a harvest that leaves no documents out."""
    shown: str
    """Beginning of the document."""
    place: str = ""
    """Where it is, such as a line of a file; empty if that is not known here."""

    def to_values(self) -> list[Any]:
        """Return what `from_values` takes, for JSON."""
        error = self.error
        values = [error.what, error.expected, error.got, error.remedy]
        texts = [value if value is None else str(value) for value in values]
        return [self.reason, self.shown, self.place, texts]

    @classmethod
    def from_values(cls, values: list[Any]) -> Unusable:
        """Return what `to_values` was made of."""
        reason, shown, place, (what, expected, got, remedy) = values
        error = DatasetError(what, expected=expected, got=got, remedy=remedy)
        return cls(reason, error, shown, place)


def shown(record: object) -> str:
    """Return the beginning of a document as Python writes it."""
    if isinstance(record, LongText):
        record = next(record.pieces(), "")
    if isinstance(record, str | bytes | list):
        record = record[:_SHOWN]
    return repr(record)[:_SHOWN]
