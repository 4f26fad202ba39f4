"""Seeded order of documents.

`IndexedDocuments` are permuted; a `DocumentStream` is shuffled within a buffer; a `Mixture` draws
the source of each document by weight, and ends when a drawn source is exhausted (repeating
documents would change the text, skipping the source would change the shares).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from actcache.core import rng
from actcache.data.datasets import DocumentStream, IndexedDocuments, Mixture
from actcache.data.records import Record

DOCUMENTS_AT_ONCE = 256
"""Documents read and tokenised at once."""


@dataclass(frozen=True)
class DocumentOrder:
    """Settings of the shuffle of documents."""

    seed: int
    keep_order: bool
    """Keep the dataset's order; a mixture still draws its sources at random."""
    buffer: int
    """Size of a stream's shuffle buffer, in documents."""


def documents_in_order(
    source: IndexedDocuments | DocumentStream | Mixture, order: DocumentOrder
) -> Iterator[list[Record]]:
    """Yield all documents in the seeded order, in batches.

    Raises:
        DatasetError: a document does not have its column's type.
    """
    if isinstance(source, Mixture):
        yield from _draw(source, order)
        return
    documents = _shuffled(source, order)
    while batch := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
        yield batch


def _draw(mixture: Mixture, order: DocumentOrder) -> Iterator[list[Record]]:
    sources = [_shuffled(source, order, number) for number, source in enumerate(mixture.sources)]
    for drawn in _drawn(mixture, order):
        batch: list[Record] = []
        for number in drawn:
            taken = list(itertools.islice(sources[number], 1))
            if not taken:
                yield batch
                return
            batch += taken
        yield batch


def _drawn(mixture: Mixture, order: DocumentOrder) -> Iterator[list[int]]:
    """Yield the sources that documents are drawn from, in batches without end."""
    shares = np.cumsum(mixture.weights) / np.sum(mixture.weights)
    state = rng.stream("mixture", order.seed)
    while True:
        drawn = np.searchsorted(shares, state.random_sample(DOCUMENTS_AT_ONCE), side="right")
        # Rounding can leave the last cumulative share below 1.
        yield np.minimum(drawn, len(mixture.sources) - 1).tolist()


def _shuffled(
    source: IndexedDocuments | DocumentStream, order: DocumentOrder, *number: int
) -> Iterator[Record]:
    """Iterate over one source's documents; `number` is its index in a mixture."""
    state = rng.stream("documents", order.seed, *number)
    if isinstance(source, IndexedDocuments):
        indices = np.arange(source.count) if order.keep_order else state.permutation(source.count)
        for start in range(0, source.count, DOCUMENTS_AT_ONCE):
            yield from source.batch(indices[start : start + DOCUMENTS_AT_ONCE].tolist())
    elif order.keep_order:
        yield from source.walk()
    else:
        documents = source.walk()
        buffer = list(itertools.islice(documents, order.buffer))
        for document in documents:
            slot = int(state.randint(len(buffer)))
            yield buffer[slot]
            buffer[slot] = document
        for slot in state.permutation(len(buffer)):
            yield buffer[slot]


def place_in_order(
    source: IndexedDocuments | DocumentStream | Mixture, order: DocumentOrder, document: int
) -> str:
    """Describe where the document of an index in the seeded order is; empty if it is not known."""
    number: tuple[int, ...] = ()
    if isinstance(source, Mixture):
        drawn = itertools.chain.from_iterable(_drawn(source, order))
        owners = list(itertools.islice(drawn, document + 1))
        number = (owners[-1],)
        source, document = source.sources[owners[-1]], owners.count(owners[-1]) - 1
    if not isinstance(source, IndexedDocuments) or source.place is None:
        return ""
    if order.keep_order:
        return source.place(document)
    state = rng.stream("documents", order.seed, *number)
    return source.place(int(state.permutation(source.count)[document]))
