"""Statistics of a shard's rows: moments, norms and counts, for inspection and input scaling.

They cover every row at every hookpoint, so computing them must keep up with the disk. Tiles stay in
a core's cache, buffers are reused, and NumPy works without BLAS, so that the bits depend on the
rows alone and not on the number of threads or processes.
Letters: N rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.format.dtypes import RowDtype, StoredRows

BLOCK_ROWS = 4096
"""Rows of a block. Each block is summed alone; blocks are added in order."""
GROUP_ROWS = 16
"""Rows summed in float32; the sums of such groups are added in float64."""
NEAR_OVERFLOW = 32_752.0
"""Half of the largest float16."""
BINS_PER_OCTAVE = 4
NORM_BINS = 64 * BINS_PER_OCTAVE
"""Norm histogram: bin b counts norms in [2^(b/4 - 32), 2^((b+1)/4 - 32)); the first and last bin
count smaller and larger norms too."""
FIRST_EXPONENT = -32
"""Power of two at which the histogram begins."""

_TILE = 1 << 17  # values of a tile: smaller ones cost more calls, larger ones overflow the cache
_SAMPLE = 61  # stride of the rows whose mean is the centre; prime, unlike context lengths
_BITS: dict[str, tuple[str, int]] = {
    "bfloat16": ("<u2", 0x7F80),
    "float16": ("<u2", 0x7C00),
    "float32": ("<u4", 0x7F80_0000),
}
"""By type: the integer type of its bits, and the bits of infinity. Without the sign bit, floats are
ordered as their bits, and non-finite ones are not below infinity."""
_SQUARES_FIT = 2.0**-40, 2.0**48
"""Range of the largest absolute value of a dimension in which float32 can sum its squares."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of the finite rows of one hookpoint; `merge` adds those of several shards."""

    count: int
    """Finite rows."""
    total: NDArray[np.float64]
    """Sum of the rows. [D]"""
    total_squares: NDArray[np.float64]
    """Sum of the squared rows. [D]"""
    abs_max: NDArray[np.float64]
    """Largest absolute value of each dimension. [D]"""
    norm_total: float
    """Sum of the rows' Euclidean norms."""
    norm_max: float
    """Largest norm."""
    norm_histogram: NDArray[np.int64]
    """Rows by norm, see NORM_BINS. [NORM_BINS]"""
    non_finite: int
    """Rows that hold an infinity or NaN; all other fields exclude them."""
    near_overflow: int
    """Rows with an absolute value of NEAR_OVERFLOW or more."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean row. [D]"""
        return self.total / max(self.count, 1)

    @property
    def variance(self) -> float:
        """Total variance: mean of ‖x - mean‖² over the rows (a sum over dimensions)."""
        return self.squared_error_of(self.mean) / max(self.count, 1)

    def squared_error_of(self, constant: NDArray[np.float64]) -> float:
        """Compute Σ‖x - constant‖² over the rows, the denominator of an FVU. constant: [D]"""
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


def compute(rows: StoredRows, row_dtype: RowDtype) -> Statistics:
    """Compute the statistics of stored rows, decoded [N, D]."""
    return merge(parts(rows, row_dtype))


def parts(
    rows: StoredRows, row_dtype: RowDtype, mapper: Callable[..., Iterable[Statistics]] = map
) -> Iterable[Statistics]:
    """Compute the statistics of every block of rows, in order, for `merge`.

    Args:
        rows: stored rows.
        row_dtype: their type.
        mapper: `map`, or an executor's `map`, which starts at once and gives the same result.
    """
    starts = range(0, max(len(rows), 1), BLOCK_ROWS)
    blocks = [rows[start : start + BLOCK_ROWS] for start in starts]
    return mapper(partial(_of_block, row_dtype=row_dtype), blocks)


def _of_block(rows: StoredRows, row_dtype: RowDtype) -> Statistics:
    floats, name = rows.values, row_dtype.name
    if name not in _BITS:
        floats, name = row_dtype.to_float32(rows), "float32"
    kind, infinity = _BITS[name]
    bits = floats.view(kind)
    found = _sums(bits, name, np.float32)
    if (broken := found.peaks >= infinity).any():
        finite = (_without_sign(bits[:, broken]) < infinity).all(axis=1)
        clean = _of_block(rows[np.flatnonzero(finite)], row_dtype)
        return replace(clean, non_finite=len(rows) - clean.count)
    abs_max = _floats(found.peaks, name, np.empty(len(found.peaks), np.float32))
    if not _squares_fit(abs_max):
        found = _sums(bits, name, np.float64)
    norms = np.sqrt(found.squared_norms)
    return Statistics(
        count=len(rows),
        total=found.total,
        total_squares=found.total_squares,
        abs_max=abs_max.astype(np.float64),
        norm_total=float(norms.sum()),
        norm_max=float(norms.max(initial=0.0)),
        norm_histogram=np.bincount(_bin(norms), minlength=NORM_BINS),
        non_finite=0,
        near_overflow=_near_overflow(bits, name, abs_max),
    )


@dataclass(frozen=True)
class _Sums:
    """Sums of a block; invalid if a peak is not finite."""

    total: NDArray[np.float64]  # [D]
    total_squares: NDArray[np.float64]  # [D]
    squared_norms: NDArray[np.float64]  # [N]
    peaks: NDArray[Any]  # bits of the largest absolute value of each dimension [D]


def _sums(bits: NDArray[Any], name: str, dtype: type[np.floating[Any]]) -> _Sums:
    """Sum a block of bits [N, D]; norms and sums within groups are computed in `dtype`.

    The sums are of differences from a centre and of their squares, because with a mean far from
    zero the variance would be a small difference of large, rounded sums. The centre is the mean of
    a sample of rows, which is within about sqrt(61) standard deviations of the mean of all.
    """
    N, D = bits.shape
    tile = GROUP_ROWS * max(1, min(_TILE // max(D, 1), N) // GROUP_ROWS)
    buffer, x = np.empty((tile, D), np.float32), np.empty((tile, D), dtype)
    magnitudes, peaks = np.empty((tile, D), bits.dtype), np.zeros(D, bits.dtype)
    sums, squares, squared_norms = np.zeros(D), np.zeros(D), np.zeros(N)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller sums such a block again
        centre = _centre(bits, name)
        for start in range(0, N, tile):
            part = bits[start : start + tile]
            n = len(part)
            _without_sign(part, out=magnitudes[:n])
            np.maximum(peaks, np.maximum.reduce(magnitudes[:n], axis=0), out=peaks)
            floats = _floats(part, name, buffer[:n]).astype(dtype, copy=False)
            squared_norms[start : start + n] = np.einsum("nd,nd->n", floats, floats)
            np.subtract(floats, centre, out=x[:n])
            x[n:] = 0  # padding of the last tile
            sums += _column_sums(x)
            np.multiply(x, x, out=x)
            squares += _column_sums(x)
        about = centre.astype(np.float64)
        total_squares = squares + about * (2 * sums + N * about)
    return _Sums(sums + N * about, total_squares, squared_norms, peaks)


def _centre(bits: NDArray[Any], name: str) -> NDArray[np.float32]:
    """Mean of every 61st row, cut to 12 bits so that most differences from it are exact. [D]"""
    sample = bits[::_SAMPLE]
    floats = _floats(sample, name, np.empty(sample.shape, np.float32))
    mean = (floats.sum(axis=0, dtype=np.float64) / max(len(sample), 1)).astype(np.float32)
    centre: NDArray[np.float32] = (mean.view(np.uint32) & 0xFFFF_F000).view(np.float32)
    return centre


def _column_sums(x: NDArray[Any]) -> NDArray[np.float64]:
    """Sum over rows: within groups in the type of x, over groups in float64. [D]"""
    groups = np.add.reduce(x.reshape(-1, GROUP_ROWS, x.shape[1]), axis=1)
    sums: NDArray[np.float64] = np.add.reduce(groups, axis=0, dtype=np.float64)
    return sums


def _without_sign(bits: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
    cleared: NDArray[Any] = np.bitwise_and(bits, (1 << (8 * bits.itemsize - 1)) - 1, out=out)
    return cleared


def _floats(bits: NDArray[Any], name: str, buffer: NDArray[np.float32]) -> NDArray[np.float32]:
    """Convert the bits of finite values to float32, exactly, in `buffer` (float32: as a view)."""
    if name == "float32":
        return bits.view(np.float32)
    words = buffer.view(np.uint32)
    if name == "bfloat16":  # the upper half of a float32
        np.copyto(words, bits)
        np.left_shift(words, 16, out=words)
        return buffer
    # float16: shift its fields to those of a float32, whose exponent bias is 112 higher. NumPy's
    # own conversion handles one value at a time and would take longer than all other steps.
    np.copyto(words.view(np.int32), bits.view(np.int16))
    np.left_shift(words, 13, out=words)
    np.bitwise_and(words, 0x8FFF_FFFF, out=words)  # clear the extended sign bits
    np.multiply(buffer, np.float32(2.0**112), out=buffer)
    return buffer


def _squares_fit(abs_max: NDArray[np.float32]) -> bool:
    low, high = _SQUARES_FIT
    return bool(((abs_max == 0) | ((abs_max >= low) & (abs_max < high))).all())


def _near_overflow(bits: NDArray[Any], name: str, abs_max: NDArray[np.float32]) -> int:
    high = abs_max >= NEAR_OVERFLOW
    if not high.any():
        return 0
    chosen = np.ascontiguousarray(bits[:, high])
    values = _floats(chosen, name, np.empty(chosen.shape, np.float32))
    return int((np.abs(values) >= NEAR_OVERFLOW).any(axis=1).sum())


def merge(parts: Iterable[Statistics]) -> Statistics:
    """Add the statistics of one or more shards or blocks, in the order given."""
    first, *rest = parts
    total, squares = first.total.copy(), first.total_squares.copy()
    histogram, abs_max = first.norm_histogram.copy(), first.abs_max.copy()
    for part in rest:
        total += part.total
        squares += part.total_squares
        histogram += part.norm_histogram
        np.maximum(abs_max, part.abs_max, out=abs_max)
    parts = [first, *rest]
    return Statistics(
        count=sum(p.count for p in parts),
        total=total,
        total_squares=squares,
        abs_max=abs_max,
        norm_total=sum(p.norm_total for p in parts),
        norm_max=max(p.norm_max for p in parts),
        norm_histogram=histogram,
        non_finite=sum(p.non_finite for p in parts),
        near_overflow=sum(p.near_overflow for p in parts),
    )


def _bin(norms: NDArray[np.float64]) -> NDArray[np.int64]:
    with np.errstate(divide="ignore"):
        octave = np.log2(norms) - FIRST_EXPONENT  # a zero norm: -inf, clipped to the first bin
    bins: NDArray[np.int64] = np.clip(np.floor(octave * BINS_PER_OCTAVE), 0, NORM_BINS - 1).astype(
        np.int64
    )
    return bins
