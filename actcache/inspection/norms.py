"""Norm histogram of a hookpoint's rows, cut to the bins that have rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.format.statistics import BINS_PER_OCTAVE, NORM_BINS

MIN_EXPONENT = -32
"""Exponent of the first bin: it ends a quarter of an octave above 2^-32, and includes zero."""


@dataclass(frozen=True)
class NormHistogram:
    """Rows by Euclidean norm, in bins of a quarter of an octave, from the first bin with rows."""

    first_bin: int
    """Number of the first bin here; bin b begins at 2^(b/4 - 32)."""
    counts: tuple[int, ...]
    """Rows in each bin; empty if no row is finite."""

    @property
    def edges(self) -> tuple[float, ...]:
        """Edges of the bins: one more than the number of bins."""
        return tuple(edge(self.first_bin + i) for i in range(len(self.counts) + 1))

    def quantile(self, q: float) -> float:
        """Return the norm below which a fraction q of the rows lies, interpolated; NaN if empty."""
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
    """Cut a histogram [NORM_BINS] to the bins with rows; negative counts are taken as 0."""
    counts = np.clip(counts, 0, None)
    filled = np.flatnonzero(counts)
    if not len(filled):
        return NormHistogram(0, ())
    first, last = int(filled[0]), int(filled[-1])
    return NormHistogram(first, tuple(int(c) for c in counts[first : last + 1]))


def edge(number: float) -> float:
    """Return the lower edge of a bin; fractions interpolate on the logarithmic scale."""
    return float(2.0 ** (min(max(number, 0), NORM_BINS) / BINS_PER_OCTAVE + MIN_EXPONENT))


def span_of(norms: Iterable[NormHistogram]) -> tuple[int, int]:
    """Return the range of bins [first, end) that covers all of some histograms."""
    filled = [n for n in norms if n.counts]
    first = min((n.first_bin for n in filled), default=0)
    return first, max((n.first_bin + len(n.counts) for n in filled), default=first + 1)
