"""Which token positions become rows. A row that is left out is left out at every hookpoint.

Letters: S sequences of a shard, C context length, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from actcache.format.manifest import Identity

FILTERS = ("padding", "skip_positions", "exclude_special", "exclude_tokens", "max_norm_ratio")
"""Every filter, in the order in which they are asked: a row is counted under the first."""

Mask = NDArray[np.bool_]
Norms = NDArray[np.float64]


def kept_positions(
    identity: Identity, tokens: NDArray[np.int32], lengths: NDArray[np.int32]
) -> tuple[Mask, dict[str, int]]:
    """What the filters that look at the text leave.

    Args:
        identity: says which filters.
        tokens: token ids. [S, C]
        lengths: tokens of each sequence before its padding. [S]

    Returns:
        Whether each position is kept [S, C], and how many were left out by filter; what looks at
        activations counts 0.
    """
    positions = np.arange(tokens.shape[1])
    left_out = {
        "padding": positions >= lengths[:, None],
        "skip_positions": np.broadcast_to(positions < identity.skip_positions, tokens.shape),
        "exclude_special": _among(tokens, identity.exclude_special),
        "exclude_tokens": _among(tokens, identity.exclude_tokens),
    }
    kept = np.ones(tokens.shape, dtype=bool)
    dropped = dict.fromkeys(FILTERS, 0)
    for name, out in left_out.items():
        dropped[name] = int((kept & out).sum())
        kept &= ~out
    return kept, dropped


def norm_outliers(norms: Mapping[str, Norms], ratio: float) -> Mask:
    """Rows whose norm, at any hookpoint, is over `ratio` times the median there.

    A row that holds an infinity or NaN is over it. The median is that of the other rows.

    Args:
        norms: Euclidean norms by hookpoint. Each [N]
        ratio: how many medians a row may have.

    Returns:
        [N]
    """
    over = np.zeros(len(next(iter(norms.values()))), dtype=bool)
    for norm in norms.values():
        finite = norm[np.isfinite(norm)]
        median = float(np.median(finite)) if len(finite) else 0.0
        over |= ~(norm <= ratio * median)  # NaN compares false
    return over


def row_norms(rows: NDArray[np.float32]) -> Norms:
    """Euclidean norm of each row [N, D], summed in float64 by one thread. [N]"""
    wide = rows.astype(np.float64)
    norms: Norms = np.sqrt(np.square(wide, out=wide).sum(axis=1))
    return norms


def _among(tokens: NDArray[np.int32], ids: tuple[int, ...]) -> Mask:
    return np.isin(tokens, np.asarray(ids, dtype=np.int32))
