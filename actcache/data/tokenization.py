"""Documents to token ids: text by the tokenizer, conversations by its chat template first.

A long text is tokenised in pieces, cut where the tokenizer cannot tell: the ids of the pieces, one
after another, are those of the whole. A cut is looked for at the beginning of a line, before a
space, at the end of a word. It is taken if the ids of the piece with the text behind it end with
the ids of the text behind it alone. Otherwise, another place is tried; without one, the piece
grows. Of the text behind it, the tokenizer sees some hundred characters, more than a normaliser,
an added token or the rules for words look at.

Some tokenizers put a space before a text, or strip one there. So the text behind a cut is tokenised
alone, after a line end, or after a letter, whose ids are removed again: the first of them that
gives the same ids.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.data.chats import chat_text
from actcache.data.datasets import Kind
from actcache.data.records import LongText, Record, Unusable, shown
from actcache.data.table_rows import DOCUMENT
from actcache.data.token_rows import row_ids
from actcache.errors import DatasetError

Ids = NDArray[np.int64]
Render = Callable[[Any, Record], str]
"""Function from a tokenizer and a conversation to its text, as `chat_text`."""

LONG = 1 << 16
"""Characters of a text beyond which it is tokenised in pieces."""
_PIECE = 1 << 15  # characters of a piece, unless it must grow
_AT_ONCE = 1 << 18  # characters of short texts tokenised in one call
_AHEAD = 512  # characters behind a cut that are tokenised with a piece
_AREA = 4096  # characters at the end of a piece in which a cut is looked for
_TRIED = 3  # places of a kind that are tried
_LONGEST = 32  # characters of a token, and of what is repeated, in `_reaches_far`
_BEFORE = ("", "\n", "a")  # what may precede the text behind a cut
_PLACES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?<=\n)(?=\S)",
        r"(?<=\S)(?= \w)",
        r"(?<=\s)(?=\S)",
        r"(?<=\w)(?=[^\w\s])",
        r"(?<=[^\w\s])(?=\w)",
    )
)


def tokenize(
    tokenizer: Any, kind: Kind, records: Iterable[Record], render: Render = chat_text
) -> Iterator[Ids | Iterator[Ids | Unusable] | Unusable]:
    """Tokenise documents, as far as asked for. Only a chat template adds special tokens.

    Yields:
        For each document its ids, or why it cannot be used. Of a long text, an iterator of pieces
        of its ids, which ends with the reason if the tokenizer refuses the rest.
    """
    held: list[Record] = []
    size = 0
    for record in records:
        if kind == "chat" and not isinstance(record, Unusable):
            record = _chat(tokenizer, record, render)
        elif kind == "ids" and not isinstance(record, Unusable):
            record = _row(record)
        is_long = isinstance(record, LongText) or (isinstance(record, str) and len(record) > LONG)
        if is_long or size > _AT_ONCE:
            yield from _tokenize_short(tokenizer, held)
            held, size = [], 0
        if is_long:
            yield _tokenize_long(tokenizer, record)
        else:
            held.append(record)
            size += 0 if isinstance(record, Unusable) else len(record)
    yield from _tokenize_short(tokenizer, held)


def _tokenize_short(tokenizer: Any, records: list[Record | Unusable]) -> Iterator[Ids | Unusable]:
    texts = [record for record in records if isinstance(record, str)]
    found = iter(_encode_each(tokenizer, texts))
    for record in records:
        if isinstance(record, Unusable):
            yield record
        elif isinstance(record, str):
            yield next(found)
        else:
            yield _of_ids(record)


def _of_ids(record: list[int]) -> Ids | Unusable:
    try:
        return np.array(record, dtype=np.int64)
    except OverflowError:
        error = DatasetError("a token id has more than 64 bits", got=max(record, key=abs))
        return Unusable("token_id", error, shown(record))


def _tokenize_long(tokenizer: Any, record: str | LongText) -> Iterator[Ids | Unusable]:
    try:
        yield from _pieces(tokenizer, _chunks(record))
    except _RefusedError as error:
        yield error.unusable(record)


def _encode_each(tokenizer: Any, texts: list[str]) -> list[Ids | Unusable]:
    """Tokenise texts in one call; if the tokenizer refuses them, each in its own."""
    if not texts:
        return []
    try:
        return [np.array(ids, dtype=np.int64) for ids in _encode(tokenizer, texts)]
    except _RefusedError as error:
        if len(texts) > 1:
            return [_encode_each(tokenizer, [text])[0] for text in texts]
        return [error.unusable(texts[0])]


class _RefusedError(Exception):
    """A tokenizer raised an exception."""

    def unusable(self, record: Record) -> Unusable:
        """Describe the document that it raised it for."""
        error = DatasetError("the tokenizer refuses a document", got=str(self))
        return Unusable("tokenizer", error, shown(record))


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    try:
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raise any type
        raise _RefusedError(f"{type(error).__name__}: {error}") from error
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _chat(tokenizer: Any, record: Record, render: Render) -> str | Unusable:
    try:
        return render(tokenizer, record)
    except DatasetError as error:
        return Unusable("chat_template", error, _shown(record))


def _row(record: Record) -> list[int] | Unusable:
    try:
        return row_ids(record)
    except DatasetError as error:
        return Unusable("type", error, _shown(record))


def _shown(record: Record) -> str:
    return shown(record[DOCUMENT] if isinstance(record, dict) else record)


def _chunks(text: str | LongText) -> Iterator[str]:
    if isinstance(text, LongText):
        yield from text.pieces()
        return
    for start in range(0, len(text), LONG):
        yield text[start : start + LONG]


def _pieces(tokenizer: Any, chunks: Iterator[str]) -> Iterator[Ids]:
    """Tokenise a text that comes in chunks of any size."""
    ahead = max([_AHEAD, *(2 * len(t) for t in getattr(tokenizer, "get_added_vocab", dict)())])
    held: list[str] = []
    length, size, before = 0, _PIECE, ""
    for chunk in chunks:
        held.append(chunk)
        length += len(chunk)
        if length < size + ahead:
            continue
        rest, start = "".join(held), 0
        while len(rest) - start >= size + ahead:
            cut = _cut(tokenizer, before, rest[start : start + size + ahead], size)
            if cut is None:
                size *= 2
                continue
            place, before, ids = cut
            yield ids
            start, size = start + place, _PIECE
        held, length = [rest[start:]], len(rest) - start
    rest = "".join(held)
    if rest:
        yield _required(_behind(tokenizer, before, rest))


def _cut(tokenizer: Any, before: str, window: str, size: int) -> tuple[int, str, Ids] | None:
    """Find a cut near the end of a window.

    Args:
        tokenizer: the tokenizer.
        before: what precedes the window, as the last cut returned it.
        window: the text from the last cut on.
        size: index in it of the last place for a cut.

    Returns:
        The length of the piece, what precedes the text behind it, and the ids of the piece; None
        if there is no place for a cut.
    """
    places = _places(window, size)
    if not places:
        return None
    whole = _required(_behind(tokenizer, before, window))
    for place in places:
        if _reaches_far(tokenizer, window, place):
            continue
        for other in _BEFORE:
            ids = _behind(tokenizer, other, window[place:])
            if ids is not None and len(ids) and np.array_equal(whole[-len(ids) :], ids):
                return place, other, whole[: -len(ids)]
    return None


def _places(window: str, size: int) -> list[int]:
    """List places for a cut, the best kinds first, and of each kind the last few."""
    found = []
    for pattern in _PLACES:
        places = [m.start() for m in pattern.finditer(window, max(1, size - _AREA), size + 1)]
        found += [
            p for p in reversed(places[-_TRIED:]) if unicodedata.category(window[p])[0] != "M"
        ]
    return list(dict.fromkeys(found))


def _reaches_far(tokenizer: Any, window: str, place: int) -> bool:
    """Return whether ids at a place may depend on where a repetition behind the window ends.

    Unigram models choose the best ids of a whole word. In a repetition such as a-a-a-, what is left
    over by the longest tokens may be anywhere.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if type(getattr(backend, "model", None)).__name__ != "Unigram":
        return False
    end = window[place + _LONGEST :]
    if not any(end[period:] == end[:-period] for period in range(1, _LONGEST + 1)):
        return False
    if backend.pre_tokenizer is None:
        return True
    words = backend.pre_tokenizer.pre_tokenize_str(window[place - 1 : place + 2])
    return any(first < 1 < last for _, (first, last) in words)


def _required(ids: Ids | None) -> Ids:
    """Return the ids of a text behind a cut, where `_behind` gave some for its beginning."""
    if ids is None:
        raise _RefusedError("its ids for a part of the text depend on text that is far away")
    return ids


def _behind(tokenizer: Any, before: str, text: str) -> Ids | None:
    """Tokenise a text as it is behind another; None if the ids do not show where it begins."""
    (ids,) = _encode(tokenizer, [before + text])
    if not before:
        return np.array(ids, dtype=np.int64)
    (prefix,) = _encode(tokenizer, [before])
    if ids[: len(prefix)] != prefix:
        return None
    return np.array(ids[len(prefix) :], dtype=np.int64)
