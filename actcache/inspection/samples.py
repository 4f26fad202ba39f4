"""Text of rows: random rows with their context, and sequences with the norm of every token.

The rows of a sequence are scattered over their shard by shuffling. They are read one by one, which
takes milliseconds and little memory for any size of shard.
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

_UNFINISHED = "\ufffd"  # decoded text of a character whose other bytes are in later tokens
_MAX_TOKENS = 8  # largest number of tokens of one character


@dataclass(frozen=True)
class Sample:
    """One row with its token and the text around it."""

    shard: int
    row: int
    sequence: int
    """Number of the sequence within the shard."""
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
    """Text of the token; a character of several tokens belongs to the last of them."""
    state: State
    """kept; left out: a filter removed the row; padding: after the end of the sequence."""
    norm: float | None
    """Euclidean norm of the row; None without a row."""


@dataclass(frozen=True)
class SequenceView:
    """One sequence with the norms of one hookpoint."""

    shard: int
    sequence: int
    """Number of the sequence within the shard."""
    number: int
    """Number of the sequence in the whole harvest."""
    hookpoint: str
    tokens: tuple[Token, ...]


def sample_rows(
    cache: Cache,
    count: int,
    tokenizer: Any,
    context: int = 12,
    shards: Sequence[int] | None = None,
) -> list[Sample]:
    """Choose random rows, and decode the tokens around them.

    Args:
        cache: an open cache.
        count: number of rows.
        tokenizer: object with `decode`; None: token ids are shown.
        context: number of tokens before and after.
        shards: numbers of the shards; None: all.
    """
    cache.require_shards()
    state = rng.stream("inspect", 0)
    chosen = cache.shards if shards is None else shards
    shards = [shard for shard in chosen if cache.receipts[shard].rows]
    samples = []
    for _ in range(count if shards else 0):
        shard = shards[state.randint(len(shards))]
        row = int(state.randint(cache.receipts[shard].rows))
        stored = cache.tokens(shard)
        sequence, position = int(stored.row_sequence[row]), int(stored.row_position[row])
        ids = stored.tokens[sequence]
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
    """Yield sequences with the norms of a hookpoint; each is read only when it is needed.

    Args:
        cache: an open cache.
        hookpoint: hookpoint whose norms are computed.
        tokenizer: object with `decode`; None: token ids are shown.
        shards: numbers of the shards; None: all.
    """
    cache.require_hookpoint(hookpoint)
    for shard in cache.shards if shards is None else shards:
        stored = cache.tokens(shard)
        order = np.argsort(stored.row_sequence, kind="stable")  # rows by sequence [N]
        ends = np.cumsum(np.bincount(stored.row_sequence, minlength=len(stored.tokens)))
        for sequence, rows in enumerate(np.split(order, ends[:-1])):
            yield SequenceView(
                shard=shard,
                sequence=sequence,
                number=cache.receipts[shard].first_sequence + sequence,
                hookpoint=hookpoint,
                tokens=_tokens(cache, hookpoint, tokenizer, shard, sequence, stored, rows),
            )


def _tokens(
    cache: Cache,
    hookpoint: str,
    tokenizer: Any,
    shard: int,
    sequence: int,
    stored: ShardTokens,
    rows: NDArray[np.int64],
) -> tuple[Token, ...]:
    norms = {
        int(stored.row_position[row]): _norm(cache, hookpoint, shard, int(row))
        for row in np.sort(rows)
    }
    ids = stored.tokens[sequence]
    length = int(stored.lengths[sequence])
    texts = token_texts(tokenizer, ids[:length]) + [""] * (len(ids) - length)
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


def token_texts(tokenizer: Any, ids: NDArray[np.int32]) -> list[str]:
    """Decode every token: the text that it adds to the tokens before it.

    Tokens are not decoded alone: some tokenizers drop the space before the first word, and the
    bytes of a character may be split over several tokens. The texts concatenate to the whole text.
    """
    if tokenizer is None:
        return [str(int(i)) for i in ids]
    texts = []
    begin = end = 0  # tokens [begin, end) were decoded last: the next ones are decoded after them
    for position in range(len(ids)):
        before = _decode(tokenizer, ids[begin:end])
        whole = _decode(tokenizer, ids[begin : position + 1])
        if whole.endswith(_UNFINISHED) and position - end < _MAX_TOKENS:
            texts.append("")
            continue
        texts.append(whole.removeprefix(before))
        begin, end = end, position + 1
    if len(ids) and end < len(ids):  # the sequence ends within a character
        whole = _decode(tokenizer, ids[begin:])
        texts[-1] = whole.removeprefix(_decode(tokenizer, ids[begin:end]))
    return texts


def _decode(tokenizer: Any, ids: NDArray[np.int32]) -> str:
    if tokenizer is None:
        return " ".join(str(int(i)) for i in ids)
    try:
        text: str = tokenizer.decode([int(i) for i in ids])
    except (OverflowError, ValueError, IndexError, TypeError):  # ids outside the vocabulary
        return "".join(f"<{int(i)}>" for i in ids)
    return text


def _norm(cache: Cache, hookpoint: str, shard: int, row: int) -> float:
    stored = cache.row_dtype.to_float32(cache.read(hookpoint, shard, row, 1))
    return float(np.linalg.norm(stored.astype(np.float64)))
