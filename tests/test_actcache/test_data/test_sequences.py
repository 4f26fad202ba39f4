from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.core import rng
from actcache.data import document_order, tokenization
from actcache.data.datasets import (
    Column,
    DocumentStream,
    IndexedDocuments,
    Mixture,
    TokenFile,
)
from actcache.data.document_order import places_in_order
from actcache.data.records import LongText
from actcache.data.sequences import (
    DocumentOrder,
    Sequence,
    SequencePipeline,
    count_sequences,
    documents_in_order,
    iter_sequences,
)
from actcache.errors import DatasetError


class Letters:
    """Tokenizer with one token per letter, a = 1."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) - 96 for c in text] for text in texts]}


TEXT = Column("text", "text")
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def documents(*texts: Any) -> IndexedDocuments:
    return IndexedDocuments(lambda numbers: [texts[n] for n in numbers], len(texts), TEXT, "")


def token_file(ids: list[int], dtype: str = "<u2") -> TokenFile:
    array = np.array(ids, dtype=dtype)
    return TokenFile(len(ids), lambda first, n: array[first : first + n], Path("x.bin"), "")


def pipeline(kind: Any = "pack", ctx_len: int = 4, **changes: Any) -> SequencePipeline:
    order = DocumentOrder(changes.pop("seed", 0), changes.pop("keep_order", True), 100)
    values = {"bos_id": None, "eos_id": 0, "pad_id": None, "order": order, "vocab_size": 100}
    if kind != "pack":
        values |= {"eos_id": None, "pad_id": 77}
    return SequencePipeline(kind, ctx_len, **(values | changes))


def sequences_of(source: Any, *kind: str, tokenizer: Any = None, **changes: Any) -> list[Sequence]:
    settings, tokenizer = pipeline(*kind, **changes), tokenizer or Letters()
    found = list(iter_sequences(source, tokenizer, settings))
    for sequence in found:
        assert sequence.tokens.dtype == np.int32
        assert sequence.tokens.shape == (settings.ctx_len,)
    assert count_sequences(source, tokenizer, settings, None) == len(found)
    return found


def pack(source: Any, **changes: Any) -> list[list[int]]:
    found = sequences_of(source, **changes)
    assert all(sequence.length == len(sequence.tokens) for sequence in found)
    return [sequence.tokens.tolist() for sequence in found]


def test_pack_joins_documents_with_eos_and_cuts_them() -> None:
    assert pack(documents("abc", "de", "f")) == [[1, 2, 3, 0], [4, 5, 0, 6]]


def test_pack_drops_the_incomplete_last_sequence() -> None:
    assert pack(documents("abcdefg")) == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert pack(documents("abcdefgh")) == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_bos_is_the_first_token_of_every_sequence_and_counts_towards_ctx_len() -> None:
    assert pack(documents("abcde", "f"), bos_id=9) == [[9, 1, 2, 3], [9, 4, 5, 0]]


def test_empty_documents_add_no_eos() -> None:
    assert pack(documents("", "abc", "", "", "d", "ef")) == pack(documents("abc", "d", "ef"))


def test_text_shorter_than_one_sequence_gives_no_sequence() -> None:
    assert pack(documents("ab")) == []
    assert pack(documents("", "")) == []
    assert pack(documents("abc"), bos_id=9, ctx_len=6) == []
    assert pack(documents("abc"), bos_id=9, ctx_len=5) == [[9, 1, 2, 3, 0]]


def test_the_order_of_documents_follows_from_the_seed() -> None:
    texts = [chr(97 + i) * 3 for i in range(20)]
    orders = []
    for seed in (0, 1):
        found = pack(documents(*texts), keep_order=False, seed=seed)
        permutation = rng.stream("documents", seed).permutation(20)
        assert found == [[int(i) + 1] * 3 + [0] for i in permutation]
        orders.append(found)
    assert orders[0] != orders[1]
    assert pack(documents(*texts)) == sorted(orders[0])


def test_sequences_do_not_depend_on_the_tokenisation_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = ["abcdefghijk"[: i % 11] for i in range(100)]
    whole = [pack(documents(*texts), keep_order=k, bos_id=9) for k in (True, False)]
    monkeypatch.setattr(document_order, "DOCUMENTS_AT_ONCE", 7)
    assert [pack(documents(*texts), keep_order=k, bos_id=9) for k in (True, False)] == whole


@given(st.lists(st.text("abc", max_size=12), max_size=12), st.integers(2, 9), st.booleans())
def test_pack_equals_concatenating_and_cutting(
    texts: list[str], ctx_len: int, with_bos: bool
) -> None:
    line = [token for text in texts if text for token in [*(ord(c) - 96 for c in text), 0]]
    bos = [50] if with_bos else []
    size = ctx_len - len(bos)
    expected = [bos + line[i : i + size] for i in range(0, len(line) - size + 1, size)]
    assert pack(documents(*texts), ctx_len=ctx_len, bos_id=50 if with_bos else None) == expected


def pairs(found: list[Sequence]) -> list[tuple[list[int], int, int, int]]:
    return [(s.tokens.tolist(), s.length, s.document, s.start) for s in found]


def test_truncate_takes_the_beginning_of_each_document_and_pads() -> None:
    source = documents("abcdef", "", "gh", "ijkl")
    assert pairs(sequences_of(source, "truncate")) == [
        ([1, 2, 3, 4], 4, 0, 0),
        ([7, 8, 77, 77], 2, 2, 0),
        ([9, 10, 11, 12], 4, 3, 0),
    ]
    assert pairs(sequences_of(source, "truncate", bos_id=50))[:2] == [
        ([50, 1, 2, 3], 4, 0, 0),
        ([50, 7, 8, 77], 3, 2, 0),
    ]


def test_crop_takes_one_window_of_each_document_at_a_random_position() -> None:
    texts = [ALPHABET[i % 5 :] for i in range(200)]
    found = sequences_of(documents(*texts), "crop", ctx_len=5)
    starts = {}
    for number, (text, sequence) in enumerate(zip(texts, found, strict=True)):
        start = sequence.start
        assert (sequence.document, sequence.length) == (number, 5)
        window = [ord(c) - 96 for c in text[start : start + 5]]
        assert sequence.tokens.tolist() == window
        slack = len(text) - 5
        assert start == rng.stream("crop", 0, number).randint(slack + 1)
        starts.setdefault(slack, set()).add(start)
    assert all(len(found_starts) > slack / 2 for slack, found_starts in starts.items())
    assert pairs(sequences_of(documents("abc"), "crop", ctx_len=5)) == [
        ([1, 2, 3, 77, 77], 3, 0, 0)
    ]
    again = sequences_of(documents(*texts), "crop", ctx_len=5, seed=1)
    assert [s.start for s in again] != [s.start for s in found]


def test_every_sequence_records_the_document_and_position_of_its_first_token() -> None:
    source = documents("abc", "", "defgh", "i", "jk")
    found = sequences_of(source, ctx_len=3, bos_id=50)
    line = [
        (n, i)
        for n, t in enumerate(["abc", "", "defgh", "i", "jk"])
        if t
        for i in range(len(t) + 1)
    ]
    assert [(s.document, s.start) for s in found] == line[: len(found) * 2 : 2]
    by_file = sequences_of(token_file(range(10)), ctx_len=4, bos_id=50, eos_id=None)
    assert [(s.document, s.start) for s in by_file] == [(0, 0), (0, 3), (0, 6)]


def test_a_document_that_ends_with_eos_gets_no_second_eos() -> None:
    ids = Column("ids", "ids")
    source = IndexedDocuments(
        lambda numbers: [[[5, 0], [6], [], [7, 0]][n] for n in numbers], 4, ids, ""
    )
    found = [s.tokens.tolist() for s in sequences_of(source, ctx_len=2)]
    assert found == [[5, 0], [6, 0], [7, 0]]


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4", "<i4", "<i8"])
def test_a_file_of_token_ids_is_cut_without_eos(dtype: str) -> None:
    source = token_file([5, 6, 7, 8, 9, 10, 11], dtype)
    assert pack(source, eos_id=None, ctx_len=3) == [[5, 6, 7], [8, 9, 10]]
    assert pack(source, eos_id=None, ctx_len=4, bos_id=1) == [[1, 5, 6, 7], [1, 8, 9, 10]]
    assert pack(source, eos_id=None, ctx_len=8) == []


@pytest.mark.parametrize(
    ("ids", "dtype"), [([1, 100], "<u2"), ([2**32 - 1, 1], "<u4"), ([-1, 1], "<i4")]
)
def test_a_token_id_outside_the_vocabulary_is_refused_with_a_remedy(
    ids: list[int], dtype: str
) -> None:
    with pytest.raises(DatasetError, match=r"(?s)vocabulary.*0 to 99.*got.*--bin-dtype"):
        list(iter_sequences(token_file(ids, dtype), None, pipeline(ctx_len=2, eos_id=None)))


def test_counting_stops_at_the_limit() -> None:
    def texts(numbers: list[int]) -> list[str]:
        assert max(numbers) < 256, "read further than the limit"
        return ["abc"] * len(numbers)

    endless = IndexedDocuments(texts, 10**6, TEXT, "")
    assert count_sequences(endless, Letters(), pipeline(), 5) == 5
    assert count_sequences(token_file(range(40)), None, pipeline(eos_id=None), 3) == 3


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
    assert all(len(batch) <= document_order.DOCUMENTS_AT_ONCE for batch in batches)
    return [document for batch in batches for document in batch]


TEXTS = [f"{n}" for n in range(700)]


def test_indexed_documents_are_permuted_by_the_seed() -> None:
    expected = rng.stream("documents", 3).permutation(700)
    assert taken(documents(*TEXTS), seed=3) == [str(n) for n in expected]
    assert taken(documents(*TEXTS), keep_order=True) == TEXTS


def test_a_stream_is_shuffled_within_its_buffer_and_keeps_every_document() -> None:
    found = taken(stream(*TEXTS), buffer=50)
    assert sorted(found) == sorted(TEXTS)
    assert found != TEXTS
    for position, text in enumerate(found):  # no document comes earlier than the buffer allows
        assert int(text) < position + 50
    assert taken(stream(*TEXTS), buffer=50) == found
    assert taken(stream(*TEXTS), buffer=50, seed=1) != found
    assert taken(stream(*TEXTS), buffer=1) == TEXTS
    assert sorted(taken(stream("a", "b"), buffer=50)) == ["a", "b"]
    assert taken(stream(*TEXTS), keep_order=True) == TEXTS


def test_the_order_of_a_stream_never_changes_between_versions() -> None:
    assert "".join(taken(stream(*"abcdefghij"), buffer=4)) == "cdfbeigahj"


def test_a_stream_is_read_no_further_than_buffer_and_batch() -> None:
    def endless() -> Iterator[str]:
        for n in itertools.count():
            assert n < 400, "read too far"
            yield str(n)

    source = DocumentStream(endless, TEXT, "")
    first = next(documents_in_order(source, DocumentOrder(0, False, 100)))
    assert len(first) == 256


def test_a_mixture_draws_by_weight_with_each_source_in_its_own_order() -> None:
    first, second = (documents(*(f"{name}{n}" for n in range(4000))) for name in "ab")
    found = taken(Mixture((first, second), (3.0, 1.0)))
    shares = Counter(text[0] for text in found)
    assert shares["a"] / len(found) == pytest.approx(0.75, abs=0.02)
    orders = [rng.stream("documents", 0, number).permutation(4000) for number in (0, 1)]
    for name, order in zip("ab", orders, strict=True):
        alone = [text for text in found if text[0] == name]
        assert alone == [f"{name}{n}" for n in order[: len(alone)]]


def test_a_mixture_ends_when_a_drawn_source_is_exhausted() -> None:
    long = documents(*(f"a{n}" for n in range(5000)))
    found = taken(Mixture((long, stream("b0", "b1", "b2")), (1.0, 1.0)), buffer=1)
    assert len(set(found)) == len(found)
    assert Counter(text[0] for text in found)["b"] == 3
    # The fourth draw of the stream finds it exhausted.
    draws = rng.stream("mixture", 0).random_sample(256) >= 0.5
    assert len(found) == int(np.flatnonzero(draws)[3])


def test_the_draws_of_a_mixture_never_change_between_versions() -> None:
    sources = tuple(documents(*(f"{name}{n}" for n in range(9))) for name in "abc")
    found = taken(Mixture(sources, (1.0, 2.0, 1.0)), keep_order=True)
    assert " ".join(found) == "b0 b1 c0 b2 c1 b3 a0 b4 b5 a1 b6 c2 b7 b8"


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_rounding_of_the_weights_never_draws_a_source_out_of_range(
    weights: list[float], seed: int
) -> None:
    sources = tuple(documents("x", "y", "z") for _ in weights)
    found = taken(Mixture(sources, tuple(weights)), seed=seed)
    assert 3 <= len(found) <= 3 * len(weights)


def long_text(*pieces: str) -> LongText:
    return LongText(lambda: iter(pieces))


@pytest.mark.parametrize("kind", ["pack", "crop", "truncate"])
def test_the_pieces_of_a_text_do_not_change_its_sequences(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "_PIECE", 20)
    monkeypatch.setattr(tokenization, "_AHEAD", 8)
    texts = ["abcdefghij" * 30, "ab", "klmno " * 40, "c"]
    plain = [text.replace(" ", "z") for text in texts]
    whole = pairs(sequences_of(documents(*plain), kind, bos_id=9))
    in_pieces = [long_text(text[:33], text[33:]) for text in plain]
    assert pairs(sequences_of(documents(*in_pieces), kind, bos_id=9)) == whole


def test_a_huge_text_is_read_only_as_far_as_sequences_are_asked_for() -> None:
    def endless() -> Iterator[str]:
        for number in itertools.count():
            assert number < 5, "read further than needed"
            yield "a b c d " * 5000

    for kind in ("pack", "truncate"):
        source = documents(LongText(endless), "e" * 10, "f" * 10)
        settings = pipeline(kind, ctx_len=1000, vocab_size=300)
        found = list(itertools.islice(iter_sequences(source, Characters(), settings), 1))
        assert [s.length for s in found] == [1000]
        assert count_sequences(source, Characters(), settings, 1) == 1


class Characters:
    """Tokenizer with one token per character."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(map(ord, text)) for text in texts]}


def left_out_of(found: list[Sequence]) -> list[list[int]]:
    return [[left.document for left in sequence.left_out] for sequence in found]


def test_documents_left_out_are_counted_with_the_sequence_that_follows() -> None:
    source = documents("abc", 7, "d~f", "def", "gh~", "ijk", None, "~", "~")
    found = sequences_of(source, vocab_size=30, max_bad_documents=1.0)
    assert [s.tokens.tolist() for s in found] == [[1, 2, 3, 0], [4, 5, 6, 0], [9, 10, 11, 0]]
    assert [s.document for s in found] == [0, 3, 5]
    assert left_out_of(found) == [[], [1, 2], [4, 7, 8]]  # the last: also those behind it
    reasons = [left.reason for s in found for left in s.left_out]
    assert reasons == ["type", "token_id", "token_id", "token_id", "token_id"]
    assert found[1].left_out[0].shown == "7"
    assert "id 30" in found[1].left_out[1].detail
    for kind in ("crop", "truncate"):
        found = sequences_of(source, kind, vocab_size=30, max_bad_documents=1.0)
        assert left_out_of(found) == [[], [1, 2], [4, 7, 8]]


def test_of_a_long_text_the_tokens_before_the_bad_one_are_used_however_it_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenization, "_AHEAD", 4)
    text = "ab." * 9 + "~" + "ab" * 30
    for size in (5, 11, 1000):
        monkeypatch.setattr(tokenization, "_PIECE", size)
        source = documents("cd", long_text(text), "ef")
        found = sequences_of(
            source, ctx_len=4, eos_id=99, vocab_size=100, max_bad_documents=1.0, tokenizer=Near()
        )
        line = [i % 50 for i in b"cd\x63" + b"ab." * 9 + b"\x63ef\x63"]
        line[2] = line[-4] = line[-1] = 99
        assert [i for s in found for i in s.tokens.tolist()] == line[:32]
        assert left_out_of(found) == [[]] * 7 + [[1]]


class Near:
    """Tokenizer with an id above 99 for ~ alone."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[126 if c == "~" else ord(c) % 50 for c in t] for t in texts]}


@pytest.mark.parametrize("bad", [[2**70], [-1], [100]])
def test_a_document_of_token_ids_outside_the_vocabulary_is_left_out(bad: list[int]) -> None:
    rows = [[1, 2, 3], bad, [4, 5, 6]]
    source = IndexedDocuments(lambda n: [rows[i] for i in n], 3, Column("ids", "ids"), "")
    found = sequences_of(source, max_bad_documents=0.5)
    assert [s.tokens.tolist() for s in found] == [[1, 2, 3, 0], [4, 5, 6, 0]]
    assert left_out_of(found) == [[], [1]]


def test_without_a_share_the_first_document_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"(?s)vocabulary.*0 to 29.*id 30"):
        list(iter_sequences(documents("abcd", "~"), Letters(), pipeline(vocab_size=30)))
    with pytest.raises(DatasetError, match=r"'text' does not hold text"):
        list(iter_sequences(documents("abcd", 7), Letters(), pipeline()))


@pytest.mark.parametrize("keep_order", [True, False])
def test_the_place_of_a_document_is_found_in_the_seeded_order(
    keep_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def source(name: str) -> IndexedDocuments:
        texts = [f"{name}{n}" for n in range(300)]
        return IndexedDocuments(
            lambda numbers: [texts[n] for n in numbers], 300, TEXT, "", place=texts.__getitem__
        )

    drawn: list[tuple[object, ...]] = []
    stream_of = rng.stream

    def watched(*key: Any) -> Any:
        drawn.append(key)
        return stream_of(*key)

    monkeypatch.setattr(rng, "stream", watched)
    order = DocumentOrder(3, keep_order, 10)
    for text in (source("a"), Mixture((source("a"), source("b")), (2.0, 1.0))):
        documents_taken = taken(text, seed=3, keep_order=keep_order)
        drawn.clear()
        place = places_in_order(text, order)
        for number in (299, 0, 1, 255, 256, 299):
            assert place(number) == documents_taken[number]
        assert len(drawn) == len(set(drawn))  # the order is derived once, not for each document
    assert places_in_order(stream("a", "b"), order)(1) == ""


@pytest.mark.parametrize("kind", ["pack", "truncate"])
def test_a_large_document_takes_less_memory_than_12_bytes_for_each_of_its_bytes(
    kind: Any, make_tokenizer: Callable[..., Any]
) -> None:
    text = "the cache of a row\n" * 60_000
    tokenizer, source = make_tokenizer(), documents(text)
    pad_id = None if kind == "pack" else 0
    settings = pipeline(kind=kind, ctx_len=128, vocab_size=300, pad_id=pad_id)
    next(iter_sequences(source, tokenizer, settings))  # what is loaded once
    tracemalloc.start()
    count = sum(1 for _ in iter_sequences(source, tokenizer, settings))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 1 if kind == "truncate" else count > 1000
    assert most < 12 * len(text)
