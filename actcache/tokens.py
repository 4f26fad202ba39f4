"""Text to fixed-length sequences: the `pack` pipeline.

Documents in their order, each followed by EOS, one long line cut into pieces of ctx_len tokens
(ctx_len - 1 where BOS is put before each piece). What is left at the end, less than a piece, is
dropped. The sequences depend on the text, the tokenizer and the seed alone, so every process can
make the same ones for itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache import rng
from actcache.documents import TextDocuments, TokenFile
from actcache.errors import DatasetError
from actcache.progress import Progress

Sequence = NDArray[np.int32]

_DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True)
class Packing:
    """How documents become sequences."""

    ctx_len: int
    """Tokens in a sequence."""
    bos_id: int | None
    """Token put first in each sequence; None: none."""
    eos_id: int | None
    """Token put after each document; None: the source holds token ids already."""
    keep_order: bool
    """Take documents in the dataset's order."""
    seed: int
    """Seed of the order of documents."""
    vocab_size: int
    """Token ids must be below this."""

    @property
    def text_tokens(self) -> int:
        """Tokens of text in a sequence."""
        return self.ctx_len - (self.bos_id is not None)


def sequences(
    source: TextDocuments | TokenFile, tokenizer: Any, packing: Packing
) -> Iterator[Sequence]:
    """All sequences of the text, each [ctx_len] int32.

    Raises:
        DatasetError: a token id is beyond the model's vocabulary, or a document is not text.
    """
    pieces = _bin_pieces(source, packing) if isinstance(source, TokenFile) else None
    if pieces is None:
        assert isinstance(source, TextDocuments)
        pieces = _text_pieces(source, tokenizer, packing)
    for piece in pieces:
        if int(piece.max()) >= packing.vocab_size or int(piece.min()) < 0:
            raise DatasetError(
                "a token id is not in the model's vocabulary",
                expected=f"0 to {packing.vocab_size - 1}",
                got=f"{int(piece.min())} to {int(piece.max())}",
                remedy="for a .bin file: is --bin-dtype right, and was it made for this model?",
            )
        sequence = np.empty(packing.ctx_len, dtype=np.int32)
        if packing.bos_id is not None:
            sequence[0] = packing.bos_id
        sequence[-len(piece) :] = piece
        yield sequence


def count_sequences(
    source: TextDocuments | TokenFile, tokenizer: Any, packing: Packing, limit: int | None
) -> int:
    """How many sequences there are, counting no further than `limit`."""
    if isinstance(source, TokenFile):
        count = len(source.ids) // packing.text_tokens
        return count if limit is None else min(count, limit)
    count = 0
    bar = Progress("count", None if limit is None else limit * packing.ctx_len, "tok")
    for _ in itertools.islice(sequences(source, tokenizer, packing), limit):
        count += 1
        bar.advance(packing.ctx_len)
    bar.close()
    return count


def _bin_pieces(source: TokenFile, packing: Packing) -> Iterator[NDArray[Any]]:
    size = packing.text_tokens
    for start in range(0, len(source.ids) - size + 1, size):
        yield source.ids[start : start + size].astype(np.int64)


def _text_pieces(source: TextDocuments, tokenizer: Any, packing: Packing) -> Iterator[NDArray[Any]]:
    size = packing.text_tokens
    line: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    for numbers in _document_order(source.count, packing):
        texts = [text for text in source.batch(numbers) if text]
        parts = [line]
        parts += [
            np.asarray([*ids, packing.eos_id], dtype=np.int64) for ids in tokenize(tokenizer, texts)
        ]
        line = np.concatenate(parts)
        whole = len(line) // size * size
        yield from line[:whole].reshape(-1, size)
        line = line[whole:]


def tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _document_order(count: int, packing: Packing) -> Iterator[list[int]]:
    order: Any = range(count)
    if not packing.keep_order:
        order = rng.stream("documents", packing.seed).permutation(count)
    for start in range(0, count, _DOCUMENTS_AT_ONCE):
        yield [int(n) for n in order[start : start + _DOCUMENTS_AT_ONCE]]
