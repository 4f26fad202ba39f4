"""Batches of plans, one after another: what a stream's threads make of a cache.

Nothing here waits for whoever takes the batches, and nothing knows who that is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from actcache.cache.reader import Cache
from actcache.storage import StoredRows
from actcache.stream.memory_budget import HELD_BATCHES, extra_windows
from actcache.stream.order import Epoch, OrderPlan, Rows, lanes_of_rank
from actcache.stream.row_tokens import RowTokenReader, RowTokens
from actcache.stream.shuffle_buffer import (
    BatchRecycler,
    BufferSlots,
    HostShuffleBuffer,
    RawBatch,
    ShuffleBuffer,
)
from actcache.stream.unshuffled import GROUPS, sequential_batches, steps_at_once
from actcache.stream.verified_reads import ReadSettings, VerifiedReader, Verify
from actcache.stream.window_loader import Window, WindowLoader

if TYPE_CHECKING:
    import torch

    from actcache.stream.device_buffer import CopyEvent, CopyStream

    Made = tuple[int, dict[str, torch.Tensor], Rows]


StreamPosition = tuple[int, int, int]
"""Epoch, number of the plan, step within it: where a batch lies."""


class PlanSource(Protocol):
    """Plans that a stream walks one after another, in every epoch the same."""

    missing: int | None
    """The shard that `walk` waits for now, if it waits."""

    def iter_plans(self, first: int, stop: threading.Event) -> Iterator[tuple[int, OrderPlan]]:
        """Number and plan, from number `first` on; ends early when `stop` is set."""


class SinglePlan:
    """One plan, as plans."""

    def __init__(self, plan: OrderPlan) -> None:
        self._plan = plan
        self.missing: int | None = None

    def iter_plans(self, first: int, stop: threading.Event) -> Iterator[tuple[int, OrderPlan]]:
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
    """Rows by hookpoint, in the type on disk; 8-bit rows as float32. Each [n, d_in]"""
    addresses: Rows
    """(shard, row in shard) of every row. [n, 2]"""
    segment: int = 0
    """Number of the plan that it is of, where there are several."""
    last: bool = False
    """Whether it ends a stream of a given number of epochs."""
    text: RowTokens | None = None
    """Which tokens the rows are, if the stream was asked for it."""
    ready: CopyEvent | None = None
    """When the rows are on their device, if that is not the CPU."""


class BatchBuilder:
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
        device: where rows are mixed and put; None: in main memory.
        reading: how to read.
    """

    def __init__(
        self,
        cache: Cache,
        hookpoints: Sequence[str],
        plans: PlanSource,
        *,
        segmented: bool,
        rank: int,
        world_size: int,
        verify: Verify,
        waiting: int,
        text: bool,
        device: torch.device | None,
        reading: ReadSettings,
    ) -> None:
        self.cache, self.hookpoints, self.plans = cache, tuple(hookpoints), plans
        self._segmented, self._rank, self._world_size = segmented, rank, world_size
        self._reads = VerifiedReader(cache, verify, reading)
        self._waiting = waiting
        self._widths = {name: cache.manifest.width(name) for name in hookpoints}
        self.row_bytes = sum(map(cache.row_dtype.row_bytes, self._widths.values()))
        """Bytes of a row on disk, of all hookpoints that are read."""
        self._pool: ShuffleBuffer[Any] | None = None
        self._reading, self._device = reading, device
        self._side: CopyStream | None = None
        self._text = RowTokenReader(cache) if text else None

    def batches(
        self, place: StreamPosition, epochs: int | None, threads: Executor, stop: threading.Event
    ) -> Iterator[tuple[Batch, StreamPosition]]:
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
        self, place: StreamPosition, epochs: int | None, threads: Executor, stop: threading.Event
    ) -> Iterator[tuple[Batch, StreamPosition]]:
        epoch, segment, step = place
        while not stop.is_set() and epoch != epochs:
            for number, plan in self.plans.iter_plans(segment, stop):
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
        for step, activations, addresses in filled(line, lanes, first_step, threads):
            # Read before the batch is handed out: then its memory is its own.
            text = None if self._text is None else self._text.of(addresses)
            ready = None if self._side is None else self._side.mark()
            yield Batch(epoch, step, activations, addresses, number, text=text, ready=ready)

    def _in_order(
        self, line: Epoch, lanes: list[int], first_step: int, threads: Executor
    ) -> Iterator[Made]:
        batch = len(lanes) * line.plan.rows_per_lane_and_batch
        each = steps_at_once(line.plan, batch * self.row_bytes)
        memory = self._memory(GROUPS * each)
        filled = sequential_batches(self._reads, memory, threads, line, lanes, first_step, each)
        tensors = self._tensors()
        for item in filled:
            yield item.step, tensors(item.rows), item.addresses

    def _mixed(
        self, line: Epoch, lanes: list[int], first_step: int, threads: Executor
    ) -> Iterator[Made]:
        pool = self._require_pool(line.plan, len(lanes))
        ahead = WindowLoader(self._reads, self.hookpoints, pool, threads, line, lanes, first_step)
        for item in shuffled_batches(ahead, pool, line, lanes, first_step):
            yield item.step, pool.tensors(item.rows), item.addresses

    def _require_pool(self, plan: OrderPlan, lanes: int) -> ShuffleBuffer[Any]:
        """Memory for windows of a plan; that of another plan is let go first."""
        shape = (lanes + extra_windows(lanes), min(plan.window, plan.lane_rows))
        if self._pool is None or self._pool.places.shape != shape:
            self._pool = None
            self._pool = self._make_pool(BufferSlots(*shape))
        return self._pool

    def _make_pool(self, places: BufferSlots) -> ShuffleBuffer[Any]:
        side = self._require_side()
        if side is None:
            return HostShuffleBuffer(self.cache, self.hookpoints, places, self._memory(0))
        from actcache.stream.device_buffer import DeviceShuffleBuffer

        return DeviceShuffleBuffer(
            self.cache, self.hookpoints, places, side, self._reading.threads + 1
        )

    def _tensors(self) -> Callable[[dict[str, StoredRows]], dict[str, torch.Tensor]]:
        """What makes tensors of a batch in main memory."""
        row_dtype, side = self.cache.row_dtype, self._require_side()
        if side is None:
            return lambda batch: {name: row_dtype.to_torch(rows) for name, rows in batch.items()}
        from actcache.stream.device_buffer import BatchUploader

        return BatchUploader(row_dtype, side).put

    def _require_side(self) -> CopyStream | None:
        if self._device is not None and self._side is None:
            from actcache.stream.device_buffer import CopyStream

            self._side = CopyStream(self._device)
        return self._side

    def _memory(self, filled_at_once: int) -> BatchRecycler:
        most = self._waiting + HELD_BATCHES + filled_at_once
        if self._device is None:
            empty = self.cache.row_dtype.empty
        else:
            from actcache.stream.device_buffer import pinned_rows

            empty = partial(pinned_rows, self._device, self.cache.row_dtype)
        return BatchRecycler(empty, self._widths, most)


def _mark_last(
    items: Iterator[tuple[Batch, StreamPosition]],
) -> Iterator[tuple[Batch, StreamPosition]]:
    """The same batches, the last one marked; after it, the place is the start of an epoch."""
    held = next(items, None)
    for item in items:
        assert held is not None
        yield held
        held = item
    if held is not None:
        batch, _ = held
        yield replace(batch, last=True), (batch.epoch + 1, 0, 0)


M = TypeVar("M")


def shuffled_batches(
    ahead: WindowLoader,
    pool: ShuffleBuffer[M],
    line: Epoch,
    lanes: Sequence[int],
    first_step: int,
) -> Iterator[RawBatch[M]]:
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
        filled = RawBatch(step, pool.batch(count), np.empty((count, 2), dtype=np.int64))
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
    ahead: WindowLoader,
    pool: ShuffleBuffer[M],
    window: Window | None,
    row: int,
    count: int,
    out: RawBatch[M],
    at: int,
) -> Window | None:
    """Copy a lane's rows [row, row + count), of several windows, to a batch from row `at` on.

    Returns:
        The window that the lane has now.
    """
    while count:
        if window is None or row >= window.stop:
            window = ahead.next_window(window)
        n = min(count, window.stop - row)
        start, _, place = _bounds(pool, window)
        first = place + row - start
        _gather(pool, pool.places.order[first : first + n], out, at)
        row, count, at = row + n, count - n, at + n
    return window


def _bounds(pool: ShuffleBuffer[Any], window: Window | None) -> tuple[int, int, int]:
    assert window is not None
    return window.start, window.stop, window.slot * pool.places.shape[1]


def _gather(pool: ShuffleBuffer[M], chosen: Rows, out: RawBatch[M], at: int) -> None:
    """Copy rows of the pool to a batch, from row `at` on."""
    place = slice(at, at + len(chosen))
    pool.gather(chosen, out.rows, at)
    # mode='clip' lets NumPy write straight to `out`; the indices are in range.
    np.take(pool.places.addresses, chosen, axis=0, out=out.addresses[place], mode="clip")
