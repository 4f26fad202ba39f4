"""How long a hookpoint's rows are: the part of the norm histogram that holds any."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.format.statistics import BINS_PER_OCTAVE, NORM_BINS

MIN_EXPONENT = -32
"""The first bin ends a quarter of an octave above 2^-32; it holds zero, too."""


@dataclass(frozen=True)
class NormHistogram:
    """Rows by Euclidean norm, in bins of a quarter of an octave, from the first that has any."""

    first_bin: int
    """Number of the first bin here; bin b begins at 2^(b/4 - 32)."""
    counts: tuple[int, ...]
    """Rows in each; empty where no row is finite."""

    @property
    def edges(self) -> tuple[float, ...]:
        """Where the bins begin, and where the last one ends: one more than there are bins."""
        return tuple(edge(self.first_bin + i) for i in range(len(self.counts) + 1))

    def quantile(self, q: float) -> float:
        """Norm that a fraction q of the rows stays below, as exact as the bins; NaN of nothing."""
        total = sum(self.counts)
        if total <= 0:
            return math.nan
        below = 0.0
        for number, count in enumerate(self.counts, start=self.first_bin):
            if count > 0 and below + count >= q * total:
                return edge(number + (q * total - below) / count)
            below += count
        return edge(self.first_bin + len(self.counts))


def norm_histogram(counts: NDArray[np.int64]) -> NormHistogram:
    """The part with rows of a whole histogram [NORM_BINS]; what is not a count is none."""
    counts = np.clip(counts, 0, None)
    filled = np.flatnonzero(counts)
    if not len(filled):
        return NormHistogram(0, ())
    first, last = int(filled[0]), int(filled[-1])
    return NormHistogram(first, tuple(int(c) for c in counts[first : last + 1]))


def edge(number: float) -> float:
    """Where a bin begins; between two bins, in proportion on the logarithmic scale."""
    return float(2.0 ** (min(max(number, 0), NORM_BINS) / BINS_PER_OCTAVE + MIN_EXPONENT))


def span_of(norms: Iterable[NormHistogram]) -> tuple[int, int]:
    """First bin, and the one after the last, that any of some histograms has."""
    filled = [n for n in norms if n.counts]
    first = min((n.first_bin for n in filled), default=0)
    return first, max((n.first_bin + len(n.counts) for n in filled), default=first + 1)
