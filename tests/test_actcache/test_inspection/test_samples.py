"""Samples of rows with their context, and sequences with norms."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.cache.reader import Cache
from actcache.errors import EmptyCacheError, HookpointError
from actcache.inspection.samples import read_sequences, sample_rows, token_texts


class Letters:
    """A tokenizer that decodes id n to '<n>'."""

    def decode(self, ids: list[int]) -> str:
        assert all(type(i) is int for i in ids)
        return "".join(f"<{i}>" for i in ids)


def test_a_sample_has_the_text_around_its_row(make_cache: Callable[..., Path]) -> None:
    cache = Cache.open(make_cache(shards=3))
    samples = sample_rows(cache, 20, Letters(), context=3)
    assert len({(s.shard, s.row) for s in samples}) > 15
    for sample in samples:
        words = cache.tokens(sample.shard)
        assert sample.sequence == words.row_sequence[sample.row]
        assert sample.position == words.row_position[sample.row]
        ids = [f"<{i}>" for i in words.tokens[sample.sequence]]
        place = sample.position
        assert sample.before == "".join(ids[max(0, place - 3) : place])
        assert sample.token == ids[place]
        assert sample.after == "".join(ids[place + 1 : place + 4])
        for name, norm in sample.norms.items():
            row = cache.read(name, sample.shard, sample.row, 1)
            assert norm == pytest.approx(np.linalg.norm(row.values.astype(np.float64)))
    assert json.dumps([dataclasses.asdict(s) for s in samples])


def test_the_same_rows_are_sampled_every_time(make_cache: Callable[..., Path]) -> None:
    cache = Cache.open(make_cache(shards=3))
    assert sample_rows(cache, 5, None) == sample_rows(cache, 7, None)[:5]


def test_without_a_tokenizer_ids_are_shown(make_cache: Callable[..., Path]) -> None:
    cache = Cache.open(make_cache(shards=1))
    (sample,) = sample_rows(cache, 1, None)
    words = cache.tokens(0).tokens[sample.sequence]
    assert sample.token == str(words[sample.position])


def test_only_the_given_shards_are_sampled(make_cache: Callable[..., Path]) -> None:
    cache = Cache.open(make_cache(shards=3))
    assert {s.shard for s in sample_rows(cache, 10, None, shards=[2])} == {2}
    with pytest.raises(EmptyCacheError):
        sample_rows(Cache.open(make_cache(shards=0, end=False)), 1, None)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"dtype": "int8"},
        {"backend": "zarr", "dtype": "bfloat16"},
        {"backend": "zarr", "compression": "zstd"},
    ],
)
def test_a_sequence_has_the_norm_of_each_of_its_rows(
    how: dict[str, Any], make_cache: Callable[..., Path]
) -> None:
    root = make_cache(shards=2, sequences=4, last_sequences=3, skip_positions=2, **how)
    cache = Cache.open(root)
    readings = list(read_sequences(cache, "layers.1", Letters()))
    assert [(r.shard, r.sequence, r.number) for r in readings] == [
        *((0, s, s) for s in range(4)),
        *((1, s, 4 + s) for s in range(3)),
    ]
    for reading in readings:
        words = cache.tokens(reading.shard)
        stored = cache.read("layers.1", reading.shard)
        rows = cache.row_dtype.to_float32(stored).astype(np.float64)
        norms = {
            (int(s), int(p)): np.linalg.norm(row)
            for s, p, row in zip(words.row_sequence, words.row_position, rows, strict=True)
        }
        assert [t.id for t in reading.tokens] == list(words.tokens[reading.sequence])
        for token in reading.tokens:
            assert token.text == f"<{token.id}>"
            assert token.state == ("left out" if token.position < 2 else "kept")
            expected = norms.get((reading.sequence, token.position))
            assert token.norm == (None if expected is None else pytest.approx(expected))
    assert json.dumps([dataclasses.asdict(r) for r in readings], allow_nan=False)


def test_sequences_are_read_lazily(
    make_cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache.open(make_cache(shards=3))
    read: list[int] = []
    real = cache.tokens
    monkeypatch.setattr(cache, "tokens", lambda shard: (read.append(shard), real(shard))[1])
    readings = read_sequences(cache, "layers.0", None)
    next(readings)
    assert read == [0]
    assert next(read_sequences(cache, "layers.0", None, [2])).shard == 2
    with pytest.raises(HookpointError):
        next(read_sequences(cache, "layers.7", None))


class Bytes:
    """A tokenizer of bytes: a character may need several of them."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class Words:
    """A tokenizer that drops the space before the first word, as sentencepiece does."""

    def decode(self, ids: list[int]) -> str:
        return " ".join("abcdefgh"[i] for i in ids)


def ids_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)


def test_a_character_of_several_tokens_belongs_to_the_last_of_them() -> None:
    assert token_texts(Bytes(), ids_of("aß€b")) == ["a", "", "ß", "", "", "€", "b"]


def test_token_texts_concatenate_to_the_text_at_any_length() -> None:
    ids = ids_of("größe 日本")
    for length in range(len(ids) + 1):
        assert "".join(token_texts(Bytes(), ids[:length])) == Bytes().decode(list(ids[:length]))


def test_invalid_bytes_are_shown_as_replacement_characters() -> None:
    found = token_texts(Bytes(), np.full(40, 0xFF, dtype=np.int32))
    assert "".join(found) == "\ufffd" * 40


def test_spaces_between_words_are_kept_if_the_tokenizer_drops_the_first() -> None:
    assert token_texts(Words(), np.array([0, 1, 1, 2])) == ["a", " b", " b", " c"]


def test_ids_outside_the_vocabulary_are_shown_as_numbers() -> None:
    class Narrow:
        def decode(self, ids: list[int]) -> Any:
            if min(ids, default=0) < 0:
                raise OverflowError("can't convert negative int to unsigned")
            return "x" * len(ids)

    assert "<-5>" in "".join(token_texts(Narrow(), np.array([1, -5, 2])))
