"""Cut documents, in their seeded order, to sequences of ctx_len tokens.

Pack concatenates the documents, a separator after each, and cuts the result every ctx_len tokens
(ctx_len - 1 if BOS is put before each sequence), dropping the incomplete last sequence; crop takes
a window of each document at a random position; truncate takes the beginning of each document. The
last two give sequences that may be shorter and are padded on the right.

Documents are read and tokenised only as far as sequences are asked for, and one further: only a
sequence that is not the last of the text is known to count no documents left out behind it.

A document that cannot be used is left out (`left_out`). Of a long text whose tokenizer gives an id
outside the vocabulary, the tokens before that id are used.

The sequences depend on the text, the tokenizer and the seed only: every process of a harvest
generates the same ones. A published shard holds the document and token at which each of its
sequences begins; from there on, the text can be tokenised anew. Letter: C context length.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from actcache.core import rng
from actcache.core.progress import Progress
from actcache.data.chats import chat_text
from actcache.data.datasets import (
    DocumentStream,
    IndexedDocuments,
    Kind,
    Mixture,
    Source,
    TokenFile,
)
from actcache.data.document_order import DocumentOrder, documents_in_order, places_in_order
from actcache.data.left_out import BlockLeftOut, LeftOut, LeftOutDocuments
from actcache.data.records import Record, Unusable, shown
from actcache.data.token_rows import WholeRows
from actcache.data.tokenization import Ids, Render, tokenize
from actcache.errors import DatasetError

_IDS_AT_ONCE = 1 << 17  # token ids read from a file at once
_BATCH = 256  # sequences between two updates of a progress bar
_NEAR = 1 << 20  # tokens that are rather read on than the text is entered anew


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
    render: Render = chat_text
    """How conversations become text."""
    notes: tuple[str, ...] = ()
    """What the summary says of these settings."""

    def warnings(self) -> tuple[str, ...]:
        """Return the notes, and what was found while the text was read."""
        return (*self.notes, *(self.whole_rows.warnings() if self.whole_rows else ()))

    max_bad_documents: float | None = None
    """Share of the documents that may be left out; None: the first that cannot be used is refused.
    """

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
    left_out: tuple[LeftOut, ...] = ()
    """Documents left out since the sequence before; at the end of the text, also behind it."""


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence, before BOS and padding are added, or of a whole document."""

    ids: Ids
    document: int
    start: int


def iter_sequences(
    source: Source, tokenizer: Any, pipeline: SequencePipeline, document: int = 0, start: int = 0
) -> Iterator[Sequence]:
    """Generate all sequences of the text, in order, or those from a known one on.

    Args:
        source: the text.
        tokenizer: the tokenizer; None for token ids.
        pipeline: how documents become sequences.
        document: document in which the first sequence begins; those before it are not tokenised.
        start: index of its first token in that document.

    Raises:
        DatasetError: a token id is outside the model's vocabulary, or a document cannot be read.
    """
    left_out = LeftOutDocuments(pipeline.max_bad_documents, places_of(source, pipeline))
    if isinstance(source, TokenFile):
        pieces = _cut_file(source, pipeline, start)
    else:
        tokenised = _tokenised(source, tokenizer, pipeline, left_out, document)
        pieces = _cut(tokenised, pipeline, start)
    sequence: Sequence | None = None
    for piece in pieces:
        if sequence is not None:
            yield sequence
        sequence = as_sequence(piece, pipeline, left_out.take() if left_out.found else ())
    if sequence is not None:
        yield dataclasses.replace(sequence, left_out=sequence.left_out + left_out.take())


def places_of(source: Source, pipeline: SequencePipeline) -> Callable[[int], str]:
    """Return the function from a document's index in the shuffled order to where it is."""
    if isinstance(source, TokenFile):
        return lambda _: ""
    return places_in_order(source, pipeline.order)


def as_sequence(
    piece: Piece, pipeline: SequencePipeline, left_out: tuple[LeftOut, ...] = ()
) -> Sequence:
    """Add BOS and padding to the tokens of a sequence."""
    first = int(pipeline.bos_id is not None)
    tokens = np.full(pipeline.ctx_len, pipeline.pad_id or 0, dtype=np.int32)
    tokens[:first] = pipeline.bos_id or 0
    length = first + len(piece.ids)
    tokens[first:length] = piece.ids
    return Sequence(tokens, length, piece.document, piece.start, left_out)


def pieces_of(
    records: list[Record],
    first: int,
    kind: Kind,
    tokenizer: Any,
    pipeline: SequencePipeline,
    left_out: BlockLeftOut,
    most: int,
    check: Callable[[], None],
) -> Iterator[Piece]:
    """Tokenise documents: whole ones with the separator for pack, else their windows.

    Args:
        records: the documents.
        first: index of the first in the shuffled order.
        kind: their kind.
        tokenizer: the tokenizer.
        pipeline: how documents become sequences.
        left_out: takes those that cannot be used.
        most: with pack, number of tokens beyond which nothing more is needed of a document.
        check: called before each piece of a document; what it raises ends the tokenisation.
    """
    documents = (
        (document, _checked(pieces, check))
        for document, pieces in _tokenised_records(
            records, first, kind, tokenizer, pipeline, left_out
        )
    )
    if pipeline.kind != "pack":
        for piece in _cut(documents, pipeline):
            yield piece
            left_out.position += 1
        return
    for document, pieces in documents:
        held: list[Ids] = []
        length = 0
        for ids in _with_eos(pieces, pipeline.eos_id):
            held.append(ids)
            length += len(ids)
            left_out.position += len(ids)
            if length >= most:
                break
        if length:
            yield Piece(np.concatenate(held), document, 0)


def _checked(pieces: Iterator[Ids], check: Callable[[], None]) -> Iterator[Ids]:
    for ids in pieces:
        check()
        yield ids


def _cut(
    documents: Iterator[_Document], pipeline: SequencePipeline, start: int = 0
) -> Iterator[Piece]:
    """Cut documents; with pack, the first piece is the one that begins at token `start`."""
    if pipeline.kind != "pack":
        return (_crop if pipeline.kind == "crop" else _truncate)(documents, pipeline)
    size = pipeline.text_tokens
    if start % size:  # fill up what was before the first document, so that the cuts are the same
        filler = np.full(-start % size, pipeline.eos_id or 0)
        documents = itertools.chain([(0, iter([filler]))], documents)
    return itertools.islice(_pack(documents, pipeline), -(-start // size), None)


def count_sequences(
    source: Source, tokenizer: Any, pipeline: SequencePipeline, limit: int | None
) -> int:
    """Count the sequences of the text, up to `limit`."""
    if isinstance(source, TokenFile):
        count = source.count // pipeline.text_tokens
        return count if limit is None else min(count, limit)
    sequences = iter_sequences(source, tokenizer, pipeline)
    return sum(1 for _ in _with_progress(sequences, limit, pipeline.ctx_len))


def _with_progress(
    sequences: Iterator[Sequence], limit: int | None, ctx_len: int
) -> Iterator[Sequence]:
    """Yield sequences, up to `limit`, and show the progress; a few need no bar."""
    count, bar = 0, None
    for sequence in itertools.islice(sequences, limit):
        yield sequence
        count += 1
        if count % _BATCH:
            continue
        tokens = _BATCH * ctx_len
        if bar is None:
            total = None if limit is None else limit * ctx_len
            bar = Progress("count", total, "tok", initial=tokens)
        else:
            bar.advance(tokens)
    if bar is not None:
        bar.advance(count % _BATCH * ctx_len)
        bar.close()


def _cut_file(source: TokenFile, pipeline: SequencePipeline, start: int) -> Iterator[Piece]:
    size = pipeline.text_tokens
    count = source.count // size
    at_once = max(1, _IDS_AT_ONCE // size)
    for first in range(start // size, count, at_once):
        number = min(at_once, count - first)
        ids = source.read(first * size, number * size).astype(np.int64).reshape(number, size)
        if _first_outside(ids.ravel(), pipeline) is not None:
            raise DatasetError(
                f"a token id of {source.path} is outside the model's vocabulary",
                expected=f"0 to {pipeline.vocab_size - 1}",
                got=f"{int(ids.min())} to {int(ids.max())}",
                remedy="check --bin-dtype, and that this model's tokenizer made the file",
            )
        for sequence, row in enumerate(ids, start=first):
            yield Piece(row, 0, sequence * size)


def _pack(documents: Iterator[_Document], pipeline: SequencePipeline) -> Iterator[Piece]:
    size = pipeline.text_tokens
    row, filled, origin = np.empty(size, np.int64), 0, (0, 0)
    for document, pieces in documents:
        position = 0
        for ids in _with_eos(pieces, pipeline.eos_id):
            taken = 0
            while taken < len(ids):
                if not filled:
                    origin = document, position + taken
                number = min(size - filled, len(ids) - taken)
                row[filled : filled + number] = ids[taken : taken + number]
                filled, taken = filled + number, taken + number
                if filled == size:
                    yield Piece(row, *origin)
                    row, filled = np.empty(size, np.int64), 0
            position += len(ids)


def _with_eos(pieces: Iterator[Ids], eos_id: int | None) -> Iterator[Ids]:
    """Append EOS to a document that has tokens, unless it ends with it."""
    last = None
    for ids in pieces:
        yield ids
        last = ids[-1] if len(ids) else last
    if last is not None and eos_id is not None and last != eos_id:
        yield np.array([eos_id])


def _crop(documents: Iterator[_Document], pipeline: SequencePipeline) -> Iterator[Piece]:
    size = pipeline.text_tokens
    for document, pieces in documents:
        held = [ids.astype(np.int32) for ids in pieces]
        count = sum(map(len, held))
        start = 0
        if count > size:  # one random stream per document: its window depends on no other
            state = rng.stream("crop", pipeline.order.seed, document)
            start = int(state.randint(count - size + 1))
        if count:
            yield Piece(_window(held, start, size), document, start)


def _truncate(documents: Iterator[_Document], pipeline: SequencePipeline) -> Iterator[Piece]:
    size = pipeline.text_tokens
    if pipeline.whole_rows is not None:
        documents = pipeline.whole_rows.count(documents)
    for document, pieces in documents:
        held: list[Ids] = []
        while sum(map(len, held)) < size and (ids := next(pieces, None)) is not None:
            held.append(ids)
        if any(map(len, held)):
            yield Piece(_window(held, 0, size), document, 0)


def _window(pieces: list[Any], start: int, size: int) -> Ids:
    """Return ids `start` to `start + size` of pieces that follow each other, as far as they go."""
    found, offset = [], 0
    for ids in pieces:
        found.append(ids[max(0, start - offset) : max(0, start + size - offset)])
        offset += len(ids)
    window: Ids = np.concatenate(found)
    return window


_Document = tuple[int, Iterator[Ids]]
"""Index of a document in the shuffled order, and its token ids in pieces."""


def _tokenised(
    source: IndexedDocuments | DocumentStream | Mixture,
    tokenizer: Any,
    pipeline: SequencePipeline,
    left_out: LeftOutDocuments,
    first: int,
) -> Iterator[_Document]:
    """Yield the documents from index `first` on that can be used and are not empty."""
    kind = source.column.kind
    for records in documents_in_order(source, pipeline.order, first):
        yield from _tokenised_records(records, first, kind, tokenizer, pipeline, left_out)
        first += len(records)
    left_out.end(first)


def _tokenised_records(
    records: list[Record],
    first: int,
    kind: Kind,
    tokenizer: Any,
    pipeline: SequencePipeline,
    left_out: LeftOutDocuments | BlockLeftOut,
) -> Iterator[_Document]:
    filled = [(first + i, record) for i, record in enumerate(records) if record]
    given = (record for _, record in filled)
    tokenised = tokenize(tokenizer, kind, given, pipeline.render)
    for (document, record), ids in zip(filled, tokenised, strict=True):
        if isinstance(ids, np.ndarray):
            outside = _first_outside(ids, pipeline)
            if outside is None:
                yield document, iter([ids])
                continue
            ids = _bad_id(int(ids[outside]), tokenizer, pipeline, record)
        if isinstance(ids, Unusable):
            left_out.add(document, ids)
            continue
        yield document, _until_outside(document, ids, record, tokenizer, pipeline, left_out)


def _until_outside(
    document: int,
    pieces: Iterator[Ids | Unusable],
    record: Any,
    tokenizer: Any,
    pipeline: SequencePipeline,
    left_out: LeftOutDocuments | BlockLeftOut,
) -> Iterator[Ids]:
    """Yield the ids of a long text up to the first outside the vocabulary; leave out the rest."""
    for ids in pieces:
        if isinstance(ids, Unusable):
            left_out.add(document, ids)
            return
        outside = _first_outside(ids, pipeline)
        yield ids[:outside]
        if outside is not None:
            left_out.add(document, _bad_id(int(ids[outside]), tokenizer, pipeline, record))
            return


def _first_outside(ids: Ids, pipeline: SequencePipeline) -> int | None:
    if not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < pipeline.vocab_size):
        return None
    return int(np.flatnonzero((ids < 0) | (ids >= pipeline.vocab_size))[0])


def _bad_id(token: int, tokenizer: Any, pipeline: SequencePipeline, record: Any) -> Unusable:
    name = ""
    if hasattr(tokenizer, "convert_ids_to_tokens") and 0 <= token < len(tokenizer):
        name = f" ({tokenizer.convert_ids_to_tokens(token)!r})"
    error = DatasetError(
        "a token id is outside the model's vocabulary",
        expected=f"0 to {pipeline.vocab_size - 1}",
        got=f"id {token}{name}",
        remedy="the tokenizer must be that of the model",
    )
    return Unusable("token_id", error, shown(record))


@dataclass(frozen=True)
class Anchor:
    """A sequence that is known, such as the last one of a published shard."""

    number: int
    """Its number in the text, from 0."""
    sequence: Sequence

    def require_equal(self, found: Sequence | None) -> None:
        """Raise `DatasetError` unless the text, tokenised anew, gives the same sequence."""
        known = self.sequence
        if found is None or not _are_equal(found, known):
            raise DatasetError(
                "the text gives other tokens than when the cache was begun",
                expected=f"sequence {self.number} as it was published: document "
                f"{known.document}, tokens {known.tokens[:8].tolist()}...",
                got="no sequence" if found is None else f"{found.tokens[:8].tolist()}...",
                remedy="the text, the tokenizer and their libraries must be those of then",
            )


class NumberedSequences(Protocol):
    """The sequences of a text, by number."""

    def read(self, first: int, most: int) -> list[Sequence]:
        """Return `most` sequences from number `first` on, fewer if the text ends."""

    def count(self, first: int, most: int) -> int:
        """Count the sequences that `read` would return."""

    def close(self) -> None:
        """End what still runs."""


class SequenceReader:
    """Reads the text from an anchor on, and forwards from then on.

    Args:
        source: the text.
        tokenizer: the tokenizer; None for token ids.
        pipeline: how documents become sequences.
        find_anchor: function from a number to an anchor before it, the nearest that is known.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        pipeline: SequencePipeline,
        find_anchor: Callable[[int], Anchor | None] = lambda _: None,
    ) -> None:
        self._text = (source, tokenizer, pipeline)
        self.find_anchor = find_anchor
        self._near = _NEAR // pipeline.ctx_len
        self._sequences: Iterator[Sequence] | None = None
        self._kept: list[Sequence] = []  # counted, and read after that
        self._next = 0  # number of the next

    def read(self, first: int, most: int) -> list[Sequence]:
        """Return `most` sequences from number `first` on, fewer if the text ends.

        Raises:
            DatasetError: the text cannot be read, or is not that of the anchor.
        """
        sequences = self._enter(first)
        found, self._kept = self._kept[:most], self._kept[most:]
        found += itertools.islice(sequences, most - len(found))
        self._next += len(found)
        return found

    def count(self, first: int, most: int) -> int:
        """Count the sequences that `read` would return; they are kept for it."""
        source, _, pipeline = self._text
        if isinstance(source, TokenFile):
            return max(0, min(most, source.count // pipeline.text_tokens - first))
        sequences = self._enter(first)
        missing = max(0, most - len(self._kept))
        self._kept += _with_progress(sequences, missing, pipeline.ctx_len)
        return min(most, len(self._kept))

    def close(self) -> None:
        """Do nothing: no thread runs."""

    def _enter(self, first: int) -> Iterator[Sequence]:
        """Move to a number, by reading on if it is near, else from an anchor."""
        ahead = self._sequences is not None and self._next <= first
        if not ahead or first > self._next + self._near:
            anchor = self.find_anchor(first) if first else None
            if anchor is not None and not (ahead and anchor.number < self._next):
                self._sequences, self._next, self._kept = self._from(anchor), anchor.number + 1, []
            elif not ahead:
                self._sequences, self._next, self._kept = iter_sequences(*self._text), 0, []
        assert self._sequences is not None
        skipped = first - self._next
        dropped = len(self._kept[:skipped])
        self._kept = self._kept[dropped:]
        dropped += sum(1 for _ in itertools.islice(self._sequences, skipped - dropped))
        self._next += dropped
        return self._sequences

    def _from(self, anchor: Anchor) -> Iterator[Sequence]:
        known = anchor.sequence
        sequences = iter_sequences(*self._text, known.document, known.start)
        anchor.require_equal(next(sequences, None))
        return sequences


def _are_equal(one: Sequence, other: Sequence) -> bool:
    origins = [(s.document, s.start, s.length) for s in (one, other)]
    return origins[0] == origins[1] and bool(np.array_equal(one.tokens, other.tokens))
