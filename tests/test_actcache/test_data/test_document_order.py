from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets as hf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.config import HarvestConfig
from actcache.data import datasets, document_order
from actcache.data.datasets import Column, DocumentStream, IndexedDocuments, Mixture
from actcache.data.document_order import DocumentOrder, documents_in_order, open_order

TEXT = Column("text", "text")


def documents(*texts: str) -> IndexedDocuments:
    return IndexedDocuments(lambda numbers: [texts[n] for n in numbers], len(texts), TEXT, "")


def stream(*texts: str) -> DocumentStream:
    return DocumentStream(lambda: iter(texts), TEXT, "")


def texts_of(name: str, count: int) -> list[str]:
    return [f"{name}{n}" for n in range(count)]


SOURCES: dict[str, Any] = {
    "documents": documents(*texts_of("a", 300)),
    "stream": stream(*texts_of("a", 300)),
    "mixture": Mixture((documents(*texts_of("a", 90)), documents(*texts_of("b", 300))), (1.0, 3.0)),
    "streams": Mixture((stream(*texts_of("a", 60)), documents(*texts_of("b", 300))), (1.0, 2.0)),
}


def taken(source: Any, order: DocumentOrder, first: int = 0) -> list[str]:
    return [text for batch in documents_in_order(source, order, first) for text in batch]


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("keep_order", [False, True])
@pytest.mark.parametrize("draws", [7, 1 << 20])
def test_the_order_entered_anywhere_goes_on_as_from_the_beginning(
    kind: str, keep_order: bool, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_order, "_DRAWS", draws)
    order = DocumentOrder(3, keep_order, 20)
    whole = taken(SOURCES[kind], order)
    for first in [*range(0, len(whole), 13), len(whole) - 1, len(whole)]:
        assert taken(SOURCES[kind], order, first) == whole[first:]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=12), st.sampled_from([*SOURCES])
)
def test_documents_are_skipped_between_those_that_are_taken(
    steps: list[tuple[bool, int]], kind: str
) -> None:
    order = DocumentOrder(1, False, 15)
    whole, position = taken(SOURCES[kind], order), 0
    reader = open_order(SOURCES[kind], order)
    for take, count in steps:
        if position + count > len(whole):
            return  # beyond the end of a mixture, the draws go on
        if take:
            assert reader.take(count) == whole[position : position + count]
        else:
            reader.skip(count)
        position += count


def test_documents_before_the_first_are_not_read() -> None:
    read: list[int] = []

    def fetch(numbers: list[int]) -> list[str]:
        read.extend(numbers)
        return [str(n) for n in numbers]

    source = IndexedDocuments(fetch, 10_000, TEXT, "")
    order = DocumentOrder(0, False, 20)
    next(documents_in_order(Mixture((source, source), (1.0, 1.0)), order, 15_000))
    assert len(read) == document_order.DOCUMENTS_AT_ONCE


def test_a_stream_is_entered_at_the_oldest_document_of_its_buffer() -> None:
    begun: list[int] = []

    def walk_from(first: int) -> Iterator[str]:
        begun.append(first)
        return iter(texts_of("a", 5000)[first:])

    source = DocumentStream(lambda: walk_from(0), TEXT, "", walk_from=walk_from)
    order = DocumentOrder(0, False, 20)
    whole = taken(source, order)
    begun.clear()
    assert taken(source, order, 4000) == whole[4000:]
    assert len(begun) == 1
    assert 3700 < begun[0] < 4000


@pytest.mark.parametrize("form", ["jsonl", "csv", "folder", "saved", "hub"])
def test_streams_of_every_form_begin_at_any_document(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = texts_of("a", 600)
    lines = [json.dumps({"text": text}) for text in texts]
    name = {"jsonl": "a.jsonl", "csv": "a.csv"}.get(form, "folder")
    if form == "jsonl":
        (tmp_path / name).write_text("\n".join(lines))
    elif form == "csv":
        (tmp_path / name).write_text("\n".join(["text", *texts]))
    elif form == "folder":
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text("\n".join(lines[:250]))
        (tmp_path / name / "b.csv").write_text("\n".join(["text", *texts[250:290]]))
        (tmp_path / name / "c.jsonl").write_text("\n".join(lines[290:]))
    else:
        table = hf.Dataset.from_dict({"text": texts})
        table.save_to_disk(str(tmp_path / name))
    path = str(tmp_path / name)
    if form == "hub":
        stream = table.to_iterable_dataset(num_shards=3)
        monkeypatch.setattr(datasets, "_load_from_hub", lambda _: (stream, None))
        path = "some/dataset"
    source = datasets.open_dataset(
        HarvestConfig("model", path, "out", streaming=True, max_tokens=4096)
    )
    assert isinstance(source, DocumentStream)
    assert source.walk_from is not None
    for first in (0, 1, 249, 250, 270, 290, 400, 599, 600):
        assert list(source.begin(first)) == texts[first:]
