"""`ActivationStream`: batches in the order of `order`, read ahead by threads."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from actcache.batch_memory import BatchMemory
from actcache.budget import HELD_BATCHES, PREFETCH_BATCHES, spare_windows
from actcache.checked_reads import CheckedReads, Verify
from actcache.errors import RunError
from actcache.in_order import GROUPS, Filled, in_order, steps_at_once
from actcache.order import Epoch, OrderPlan, Rows, lanes_of_rank
from actcache.read_ahead import ReadAhead, Window, WindowMemory
from actcache.reader import Cache
from actcache.row_text import RowText, TextReader
from actcache.storage import StoredRows
from actcache.tuning import DEFAULT_THREADS

if TYPE_CHECKING:
    import torch

_PATIENCE = 1.0  # seconds without a batch before a consumer hears what is waited for


class Plans(Protocol):
    """Plans that a stream walks one after another, in every epoch the same."""

    missing: int | None
    """The shard that `walk` waits for now, if it waits."""

    def walk(self, first: int, stop: threading.Event) -> Iterator[tuple[int, OrderPlan]]:
        """Number and plan, from number `first` on; ends early when `stop` is set."""


Place = tuple[int, int, int]
"""Epoch, number of the plan, step within it: where a batch lies."""


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


class ActivationStream:
    """Endless batches from a cache; every row of an epoch once, but for fewer than B + L.

    The order is a pure function of (plan, epoch, step), so two integers are the whole state, and a
    stream rebuilt from them, on any number of ranks, goes on exactly where it was.

    Given several plans (the segments of a cache, see `follow`), an epoch is all of them in turn;
    each leaves out fewer than B + L rows, and the state has the segment's number too.

    Args:
        cache: where the rows are.
        hookpoints: which to read; nothing else is read.
        plan: the order, or the order of each segment.
        epoch: epoch to begin with.
        segment: segment to begin with.
        step: step within epoch, or segment, to begin with.
        epochs: end after so many; None: never. The last batch of a segment is then handed out once
            it is known whether more follow.
        rank: this process's number.
        world_size: processes that share each global batch.
        verify: when the bytes that are read are compared with the receipts, see `CheckedReads`.
        prefetch: batches that may wait to be taken.
        threads: read rows ahead of the batches; cannot touch the order.
        text: whether batches carry token ids, sequences and positions; else no text is read.

    Raises:
        HookpointError: the cache does not hold a hookpoint.
        ConfigError: the lanes cannot be divided among the ranks.
    """

    def __init__(
        self,
        cache: Cache,
        hookpoints: Sequence[str],
        plan: OrderPlan | Plans,
        *,
        epoch: int = 0,
        segment: int = 0,
        step: int = 0,
        epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        verify: Verify = "first-read",
        prefetch: int = PREFETCH_BATCHES,
        threads: int = DEFAULT_THREADS,
        text: bool = False,
    ) -> None:
        for hookpoint in hookpoints:
            cache.require_hookpoint(hookpoint)
        self.cache, self.hookpoints = cache, tuple(hookpoints)
        self._segmented = not isinstance(plan, OrderPlan)
        self._plans: Plans = _OnePlan(plan) if isinstance(plan, OrderPlan) else plan
        self._rank, self._world_size = rank, world_size
        self._reads = CheckedReads(cache, verify)
        widths = map(cache.manifest.width, self.hookpoints)
        self.row_bytes = sum(map(cache.codec.row_bytes, widths))
        """Bytes of a row on disk, of all hookpoints that are read."""
        self._window_memory = WindowMemory(cache, self.hookpoints)
        self._threads = threads
        if isinstance(plan, OrderPlan):
            lanes_of_rank(plan.lanes, rank, world_size)  # refused here, not by the thread
        self._place: Place = (epoch, segment, step)
        self._epochs = epochs
        self._text = TextReader(cache) if text else None
        self.seconds_waited = 0.0
        """Waiting for batches."""
        self.seconds_to_first = 0.0
        """Of that, for the first one."""
        self.seconds_for_shards = 0.0
        """Of that, for shards that were not there yet; in steps of a second."""
        self.on_wait: Callable[[int], None] = lambda _: None
        """Called by `next` about once a second while a shard is waited for, with its number."""
        self._batches: queue.Queue[tuple[Batch, Place] | BaseException | None] = queue.Queue(
            prefetch
        )
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def state_dict(self) -> dict[str, int]:
        """Where the next batch lies."""
        epoch, segment, step = self._place
        if self._segmented:
            return {"epoch": epoch, "segment": segment, "step": step}
        return {"epoch": epoch, "step": step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state. Only before the first batch is taken."""
        if self._thread is not None:
            raise RunError("the stream has already begun", remedy="load the state into a new one")
        self._place = (state["epoch"], state.get("segment", 0), state["step"])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; a reader's error is raised here."""
        if self._stop.is_set():
            raise RunError("the stream is closed", remedy="make a new one from its state")
        if self._thread is None:
            self._thread = threading.Thread(target=self._produce, name="actcache-reader")
            self._thread.daemon = True  # an abandoned stream must not keep the process alive
            self._thread.start()
        began = time.monotonic()
        item = self._take()
        seconds = time.monotonic() - began
        if not self.seconds_waited:
            self.seconds_to_first = seconds
        self.seconds_waited += seconds
        if item is None:
            self.close()
            raise StopIteration
        if isinstance(item, BaseException):
            self.close()
            raise item
        batch, self._place = item
        return batch

    def _take(self) -> tuple[Batch, Place] | BaseException | None:
        while True:
            try:
                return self._batches.get(timeout=_PATIENCE)
            except queue.Empty:
                missing = self._plans.missing
                self._require_reader()
            if missing is not None:
                self.seconds_for_shards += _PATIENCE
                self.on_wait(missing)

    def _require_reader(self) -> None:
        """Raise `RunError` if no batch will ever come: a process that forked has no threads."""
        if (self._thread is None or not self._thread.is_alive()) and self._batches.empty():
            raise RunError(
                "the stream's thread is gone",
                remedy="make the stream in the process that takes its batches",
            )

    def __enter__(self) -> ActivationStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead. Taking another batch is then an error."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _produce(self) -> None:
        try:
            self._pool = ThreadPoolExecutor(self._threads, "actcache-loader")
            try:
                for item in self._walk() if self._epochs is None else _mark_last(self._walk()):
                    if not self._put(item):
                        return
            finally:
                self._pool.shutdown(cancel_futures=True)
            self._put(None)
        except BaseException as error:  # handed over whole: whoever takes the batch raises it
            self._put(error)

    def _put(self, item: tuple[Batch, Place] | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._batches.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _walk(self) -> Iterator[tuple[Batch, Place]]:
        """Every batch, and the place after it."""
        epoch, segment, step = self._place
        while not self._stop.is_set() and epoch != self._epochs:
            for number, plan in self._plans.walk(segment, self._stop):
                # The next segment's number, whether there is one or not: the place is a function of
                # the batches before it, not of what is known of those after it.
                end = (epoch, number + 1, 0) if self._segmented else (epoch + 1, 0, 0)
                for batch in self._segment(epoch, number, plan, step):
                    whole = batch.step + 1 == plan.steps_per_epoch
                    yield batch, end if whole else (epoch, number, batch.step + 1)
                step = 0
            epoch, segment, step = epoch + 1, 0, 0

    def _segment(
        self, epoch: int, number: int, plan: OrderPlan, first_step: int
    ) -> Iterator[Batch]:
        line = Epoch(plan, epoch)
        lanes = lanes_of_rank(plan.lanes, self._rank, self._world_size)
        filled = self._mixed if plan.window > 1 else self._in_order
        for item in filled(line, lanes, first_step):
            # Read before the batch is handed out: then its memory is its own.
            activations = {
                name: self.cache.codec.to_torch(rows) for name, rows in item.rows.items()
            }
            text = None if self._text is None else self._text.of(item.addresses)
            yield Batch(epoch, item.step, activations, item.addresses, number, text=text)

    def _in_order(self, line: Epoch, lanes: list[int], first_step: int) -> Iterator[Filled]:
        batch = len(lanes) * line.plan.rows_per_lane_and_batch
        each = steps_at_once(line.plan, batch * self.row_bytes)
        memory = self._memory(GROUPS * each)
        return in_order(self._reads, memory, self._pool, line, lanes, first_step, each)

    def _memory(self, filled_at_once: int) -> BatchMemory:
        most = self._batches.maxsize + HELD_BATCHES + filled_at_once
        widths = {name: self.cache.manifest.width(name) for name in self.hookpoints}
        return BatchMemory(self.cache.codec, widths, most)

    def _mixed(self, line: Epoch, lanes: list[int], first_step: int) -> Iterator[Filled]:
        b = line.plan.rows_per_lane_and_batch
        ahead = ReadAhead(
            self._reads,
            self._window_memory,
            self._pool,
            line,
            lanes,
            first_step,
            spare_windows(len(lanes)),
        )
        memory = self._memory(0)
        windows: list[Window | None] = [None] * len(lanes)
        for step in range(first_step, line.plan.steps_per_epoch):
            rows = memory.take(b * len(lanes))
            addresses = np.empty((b * len(lanes), 2), dtype=np.int64)
            for i, lane in enumerate(lanes):
                windows[i] = _take(ahead, windows[i], lane, step * b, b, rows, addresses, at=i * b)
            yield Filled(step, rows, addresses)
        ahead.end(windows)


class _OnePlan:
    """One plan, as plans."""

    def __init__(self, plan: OrderPlan) -> None:
        self._plan = plan
        self.missing: int | None = None

    def walk(self, first: int, stop: threading.Event) -> Iterator[tuple[int, OrderPlan]]:
        """The plan."""
        del first, stop
        yield 0, self._plan


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
