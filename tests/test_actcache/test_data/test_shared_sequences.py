from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actcache.data import shared_sequences
from actcache.data.datasets import Column, DocumentStream, IndexedDocuments, Mixture
from actcache.data.document_order import DocumentOrder
from actcache.data.sequences import Anchor, Sequence, SequencePipeline, iter_sequences
from actcache.data.shared_sequences import SharedSequences, documents_of_a_block
from actcache.data.text_blocks import read_block, read_header
from actcache.errors import DatasetError

TEXT = Column("text", "text")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_sequences, "_PAUSE", 0.001)


class Letters:
    """Tokenizer with one token per letter, a = 1; it counts its tokens."""

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        found = [[ord(c) - 96 for c in text] for text in texts]
        self.tokens += sum(map(len, found))
        return {"input_ids": found}


def documents(texts: list[str]) -> IndexedDocuments:
    return IndexedDocuments(lambda numbers: [texts[n] for n in numbers], len(texts), TEXT, "")


def source_of(kind: str, texts: list[str]) -> Any:
    half = len(texts) // 2
    if kind == "stream":
        return DocumentStream(lambda: (TEXT.check(t, i) for i, t in enumerate(texts)), TEXT, "")
    if kind == "mixture":
        return Mixture((documents(texts[:half]), documents(texts[half:])), (1.0, 2.0))
    return documents(texts)


def pipeline(kind: Any = "pack", ctx_len: int = 4, bos_id: int | None = None) -> SequencePipeline:
    pack = kind == "pack"
    order = DocumentOrder(3, False, 5)
    return SequencePipeline(
        kind, ctx_len, bos_id, 1 if pack else None, None if pack else 77, order, 100
    )


def as_tuples(sequences: list[Sequence]) -> list[Any]:
    return [(s.tokens.tolist(), s.length, s.document, s.start, s.left_out) for s in sequences]


def share(
    source: Any, settings: SequencePipeline, folder: Path, size: int, world_size: int
) -> list[SharedSequences]:
    return [
        SharedSequences(source, Letters(), settings, folder, size, rank, world_size)
        for rank in range(world_size)
    ]


def together(ranks: list[SharedSequences], shard: int) -> list[Sequence]:
    """Read shards in turn, each rank in a thread, as the processes of a harvest do."""
    found: dict[int, list[Sequence]] = {}
    counts: list[int] = []
    errors: list[BaseException] = []

    def run(rank: int, reader: SharedSequences) -> None:
        number = total = 0
        try:
            while True:
                if number % len(ranks) == rank:
                    found[number] = reader.read(number * shard, shard)
                    had = len(found[number])
                else:
                    had = reader.count(number * shard, shard)
                total, number = total + had, number + 1
                if had < shard:
                    counts.append(total)
                    return
        except BaseException as error:
            errors.append(error)
        finally:
            reader.close()

    threads = [threading.Thread(target=run, args=given) for given in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    sequences = [sequence for number in sorted(found) for sequence in found[number]]
    assert counts == [len(sequences)] * len(ranks)
    return sequences


@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25
)
@given(
    texts=st.lists(st.text("abcd", max_size=14) | st.just(7), min_size=1, max_size=30),
    kind=st.sampled_from(["pack", "crop", "truncate"]),
    place=st.sampled_from(["documents", "stream", "mixture"]),
    ctx_len=st.integers(2, 9),
    bos_id=st.sampled_from([None, 50]),
    size=st.integers(1, 12),
    world_size=st.integers(1, 3),
    data=st.data(),
)
def test_sequences_tokenised_together_are_those_of_one_process(
    texts: list[Any],  # 7 is no text, and left out
    kind: str,
    place: str,
    ctx_len: int,
    bos_id: int | None,
    size: int,
    world_size: int,
    data: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    source, chosen = source_of(place, texts), pipeline(kind, ctx_len, bos_id)
    chosen = dataclasses.replace(chosen, max_bad_documents=1.0)
    folder = tmp_path_factory.mktemp("blocks")
    shard = data.draw(st.integers(1, 4))
    try:
        whole = list(iter_sequences(source, Letters(), chosen))
    except DatasetError:  # none of the documents is a text
        with pytest.raises(DatasetError, match="cannot be used"):
            together(share(source, chosen, folder, size, world_size), shard)
        return
    assert as_tuples(together(share(source, chosen, folder, size, world_size), shard)) == as_tuples(
        whole
    )
    if whole:  # one process alone enters anywhere, with blocks or without
        known = data.draw(st.integers(0, len(whole) - 1))
        for path in data.draw(st.sampled_from([[], sorted(folder.iterdir())])):
            path.unlink()
        (reader,) = share(source, chosen, folder, size, 1)
        reader.enter(Anchor(known, whole[known]))
        assert as_tuples(reader.read(known + 1, 99)) == as_tuples(whole[known + 1 :])
        reader.close()


TEXTS = ["abcdefgh"[: n % 8 + 1] for n in range(400)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_document_is_tokenised_by_one_process(tmp_path: Path, world_size: int) -> None:
    ranks = share(documents(TEXTS), pipeline(), tmp_path, 10, world_size)
    assert len(together(ranks, 5)) == 537
    assert sum(rank.tokens for rank in ranks) == 2150
    assert max(rank.tokens for rank in ranks) <= 2150 / world_size + 100


def test_text_beyond_the_goal_is_not_tokenised(tmp_path: Path) -> None:
    reader = SharedSequences(documents(TEXTS), Letters(), pipeline(), tmp_path, 10, 0, 1, goal=50)
    assert len(reader.read(0, 50)) == 50
    reader.close()
    assert reader.tokens < 200 + 2 * 55


def test_damaged_and_missing_blocks_are_made_again(tmp_path: Path) -> None:
    (reader,) = share(documents(TEXTS), pipeline(), tmp_path, 10, 1)
    whole = as_tuples(reader.read(0, 1000))
    reader.close()
    blocks = sorted(tmp_path.glob("*.ids"))
    found = {path: path.read_bytes() for path in blocks}
    assert len(found) == 41
    for number, change in enumerate(
        [
            lambda data: data[:-1] + b"\x7f",  # of the token ids
            lambda data: data[:40] + b"\x7f" + data[41:],  # of the header
            lambda data: data[:-4],
            lambda data: b"",
            lambda data: data[:8] + b"\xff" * 16 + data[24:],
        ]
    ):
        blocks[3 * number].write_bytes(change(found[blocks[3 * number]]))
        assert read_block(blocks[3 * number]) is None
    assert read_header(blocks[0]) is not None
    blocks[20].unlink()
    (reader,) = share(documents(TEXTS), pipeline(), tmp_path, 10, 1)
    assert as_tuples(reader.read(0, 1000)) == whole
    reader.close()
    assert {path: path.read_bytes() for path in blocks} == found


def test_blocks_of_a_process_that_never_comes_are_made_after_some_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_sequences, "PATIENCE", 0.1)
    whole = list(iter_sequences(documents(TEXTS), Letters(), pipeline()))
    alone, *_ = share(documents(TEXTS), pipeline(), tmp_path, 10, 3)
    assert as_tuples(alone.read(0, 1000)) == as_tuples(whole)
    alone.close()
    late = share(documents(TEXTS), pipeline(), tmp_path, 10, 3)[2]
    assert as_tuples(late.read(0, 1000)) == as_tuples(whole)
    late.close()
    assert late.tokens == 0


@pytest.mark.parametrize(("known", "asked", "found"), [((7, True), 10, 2), ((15, False), 10, 10)])
def test_a_process_that_waits_learns_that_the_cache_is_complete(
    known: tuple[int, bool], asked: int, found: int, tmp_path: Path
) -> None:
    reader = SharedSequences(
        documents(TEXTS), Letters(), pipeline(), tmp_path, 10, 1, 2, None, lambda: known
    )
    assert reader.count(5, asked) == found
    reader.close()


def test_a_goal_that_others_have_reached_does_not_end_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_sequences, "PATIENCE", 1.5)
    reader = SharedSequences(
        documents(TEXTS), Letters(), pipeline(), tmp_path, 10, 1, 2, None, lambda: (5, False)
    )
    assert reader.count(5, 10) == 10
    reader.close()


def test_an_error_of_the_text_is_raised_where_it_is_read(tmp_path: Path) -> None:
    texts: list[Any] = list("abcdefghij")
    texts[9] = 5
    source = documents(texts)
    chosen = dataclasses.replace(pipeline(), order=DocumentOrder(0, True, 5))
    (reader,) = share(source, chosen, tmp_path, 2, 1)
    assert len(reader.read(0, 3)) == 3
    with pytest.raises(DatasetError, match="does not hold text"):
        reader.read(3, 4)
    reader.close()


def test_a_known_sequence_of_another_text_is_refused(tmp_path: Path) -> None:
    known = list(iter_sequences(documents(TEXTS), Letters(), pipeline()))[5]
    (reader,) = share(documents([f"x{text}" for text in TEXTS]), pipeline(), tmp_path, 10, 1)
    reader.enter(Anchor(5, known))
    with pytest.raises(DatasetError, match="other tokens than when the cache was begun"):
        reader.read(6, 1)
    reader.close()


def test_the_size_of_a_block_follows_from_text_and_goal() -> None:
    def size(kind: str, goal: int | None, of: int | None = None) -> int:
        source = dataclasses.replace(documents(["a"] * 10_000), bytes=of)
        return documents_of_a_block(source, pipeline(kind, 1024), goal)

    assert size("pack", None) == size("crop", None) == 256
    assert size("pack", None, 40_000_000) == 524
    assert size("pack", 100, 40_000_000) == 16
    assert size("pack", 1 << 14, 40_000_000) == 65
    assert size("pack", None, 10_000 << 30) == 1
    assert (size("crop", 1000), size("crop", 10_000), size("crop", 10**6)) == (16, 39, 256)


@pytest.mark.parametrize("kind", ["pack", "crop"])
def test_closing_ends_the_thread_within_a_long_text(kind: str, tmp_path: Path) -> None:
    class Slow(Letters):
        begun, closed = threading.Event(), threading.Event()

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            self.begun.set()
            self.closed.wait(10)
            if threading.current_thread() is reader._thread:
                self.tokens += sum(map(len, texts))
            return {"input_ids": [[1] * len(text) for text in texts]}

    text, tokenizer = "some words\n" * 20_000, Slow()
    reader = SharedSequences(documents([text]), tokenizer, pipeline(kind), tmp_path, 1, 0, 2)
    reading = threading.Thread(target=reader.count, args=(0, 1), daemon=True)
    reading.start()
    assert tokenizer.begun.wait(10)
    closing = threading.Thread(target=reader.close)
    closing.start()
    assert reader._stopped.wait(10)
    thread = reader._thread
    assert thread is not None
    tokenizer.closed.set()
    thread.join()
    assert tokenizer.tokens < len(text) // 2
    closing.join()
    reading.join()
