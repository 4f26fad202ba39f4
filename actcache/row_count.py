"""How many rows a text leaves after the filters that need no activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from actcache.decision import Decision
from actcache.filters import FILTERS, kept_positions
from actcache.manifest import Identity
from actcache.planning import COUNTED_TOKENS, is_believed
from actcache.progress import Progress
from actcache.tokens import Sequence, sequences

Known = Literal["exact", "estimated", "at most"]
_AT_ONCE = 256  # sequences that the filters look at together


@dataclass(frozen=True)
class RowCount:
    """Rows that filters by text leave of each sequence."""

    rows: NDArray[np.float64]
    """Of the sequences that were looked at; their mean stands for the others. [n]"""
    planned: int
    """Sequences of the harvest."""
    known: Known
    """exact; estimated, from the first sequences or a trial; at most, before the norm filter."""
    shares: dict[str, float]
    """Positions dropped of each sequence, by filter, on average."""

    @property
    def total(self) -> int:
        """Rows at each hookpoint."""
        return round(float(self.rows.mean()) * self.planned)

    @property
    def dropped(self) -> dict[str, int]:
        """Positions without a row, by filter."""
        return {name: round(share * self.planned) for name, share in self.shares.items()}

    def of_shard(self, first: int, count: int) -> int:
        """Rows of the `count` sequences from `first` on."""
        if len(self.rows) == self.planned:
            return round(float(self.rows[first : first + count].sum()))
        return round(float(self.rows.mean()) * count)

    def thinned(self, identity: Identity, share: float) -> RowCount:
        """The same less the share of rows that a trial saw the norm filter leave out."""
        if identity.max_norm_ratio is None:
            return self
        left_out = self.shares | {"max_norm_ratio": share * float(self.rows.mean())}
        return RowCount(self.rows * (1 - share), self.planned, "estimated", left_out)


def count_rows(decided: Decision, identity: Identity, planned: int) -> RowCount:
    """Rows of `planned` sequences; text beyond 16M tokens is taken to be as that before it."""
    believed = is_believed(planned, decided.source, decided.pipeline)  # the text may end before
    known: Known = "at most" if believed or identity.max_norm_ratio is not None else "exact"
    looks = identity.exclude_special or identity.exclude_tokens or identity.pipeline != "pack"
    if not looks:
        shares = dict.fromkeys(FILTERS, 0.0) | {"skip_positions": float(identity.skip_positions)}
        return RowCount(np.array([identity.rows_per_sequence * 1.0]), planned, known, shares)
    wanted = min(planned, max(1, COUNTED_TOKENS // identity.ctx_len))
    found = sequences(decided.source, decided.tokenizer, decided.pipeline)
    bar = Progress("count rows", wanted, "seq")
    rows, dropped = [], dict.fromkeys(FILTERS, 0)
    for group in _groups(islice(found, wanted)):
        tokens = np.stack([sequence.tokens for sequence in group])
        lengths = np.array([sequence.length for sequence in group], dtype=np.int32)
        kept, left_out = kept_positions(identity, tokens, lengths)
        rows.append(kept.sum(axis=1))
        dropped = {name: dropped[name] + left_out[name] for name in FILTERS}
        bar.advance(len(group))
    bar.close()
    counts = np.concatenate(rows).astype(np.float64)
    shares = {name: n / len(counts) for name, n in dropped.items()}
    return RowCount(counts, planned, known if len(counts) == planned else "estimated", shares)


def _groups(found: Iterator[Sequence]) -> Iterator[list[Sequence]]:
    while group := list(islice(found, _AT_ONCE)):
        yield group
