"""`ActivationStream`: batches in the order of `order`, read ahead by threads."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor

import torch

from actcache.cache.reader import Cache
from actcache.errors import RunError
from actcache.stream.batches import Batch, BatchBuilder, PlanSource, SinglePlan, StreamPosition
from actcache.stream.memory_budget import PREFETCH_BATCHES
from actcache.stream.order import OrderPlan, lanes_of_rank
from actcache.stream.prefetcher import BackgroundIterator
from actcache.stream.verified_reads import DEFAULT, ReadSettings, Verify

__all__ = ["ActivationStream", "Batch"]

_TIMEOUT = 1.0  # seconds without a batch before a consumer hears what is waited for


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
        verify: when the bytes that are read are compared with the receipts, see `VerifiedReader`.
        prefetch: batches that may wait to be taken.
        reading: how rows are read ahead of the batches; cannot touch the order. See `tuning.tune`.
        text: whether batches carry token ids, sequences and positions; else no text is read.
        device: where rows are mixed, and batches put: with CUDA, beside whatever runs there. None:
            in main memory.

    Raises:
        HookpointError: the cache does not hold a hookpoint.
        ConfigError: the lanes cannot be divided among the ranks.
    """

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
        if isinstance(plan, OrderPlan):
            lanes_of_rank(plan.lanes, rank, world_size)  # refused here, not by the thread
        self.cache, self.hookpoints = cache, tuple(hookpoints)
        self._segmented = not isinstance(plan, OrderPlan)
        self._plans: PlanSource = SinglePlan(plan) if isinstance(plan, OrderPlan) else plan
        self._maker = BatchBuilder(
            cache,
            hookpoints,
            self._plans,
            segmented=self._segmented,
            rank=rank,
            world_size=world_size,
            verify=verify,
            waiting=prefetch,
            text=text,
            device=None if device is None else torch.device(device),
            reading=reading,
        )
        self.row_bytes = self._maker.row_bytes
        """Bytes of a row on disk, of all hookpoints that are read."""
        self._ahead, self._threads = prefetch, reading.threads
        self._place: StreamPosition = (epoch, segment, step)
        self._epochs = epochs
        self.seconds_waited = 0.0
        """Waiting for batches."""
        self.seconds_to_first = 0.0
        """Of that, for the first one."""
        self.seconds_for_shards = 0.0
        """Of that, for shards that were not there yet; in steps of a second."""
        self.on_wait: Callable[[int], None] = lambda _: None
        """Called by `next` about once a second while a shard is waited for, with its number."""
        self._producer: BackgroundIterator[tuple[Batch, StreamPosition]] | None = None
        self._closed = False

    def state_dict(self) -> dict[str, int]:
        """Where the next batch lies."""
        epoch, segment, step = self._place
        if self._segmented:
            return {"epoch": epoch, "segment": segment, "step": step}
        return {"epoch": epoch, "step": step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state. Only before the first batch is taken."""
        if self._producer is not None:
            raise RunError("the stream has already begun", remedy="load the state into a new one")
        self._place = (state["epoch"], state.get("segment", 0), state["step"])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; a reader's error is raised here."""
        if self._closed:
            raise RunError("the stream is closed", remedy="make a new one from its state")
        if self._producer is None:
            self._producer = self._begin()
        began = time.monotonic()
        item = self._take(self._producer)
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
        if batch.ready is not None:
            batch.ready.join(batch.activations)
        return batch

    def _begin(self) -> BackgroundIterator[tuple[Batch, StreamPosition]]:
        maker, place, epochs = self._maker, self._place, self._epochs

        def make(
            threads: Executor, stop: threading.Event
        ) -> Iterator[tuple[Batch, StreamPosition]]:
            return maker.batches(place, epochs, threads, stop)  # not `self`: it may be forgotten

        producer = BackgroundIterator(make, self._ahead, self._threads)
        weakref.finalize(self, producer.stop).atexit = False  # at exit a producer ends itself
        return producer

    def _take(
        self, producer: BackgroundIterator[tuple[Batch, StreamPosition]]
    ) -> tuple[Batch, StreamPosition] | BaseException | None:
        while True:
            try:
                return producer.get(_TIMEOUT)
            except queue.Empty:
                missing = self._plans.missing
            if not producer.is_alive():
                raise RunError(
                    "the stream's thread is gone",
                    remedy="make the stream in the process that takes its batches",
                )
            if missing is not None:
                self.seconds_for_shards += _TIMEOUT
                self.on_wait(missing)

    def __enter__(self) -> ActivationStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead. Taking another batch is then an error."""
        self._closed = True
        if self._producer is not None:
            self._producer.close()
