from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from actcache.data.datasets import Column, DocumentStream, IndexedDocuments, Mixture, TokenFile
from actcache.data.document_order import DocumentOrder
from actcache.data.sequences import (
    Anchor,
    Sequence,
    SequencePipeline,
    SequenceReader,
    iter_sequences,
)
from actcache.errors import DatasetError

IDS = Column("ids", "ids")
EOS = 0


def documents(texts: list[list[int]]) -> IndexedDocuments:
    return IndexedDocuments(lambda numbers: [texts[n] for n in numbers], len(texts), IDS, "")


def source_of(kind: str, texts: list[list[int]]) -> Any:
    half = len(texts) // 2
    if kind == "file":
        ids = np.array([i for text in texts for i in text], np.int64)
        return TokenFile(len(ids), lambda first, n: ids[first : first + n], Path("x.bin"), "")
    if kind == "stream":
        return DocumentStream(lambda: iter(texts), IDS, "")
    if kind == "mixture":
        return Mixture((documents(texts[:half]), documents(texts[half:])), (1.0, 2.0))
    return documents(texts)


def pipeline_of(kind: Any, source: Any, ctx_len: int, bos_id: int | None) -> SequencePipeline:
    joins = kind == "pack" and not isinstance(source, TokenFile)
    pad_id = None if kind == "pack" else 77
    order = DocumentOrder(3, False, 5)
    return SequencePipeline(kind, ctx_len, bos_id, EOS if joins else None, pad_id, order, 100)


def as_tuples(sequences: list[Sequence]) -> list[Any]:
    return [(s.tokens.tolist(), s.length, s.document, s.start, s.left_out) for s in sequences]


BAD = [5, -1]
"""Ids of which one is none of the vocabulary: such a document is left out."""
TEXTS = st.lists(st.lists(st.integers(EOS, 5), max_size=14) | st.just(BAD), min_size=1, max_size=30)


@given(
    TEXTS,
    st.sampled_from(["pack", "crop", "truncate"]),
    st.sampled_from(["documents", "stream", "mixture", "file"]),
    st.integers(2, 9),
    st.sampled_from([None, 50]),
    st.data(),
)
def test_sequences_from_any_known_one_are_those_from_the_beginning(
    texts: list[list[int]], kind: str, place: str, ctx_len: int, bos_id: int | None, data: Any
) -> None:
    source = source_of(place, texts)
    kind = "pack" if place == "file" else kind
    pipeline = pipeline_of(kind, source, ctx_len, bos_id)
    pipeline = dataclasses.replace(pipeline, max_bad_documents=1.0)
    assume(place != "file" or BAD not in texts)
    assume(any(text != BAD for text in texts))
    whole = list(iter_sequences(source, None, pipeline))
    if not whole:
        return
    known = data.draw(st.integers(0, len(whole) - 1))
    origin = whole[known]
    found = list(iter_sequences(source, None, pipeline, origin.document, origin.start))
    assert as_tuples(found)[0][:-1] == as_tuples(whole)[known][:-1]
    assert as_tuples(found[1:]) == as_tuples(whole[known + 1 :])
    asked: list[int] = []

    def find_anchor(number: int) -> Anchor | None:
        asked.append(number)
        return Anchor(known, origin) if known < number else None

    reader = SequenceReader(source, None, pipeline, find_anchor)
    for _ in range(4):
        first, most = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, 5))
        if data.draw(st.booleans()):
            assert reader.count(first, most) == len(whole[first : first + most])
        assert as_tuples(reader.read(first, most)) == as_tuples(whole[first : first + most])


def test_only_documents_from_the_known_sequence_on_are_read() -> None:
    read: list[int] = []

    def fetch(numbers: list[int]) -> list[list[int]]:
        read.extend(numbers)
        return [[n % 90 + 1] * 7 for n in numbers]

    source = IndexedDocuments(fetch, 100_000, IDS, "")
    pipeline = pipeline_of("pack", source, 8, None)
    pipeline = dataclasses.replace(pipeline, order=DocumentOrder(0, True, 5))
    known = next(iter_sequences(source, None, pipeline, 90_000))
    read.clear()
    reader = SequenceReader(source, None, pipeline, lambda _: Anchor(90_000, known))
    (found,) = reader.read(90_001, 1)
    assert found.document == 90_001
    assert min(read) == 90_000
    assert len(read) <= 256


@pytest.mark.parametrize("change", [{"tokens": np.full(8, 9, np.int32)}, {"start": 3}])
def test_a_text_that_is_not_that_of_the_known_sequence_is_refused(change: Any) -> None:
    source = documents([[1, 2, 3, 4, 5, 6, 7]] * 9)
    pipeline = pipeline_of("pack", source, 8, None)
    known = dataclasses.replace(list(iter_sequences(source, None, pipeline))[2], **change)
    reader = SequenceReader(source, None, pipeline, lambda _: Anchor(2, known))
    with pytest.raises(DatasetError, match=r"(?s)other tokens.*sequence 2 as it was published"):
        reader.read(3, 1)


def test_the_text_is_read_on_to_what_is_near_and_entered_anew_for_what_is_far() -> None:
    source = documents([[1, 2, 3]] * 4000)
    pipeline = pipeline_of("pack", source, 4, None)
    whole = list(iter_sequences(source, None, pipeline))
    asked: list[int] = []

    def find_anchor(number: int) -> Anchor:
        asked.append(number)
        return Anchor(number - 1, whole[number - 1])

    reader = SequenceReader(source, None, pipeline, find_anchor)
    reader._near = 100
    for first in (10, 20, 110, 3000, 3001):
        assert as_tuples(reader.read(first, 2)) == as_tuples(whole[first : first + 2])
    assert asked == [10, 3000, 3001]
