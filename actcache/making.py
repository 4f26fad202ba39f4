"""Batches of plans, one after another: what a stream's threads make of a cache.

Nothing here waits for whoever takes the batches, and nothing knows who that is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from actcache.batch_memory import BatchMemory
from actcache.budget import HELD_BATCHES, spare_windows
from actcache.checked_reads import CheckedReads, Verify
from actcache.in_order import GROUPS, Filled, in_order, steps_at_once
from actcache.order import Epoch, OrderPlan, Rows, lanes_of_rank
from actcache.read_ahead import ReadAhead, Window, WindowMemory
from actcache.reader import Cache
from actcache.row_text import RowText, TextReader
from actcache.storage import StoredRows

if TYPE_CHECKING:
    import torch

Place = tuple[int, int, int]
"""Epoch, number of the plan, step within it: where a batch lies."""


class Plans(Protocol):
    """Plans that a stream walks one after another, in every epoch the same."""

    missing: int | None
    """The shard that `walk` waits for now, if it waits."""

    def walk(self, first: int, stop: threading.Event) -> Iterator[tuple[int, OrderPlan]]:
        """Number and plan, from number `first` on; ends early when `stop` is set."""


class OnePlan:
    """One plan, as plans."""

    def __init__(self, plan: OrderPlan) -> None:
        self._plan = plan
        self.missing: int | None = None

    def walk(self, first: int, stop: threading.Event) -> Iterator[tuple[int, OrderPlan]]:
        """The plan."""
        del first, stop
        yield 0, self._plan


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: n = B/W rows."""

    epoch: int
    step: int
    """Step within the epoch, or within the segment where there are several."""
    activations: dict[str, torch.Tensor]
    """Rows by hookpoint, on the CPU, in the type on disk; 8-bit rows as float32. Each [n, d_in]"""
    addresses: Rows
    """(shard, row in shard) of every row. [n, 2]"""
    segment: int = 0
    """Number of the plan that it is of, where there are several."""
    last: bool = False
    """Whether it ends a stream of a given number of epochs."""
    text: RowText | None = None
    """Which tokens the rows are, if the stream was asked for it."""


class BatchMaker:
    """Reads the batches of one rank.

    Args:
        cache: where the rows are.
        hookpoints: which to read.
        plans: the order.
        segmented: whether there may be several plans.
        rank: this process's number.
        world_size: processes that share each global batch.
        verify: when the bytes that are read are compared with the receipts.
        waiting: batches that may wait to be taken.
        text: whether batches carry what their rows' tokens are.
    """

    def __init__(
        self,
        cache: Cache,
        hookpoints: Sequence[str],
        plans: Plans,
        *,
        segmented: bool,
        rank: int,
        world_size: int,
        verify: Verify,
        waiting: int,
        text: bool,
    ) -> None:
        self.cache, self.hookpoints, self.plans = cache, tuple(hookpoints), plans
        self._segmented, self._rank, self._world_size = segmented, rank, world_size
        self._reads = CheckedReads(cache, verify)
        self._waiting = waiting
        self._widths = {name: cache.manifest.width(name) for name in hookpoints}
        self.row_bytes = sum(map(cache.codec.row_bytes, self._widths.values()))
        """Bytes of a row on disk, of all hookpoints that are read."""
        self._window_memory = WindowMemory(cache, self.hookpoints)
        self._text = TextReader(cache) if text else None

    def batches(
        self, place: Place, epochs: int | None, threads: Executor, stop: threading.Event
    ) -> Iterator[tuple[Batch, Place]]:
        """Every batch from a place on, and the place after it.

        Args:
            place: where to begin.
            epochs: end after so many, the last batch marked; None: never.
            threads: read rows ahead.
            stop: ends it, in the middle of waiting for a shard too.
        """
        walk = self._walk(place, epochs, threads, stop)
        return walk if epochs is None else _mark_last(walk)

    def _walk(
        self, place: Place, epochs: int | None, threads: Executor, stop: threading.Event
    ) -> Iterator[tuple[Batch, Place]]:
        epoch, segment, step = place
        while not stop.is_set() and epoch != epochs:
            for number, plan in self.plans.walk(segment, stop):
                # The next segment's number, whether there is one or not: the place is a function of
                # the batches before it, not of what is known of those after it.
                end = (epoch, number + 1, 0) if self._segmented else (epoch + 1, 0, 0)
                for batch in self._segment(epoch, number, plan, step, threads):
                    whole = batch.step + 1 == plan.steps_per_epoch
                    yield batch, end if whole else (epoch, number, batch.step + 1)
                step = 0
            epoch, segment, step = epoch + 1, 0, 0

    def _segment(
        self, epoch: int, number: int, plan: OrderPlan, first_step: int, threads: Executor
    ) -> Iterator[Batch]:
        line = Epoch(plan, epoch)
        lanes = lanes_of_rank(plan.lanes, self._rank, self._world_size)
        filled = self._mixed if plan.window > 1 else self._in_order
        for item in filled(line, lanes, first_step, threads):
            # Read before the batch is handed out: then its memory is its own.
            activations = {
                name: self.cache.codec.to_torch(rows) for name, rows in item.rows.items()
            }
            text = None if self._text is None else self._text.of(item.addresses)
            yield Batch(epoch, item.step, activations, item.addresses, number, text=text)

    def _in_order(
        self, line: Epoch, lanes: list[int], first_step: int, threads: Executor
    ) -> Iterator[Filled]:
        batch = len(lanes) * line.plan.rows_per_lane_and_batch
        each = steps_at_once(line.plan, batch * self.row_bytes)
        memory = self._memory(GROUPS * each)
        return in_order(self._reads, memory, threads, line, lanes, first_step, each)

    def _mixed(
        self, line: Epoch, lanes: list[int], first_step: int, threads: Executor
    ) -> Iterator[Filled]:
        b, spare = line.plan.rows_per_lane_and_batch, spare_windows(len(lanes))
        ahead = ReadAhead(self._reads, self._window_memory, threads, line, lanes, first_step, spare)
        memory = self._memory(0)
        windows: list[Window | None] = [None] * len(lanes)
        for step in range(first_step, line.plan.steps_per_epoch):
            rows = memory.take(b * len(lanes))
            addresses = np.empty((b * len(lanes), 2), dtype=np.int64)
            for i, lane in enumerate(lanes):
                windows[i] = _take(ahead, windows[i], lane, step * b, b, rows, addresses, at=i * b)
            yield Filled(step, rows, addresses)
        ahead.end(windows)

    def _memory(self, filled_at_once: int) -> BatchMemory:
        most = self._waiting + HELD_BATCHES + filled_at_once
        return BatchMemory(self.cache.codec, self._widths, most)


def _mark_last(items: Iterator[tuple[Batch, Place]]) -> Iterator[tuple[Batch, Place]]:
    """The same batches, the last one marked; after it, the place is the start of an epoch."""
    held = next(items, None)
    for item in items:
        assert held is not None
        yield held
        held = item
    if held is not None:
        batch, _ = held
        yield replace(batch, last=True), (batch.epoch + 1, 0, 0)


def _take(
    ahead: ReadAhead,
    window: Window | None,
    lane: int,
    row: int,
    count: int,
    out: dict[str, StoredRows],
    addresses: Rows,
    at: int,
) -> Window | None:
    """Copy a lane's rows [row, row + count) to `out` and `addresses`, from index `at` on.

    Args:
        ahead: gives the lane's next windows.
        window: the one that the lane has; None before its first.
        lane: which lane.
        row: first row.
        count: how many.
        out: by hookpoint.
        addresses: (shard, row in shard).
        at: where to begin in both.

    Returns:
        The window that the lane has now.
    """
    while count:
        if window is None or row >= window.stop:
            window = ahead.swap(window)
        assert window.lane == lane
        assert window.start <= row < window.stop
        assert window.permutation is not None
        n = min(count, window.stop - row)
        chosen = window.permutation[row - window.start : row - window.start + n]
        for name, stored in window.rows.items():
            stored.take(chosen, out[name][at : at + n])
        # mode='clip' lets NumPy write straight into `addresses`; the indices are in range.
        np.take(window.addresses, chosen, axis=0, out=addresses[at : at + n], mode="clip")
        row, count, at = row + n, count - n, at + n
    return window
