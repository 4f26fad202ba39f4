"""Sequences of a text that several processes tokenise together.

The documents, in their seeded order, form blocks of a fixed number. Block b is tokenised by the
process of rank b mod world_size, in a thread that runs ahead of what the process reads, and
published as a file (`text_blocks`) in a folder that all see. A process reads the counts of every
block, and token ids where its own sequences are. There is no collective: a process waits for the
file of another, and after some time makes it itself.

Positions count tokens, BOS left out, where documents are joined (pack), else sequences.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import count as numbers_from
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache.core.rendezvous import WaitNotice
from actcache.data.datasets import DocumentStream, IndexedDocuments, Mixture
from actcache.data.document_order import OrderReader, open_order
from actcache.data.left_out import BlockLeftOut, LeftOut, LeftOutDocuments
from actcache.data.records import Unusable
from actcache.data.sequences import (
    Anchor,
    Piece,
    Sequence,
    SequencePipeline,
    as_sequence,
    pieces_of,
    places_of,
)
from actcache.data.text_blocks import BlockHeader, read_block, read_header, write_block

PATIENCE = 30.0
"""Seconds after which a block of another process is made here."""
_NAME = re.compile(r"[0-9]{5,9}\.ids")
_PAUSE = 0.02  # seconds between two looks for a file
_AHEAD = 2  # blocks, for each process, that the thread runs ahead
_BLOCKS = 256  # blocks of a harvest, about, within the bounds of their size
_LEAST_BYTES, _MOST_BYTES = 1 << 16, 1 << 21  # text of a block
_MOST_DOCUMENTS = 256  # in a block where the size of the text is not known


def documents_of_a_block(
    source: IndexedDocuments | DocumentStream | Mixture,
    pipeline: SequencePipeline,
    goal: int | None,
) -> int:
    """Choose the number of documents in a block; it depends on text and goal alone."""
    if pipeline.kind != "pack":
        share = _MOST_DOCUMENTS if goal is None else goal // _BLOCKS
        return min(_MOST_DOCUMENTS, max(16, share))
    if not isinstance(source, IndexedDocuments) or source.bytes is None:
        return _MOST_DOCUMENTS
    wanted = _MOST_BYTES if goal is None else 4 * goal * pipeline.text_tokens // _BLOCKS
    wanted = min(_MOST_BYTES, max(_LEAST_BYTES, wanted))
    return max(1, wanted * source.count // max(1, source.bytes))


class _StoppedError(Exception):
    """The thread is to end within a block, whose text may take minutes."""


class SharedSequences:
    """The sequences of a text by number, tokenised together with other processes.

    Args:
        source: the text.
        tokenizer: the tokenizer.
        pipeline: how documents become sequences.
        folder: where the blocks are; its name follows from all that decides them.
        size: documents of a block.
        rank: rank of this process.
        world_size: number of processes.
        goal: number of sequences, at least, that are needed; None: all of the text.
        find_end: function to the number of sequences that are known to be there, such as from the
            seal of a cache, and whether the text has no more; asked while a block is waited for.
    """

    def __init__(
        self,
        source: IndexedDocuments | DocumentStream | Mixture,
        tokenizer: object,
        pipeline: SequencePipeline,
        folder: Path,
        size: int,
        rank: int,
        world_size: int,
        goal: int | None = None,
        find_end: Callable[[], tuple[int, bool]] = lambda: (0, False),
    ) -> None:
        self._source, self._tokenizer, self._pipeline = source, tokenizer, pipeline
        self._folder, self._size, self._rank, self._world_size = folder, size, rank, world_size
        self._goal, self._find_end = goal, find_end
        self._joins = pipeline.kind == "pack"
        self._unit = pipeline.text_tokens if self._joins else 1  # positions in a sequence
        self._first_block = 0
        self._bases = [0]  # position at which each block begins, from the first on
        self._end: int | None = None  # position at which the text ends
        self._anchor: Anchor | None = None  # where to begin
        self._asked = 0  # position up to which the text is read now
        self._sealed: int | None = None  # sequences by `find_end`
        # Position up to which the text is needed: one sequence more shows whether it ends.
        self._wanted = sys.maxsize if goal is None else (goal + 1) * self._unit
        self._most = self._wanted  # tokens that are needed of any document
        places = places_of(source, pipeline)
        self._left_out = LeftOutDocuments(pipeline.max_bad_documents, places)
        # Documents left out: the sequence before whose end each is; and those further on.
        self._found: list[tuple[int, LeftOut]] = []
        self._ahead: deque[tuple[int, int, Unusable]] = deque()
        self._documents: int | None = None  # documents of the text, if it has ended
        self._known: tuple[int, BlockHeader, NDArray[np.int32]] | None = None  # block read last
        self._late: set[int] = set()  # processes whose blocks are not waited for
        self._readers: dict[str, tuple[OrderReader, int]] = {}  # by thread, and next document
        self._making = threading.Lock()  # tokenizers are not safe in several threads
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._next = 0  # block that the thread makes next
        self._furthest = 0  # last block of any process
        self._looked = 0.0  # when it was looked for
        self.tokens = 0
        """Tokens that this process has tokenised."""

    def enter(self, anchor: Anchor) -> None:
        """Begin with the block of a known sequence, unless sequences have been counted before.

        It must be the same one in every process. It is compared when the text is first read.
        """
        self._anchor = anchor if len(self._bases) == 1 else None

    def _begin(self, anchor: Anchor) -> bool:
        """Read the block of a known sequence, and compare this; False if `find_end` answers."""
        document = anchor.sequence.document
        self._first_block = document // self._size
        header = self._header(self._first_block)
        if header is None:
            return False
        self._anchor = None
        before = header.documents < document
        units = int(header.lengths[before].sum()) if self._joins else int(before.sum())
        start = anchor.sequence.start if self._joins else 0
        self._bases = [anchor.number * self._unit - start - units]
        anchor.require_equal(next(iter(self.read(anchor.number, 1)), None))
        return True

    def read(self, first: int, most: int) -> list[Sequence]:
        """Return `most` sequences from number `first` on, fewer if the text ends.

        Raises:
            ActcacheError: the text cannot be read, or a block cannot be written.
        """
        number = self.count(first, most)
        if not number:
            return []
        begin, end = first * self._unit, (first + number) * self._unit
        chosen = [b for b, base in enumerate(self._bases[:-1]) if self._bases[b + 1] > begin]
        blocks, reached = [], self._bases[chosen[0]]
        origin = reached
        for block in numbers_from(self._first_block + chosen[0]):
            if reached >= end:
                break
            blocks.append(self._block(block))
            reached = self._bases[block - self._first_block + 1]
        pieces = (_pack if self._joins else _whole)(blocks, begin - origin, number, self._unit)
        left_out: dict[int, list[LeftOut]] = {}
        beyond = self._goal is not None and first + number >= self._goal  # others may not read on
        is_end = not self._reach(first + number, 1, alone=beyond)
        self._leave_out(first + number)
        self._found = [entry for entry in self._found if entry[0] >= first]
        for owner, found in self._found:
            if owner >= first + number and is_end:  # behind the last sequence of the text
                owner = first + number - 1
            left_out.setdefault(owner, []).append(found)
        return [
            as_sequence(piece, self._pipeline, tuple(left_out.get(first + i, ())))
            for i, piece in enumerate(pieces)
        ]

    def count(self, first: int, most: int) -> int:
        """Count the sequences that `read` would return."""
        number = self._reach(first, most)
        self._leave_out(first + most)
        return number

    def _reach(self, first: int, most: int, *, alone: bool = False) -> int:
        """Read the headers of all blocks up to a sequence; return as `count`.

        Args:
            first: number of the first sequence.
            most: number of sequences.
            alone: make blocks that are missing here, instead of waiting for others.
        """
        if self._anchor is not None:
            self._ask(first + most)
            if not self._begin(self._anchor):
                return max(0, min(most, (self._sealed or 0) - first))
        self._ask(first + most)
        while self._sealed is None and self._end is None and self._bases[-1] < self._asked:
            block = self._first_block + len(self._bases) - 1
            header = self._header(block, alone=alone)
            if header is not None:
                self._ahead += [
                    ((self._bases[-1] + position) // self._unit, document, unusable)
                    for document, position, unusable in header.left_out
                ]
                units = header.lengths.sum() if self._joins else len(header.lengths)
                self._bases.append(self._bases[-1] + int(units))
                if header.is_last:
                    self._end = self._bases[-1]
                    self._documents = block * self._size + header.count
        end = (self._bases[-1] if self._end is None else self._end) // self._unit
        return max(0, min(most, (end if self._sealed is None else self._sealed) - first))

    def _ask(self, sequences: int) -> None:
        self._asked, self._sealed = sequences * self._unit, None
        self._wanted = max(self._wanted, self._asked)

    def _leave_out(self, last: int) -> None:
        """Count the documents left out up to the end of sequence `last`, as one process does."""
        while self._ahead and (self._end is not None or self._ahead[0][0] <= last):
            owner, document, unusable = self._ahead.popleft()
            self._left_out.add(document, unusable)
            self._found += [(owner, found) for found in self._left_out.take()]
        if self._documents is not None:
            documents, self._documents = self._documents, None
            self._left_out.end(documents)

    def close(self) -> None:
        """Stop the thread; blocks that are published stay."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _path(self, block: int) -> Path:
        return self._folder / f"{block:05d}.ids"

    def _header(self, block: int, *, alone: bool = False) -> BlockHeader | None:
        """Return the header of a block, made if need be; None if `find_end` answers."""
        if self._thread is None:
            self._next = self._first_block + (self._rank - self._first_block) % self._world_size
            self._thread = threading.Thread(target=self._run_ahead, daemon=True)
            self._thread.start()
        if (header := read_header(self._path(block))) is not None:
            self._late.discard(block % self._world_size)
            return header
        header = None if alone else self._wait(block)
        if header is None and self._sealed is None:
            header = self._make(block, "reading")[0]
        return header

    def _block(self, block: int) -> tuple[BlockHeader, NDArray[np.int32]]:
        if self._known is None or self._known[0] != block:
            found = read_block(self._path(block)) or self._make(block, "reading")
            self._known = block, *found
        return self._known[1:]

    def _wait(self, block: int) -> BlockHeader | None:
        """Wait for the file of a block; None: it is late, or `find_end` answers."""
        owner = block % self._world_size
        notice, last = WaitNotice("harvest"), time.monotonic()
        while owner not in self._late:
            time.sleep(_PAUSE)
            assert self._thread is not None
            passed = block < self._next or not self._thread.is_alive()
            if (header := read_header(self._path(block))) is not None:
                return header
            if owner == self._rank and passed:
                return None
            notice.update(f"block {block} of the text, which rank {owner} tokenises")
            if time.monotonic() > last + 1:
                last = time.monotonic()
                end, is_whole = self._find_end()
                if is_whole or end * self._unit >= self._asked:
                    self._sealed = end
                    return None
            if owner != self._rank and notice.seconds > PATIENCE:
                self._late.add(owner)
        return None

    def _run_ahead(self) -> None:
        """Make the blocks of this process, up to a distance from what is read and wanted."""
        while not self._stopped.is_set():
            try:
                if not self._is_due(self._next):
                    self._stopped.wait(_PAUSE)
                    continue
                header = read_header(self._path(self._next)) or self._make(self._next, "ahead")[0]
            except Exception:  # it is raised where the block is needed
                return
            if header.is_last:
                return
            self._next += self._world_size

    def _is_due(self, block: int) -> bool:
        if self._end is not None or self._bases[-1] >= self._wanted:
            return False
        if block < self._first_block + len(self._bases) + _AHEAD * self._world_size:
            return True
        # A process that reads further on needs the blocks before those that it has made.
        if time.monotonic() > self._looked + 1:
            names = [path.name for path in self._folder.iterdir()] if self._folder.exists() else []
            self._furthest = max((int(n[:-4]) for n in names if _NAME.fullmatch(n)), default=0)
            self._looked = time.monotonic()
        return block < self._furthest

    def _make(self, block: int, thread: str) -> tuple[BlockHeader, NDArray[np.int32]]:
        with self._making:
            reader, position = self._readers.get(thread, (None, 0))
            first = block * self._size
            if reader is None or position > first:
                reader, position = open_order(self._source, self._pipeline.order), 0
            reader.skip(first - position)
            records = reader.take(self._size)
            self._readers[thread] = reader, first + len(records)
            kind = self._source.column.kind
            left_out, most = BlockLeftOut(), self._most

            def check() -> None:
                if thread == "ahead" and self._stopped.is_set():
                    raise _StoppedError

            text = (self._tokenizer, self._pipeline, left_out, most, check)
            pieces = list(pieces_of(records, first, kind, *text))
            self.tokens += sum(len(piece.ids) for piece in pieces)
            return write_block(
                self._path(block),
                pieces,
                left_out.found,
                len(records),
                is_last=len(records) < self._size,
            )


_Blocks = list[tuple[BlockHeader, NDArray[np.int32]]]


def _pack(blocks: _Blocks, begin: int, number: int, size: int) -> list[Piece]:
    """Cut the joined documents every `size` tokens, from token `begin` on."""
    line = np.concatenate([ids for _, ids in blocks])
    lengths, documents = (
        np.concatenate([getattr(header, name) for header, _ in blocks])
        for name in ("lengths", "documents")
    )
    ends = np.cumsum(lengths)
    places = begin + size * np.arange(number)
    owners = np.searchsorted(ends, places, side="right")
    starts = places - (ends - lengths)[owners]
    return [
        Piece(line[place : place + size].astype(np.int64), document, start)
        for place, document, start in zip(
            places.tolist(), documents[owners].tolist(), starts.tolist(), strict=True
        )
    ]


def _whole(blocks: _Blocks, begin: int, number: int, _: int) -> list[Piece]:
    """Return the windows, from number `begin` on."""
    pieces: list[Piece] = []
    for header, ids in blocks:
        ends = np.cumsum(header.lengths)
        pieces += [
            Piece(ids[end - length : end].astype(np.int64), document, start)
            for end, length, document, start in zip(
                ends.tolist(),
                header.lengths.tolist(),
                header.documents.tolist(),
                header.starts.tolist(),
                strict=True,
            )
        ]
    return pieces[begin : begin + number]
