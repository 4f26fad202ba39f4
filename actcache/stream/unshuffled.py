"""Batches of a plan whose windows are single rows: nothing is mixed in memory.

Rows go straight from their files into their batches: several batches are filled at once, so that
each read is long, and no row is copied. G steps of a group, L lanes, b rows of a lane and batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future

import numpy as np

from actcache.cache.reader import byte_views
from actcache.storage import StoredRows
from actcache.stream.order import Epoch, OrderPlan, Rows
from actcache.stream.shuffle_buffer import BatchRecycler, RawBatch
from actcache.stream.verified_reads import VerifiedReader, row_sizes
from actcache.stream.window_loader import write_addresses

GROUP_BYTES = 64 << 20
"""Of batches that are filled at once."""

GROUPS = 2
"""One is handed out while the other is filled."""

_READS = 8  # of a group, at least: so that threads end at about the same time


Stored = RawBatch[dict[str, StoredRows]]


def steps_at_once(plan: OrderPlan, batch_bytes: int) -> int:
    """Steps of a group: as many as make reads of a block, in bounded memory."""
    longest = plan.block_rows // plan.rows_per_lane_and_batch
    return max(1, min(longest, GROUP_BYTES // batch_bytes))


def sequential_batches(
    reads: VerifiedReader,
    memory: BatchRecycler,
    threads: Executor,
    line: Epoch,
    lanes: Sequence[int],
    first_step: int,
    each: int,
) -> Iterator[Stored]:
    """The batches of some lanes of an epoch, from a step on.

    Args:
        reads: how rows are read.
        memory: for the batches.
        threads: read them.
        line: the epoch.
        lanes: which lanes.
        first_step: step of the first batch.
        each: steps of a group.
    """
    plan, b = line.plan, line.plan.rows_per_lane_and_batch
    starts = iter(range(first_step, plan.steps_per_epoch, each))
    groups: deque[tuple[list[Stored], list[Future[None]]]] = deque()
    share = -(-len(lanes) // _READS)

    def begin(step: int) -> None:
        steps = range(step, min(step + each, plan.steps_per_epoch))
        addresses = np.empty((len(steps), len(lanes), b, 2), dtype=np.int64)
        batches = [
            RawBatch(t, memory.take(len(lanes) * b), addresses[n].reshape(-1, 2))
            for n, t in enumerate(steps)
        ]
        group = _Group(batches, addresses)
        futures = [
            threads.submit(_fill, reads, line, lanes[i : i + share], i, group)
            for i in range(0, len(lanes), share)
        ]
        groups.append((batches, futures))

    while True:
        while len(groups) < GROUPS and (step := next(starts, None)) is not None:
            begin(step)
        if not groups:
            return
        batches, futures = groups.popleft()
        for future in futures:
            future.result()
        yield from batches


class _Group:
    """Batches that are filled at once, and their memory as views of bytes.

    Args:
        batches: of consecutive steps. T of them
        addresses: of them all. [T, L, b, 2]
    """

    def __init__(self, batches: Sequence[Stored], addresses: Rows) -> None:
        self.steps = range(batches[0].step, batches[0].step + len(batches))
        self.addresses = addresses
        flats = [{name: byte_views(rows) for name, rows in batch.rows.items()} for batch in batches]
        self.parts = [
            (name, part, [views[name][part] for views in flats], size)
            for name, rows in batches[0].rows.items()
            for part, size in row_sizes(rows).items()
        ]
        """Hookpoint, part, every batch's bytes of it, and those of a row."""


def _fill(reads: VerifiedReader, line: Epoch, lanes: Sequence[int], at: int, group: _Group) -> None:
    """Read some lanes' part of several batches. `at`: number of the first lane in a batch."""
    plan, b = line.plan, line.plan.rows_per_lane_and_batch
    addresses = np.empty((len(group.steps) * b, 2), dtype=np.int64)
    for i, lane in enumerate(lanes, at):
        first = lane * plan.lane_rows + group.steps[0] * b
        spans = list(line.spans(first, first + len(addresses)))
        begin, places = 0, []
        for span in spans:
            place: dict[str, dict[str, list[memoryview]]] = {}
            for name, part, views, size in group.parts:
                cut = _cut(views, begin, span.rows, b, i * b, size)
                place.setdefault(name, {})[part] = cut
            places.append(place)
            begin += span.rows
        reads.load_views(spans, places)
        write_addresses(spans, addresses)
        group.addresses[:, i] = addresses.reshape(-1, b, 2)


def _cut(
    views: Sequence[memoryview], begin: int, rows: int, b: int, offset: int, size: int
) -> list[memoryview]:
    """Where rows [begin, begin + rows) of a lane go: b to each batch, from its row `offset` on.

    Args:
        views: the batches' memory.
        begin: first row, counted from the first batch's.
        rows: how many.
        b: rows of the lane and a batch.
        offset: where they begin in a batch, rows.
        size: bytes of a row.
    """
    (first, before), (last, after) = divmod(begin, b), divmod(begin + rows - 1, b)
    low, high = offset * size, (offset + b) * size
    cut = [view[low:high] for view in views[first : last + 1]]
    cut[-1] = cut[-1][: (after + 1) * size]
    cut[0] = cut[0][before * size :]
    return cut
