"""Documents to fixed-length sequences.

pack: documents in their order, each followed by EOS, one long line cut into pieces of ctx_len
tokens (ctx_len - 1 where BOS is put before each piece). What is left at the end, less than a piece,
is dropped. crop: a window of each document, at a random place. truncate: the beginning of each.
These two leave sequences that may be shorter, and are padded on the right.

The sequences depend on the text, the tokenizer and the seed alone, so every process can make the
same ones for itself. Letter: C context length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actcache.core import rng
from actcache.core.progress import Progress
from actcache.data.documents import (
    DocumentStream,
    IndexedDocuments,
    Kind,
    Mixture,
    Record,
    Source,
    TokenFile,
)
from actcache.data.shuffling import DocumentOrder, documents_in_order
from actcache.errors import DatasetError

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class SequencePipeline:
    """How documents become sequences."""

    kind: Literal["pack", "crop", "truncate"]
    ctx_len: int
    """Tokens in a sequence."""
    bos_id: int | None
    """Token put first in each sequence; None: none."""
    eos_id: int | None
    """Token put after each document that does not end with it; None: none."""
    pad_id: int | None
    """Token put after a sequence that is too short; None: none is."""
    order: DocumentOrder
    vocab_size: int
    """Token ids must be below this."""

    @property
    def text_tokens(self) -> int:
        """Tokens of text in a sequence."""
        return self.ctx_len - (self.bos_id is not None)


@dataclass(frozen=True)
class Sequence:
    """One sequence, and where it came from."""

    tokens: NDArray[np.int32]
    """[C]"""
    length: int
    """Tokens before the padding."""
    document: int
    """Number of the document in which it begins, in the order they were taken."""
    start: int
    """Token of that document with which it begins."""


@dataclass(frozen=True)
class _Piece:
    """Tokens of text, before BOS and padding."""

    ids: Ids
    document: int
    start: int


def iter_sequences(
    source: Source, tokenizer: Any, pipeline: SequencePipeline
) -> Iterator[Sequence]:
    """All sequences of the text.

    Raises:
        DatasetError: a token id is beyond the model's vocabulary, or a document cannot be read.
    """
    if isinstance(source, TokenFile):
        pieces = _cut_file(source, pipeline)
    else:
        documents = _tokenised(source, tokenizer, pipeline)
        pieces = {"pack": _pack, "crop": _crop, "truncate": _truncate}[pipeline.kind](
            documents, pipeline
        )
    for piece in pieces:
        _check_vocabulary(piece.ids, pipeline)
        first = int(pipeline.bos_id is not None)
        tokens = np.full(pipeline.ctx_len, pipeline.pad_id or 0, dtype=np.int32)
        tokens[:first] = pipeline.bos_id or 0
        length = first + len(piece.ids)
        tokens[first:length] = piece.ids
        yield Sequence(tokens, length, piece.document, piece.start)


def count_sequences(
    source: Source, tokenizer: Any, pipeline: SequencePipeline, limit: int | None
) -> int:
    """How many sequences there are, counting no further than `limit`."""
    if isinstance(source, TokenFile):
        count = len(source.ids) // pipeline.text_tokens
        return count if limit is None else min(count, limit)
    count = 0
    bar = Progress("count", None if limit is None else limit * pipeline.ctx_len, "tok")
    for _ in itertools.islice(iter_sequences(source, tokenizer, pipeline), limit):
        count += 1
        bar.advance(pipeline.ctx_len)
    bar.close()
    return count


def _check_vocabulary(ids: Ids, pipeline: SequencePipeline) -> None:
    if int(ids.max()) >= pipeline.vocab_size or int(ids.min()) < 0:
        raise DatasetError(
            "a token id is not in the model's vocabulary",
            expected=f"0 to {pipeline.vocab_size - 1}",
            got=f"{int(ids.min())} to {int(ids.max())}",
            remedy="for a .bin file: is --bin-dtype right, and was it made for this model?",
        )


def _cut_file(source: TokenFile, pipeline: SequencePipeline) -> Iterator[_Piece]:
    size = pipeline.text_tokens
    for start in range(0, len(source.ids) - size + 1, size):
        yield _Piece(source.ids[start : start + size].astype(np.int64), 0, start)


def _pack(documents: Iterator[tuple[int, Ids]], pipeline: SequencePipeline) -> Iterator[_Piece]:
    size = pipeline.text_tokens
    line: list[Ids] = [np.empty((3, 0), dtype=np.int64)]  # token, its document, its place there
    waiting = 0
    for number, ids in documents:
        if pipeline.eos_id is not None and ids[-1] != pipeline.eos_id:
            ids = np.append(ids, pipeline.eos_id)
        line.append(np.stack([ids, np.full(len(ids), number), np.arange(len(ids))]))
        waiting += len(ids)
        if waiting < size:
            continue
        joined = np.concatenate(line, axis=1)
        whole = waiting // size * size
        for start in range(0, whole, size):
            tokens, numbers, places = joined[:, start : start + size]
            yield _Piece(tokens, int(numbers[0]), int(places[0]))
        line, waiting = [joined[:, whole:]], waiting - whole


def _crop(documents: Iterator[tuple[int, Ids]], pipeline: SequencePipeline) -> Iterator[_Piece]:
    size = pipeline.text_tokens
    for number, ids in documents:
        start = 0
        if len(ids) > size:  # a stream of its own for each document: none moves the others
            state = rng.stream("crop", pipeline.order.seed, number)
            start = int(state.randint(len(ids) - size + 1))
        yield _Piece(ids[start : start + size], number, start)


def _truncate(documents: Iterator[tuple[int, Ids]], pipeline: SequencePipeline) -> Iterator[_Piece]:
    for number, ids in documents:
        yield _Piece(ids[: pipeline.text_tokens], number, 0)


def _tokenised(
    source: IndexedDocuments | DocumentStream | Mixture, tokenizer: Any, pipeline: SequencePipeline
) -> Iterator[tuple[int, Ids]]:
    """(number in the order taken, token ids) of every document that has tokens."""
    first = 0
    for records in documents_in_order(source, pipeline.order):
        filled = [(first + i, record) for i, record in enumerate(records) if record]
        found = tokenize(tokenizer, source.column.kind, [record for _, record in filled])
        for (number, _), ids in zip(filled, found, strict=True):
            if len(ids):
                yield number, np.asarray(ids, dtype=np.int64)
        first += len(records)


def tokenize(tokenizer: Any, kind: Kind, records: list[Record]) -> list[list[int]]:
    """Token ids of each document; special tokens are those of a chat template alone.

    Raises:
        DatasetError: a conversation does not fit the template.
    """
    if not records:
        return []
    if kind == "ids":
        return records
    if kind == "chat":
        return [_chat(tokenizer, record) for record in records]
    encoded = tokenizer(
        records, add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _chat(tokenizer: Any, messages: Record) -> list[int]:
    # A table gives every message every key that some message has.
    messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
    try:
        written = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates are programs, and raise what they like
        raise DatasetError(
            "a conversation does not fit the tokenizer's chat template",
            got=f"{type(error).__name__}: {error}, roles {[m.get('role') for m in messages][:8]}",
            remedy="its messages need the roles, contents and order that the template asks for",
        ) from error
    ids: list[int] = tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
