"""`ActivationStream`: batches in the order of `order`, read ahead by a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from actcache.errors import RunError
from actcache.order import Epoch, OrderPlan, Rows, lanes_of_rank
from actcache.reader import Cache
from actcache.storage import Array

if TYPE_CHECKING:
    import torch

PREFETCH_BATCHES = 4


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: n = B/W rows."""

    epoch: int
    step: int
    """Step within the epoch."""
    activations: dict[str, torch.Tensor]
    """Rows by hookpoint, in the type on disk, on the CPU. Each [n, d_in]"""
    addresses: Rows
    """(shard, row in shard) of every row. [n, 2]"""


class ActivationStream:
    """Endless batches from a cache; every row of an epoch once, but for fewer than B + L.

    The order is a pure function of (plan, epoch, step), so two integers are the whole state, and a
    stream rebuilt from them, on any number of ranks, goes on exactly where it was.

    Args:
        cache: where the rows are.
        hookpoints: which to read; nothing else is read.
        plan: the order.
        epoch: epoch to begin with.
        step: step within it to begin with.
        rank: this process's number.
        world_size: processes that share each global batch.

    Raises:
        HookpointError: the cache does not hold a hookpoint.
        ConfigError: the lanes cannot be divided among the ranks.
    """

    def __init__(
        self,
        cache: Cache,
        hookpoints: Sequence[str],
        plan: OrderPlan,
        *,
        epoch: int = 0,
        step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for hookpoint in hookpoints:
            cache.require_hookpoint(hookpoint)
        self.cache, self.hookpoints, self.plan = cache, tuple(hookpoints), plan
        self.lanes = lanes_of_rank(plan.lanes, rank, world_size)
        self.epoch, self.step = epoch, step
        self.seconds_waited = 0.0
        self._batches: queue.Queue[Batch | BaseException] = queue.Queue(PREFETCH_BATCHES)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def state_dict(self) -> dict[str, int]:
        """Where the next batch lies."""
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state. Only before the first batch is taken."""
        if self._thread is not None:
            raise RunError("the stream has already begun", remedy="load the state into a new one")
        self.epoch, self.step = state["epoch"], state["step"]

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
        item = self._batches.get()
        self.seconds_waited += time.monotonic() - began
        if isinstance(item, BaseException):
            self.close()
            raise item
        epoch, step = item.epoch, item.step + 1
        self.epoch, self.step = (
            (epoch, step) if step < self.plan.steps_per_epoch else (epoch + 1, 0)
        )
        return item

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
            epoch, step = self.epoch, self.step
            while True:
                for batch in self._epoch(epoch, step):
                    if not self._put(batch):
                        return
                epoch, step = epoch + 1, 0
        except BaseException as error:  # handed over whole: whoever takes the batch raises it
            self._put(error)

    def _put(self, item: Batch | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._batches.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _epoch(self, epoch: int, first_step: int) -> Iterator[Batch]:
        plan = self.plan
        line = Epoch(plan, epoch)
        b = plan.rows_per_lane_and_batch
        lanes = [_Lane(self.cache, self.hookpoints, line, lane) for lane in self.lanes]
        storage = self.cache.codec.storage
        for step in range(first_step, plan.steps_per_epoch):
            n = b * len(lanes)
            rows = {
                name: np.empty((n, self.cache.manifest.width(name)), dtype=storage)
                for name in self.hookpoints
            }
            addresses = np.empty((n, 2), dtype=np.int64)
            for i, lane in enumerate(lanes):
                lane.take(step * b, b, rows, addresses, at=i * b)
            yield Batch(
                epoch,
                step,
                {name: self.cache.codec.to_torch(array) for name, array in rows.items()},
                addresses,
            )


class _Lane:
    """One lane's current window, in memory."""

    def __init__(self, cache: Cache, hookpoints: Sequence[str], line: Epoch, lane: int) -> None:
        self._cache, self._line, self._lane = cache, line, lane
        capacity = min(line.plan.window, line.plan.lane_rows)
        self._buffers = {
            name: np.empty((capacity, cache.manifest.width(name)), dtype=cache.codec.storage)
            for name in hookpoints
        }
        self._addresses = np.empty((capacity, 2), dtype=np.int64)
        self._start = self._stop = 0  # rows of the lane that the window holds
        self._permutation: Rows = np.empty(0, dtype=np.int64)

    def take(self, row: int, count: int, out: dict[str, Array], addresses: Rows, at: int) -> None:
        """Copy the lane's rows [row, row + count) to `out` and `addresses`, from index `at` on."""
        while count:
            if not self._start <= row < self._stop:
                self._load(self._line.window_at(self._lane, row))
            n = min(count, self._stop - row)
            chosen = self._permutation[row - self._start : row - self._start + n]
            for name, buffer in self._buffers.items():
                # mode='clip' lets NumPy write straight into `out`; the indices are in range.
                np.take(buffer, chosen, axis=0, out=out[name][at : at + n], mode="clip")
            np.take(self._addresses, chosen, axis=0, out=addresses[at : at + n], mode="clip")
            row, count, at = row + n, count - n, at + n

    def _load(self, number: int) -> None:
        self._start, self._stop = self._line.window(self._lane, number)
        self._permutation = self._line.permutation(self._lane, number)
        first = self._lane * self._line.plan.lane_rows
        filled = 0
        for span in self._line.spans(first + self._start, first + self._stop):
            place = slice(filled, filled + span.rows)
            for name, buffer in self._buffers.items():
                self._cache.read_into(name, span.shard, span.start, buffer[place])
            self._addresses[place, 0] = span.shard
            self._addresses[place, 1] = np.arange(span.start, span.start + span.rows)
            filled += span.rows
