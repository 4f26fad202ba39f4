"""Random streams that never change: NumPy's frozen `RandomState`, one per (purpose, numbers)."""

from __future__ import annotations

import threading
import zlib

import numpy as np
from numpy.typing import NDArray

_own = threading.local()


def permutation(count: int, purpose: str, *numbers: int) -> NDArray[np.int64]:
    """Return `stream(purpose, *numbers).permutation(count)`, ten times faster for small counts.

    Constructing a `RandomState` reads the system's entropy first; this reseeds one per thread.
    """
    if not hasattr(_own, "state"):
        _own.state = np.random.RandomState(0)
    state: np.random.RandomState = _own.state
    state.seed(_seed(purpose, numbers))
    return state.permutation(count).astype(np.int64, copy=False)


def stream(purpose: str, *numbers: int) -> np.random.RandomState:
    """Create the random stream of one purpose.

    Args:
        purpose: name such as 'rows in shard'; streams of other names are independent.
        numbers: seed, then further numbers that distinguish the stream, each in [0, 2^32).
    """
    return np.random.RandomState(_seed(purpose, numbers))


def _seed(purpose: str, numbers: tuple[int, ...]) -> list[int]:
    return [zlib.crc32(purpose.encode()), *numbers]
