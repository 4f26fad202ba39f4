"""`ActivationStream`: shuffled batches in the order of `order`, built by threads ahead of use."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from actcache.cache.reader import Cache
from actcache.core.arguments import COUNT, SIZE, checked
from actcache.core.process import choose_device
from actcache.errors import ConfigError, RunError
from actcache.filesystem.slow_reads import report_slow_reads
from actcache.stream.memory_budget import HELD_BATCHES, PREFETCH_BATCHES, extra_windows
from actcache.stream.order import Epoch, OrderPlan, Rows, SequentialEpoch, lanes_of_rank
from actcache.stream.prefetcher import BackgroundIterator
from actcache.stream.row_tokens import RowTokenReader, RowTokens
from actcache.stream.shuffle_buffer import (
    BufferSlots,
    HostShuffleBuffer,
    ShuffleBuffer,
    WindowLoader,
    shuffled_batches,
)
from actcache.stream.verified_reads import DEFAULT, ReadSettings, VerifiedReader, Verify

if TYPE_CHECKING:
    from actcache.stream.device_buffer import CopyEvent, CopyStream

_TIMEOUT = 1.0  # seconds without a batch before the missing shard is reported
_SEQUENTIAL_BYTES = 64 << 20  # of the windows that are loaded where rows are not shuffled


StreamPosition = tuple[int, int, int]
"""Position of a batch: epoch, number of the plan, step within the plan."""


class PlanSource(Protocol):
    """Plans that a stream reads one after another, the same in every epoch."""

    missing: int | None
    """The shard that `iter_plans` waits for now, if any."""

    def iter_plans(self, first: int, stop: threading.Event) -> Iterator[tuple[int, OrderPlan]]:
        """Yield (number, plan) from number `first` on; return early when `stop` is set."""


class SinglePlan:
    """A `PlanSource` of one plan."""

    def __init__(self, plan: OrderPlan) -> None:
        self._plan = plan
        self.missing: int | None = None

    def iter_plans(self, first: int, stop: threading.Event) -> Iterator[tuple[int, OrderPlan]]:
        """Yield the plan."""
        del first, stop
        yield 0, self._plan


@dataclass(frozen=True)
class Batch:
    """One rank's rows of a global batch: n = B/W."""

    epoch: int
    step: int
    """Step within the epoch, or within the segment if there are several."""
    activations: dict[str, torch.Tensor]
    """Rows by hookpoint, in the type on disk; 8-bit rows as float32. Each [n, d_in]"""
    addresses: Rows
    """(shard, row in shard) of every row. [n, 2]"""
    segment: int = 0
    """Number of the plan, if there are several."""
    last: bool = False
    """Whether it is the last batch of a stream with a limited number of epochs."""
    text: RowTokens | None = None
    """Tokens of the rows, if the stream was opened with `text`."""
    ready: CopyEvent | None = None
    """Event that completes when the rows are on their device; None on the CPU."""


class BatchBuilder:
    """Builder of one rank's batches, for the thread of a stream; holds no reference to the stream.

    The arguments are those of `ActivationStream`.
    """

    def __init__(
        self,
        cache: Cache,
        hookpoints: Sequence[str],
        plans: PlanSource,
        *,
        rank: int,
        world_size: int,
        verify: Verify,
        prefetch: int,
        reading: ReadSettings,
        text: bool,
        device: torch.device | None,
    ) -> None:
        self.cache, self.hookpoints, self.plans = cache, tuple(hookpoints), plans
        self.segmented = not isinstance(plans, SinglePlan)
        self._rank, self._world_size = rank, world_size
        self._reader = VerifiedReader(cache, verify, reading)
        self._prefetch, self._threads, self._device = prefetch, reading.threads, device
        widths = [cache.manifest.width(name) for name in hookpoints]
        self.row_bytes = sum(map(cache.row_dtype.row_bytes, widths))
        self._buffer: ShuffleBuffer[Any] | None = None
        self._copies: CopyStream | None = None
        self._text = RowTokenReader(cache) if text else None

    def batches(
        self,
        position: StreamPosition,
        epochs: int | None,
        threads: Executor,
        stop: threading.Event,
    ) -> Iterator[tuple[Batch, StreamPosition]]:
        """Yield every batch from a position on, with the position after it.

        Args:
            position: position of the first batch.
            epochs: number of epochs; None: endless.
            threads: executor that loads windows.
            stop: ends the iteration, also while it waits for a shard.
        """
        epoch, segment, step = position
        while not stop.is_set() and epoch != epochs:
            for number, plan in self.plans.iter_plans(segment, stop):
                # The next segment's number, even if there is none: a position depends only on the
                # batches before it, not on the shards published since.
                end = (epoch, number + 1, 0) if self.segmented else (epoch + 1, 0, 0)
                for batch in self._segment(epoch, number, plan, step, threads):
                    whole = batch.step + 1 == plan.steps_per_epoch
                    yield batch, end if whole else (epoch, number, batch.step + 1)
                step = 0
            epoch, segment, step = epoch + 1, 0, 0

    def _segment(
        self, number: int, segment: int, plan: OrderPlan, first_step: int, threads: Executor
    ) -> Iterator[Batch]:
        lanes = lanes_of_rank(plan.lanes, self._rank, self._world_size)
        if plan.window > 1:
            epoch = Epoch(plan, number)
        else:
            window = _SEQUENTIAL_BYTES // max(1, len(lanes) * self.row_bytes)
            epoch = SequentialEpoch(plan, number, max(1, min(window, plan.block_rows)))
        buffer = self._require_buffer(epoch.plan, len(lanes))
        loader = WindowLoader(
            self._reader, self.hookpoints, buffer, threads, epoch, lanes, first_step
        )
        for raw in shuffled_batches(loader, buffer, epoch, lanes, first_step):
            yield Batch(
                number,
                raw.step,
                buffer.tensors(raw.rows),
                raw.addresses,
                segment,
                text=self._text.of(raw.addresses) if self._text else None,
                ready=self._copies.mark() if self._copies else None,
            )

    def _require_buffer(self, plan: OrderPlan, lanes: int) -> ShuffleBuffer[Any]:
        """Return the buffer for windows of a plan; a buffer of another shape is freed first."""
        shape = (lanes + extra_windows(lanes), min(plan.window, plan.lane_rows))
        if self._buffer is None or self._buffer.slots.shape != shape:
            self._buffer = None
            self._buffer = self._make_buffer(BufferSlots(*shape))
        return self._buffer

    def _make_buffer(self, slots: BufferSlots) -> ShuffleBuffer[Any]:
        if self._device is None:
            recycled = self._prefetch + HELD_BATCHES
            return HostShuffleBuffer(self.cache, self.hookpoints, slots, recycled)
        from actcache.stream.device_buffer import CopyStream, DeviceShuffleBuffer

        self._copies = self._copies or CopyStream(self._device)
        return DeviceShuffleBuffer(
            self.cache, self.hookpoints, slots, self._copies, staging=self._threads + 1
        )


def _mark_last(
    items: Iterator[tuple[Batch, StreamPosition]],
) -> Iterator[tuple[Batch, StreamPosition]]:
    """Yield the same batches, the last one marked; the position after it starts the next epoch."""
    held = next(items, None)
    for item in items:
        assert held is not None
        yield held
        held = item
    if held is not None:
        batch, _ = held
        yield replace(batch, last=True), (batch.epoch + 1, 0, 0)


class ActivationStream:
    """Endless batches from a cache. An epoch has every row once, except for fewer than B + L.

    The order is a pure function of (plan, epoch, step). So two integers are the whole state, and a
    stream resumed from them, on any number of ranks, continues with the exact next batch.

    Given a `PlanSource` (the segments of a cache, see `segments`), an epoch is all of its plans in
    turn. Each plan leaves out fewer than B + L rows, and the state includes the segment's number.

    Args:
        cache: source of the rows.
        hookpoints: hookpoints to read; no others are read.
        plan: the order, or a source with the order of each segment.
        epoch: epoch of the first batch.
        segment: segment of the first batch.
        step: step of the first batch within the epoch, or segment.
        epochs: number of epochs; None: endless. The last batch of a segment is then delayed until
            it is known whether more batches follow.
        rank: rank of this process.
        world_size: number of processes that share each global batch.
        verify: when files are compared with their receipts, see `VerifiedReader`.
        prefetch: number of batches that are built ahead.
        reading: how files are read, see `probe_read_settings`. Does not change the order.
        text: whether batches include token ids, sequences and positions.
        device: device on which rows are shuffled and batches are placed; with CUDA, on a stream of
            its own. None: main memory.

    Raises:
        HookpointError: the cache does not hold a hookpoint.
        ConfigError: the lanes cannot be divided among the ranks, or an argument has another type
            or is out of range.
    """

    @checked(
        epoch=COUNT,
        segment=COUNT,
        step=COUNT,
        epochs=COUNT,
        rank=COUNT,
        world_size=SIZE,
        prefetch=SIZE,
    )
    def __init__(
        self,
        cache: Cache,
        hookpoints: Sequence[str],
        plan: OrderPlan | PlanSource,
        *,
        epoch: int = 0,
        segment: int = 0,
        step: int = 0,
        epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        verify: Verify = "first-read",
        prefetch: int = PREFETCH_BATCHES,
        reading: ReadSettings = DEFAULT,
        text: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        for hookpoint in hookpoints:
            cache.require_hookpoint(hookpoint)
        if rank >= world_size:
            raise ConfigError("rank is out of range", expected=f"< {world_size}", got=rank)
        if isinstance(plan, OrderPlan):
            lanes_of_rank(plan.lanes, rank, world_size)  # raised here instead of in the thread
            plan = SinglePlan(plan)
        self.cache, self.hookpoints = cache, tuple(hookpoints)
        self._builder = BatchBuilder(
            cache,
            hookpoints,
            plan,
            rank=rank,
            world_size=world_size,
            verify=verify,
            prefetch=prefetch,
            reading=reading,
            text=text,
            device=None if device is None else choose_device(str(device)),
        )
        self.row_bytes = self._builder.row_bytes
        """Bytes of a row on disk, summed over the hookpoints that are read."""
        self._prefetch, self._threads = prefetch, reading.threads
        self._position: StreamPosition = (epoch, segment, step)
        self._epochs = epochs
        self.seconds_waited = 0.0
        """Time spent waiting for batches."""
        self.seconds_to_first = 0.0
        """Part of it that was spent on the first batch."""
        self.seconds_for_shards = 0.0
        """Part of it that was spent on shards not yet published; in steps of a second."""
        self.on_wait: Callable[[int], None] = lambda _: None
        """Called about once a second while a shard is waited for, with its number."""
        self.on_slow: Callable[[], None] = lambda: None
        """Called about once a second while rows that exist are waited for."""
        self._items: BackgroundIterator[tuple[Batch, StreamPosition]] | None = None
        self._closed = False

    def state_dict(self) -> dict[str, int]:
        """Return the position of the next batch."""
        epoch, segment, step = self._position
        if self._builder.segmented:
            return {"epoch": epoch, "segment": segment, "step": step}
        return {"epoch": epoch, "step": step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a state. Only allowed before the first batch is taken."""
        if self._items is not None:
            raise RunError("the stream has already begun", remedy="load the state into a new one")
        self._position = (state["epoch"], state.get("segment", 0), state["step"])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Return the next batch; an error of the reading threads is raised here."""
        if self._closed:
            raise RunError("the stream is closed", remedy="make a new one from its state")
        if self._items is None:
            self._items = self._start()
        began = time.monotonic()
        item = self._take(self._items)
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
        batch, self._position = item
        if batch.ready is not None:
            batch.ready.join(batch.activations)
        return batch

    def _start(self) -> BackgroundIterator[tuple[Batch, StreamPosition]]:
        # Local variables instead of `self`: the thread must not keep the stream alive.
        builder, position, epochs = self._builder, self._position, self._epochs

        def make(
            threads: Executor, stop: threading.Event
        ) -> Iterator[tuple[Batch, StreamPosition]]:
            batches = builder.batches(position, epochs, threads, stop)
            return batches if epochs is None else _mark_last(batches)

        items = BackgroundIterator(make, self._prefetch, self._threads)
        weakref.finalize(self, items.stop).atexit = False  # `prefetcher` stops it at exit
        return items

    def _take(
        self, items: BackgroundIterator[tuple[Batch, StreamPosition]]
    ) -> tuple[Batch, StreamPosition] | BaseException | None:
        while True:
            try:
                return items.get(_TIMEOUT)
            except queue.Empty:
                missing = self._builder.plans.missing
                report_slow_reads()
            if not items.is_alive():
                raise RunError(
                    "the stream's thread is gone",
                    remedy="make the stream in the process that takes its batches",
                )
            if missing is not None:
                self.seconds_for_shards += _TIMEOUT
                self.on_wait(missing)
                continue
            try:
                self.on_slow()
            except BaseException:
                items.abandon()  # its threads may wait for a disk
                raise

    def __enter__(self) -> ActivationStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads. Taking another batch is an error afterwards."""
        self._closed = True
        if self._items is not None:
            self._items.close()
