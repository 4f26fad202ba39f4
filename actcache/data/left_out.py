"""Documents that cannot be used: left out and counted, up to a share of all.

The share is compared whenever a document is left out: of the documents so far, but at least of
1,000, since among the first few any share is large. At the end of the text, it is that of all
documents: one alone never ends a harvest then, unless none may be left out, or it is all the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from actcache.data.records import Reason, Unusable
from actcache.errors import DatasetError

_FEWEST = 1000  # documents that the share is of, at least


@dataclass(frozen=True)
class LeftOut:
    """A document that was left out."""

    document: int
    """Its index in the shuffled order."""
    reason: Reason
    place: str
    """Where it is, such as a line of a file; empty if that is not known."""
    detail: str
    """What is wrong with it."""
    shown: str
    """Its beginning."""


class LeftOutDocuments:
    """Collects the documents that are left out, in the order of the text.

    Args:
        allowed: share of all documents that may be left out; None: the first ends the harvest.
        place: function from a document's index in the shuffled order to where it is.
    """

    def __init__(self, allowed: float | None, place: Callable[[int], str]) -> None:
        self._allowed, self._place = allowed, place
        self._counts: Counter[str] = Counter()
        self._first: tuple[LeftOut, Unusable] | None = None
        self.found: list[LeftOut] = []
        """Those left out since the last call of `take`."""

    def add(self, document: int, unusable: Unusable) -> None:
        """Leave a document out.

        Raises:
            DatasetError: too many were left out, or none may be.
        """
        error = unusable.error
        if self._allowed is None:
            raise error
        place = unusable.place or self._place(document)
        detail = "; ".join(str(part) for part in (error.what, error.got) if part is not None)
        found = LeftOut(document, unusable.reason, place, detail, unusable.shown)
        self._first = self._first or (found, unusable)
        self._counts[unusable.reason] += 1
        self.found.append(found)
        if self._counts.total() > self._allowed * max(_FEWEST, document + 1):
            self._refuse(document + 1)

    def end(self, documents: int) -> None:
        """Compare with all documents of the text; raises `DatasetError` if it is too many."""
        count, allowed = self._counts.total(), self._allowed or 0.0
        if count and (count > max(1.0, allowed * documents) or count == documents):
            self._refuse(documents)

    def take(self) -> tuple[LeftOut, ...]:
        """Return those that were left out since the last call."""
        taken, self.found = tuple(self.found), []
        return taken

    def _refuse(self, documents: int) -> None:
        assert self._first is not None
        found, unusable = self._first
        where = f" ({found.place})" if found.place else ""
        remedy = f"{unusable.error.remedy}; or " if unusable.error.remedy else ""
        raise DatasetError(
            f"{self._counts.total():,} of {documents:,} documents cannot be used; the first is "
            f"document {found.document}{where}: {found.detail}",
            expected=f"at most {self._allowed:.4g} of them, --max-bad-documents",
            got=f"{by_reason(self._counts)}; the first begins with {found.shown}",
            remedy=f"{remedy}a larger --max-bad-documents leaves more out",
        ) from unusable.error


class BlockLeftOut:
    """Collects the documents that are left out of some documents, and how far these had come."""

    def __init__(self) -> None:
        self.position = 0
        """Tokens so far, or sequences where documents are not joined."""
        self.found: list[tuple[int, int, Unusable]] = []
        """Index in the shuffled order, position, and what is wrong, of each."""

    def add(self, document: int, unusable: Unusable) -> None:
        """Leave a document out."""
        self.found.append((document, self.position, unusable))


def by_reason(counts: dict[str, int]) -> str:
    """Describe counts by reason, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {reason}" for reason, count in ordered)
