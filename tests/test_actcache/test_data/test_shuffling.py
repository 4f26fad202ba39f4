from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.core import rng
from actcache.data import shuffling as mixing
from actcache.data.documents import Column, DocumentStream, IndexedDocuments, Mixture
from actcache.data.shuffling import DocumentOrder, documents_in_order
from actcache.errors import DatasetError

TEXT = Column("text", "text")


def by_number(*texts: str) -> IndexedDocuments:
    return IndexedDocuments(lambda numbers: [texts[n] for n in numbers], len(texts), TEXT, "")


def stream(*texts: str) -> DocumentStream:
    return DocumentStream(lambda: iter(texts), TEXT, "")


def taken(
    source: IndexedDocuments | DocumentStream | Mixture,
    *,
    seed: int = 0,
    keep_order: bool = False,
    buffer: int = 10,
) -> list[str]:
    order = DocumentOrder(seed, keep_order, buffer)
    batches = list(documents_in_order(source, order))
    assert all(len(batch) <= mixing.DOCUMENTS_AT_ONCE for batch in batches)
    return [document for batch in batches for document in batch]


TEXTS = [f"{n}" for n in range(700)]


def test_documents_known_by_number_are_permuted_by_the_seed() -> None:
    expected = rng.stream("documents", 3).permutation(700)
    assert taken(by_number(*TEXTS), seed=3) == [str(n) for n in expected]
    assert taken(by_number(*TEXTS), keep_order=True) == TEXTS


def test_a_stream_is_shuffled_within_its_buffer_and_loses_nothing() -> None:
    found = taken(stream(*TEXTS), buffer=50)
    assert sorted(found) == sorted(TEXTS)
    assert found != TEXTS
    for place, text in enumerate(found):  # nothing comes before the buffer could have held it
        assert int(text) < place + 50
    assert taken(stream(*TEXTS), buffer=50) == found
    assert taken(stream(*TEXTS), buffer=50, seed=1) != found
    assert taken(stream(*TEXTS), buffer=1) == TEXTS
    assert sorted(taken(stream("a", "b"), buffer=50)) == ["a", "b"]
    assert taken(stream(*TEXTS), keep_order=True) == TEXTS


def test_the_order_of_a_stream_is_the_same_for_ever() -> None:
    assert "".join(taken(stream(*"abcdefghij"), buffer=4)) == "cdfbeigahj"


def test_a_stream_is_read_no_further_than_its_buffer() -> None:
    def endless() -> Iterator[str]:
        for n in itertools.count():
            assert n < 400, "read too far"
            yield str(n)

    source = DocumentStream(endless, TEXT, "")
    first = next(documents_in_order(source, DocumentOrder(0, False, 100)))
    assert len(first) == 256


def test_a_mixture_draws_documents_by_their_weights_each_part_in_its_own_order() -> None:
    first, second = (by_number(*(f"{name}{n}" for n in range(4000))) for name in "ab")
    found = taken(Mixture((first, second), (3.0, 1.0)))
    shares = Counter(text[0] for text in found)
    assert shares["a"] / len(found) == pytest.approx(0.75, abs=0.02)
    orders = [rng.stream("documents", 0, part).permutation(4000) for part in (0, 1)]
    for name, order in zip("ab", orders, strict=True):
        alone = [text for text in found if text[0] == name]
        assert alone == [f"{name}{n}" for n in order[: len(alone)]]


def test_a_mixture_ends_with_the_first_part_that_has_none_left_and_repeats_nothing() -> None:
    long = by_number(*(f"a{n}" for n in range(5000)))
    found = taken(Mixture((long, stream("b0", "b1", "b2")), (1.0, 1.0)), buffer=1)
    assert len(set(found)) == len(found)
    assert Counter(text[0] for text in found)["b"] == 3
    # One more draw was for the part that had ended.
    draws = rng.stream("mixture", 0).random_sample(256) >= 0.5
    assert len(found) == int(np.flatnonzero(draws)[3])


def test_the_draws_of_a_mixture_are_the_same_for_ever() -> None:
    parts = tuple(by_number(*(f"{name}{n}" for n in range(9))) for name in "abc")
    found = taken(Mixture(parts, (1.0, 2.0, 1.0)), keep_order=True)
    assert " ".join(found) == "b0 b1 c0 b2 c1 b3 a0 b4 b5 a1 b6 c2 b7 b8"


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_whatever_the_weights_only_parts_that_exist_are_drawn(
    weights: list[float], seed: int
) -> None:
    parts = tuple(by_number("x", "y", "z") for _ in weights)
    found = taken(Mixture(parts, tuple(weights)), seed=seed)
    assert 3 <= len(found) <= 3 * len(weights)


def test_a_document_that_is_no_text_is_refused_by_number() -> None:
    bad = IndexedDocuments(lambda numbers: [7 for _ in numbers], 3, TEXT, "")
    with pytest.raises(DatasetError, match=r"'text' does not hold text"):
        taken(bad)
