"""Rows in their text: single rows, and whole sequences with the norm of every token.

A shard's rows are shuffled, so those of one sequence lie anywhere in it: they are read one by one,
which takes milliseconds and no memory, however large the shard is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actcache.cache.reader import Cache, ShardTokens
from actcache.core import rng

State = Literal["kept", "left out", "padding"]

_UNFINISHED = "\ufffd"  # what a tokenizer gives for a character whose other bytes are to come
_PATIENCE = 8  # tokens that one character may be spread over


@dataclass(frozen=True)
class Sample:
    """One row in its text."""

    shard: int
    row: int
    sequence: int
    """Within the shard."""
    position: int
    before: str
    token: str
    after: str
    norms: dict[str, float]
    """Norm of the row by hookpoint."""


@dataclass(frozen=True)
class Token:
    """One position of a sequence."""

    position: int
    id: int
    text: str
    """Its part of the text; a character of several tokens stands at the last of them."""
    state: State
    """kept; left out: by a filter, there is no row; padding: after the sequence's end."""
    norm: float | None
    """Euclidean norm of its row; None where there is none."""


@dataclass(frozen=True)
class SequenceView:
    """One sequence with the norms of one hookpoint."""

    shard: int
    sequence: int
    """Within the shard."""
    number: int
    """In the whole harvest."""
    hookpoint: str
    tokens: tuple[Token, ...]


def sample_rows(
    cache: Cache,
    count: int,
    tokenizer: Any,
    context: int = 12,
    shards: Sequence[int] | None = None,
) -> list[Sample]:
    """Random rows with the tokens around them.

    Args:
        cache: an open cache.
        count: how many rows.
        tokenizer: anything with `decode`; None shows token ids.
        context: tokens to show before and after.
        shards: which shards; None: all.
    """
    cache.require_shards()
    state = rng.stream("inspect", 0)
    chosen = cache.shards if shards is None else shards
    shards = [shard for shard in chosen if cache.receipts[shard].rows]
    samples = []
    for _ in range(count if shards else 0):
        shard = shards[state.randint(len(shards))]
        row = int(state.randint(cache.receipts[shard].rows))
        words = cache.tokens(shard)
        sequence, position = int(words.row_sequence[row]), int(words.row_position[row])
        ids = words.tokens[sequence]
        samples.append(
            Sample(
                shard,
                row,
                sequence,
                position,
                before=_decode(tokenizer, ids[max(0, position - context) : position]),
                token=_decode(tokenizer, ids[position : position + 1]),
                after=_decode(tokenizer, ids[position + 1 : position + 1 + context]),
                norms={name: _norm(cache, name, shard, row) for name in cache.hookpoints},
            )
        )
    return samples


def read_sequences(
    cache: Cache, hookpoint: str, tokenizer: Any, shards: Sequence[int] | None = None
) -> Iterator[SequenceView]:
    """Sequences with the norms of a hookpoint, one after another, each read when it is asked for.

    Args:
        cache: an open cache.
        hookpoint: whose rows' norms.
        tokenizer: anything with `decode`; None shows token ids.
        shards: which shards; None: all.
    """
    cache.require_hookpoint(hookpoint)
    for shard in cache.shards if shards is None else shards:
        words = cache.tokens(shard)
        order = np.argsort(words.row_sequence, kind="stable")  # rows by sequence [N]
        ends = np.cumsum(np.bincount(words.row_sequence, minlength=len(words.tokens)))
        for sequence, rows in enumerate(np.split(order, ends[:-1])):
            yield SequenceView(
                shard=shard,
                sequence=sequence,
                number=cache.receipts[shard].first_sequence + sequence,
                hookpoint=hookpoint,
                tokens=_tokens(cache, hookpoint, tokenizer, shard, sequence, words, rows),
            )


def _tokens(
    cache: Cache,
    hookpoint: str,
    tokenizer: Any,
    shard: int,
    sequence: int,
    words: ShardTokens,
    rows: NDArray[np.int64],
) -> tuple[Token, ...]:
    norms = {
        int(words.row_position[row]): _norm(cache, hookpoint, shard, int(row))
        for row in np.sort(rows)
    }
    ids = words.tokens[sequence]
    length = int(words.lengths[sequence])
    texts = pieces(tokenizer, ids[:length]) + [""] * (len(ids) - length)
    return tuple(
        Token(
            position=position,
            id=int(ids[position]),
            text=texts[position],
            state="kept" if position in norms else ("left out" if position < length else "padding"),
            norm=norms.get(position),
        )
        for position in range(len(ids))
    )


def pieces(tokenizer: Any, ids: NDArray[np.int32]) -> list[str]:
    """The text of every token: what it adds to the text of the tokens before it.

    Tokens are not decoded alone: some tokenizers drop the space before the first word, and a
    character may be spread over several tokens. Together the pieces are the text.
    """
    if tokenizer is None:
        return [str(int(i)) for i in ids]
    texts = []
    begin = end = 0  # tokens [begin, end) were told last: what comes next is decoded after them
    for place in range(len(ids)):
        told = _decode(tokenizer, ids[begin:end])
        whole = _decode(tokenizer, ids[begin : place + 1])
        if whole.endswith(_UNFINISHED) and place - end < _PATIENCE:
            texts.append("")
            continue
        texts.append(whole.removeprefix(told))
        begin, end = end, place + 1
    if len(ids) and end < len(ids):  # cut in the middle of a character
        whole = _decode(tokenizer, ids[begin:])
        texts[-1] = whole.removeprefix(_decode(tokenizer, ids[begin:end]))
    return texts


def _decode(tokenizer: Any, ids: NDArray[np.int32]) -> str:
    if tokenizer is None:
        return " ".join(str(int(i)) for i in ids)
    try:
        text: str = tokenizer.decode([int(i) for i in ids])
    except (OverflowError, ValueError, IndexError, TypeError):  # ids that are none of its own
        return "".join(f"<{int(i)}>" for i in ids)
    return text


def _norm(cache: Cache, hookpoint: str, shard: int, row: int) -> float:
    stored = cache.row_dtype.to_float32(cache.read(hookpoint, shard, row, 1))
    return float(np.linalg.norm(stored.astype(np.float64)))
