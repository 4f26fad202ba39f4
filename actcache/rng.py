"""Seeded streams that never change: NumPy's frozen `RandomState`, one per (purpose, numbers)."""

from __future__ import annotations

import zlib

import numpy as np


def stream(purpose: str, *numbers: int) -> np.random.RandomState:
    """The random stream of one purpose.

    Args:
        purpose: what it is for, such as 'rows in shard'; other purposes are independent.
        numbers: seed, then whatever else tells this stream from its siblings, each in [0, 2^32).
    """
    return np.random.RandomState([zlib.crc32(purpose.encode()), *numbers])
