"""Cut documents, in their seeded order, to sequences of ctx_len tokens.

Pack concatenates the documents, a separator after each, and cuts the result every ctx_len tokens
(ctx_len - 1 if BOS is put before each sequence), dropping the incomplete last sequence; crop takes
a window of each document at a random position; truncate takes the beginning of each document. The
last two give sequences that may be shorter and are padded on the right.

The sequences depend on the text, the tokenizer and the seed only: every process of a harvest
generates the same ones, without communication. Letter: C context length.
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
from actcache.data.datasets import (
    DocumentStream,
    IndexedDocuments,
    Mixture,
    Source,
    TokenFile,
)
from actcache.data.document_order import DocumentOrder, documents_in_order
from actcache.data.token_rows import WholeRows
from actcache.data.tokenization import tokenize
from actcache.errors import DatasetError

Ids = NDArray[np.int64]
_IDS_AT_ONCE = 1 << 17  # token ids read from a file at once
_BATCH = 256  # sequences between two updates of a progress bar


@dataclass(frozen=True)
class SequencePipeline:
    """Settings by which documents become sequences."""

    kind: Literal["pack", "crop", "truncate"]
    ctx_len: int
    """Tokens of a sequence, BOS and padding included."""
    bos_id: int | None
    """BOS, put first in each sequence; None: no BOS."""
    eos_id: int | None
    """Separator, put after each document that does not end with it; None: none."""
    pad_id: int | None
    """Padding token of short sequences; None: sequences are never short."""
    order: DocumentOrder
    vocab_size: int
    """Exclusive upper bound of the token ids."""
    whole_rows: WholeRows | None = None
    """With truncate: documents are rows of token ids that are whole sequences; None: they are not
    known to be."""
    columns: tuple[str, ...] = ()
    """Columns that decide the tokens beside that of the documents: `Identity.template_columns`."""
    notes: tuple[str, ...] = ()
    """What the summary says of these settings."""

    def warnings(self) -> tuple[str, ...]:
        """Return the notes, and what was found while the text was read."""
        return (*self.notes, *(self.whole_rows.warnings() if self.whole_rows else ()))

    @property
    def text_tokens(self) -> int:
        """Tokens of a sequence without BOS."""
        return self.ctx_len - (self.bos_id is not None)


@dataclass(frozen=True)
class Sequence:
    """Token ids of one sequence, and their origin."""

    tokens: NDArray[np.int32]
    """[C]"""
    length: int
    """Number of tokens before the padding."""
    document: int
    """Index of the document that holds the first token, in the shuffled order."""
    start: int
    """Index of the first token within that document."""


@dataclass(frozen=True)
class _Piece:
    """Tokens of one sequence, before BOS and padding are added."""

    ids: Ids
    document: int
    start: int


def iter_sequences(
    source: Source, tokenizer: Any, pipeline: SequencePipeline
) -> Iterator[Sequence]:
    """Generate all sequences of the text, in order.

    Raises:
        DatasetError: a token id is outside the model's vocabulary, or a document cannot be read.
    """
    if isinstance(source, TokenFile):
        pieces = _cut_file(source, pipeline)
    else:
        cut = {"pack": _pack, "crop": _crop, "truncate": _truncate}[pipeline.kind]
        pieces = cut(_tokenised(source, tokenizer, pipeline), pipeline)
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
    """Count the sequences of the text, up to `limit`."""
    if isinstance(source, TokenFile):
        count = source.count // pipeline.text_tokens
        return count if limit is None else min(count, limit)
    count, bar = 0, None  # a text of a few sequences needs no bar
    for _ in itertools.islice(iter_sequences(source, tokenizer, pipeline), limit):
        count += 1
        if count % _BATCH:
            continue
        tokens = _BATCH * pipeline.ctx_len
        if bar is None:
            total = None if limit is None else limit * pipeline.ctx_len
            bar = Progress("count", total, "tok", initial=tokens)
        else:
            bar.advance(tokens)
    if bar is not None:
        bar.advance(count % _BATCH * pipeline.ctx_len)
        bar.close()
    return count


def _check_vocabulary(ids: Ids, pipeline: SequencePipeline) -> None:
    if int(ids.max()) >= pipeline.vocab_size or int(ids.min()) < 0:
        raise DatasetError(
            "a token id is outside the model's vocabulary",
            expected=f"0 to {pipeline.vocab_size - 1}",
            got=f"{int(ids.min())} to {int(ids.max())}",
            remedy="for a .bin file: check --bin-dtype, and that this model's tokenizer made it",
        )


def _cut_file(source: TokenFile, pipeline: SequencePipeline) -> Iterator[_Piece]:
    size = pipeline.text_tokens
    count = source.count // size
    at_once = max(1, _IDS_AT_ONCE // size)
    for first in range(0, count, at_once):
        number = min(at_once, count - first)
        ids = source.read(first * size, number * size).astype(np.int64).reshape(number, size)
        for sequence, row in enumerate(ids, start=first):
            yield _Piece(row, 0, sequence * size)


def _pack(documents: Iterator[tuple[int, Ids]], pipeline: SequencePipeline) -> Iterator[_Piece]:
    size = pipeline.text_tokens
    columns: list[Ids] = [np.empty((3, 0), dtype=np.int64)]  # token, document, position in it
    pending = 0
    for document, ids in documents:
        if pipeline.eos_id is not None and ids[-1] != pipeline.eos_id:
            ids = np.append(ids, pipeline.eos_id)
        columns.append(np.stack([ids, np.full(len(ids), document), np.arange(len(ids))]))
        pending += len(ids)
        if pending < size:
            continue
        joined = np.concatenate(columns, axis=1)
        complete = pending // size * size
        for start in range(0, complete, size):
            tokens, numbers, positions = joined[:, start : start + size]
            yield _Piece(tokens, int(numbers[0]), int(positions[0]))
        columns, pending = [joined[:, complete:]], pending - complete


def _crop(documents: Iterator[tuple[int, Ids]], pipeline: SequencePipeline) -> Iterator[_Piece]:
    size = pipeline.text_tokens
    for document, ids in documents:
        start = 0
        if len(ids) > size:  # one random stream per document: its window depends on no other
            state = rng.stream("crop", pipeline.order.seed, document)
            start = int(state.randint(len(ids) - size + 1))
        yield _Piece(ids[start : start + size], document, start)


def _truncate(documents: Iterator[tuple[int, Ids]], pipeline: SequencePipeline) -> Iterator[_Piece]:
    if pipeline.whole_rows is not None:
        documents = pipeline.whole_rows.count(documents)
    for document, ids in documents:
        yield _Piece(ids[: pipeline.text_tokens], document, 0)


def _tokenised(
    source: IndexedDocuments | DocumentStream | Mixture, tokenizer: Any, pipeline: SequencePipeline
) -> Iterator[tuple[int, Ids]]:
    """Yield (index in the shuffled order, token ids) of every document that has tokens."""
    first, kind = 0, source.column.kind
    for records in documents_in_order(source, pipeline.order):
        filled = [(first + i, record) for i, record in enumerate(records) if record]
        tokenized = tokenize(tokenizer, kind, [record for _, record in filled])
        for (document, _), ids in zip(filled, tokenized, strict=True):
            if len(ids):
                yield document, np.asarray(ids, dtype=np.int64)
        first += len(records)
