"""Statistics of a shard's rows: what inspection shows and training divides by.

Sums run in float64 over blocks of a fixed number of rows, in NumPy (one thread), so that their
bits depend on the rows alone and not on threads or processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.storage.codec import Array, Codec

_BLOCK = 1024  # rows summed at once
BINS_PER_OCTAVE = 4
NORM_BINS = 64 * BINS_PER_OCTAVE
"""Norm histogram: bin b counts norms in [2^(b/4 - 32), 2^((b+1)/4 - 32)); ends take the rest."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of the finite rows of one hookpoint; shards add up with `merge`."""

    count: int
    """Finite rows."""
    total: NDArray[np.float64]
    """Sum of the rows. [D]"""
    total_squares: NDArray[np.float64]
    """Sum of the squared rows. [D]"""
    norm_total: float
    """Sum of the rows' Euclidean norms."""
    norm_max: float
    """Largest norm."""
    norm_histogram: NDArray[np.int64]
    """Rows by norm, see NORM_BINS. [NORM_BINS]"""
    non_finite: int
    """Rows that hold an infinity or NaN; nothing else here counts them."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean row. [D]"""
        return self.total / max(self.count, 1)

    @property
    def variance(self) -> float:
        """Total variance: mean of ‖x - mean‖² over the rows (a sum over dimensions)."""
        return self.squared_error_of(self.mean) / max(self.count, 1)

    def squared_error_of(self, constant: NDArray[np.float64]) -> float:
        """Σ‖x - constant‖² over the rows: the denominator of an FVU.

        Args:
            constant: what every row is predicted to be. [D]
        """
        per_dimension = self.total_squares - constant * (2 * self.total - self.count * constant)
        return float(per_dimension.sum())

    @property
    def rms_norm(self) -> float:
        """Root of the mean squared norm."""
        return float(np.sqrt(self.total_squares.sum() / max(self.count, 1)))

    @property
    def mean_norm(self) -> float:
        """Mean norm."""
        return self.norm_total / max(self.count, 1)


def compute(rows: Array, codec: Codec) -> Statistics:
    """Statistics of stored rows [N, D]."""
    width = rows.shape[1]
    total, total_squares = np.zeros(width), np.zeros(width)
    histogram = np.zeros(NORM_BINS, dtype=np.int64)
    count, norm_total, norm_max = 0, 0.0, 0.0
    for start in range(0, len(rows), _BLOCK):
        block = codec.to_float32(rows[start : start + _BLOCK]).astype(np.float64)  # [n, D]
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            block = block[finite]
        squares = block * block
        norms = np.sqrt(squares.sum(axis=1))
        total += block.sum(axis=0)
        total_squares += squares.sum(axis=0)
        histogram += np.bincount(_bin(norms), minlength=NORM_BINS)
        count += len(block)
        norm_total += float(norms.sum())
        norm_max = max(norm_max, float(norms.max(initial=0.0)))
    return Statistics(
        count, total, total_squares, norm_total, norm_max, histogram, len(rows) - count
    )


def merge(parts: Iterable[Statistics]) -> Statistics:
    """Statistics of several shards together, added in the order given; at least one."""
    first, *rest = parts
    total, squares = first.total.copy(), first.total_squares.copy()
    histogram = first.norm_histogram.copy()
    for part in rest:
        total += part.total
        squares += part.total_squares
        histogram += part.norm_histogram
    parts = [first, *rest]
    return Statistics(
        count=sum(p.count for p in parts),
        total=total,
        total_squares=squares,
        norm_total=sum(p.norm_total for p in parts),
        norm_max=max(p.norm_max for p in parts),
        norm_histogram=histogram,
        non_finite=sum(p.non_finite for p in parts),
    )


def _bin(norms: NDArray[np.float64]) -> NDArray[np.int64]:
    with np.errstate(divide="ignore"):
        octave = np.log2(norms) + 32  # a zero norm is -inf, and clips into the first bin
    bins: NDArray[np.int64] = np.clip(np.floor(octave * BINS_PER_OCTAVE), 0, NORM_BINS - 1).astype(
        np.int64
    )
    return bins
