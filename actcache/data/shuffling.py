"""The order in which documents are taken: seeded, and the same on every machine for ever.

Documents that are known by number are permuted. A stream is shuffled within a buffer. A mixture
draws the part that the next document comes from by weight, until a part that was drawn has none
left: the text then ends, rather than repeat documents or change the shares.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from actcache.core import rng
from actcache.data.documents import DocumentStream, IndexedDocuments, Mixture, Record

DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True)
class DocumentOrder:
    """How documents are shuffled."""

    seed: int
    keep_order: bool
    """Take them in the dataset's order; the parts of a mixture are drawn by seed all the same."""
    buffer: int
    """Documents of a stream that are held to draw the next from."""


def documents_in_order(
    source: IndexedDocuments | DocumentStream | Mixture, order: DocumentOrder
) -> Iterator[list[Record]]:
    """All documents, in batches; raises `DatasetError` for one that is not what it should be."""
    if isinstance(source, Mixture):
        yield from _drawn(source, order)
        return
    documents = _walk(source, order)
    while batch := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
        yield batch


def _drawn(mixture: Mixture, order: DocumentOrder) -> Iterator[list[Record]]:
    shares = np.cumsum(mixture.weights) / np.sum(mixture.weights)
    state = rng.stream("mixture", order.seed)
    walks = [_walk(part, order, number) for number, part in enumerate(mixture.parts)]
    while True:
        draws = np.searchsorted(shares, state.random_sample(DOCUMENTS_AT_ONCE), side="right")
        batch: list[Record] = []
        for part in draws:
            # The last share may be a rounding error below 1.
            taken = list(itertools.islice(walks[min(part, len(walks) - 1)], 1))
            if not taken:
                yield batch
                return
            batch += taken
        yield batch


def _walk(
    source: IndexedDocuments | DocumentStream, order: DocumentOrder, *part: int
) -> Iterator[Record]:
    state = rng.stream("documents", order.seed, *part)
    if isinstance(source, IndexedDocuments):
        numbers = np.arange(source.count) if order.keep_order else state.permutation(source.count)
        for start in range(0, source.count, DOCUMENTS_AT_ONCE):
            yield from source.batch([int(n) for n in numbers[start : start + DOCUMENTS_AT_ONCE]])
    elif order.keep_order:
        yield from source.walk()
    else:
        yield from _buffered(source.walk(), order.buffer, state)


def _buffered(
    documents: Iterator[Record], size: int, state: np.random.RandomState
) -> Iterator[Record]:
    held = list(itertools.islice(documents, size))
    for document in documents:
        place = int(state.randint(len(held)))
        yield held[place]
        held[place] = document
    for place in state.permutation(len(held)):
        yield held[place]
