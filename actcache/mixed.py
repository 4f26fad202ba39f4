"""Batches of a plan that mixes rows in memory: each takes b rows of every lane's window.

Most lanes have all b of a batch's rows in the window at hand, and those rows are gathered at once:
lane by lane, Python would take as long as the copying. L lanes, b rows of a lane and batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from actcache.order import Epoch, Rows
from actcache.pool import Filled, Pool
from actcache.read_ahead import ReadAhead, Window

M = TypeVar("M")


def mixed(
    ahead: ReadAhead,
    pool: Pool[M],
    line: Epoch,
    lanes: Sequence[int],
    first_step: int,
) -> Iterator[Filled[M]]:
    """The batches of some lanes of an epoch, from a step on.

    Args:
        ahead: gives the lanes' windows in turn.
        pool: where they lie.
        line: the epoch.
        lanes: which lanes.
        first_step: step of the first batch.
    """
    b = line.plan.rows_per_lane_and_batch
    windows: list[Window | None] = [None] * len(lanes)
    bounds = np.zeros((3, len(lanes)), dtype=np.int64)  # start, stop, first place in the pool
    within = np.arange(b)  # [b]
    for step in range(first_step, line.plan.steps_per_epoch):
        count = b * len(lanes)
        filled = Filled(step, pool.batch(count), np.empty((count, 2), dtype=np.int64))
        row = step * b
        starts, stops, places = bounds
        whole = row + b <= stops  # [L]
        if whole.any():
            # Lanes that need another window get some row for now: gathered in one go, all the same.
            first = np.where(whole, places + row - starts, 0)  # [L]
            _gather(pool, pool.places.order[first[:, None] + within].ravel(), filled, 0)
        for i in np.flatnonzero(~whole):
            windows[i] = _piece_by_piece(ahead, pool, windows[i], row, b, filled, at=int(i) * b)
            bounds[:, i] = _bounds(pool, windows[i])
        yield filled


def _piece_by_piece(
    ahead: ReadAhead,
    pool: Pool[M],
    window: Window | None,
    row: int,
    count: int,
    out: Filled[M],
    at: int,
) -> Window | None:
    """Copy a lane's rows [row, row + count), of several windows, to a batch from row `at` on.

    Returns:
        The window that the lane has now.
    """
    while count:
        if window is None or row >= window.stop:
            window = ahead.swap(window)
        n = min(count, window.stop - row)
        start, _, place = _bounds(pool, window)
        first = place + row - start
        _gather(pool, pool.places.order[first : first + n], out, at)
        row, count, at = row + n, count - n, at + n
    return window


def _bounds(pool: Pool[Any], window: Window | None) -> tuple[int, int, int]:
    assert window is not None
    return window.start, window.stop, window.slot * pool.places.shape[1]


def _gather(pool: Pool[M], chosen: Rows, out: Filled[M], at: int) -> None:
    """Copy rows of the pool to a batch, from row `at` on."""
    place = slice(at, at + len(chosen))
    pool.gather(chosen, out.rows, at)
    # mode='clip' lets NumPy write straight to `out`; the indices are in range.
    np.take(pool.places.addresses, chosen, axis=0, out=out.addresses[place], mode="clip")
