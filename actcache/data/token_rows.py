"""Rows of token ids: padding left out by attention_mask, and rows that are whole sequences already.

Whether they are is found out by a sample: rows that have the length of a sequence, or one length,
or that begin with BOS, were made as sequences. Joined and cut anew, every later one would be
shifted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.data.datasets import DocumentStream, IndexedDocuments
from actcache.data.records import Record
from actcache.data.table_rows import DOCUMENT
from actcache.errors import DatasetError

Ids = NDArray[np.int64]

MASK = "attention_mask"
"""Column with 0 for each token of a row that is padding."""

_SAMPLED = 256  # rows looked at
_STREAMED = 64  # rows of a stream looked at
_MOST = 0.9  # share of rows that are taken for all
_ALIKE = 8  # rows of one length, other than that of a sequence, that are no coincidence


def row_ids(record: Record) -> list[int]:
    """Return the token ids of a row, without those that its attention mask marks as padding.

    Raises:
        DatasetError: the mask has another length.
    """
    if not isinstance(record, dict):
        ids: list[int] = record
        return ids
    ids, mask = record[DOCUMENT], record.get(MASK)
    if mask is None:
        return ids
    if not isinstance(mask, list) or len(mask) != len(ids):
        got = len(mask) if isinstance(mask, list) else type(mask).__name__
        raise DatasetError(
            f"{MASK} of a row does not fit its token ids", expected=len(ids), got=got
        )
    return ids if all(mask) else list(itertools.compress(ids, mask))


@dataclass(frozen=True)
class RowSample:
    """What a sample of rows shows."""

    lengths: tuple[int, ...]
    """Tokens of each row that has any."""
    with_bos: int
    """Rows that begin with BOS."""
    masked: bool
    """Whether an attention mask marks padding."""
    padded: int
    """Rows that begin or end with the padding token all the same."""

    @staticmethod
    def of_all(samples: Sequence[RowSample]) -> RowSample:
        """Join the samples of several datasets."""
        return RowSample(
            lengths=tuple(length for sample in samples for length in sample.lengths),
            with_bos=sum(sample.with_bos for sample in samples),
            masked=any(sample.masked for sample in samples),
            padded=sum(sample.padded for sample in samples),
        )

    @property
    def begin_with_bos(self) -> bool:
        """Whether all rows, or all but a few, begin with BOS."""
        return 0 < _MOST * len(self.lengths) <= self.with_bos

    @property
    def longest(self) -> int:
        """Length of the longest row; 0 without rows."""
        return max(self.lengths, default=0)

    def notes(self, column: str) -> tuple[str, ...]:
        """Return what the summary says of padding."""
        rows = f"{len(self.lengths):,} rows of {column!r} that were looked at"
        return (
            *([f"{MASK} marks padding in rows of {column!r}, which is left out"] * self.masked),
            *(
                [
                    f"{self.padded:,} of the {rows} begin or end with the padding token, which is "
                    "harvested as text: --exclude-tokens leaves its rows out, a column "
                    f"{MASK} the tokens"
                ]
                * (self.padded > 0)
            ),
        )

    def evidence(self, ctx_len: int) -> str:
        """Say why the rows are taken for whole sequences; the empty string if they are not."""
        rows, longest = len(self.lengths), self.lengths.count(self.longest)
        fitting = self.lengths.count(ctx_len)
        if self.begin_with_bos:
            return ("each begins" if self.with_bos == rows else "nearly all begin") + " with BOS"
        if 0 < rows <= 2 * fitting:
            return f"{'each has' if fitting == rows else 'most have'} {ctx_len} tokens"
        if longest >= max(_ALIKE, _MOST * rows):
            return f"{'each has' if longest == rows else 'nearly all have'} {self.longest} tokens"
        return ""


def sample_rows(source: IndexedDocuments | DocumentStream, tokenizer: Any) -> RowSample:
    """Look at rows that are evenly spread over a source, or at the first of a stream."""
    if isinstance(source, DocumentStream):
        records = list(itertools.islice(source.walk(), _STREAMED))
    else:
        step = max(1, source.count // _SAMPLED)
        records = source.batch(range(0, source.count, step))
    usable = [record for record in records if isinstance(record, list | dict)]
    rows = []
    for record in usable:
        with suppress(DatasetError):  # the harvest leaves it out
            rows.append(row_ids(record))
    rows = [row for row in rows if row]
    bos, pad, eos = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "pad", "eos"))
    least = [pad, pad] if pad in (bos, eos) else [pad]  # a single EOS or BOS is no padding
    return RowSample(
        lengths=tuple(map(len, rows)),
        with_bos=sum(row[0] == bos for row in rows),
        masked=any(
            isinstance(record, dict) and not all(record.get(MASK) or [1]) for record in usable
        ),
        padded=sum(
            pad is not None and least in (row[: len(least)], row[-len(least) :]) for row in rows
        ),
    )


class WholeRows:
    """Counts rows that are kept whole but contradict the sample.

    Args:
        length: tokens of a row that fit into a sequence.
        bos_id: token with which every row of the sample begins; None: they do not.
    """

    def __init__(self, length: int, bos_id: int | None) -> None:
        self._length, self._bos_id = length, bos_id
        self._cut = self._without_bos = 0

    def warnings(self) -> tuple[str, ...]:
        """Return what was found while the rows were read."""
        found = {
            f"had more than {self._length} tokens, and were cut: a larger --ctx-len": self._cut,
            "do not begin with BOS, as those do that were looked at first": self._without_bos,
        }
        return tuple(
            f"{count:,} rows of token ids {what}" for what, count in found.items() if count
        )

    def count(
        self, rows: Iterator[tuple[int, Iterator[Ids]]]
    ) -> Iterator[tuple[int, Iterator[Ids]]]:
        """Yield all (document, its ids in one piece), and count. Reading them again counts anew."""
        cut = without_bos = 0
        for document, pieces in rows:
            (ids,) = pieces
            cut += len(ids) > self._length
            without_bos += self._bos_id is not None and int(ids[:1].sum()) != self._bos_id
            self._cut = max(self._cut, cut)
            self._without_bos = max(self._without_bos, without_bos)
            yield document, iter([ids])
