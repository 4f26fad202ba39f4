"""Seeded order of documents, which can be entered at any position.

`IndexedDocuments` are permuted; a `DocumentStream` is shuffled within a buffer; a `Mixture` draws
the source of each document by weight, and ends when a drawn source is exhausted (repeating
documents would change the text, skipping the source would change the shares).

To enter it, the permutation is indexed, the draws of the mixture are counted, and the shuffle
buffer is replayed on indices: only documents that are still in it are read.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from actcache.core import rng
from actcache.data.datasets import DocumentStream, IndexedDocuments, Mixture
from actcache.data.records import Record

DOCUMENTS_AT_ONCE = 256
"""Documents read and tokenised at once."""
_DRAWS = 1 << 20  # random numbers drawn at once to enter the order


@dataclass(frozen=True)
class DocumentOrder:
    """Settings of the shuffle of documents."""

    seed: int
    keep_order: bool
    """Keep the dataset's order; a mixture still draws its sources at random."""
    buffer: int
    """Size of a stream's shuffle buffer, in documents."""


def documents_in_order(
    source: IndexedDocuments | DocumentStream | Mixture, order: DocumentOrder, first: int = 0
) -> Iterator[list[Record]]:
    """Yield the documents in the seeded order from position `first` on, in batches.

    Raises:
        DatasetError: a document does not have its column's type.
    """
    reader = open_order(source, order)
    reader.skip(first)
    while batch := reader.take(DOCUMENTS_AT_ONCE):
        yield batch


class OrderReader(Protocol):
    """Position in the order of documents."""

    def skip(self, count: int) -> None:
        """Move on by so many documents, of which as few as possible are read."""

    def take(self, count: int) -> list[Record]:
        """Read the next documents: fewer than `count` at the end of the text."""


def open_order(
    source: IndexedDocuments | DocumentStream | Mixture, order: DocumentOrder
) -> OrderReader:
    """Return a reader at the beginning of the order."""
    return _Mixed(source, order) if isinstance(source, Mixture) else _of_one(source, order)


def _of_one(
    source: IndexedDocuments | DocumentStream, order: DocumentOrder, *number: int
) -> OrderReader:
    """Return a reader of one source; `number` is its index in a mixture."""
    if isinstance(source, IndexedDocuments):
        return _Permuted(source, order, *number)
    return _Streamed(source, order, *number)


class _Mixed:
    def __init__(self, mixture: Mixture, order: DocumentOrder) -> None:
        self._draw = _draws(mixture, order)
        self._readers = [_of_one(source, order, n) for n, source in enumerate(mixture.sources)]
        self._ended = False

    def skip(self, count: int) -> None:
        for start in range(0, count, _DRAWS):
            drawn = self._draw(min(_DRAWS, count - start))
            numbers = np.bincount(drawn, minlength=len(self._readers)).tolist()
            for reader, number in zip(self._readers, numbers, strict=True):
                reader.skip(number)

    def take(self, count: int) -> list[Record]:
        if self._ended:
            return []
        drawn = self._draw(count)
        numbers = np.bincount(drawn, minlength=len(self._readers)).tolist()
        taken = [iter(r.take(n)) for r, n in zip(self._readers, numbers, strict=True)]
        batch: list[Record] = []
        for source in drawn.tolist():
            document = list(itertools.islice(taken[source], 1))
            if not document:
                self._ended = True
                break
            batch += document
        return batch


class _Permuted:
    def __init__(self, source: IndexedDocuments, order: DocumentOrder, *number: int) -> None:
        self._source, self._next = source, 0
        state = rng.stream("documents", order.seed, *number)
        count = source.count
        self._indices = np.arange(count) if order.keep_order else state.permutation(count)

    def skip(self, count: int) -> None:
        self._next += count

    def take(self, count: int) -> list[Record]:
        indices = self._indices[self._next : self._next + count].tolist()
        self._next += len(indices)
        return self._source.batch(indices) if indices else []


class _Streamed:
    def __init__(self, source: DocumentStream, order: DocumentOrder, *number: int) -> None:
        self._source, self._order, self._number = source, order, number
        self._first = 0
        self._documents: Iterator[Record] | None = None  # begun when the first is taken

    def skip(self, count: int) -> None:
        if self._documents is None:
            self._first += count
        else:
            for _ in itertools.islice(self._documents, count):
                pass

    def take(self, count: int) -> list[Record]:
        if self._documents is None:
            self._documents = self._begin()
        return list(itertools.islice(self._documents, count))

    def _begin(self) -> Iterator[Record]:
        first = self._first
        if self._order.keep_order:
            return self._source.begin(first)
        state = rng.stream("documents", self._order.seed, *self._number)
        if first:
            held = np.arange(self._order.buffer)  # index of the document in each slot
            for start in range(0, first, _DRAWS):
                number = min(_DRAWS, first - start)
                slots = state.randint(len(held), size=number)
                held[slots] = len(held) + np.arange(start, start + number)
            documents = self._source.begin(int(held.min()))
            slot_of = {index: slot for slot, index in enumerate(held.tolist())}
            read = range(int(held.min()), self._order.buffer + first)
            found = {
                slot_of[index]: document
                for index, document in zip(read, documents, strict=False)
                if index in slot_of
            }
            if len(found) == len(held):
                return _shuffled([found[slot] for slot in range(len(held))], documents, state)
            # The stream ended before the buffer was full, so that fewer numbers were drawn.
            state = rng.stream("documents", self._order.seed, *self._number)
        documents = self._source.begin(0)
        buffer = list(itertools.islice(documents, self._order.buffer))
        return itertools.islice(_shuffled(buffer, documents, state), first, None)


def _draws(mixture: Mixture, order: DocumentOrder) -> Callable[[int], NDArray[np.int64]]:
    """Return the function from a number to the sources of so many further documents."""
    shares = np.cumsum(mixture.weights) / np.sum(mixture.weights)
    state = rng.stream("mixture", order.seed)

    def draw(count: int) -> NDArray[np.int64]:
        drawn = np.searchsorted(shares, state.random_sample(count), side="right")
        # Rounding can leave the last cumulative share below 1.
        return np.minimum(drawn, len(mixture.sources) - 1)

    return draw


def _shuffled(
    buffer: list[Record], documents: Iterator[Record], state: np.random.RandomState
) -> Iterator[Record]:
    """Yield the documents of a buffer and of the rest of a stream, which refills it."""
    for document in documents:
        slot = int(state.randint(len(buffer)))
        yield buffer[slot]
        buffer[slot] = document
    for slot in state.permutation(len(buffer)):
        yield buffer[slot]


def places_in_order(
    source: IndexedDocuments | DocumentStream | Mixture, order: DocumentOrder
) -> Callable[[int], str]:
    """Return the function from an index in the seeded order to where that document is.

    It returns the empty string where that is not known. What it derives from the seed, which may
    take seconds for millions of documents, is kept.
    """
    if isinstance(source, Mixture):
        return _places_in_mixture(source, order)
    return _places_of_one(source, order)


def _places_of_one(
    source: IndexedDocuments | DocumentStream, order: DocumentOrder, *number: int
) -> Callable[[int], str]:
    @functools.cache
    def permutation() -> NDArray[np.int64]:
        assert isinstance(source, IndexedDocuments)
        return rng.stream("documents", order.seed, *number).permutation(source.count)

    def place(document: int) -> str:
        if not isinstance(source, IndexedDocuments) or source.place is None:
            return ""
        return source.place(document if order.keep_order else int(permutation()[document]))

    return place


def _places_in_mixture(mixture: Mixture, order: DocumentOrder) -> Callable[[int], str]:
    draw = _draws(mixture, order)
    places = [_places_of_one(one, order, number) for number, one in enumerate(mixture.sources)]
    owners: list[int] = []  # source of each document so far
    indices: list[int] = []  # index of each in its source
    taken = [0] * len(places)

    def place(document: int) -> str:
        while len(owners) <= document:
            for owner in draw(DOCUMENTS_AT_ONCE).tolist():
                owners.append(owner)
                indices.append(taken[owner])
                taken[owner] += 1
        return places[owners[document]](indices[document])

    return place
