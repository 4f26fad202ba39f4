"""Outlier dimensions of a hookpoint, and cosines between the mean rows of hookpoints.

D is the width. A few dimensions of a residual stream often hold most of its variance; an SAE spends
its first latents on them. All numbers come from the statistics files of the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.format.statistics import Statistics

OUTLIER = 6.0
"""A dimension is an outlier from this many times the median dimension's RMS or largest |x|."""
LISTED = 10
"""Number of dimensions listed, those of the largest RMS."""
PROFILE_POINTS = 768
"""Largest number of points of the plot of RMS by dimension."""
COMPARED = 256
"""Largest number of hookpoints whose means are compared: a larger matrix is unreadable."""

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Dimension:
    """Statistics of one dimension over the finite rows."""

    dimension: int
    rms: float
    """Root of its mean square."""
    mean: float
    abs_max: float
    """Largest |x|."""
    ratio: float
    """Its RMS over the median dimension's; infinite where that is 0."""
    variance_share: float
    """Its part of the variance summed over all dimensions."""
    outlier: bool
    """Whether RMS or largest |x| is at least OUTLIER times the median dimension's."""


@dataclass(frozen=True)
class Dimensions:
    """Statistics of the dimensions of one hookpoint."""

    outliers: int
    """Number of outliers."""
    median_rms: float
    """RMS of the median dimension."""
    largest: tuple[Dimension, ...]
    """Up to LISTED, by RMS, largest first."""
    profile_step: int
    """Number of dimensions that each point of the profile covers."""
    profile: tuple[float, ...]
    """Largest RMS of dimensions [i · step, (i + 1) · step)."""


def describe(statistics: Statistics) -> Dimensions:
    """Describe the largest dimensions and count outliers; all are 0 without a finite row."""
    count = max(statistics.count, 1)
    with np.errstate(all="ignore"):  # untrusted statistics may hold any value
        squares = np.maximum(statistics.total_squares, 0) / count  # [D]
        rms = np.nan_to_num(np.sqrt(squares), posinf=np.inf)
        variance = np.maximum(squares - np.square(statistics.mean), 0)
        share = np.nan_to_num(variance / variance.sum())
        ratio = _times_median(rms)
        outlier = (ratio >= OUTLIER) | (_times_median(statistics.abs_max) >= OUTLIER)
    order = np.argsort(-rms, kind="stable")[:LISTED]
    step = -(-len(rms) // PROFILE_POINTS)
    return Dimensions(
        outliers=int(outlier.sum()),
        median_rms=float(np.median(rms)),
        largest=tuple(
            Dimension(
                dimension=int(d),
                rms=float(rms[d]),
                mean=float(statistics.mean[d]),
                abs_max=float(statistics.abs_max[d]),
                ratio=float(ratio[d]),
                variance_share=float(share[d]),
                outlier=bool(outlier[d]),
            )
            for d in order
        ),
        profile_step=step,
        profile=tuple(float(rms[i : i + step].max()) for i in range(0, len(rms), step)),
    )


def mean_cosines(means: Sequence[Vector]) -> tuple[tuple[float | None, ...], ...]:
    """Compute the cosine of the angle between the mean rows of every two hookpoints.

    Args:
        means: mean row of each hookpoint; only the first COMPARED are used. Each [D]

    Returns:
        A symmetric matrix; None between means of different widths, and where one is 0.
    """
    units = []
    for mean in means[:COMPARED]:
        with np.errstate(all="ignore"):
            length = float(np.linalg.norm(mean))
            units.append(mean / length if 0 < length < math.inf else np.full(len(mean), np.nan))
    return tuple(tuple(_cosine(a, b) for b in units) for a in units)


def _cosine(a: Vector, b: Vector) -> float | None:
    cosine = float(a @ b) if len(a) == len(b) else math.nan
    return cosine if math.isfinite(cosine) else None


def _times_median(values: Vector) -> Vector:
    """Divide values by their median. Division by 0 gives infinity, but 0 / 0 gives 0."""
    return np.nan_to_num(values / np.median(values), nan=0.0, posinf=np.inf)
