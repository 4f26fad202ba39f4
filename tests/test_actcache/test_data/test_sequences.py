from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.core import rng
from actcache.data import sequences as tokens
from actcache.data import shuffling as mixing
from actcache.data.documents import Column, IndexedDocuments, TokenFile
from actcache.data.sequences import Sequence, SequencePipeline, count_sequences, iter_sequences
from actcache.data.shuffling import DocumentOrder
from actcache.errors import DatasetError


class Letters:
    """A tokenizer: one token a letter, a = 1."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) - 96 for c in text] for text in texts]}


TEXT = Column("text", "text")
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def documents(*texts: str) -> IndexedDocuments:
    return IndexedDocuments(lambda numbers: [texts[n] for n in numbers], len(texts), TEXT, "")


def token_file(ids: list[int], dtype: str = "<u2") -> TokenFile:
    return TokenFile(np.array(ids, dtype=dtype), Path("x.bin"), "")  # type: ignore[arg-type]


def pipeline(kind: Any = "pack", ctx_len: int = 4, **changes: Any) -> SequencePipeline:
    order = DocumentOrder(changes.pop("seed", 0), changes.pop("keep_order", True), 100)
    values = {"bos_id": None, "eos_id": 0, "pad_id": None, "order": order, "vocab_size": 100}
    if kind != "pack":
        values |= {"eos_id": None, "pad_id": 77}
    return SequencePipeline(kind, ctx_len, **(values | changes))


def made(source: Any, *kind: str, **changes: Any) -> list[Sequence]:
    how = pipeline(*kind, **changes)
    found = list(iter_sequences(source, Letters(), how))
    for sequence in found:
        assert sequence.tokens.dtype == np.int32
        assert sequence.tokens.shape == (how.ctx_len,)
    assert count_sequences(source, Letters(), how, None) == len(found)
    return found


def pack(source: Any, **changes: Any) -> list[list[int]]:
    found = made(source, **changes)
    assert all(sequence.length == len(sequence.tokens) for sequence in found)
    return [sequence.tokens.tolist() for sequence in found]


def test_documents_are_joined_by_eos_and_cut() -> None:
    assert pack(documents("abc", "de", "f")) == [[1, 2, 3, 0], [4, 5, 0, 6]]


def test_what_is_left_at_the_end_is_dropped() -> None:
    assert pack(documents("abcdefg")) == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert pack(documents("abcdefgh")) == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_bos_stands_first_in_every_sequence_and_takes_the_place_of_a_token() -> None:
    assert pack(documents("abcde", "f"), bos_id=9) == [[9, 1, 2, 3], [9, 4, 5, 0]]


def test_an_empty_document_leaves_no_token() -> None:
    assert pack(documents("", "abc", "", "", "d", "ef")) == pack(documents("abc", "d", "ef"))


def test_text_shorter_than_one_sequence_gives_none() -> None:
    assert pack(documents("ab")) == []
    assert pack(documents("", "")) == []
    assert pack(documents("abc"), bos_id=9, ctx_len=6) == []
    assert pack(documents("abc"), bos_id=9, ctx_len=5) == [[9, 1, 2, 3, 0]]


def test_documents_are_taken_in_an_order_that_follows_from_the_seed() -> None:
    texts = [chr(97 + i) * 3 for i in range(20)]
    orders = []
    for seed in (0, 1):
        found = pack(documents(*texts), keep_order=False, seed=seed)
        permutation = rng.stream("documents", seed).permutation(20)
        assert found == [[int(i) + 1] * 3 + [0] for i in permutation]
        orders.append(found)
    assert orders[0] != orders[1]
    assert pack(documents(*texts)) == sorted(orders[0])


def test_many_documents_flow_over_the_batches_in_which_they_are_tokenised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = ["abcdefghijk"[: i % 11] for i in range(100)]
    whole = [pack(documents(*texts), keep_order=k, bos_id=9) for k in (True, False)]
    monkeypatch.setattr(mixing, "DOCUMENTS_AT_ONCE", 7)
    assert [pack(documents(*texts), keep_order=k, bos_id=9) for k in (True, False)] == whole


@given(st.lists(st.text("abc", max_size=12), max_size=12), st.integers(2, 9), st.booleans())
def test_packing_is_joining_and_cutting(texts: list[str], ctx_len: int, with_bos: bool) -> None:
    line = [token for text in texts if text for token in [*(ord(c) - 96 for c in text), 0]]
    bos = [50] if with_bos else []
    size = ctx_len - len(bos)
    expected = [bos + line[i : i + size] for i in range(0, len(line) - size + 1, size)]
    assert pack(documents(*texts), ctx_len=ctx_len, bos_id=50 if with_bos else None) == expected


def pairs(found: list[Sequence]) -> list[tuple[list[int], int, int, int]]:
    return [(s.tokens.tolist(), s.length, s.document, s.start) for s in found]


def test_truncating_takes_the_beginning_of_each_document_and_pads_the_rest() -> None:
    source = documents("abcdef", "", "gh", "ijkl")
    assert pairs(made(source, "truncate")) == [
        ([1, 2, 3, 4], 4, 0, 0),
        ([7, 8, 77, 77], 2, 2, 0),
        ([9, 10, 11, 12], 4, 3, 0),
    ]
    assert pairs(made(source, "truncate", bos_id=50))[:2] == [
        ([50, 1, 2, 3], 4, 0, 0),
        ([50, 7, 8, 77], 3, 2, 0),
    ]


def test_cropping_takes_one_window_of_each_document_at_a_place_of_its_own() -> None:
    texts = [ALPHABET[i % 5 :] for i in range(200)]
    found = made(documents(*texts), "crop", ctx_len=5)
    starts = {}
    for number, (text, sequence) in enumerate(zip(texts, found, strict=True)):
        start = sequence.start
        assert (sequence.document, sequence.length) == (number, 5)
        window = [ord(c) - 96 for c in text[start : start + 5]]
        assert sequence.tokens.tolist() == window
        slack = len(text) - 5
        assert start == rng.stream("crop", 0, number).randint(slack + 1)
        starts.setdefault(slack, set()).add(start)
    assert all(len(places) > slack / 2 for slack, places in starts.items())
    assert pairs(made(documents("abc"), "crop", ctx_len=5)) == [([1, 2, 3, 77, 77], 3, 0, 0)]
    again = made(documents(*texts), "crop", ctx_len=5, seed=1)
    assert [s.start for s in again] != [s.start for s in found]


def test_every_sequence_says_where_its_text_begins() -> None:
    source = documents("abc", "", "defgh", "i", "jk")
    found = made(source, ctx_len=3, bos_id=50)
    line = [
        (n, i)
        for n, t in enumerate(["abc", "", "defgh", "i", "jk"])
        if t
        for i in range(len(t) + 1)
    ]
    assert [(s.document, s.start) for s in found] == line[: len(found) * 2 : 2]
    by_file = made(token_file(range(10)), ctx_len=4, bos_id=50, eos_id=None)
    assert [(s.document, s.start) for s in by_file] == [(0, 0), (0, 3), (0, 6)]


def test_a_document_that_ends_with_eos_gets_no_second_one() -> None:
    ids = Column("ids", "ids")
    source = IndexedDocuments(
        lambda numbers: [[[5, 0], [6], [], [7, 0]][n] for n in numbers], 4, ids, ""
    )
    found = [s.tokens.tolist() for s in made(source, ctx_len=2)]
    assert found == [[5, 0], [6, 0], [7, 0]]


CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if messages[0]['role'] == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
)


def test_a_conversation_is_written_out_by_the_chat_template(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    messages = [
        {"role": "user", "content": "the cache", "name": None},
        {"role": "model", "content": "the row"},
    ]
    (ids,) = tokens.tokenize(tokenizer, "chat", [messages])
    assert tokenizer.decode(ids) == "<s>user: the cache</s><s>model: the row</s>"
    assert ids.count(tokenizer.bos_token_id) == 2
    with pytest.raises(DatasetError, match=r"(?s)chat template.*no robots.*robot"):
        tokens.tokenize(tokenizer, "chat", [[{"role": "robot", "content": "x"}]])


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4", "<i4", "<i8"])
def test_token_ids_are_cut_as_they_are(dtype: str) -> None:
    source = token_file([5, 6, 7, 8, 9, 10, 11], dtype)
    assert pack(source, eos_id=None, ctx_len=3) == [[5, 6, 7], [8, 9, 10]]
    assert pack(source, eos_id=None, ctx_len=4, bos_id=1) == [[1, 5, 6, 7], [1, 8, 9, 10]]
    assert pack(source, eos_id=None, ctx_len=8) == []


@pytest.mark.parametrize(
    ("ids", "dtype"), [([1, 100], "<u2"), ([2**32 - 1, 1], "<u4"), ([-1, 1], "<i4")]
)
def test_an_id_beyond_the_vocabulary_is_refused_with_a_remedy(ids: list[int], dtype: str) -> None:
    with pytest.raises(DatasetError, match=r"(?s)vocabulary.*0 to 99.*got.*--bin-dtype"):
        list(iter_sequences(token_file(ids, dtype), None, pipeline(ctx_len=2, eos_id=None)))


def test_counting_stops_at_the_limit() -> None:
    def texts(numbers: list[int]) -> list[str]:
        assert max(numbers) < 256, "read further than the limit"
        return ["abc"] * len(numbers)

    endless = IndexedDocuments(texts, 10**6, TEXT, "")
    assert count_sequences(endless, Letters(), pipeline(), 5) == 5
    assert count_sequences(token_file(range(40)), None, pipeline(eos_id=None), 3) == 3


def test_a_real_tokenizer_adds_nothing_of_its_own(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    (ids,) = tokens.tokenize(tokenizer, "text", ["the cache"])
    assert tokenizer.bos_token_id not in ids
    assert tokenizer.decode(ids) == "the cache"
    assert tokens.tokenize(tokenizer, "text", []) == []


def test_a_document_longer_than_the_tokenizers_limit_is_not_cut(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 8
    (ids,) = tokens.tokenize(tokenizer, "text", ["row " * 50])
    assert len(ids) >= 50
