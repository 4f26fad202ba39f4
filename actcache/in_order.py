"""Batches of a plan whose windows are single rows: nothing is mixed in memory.

Rows go straight from their files into their batches: several batches are filled at once, so that
each read is long, and no row is copied. G steps of a group, L lanes, b rows of a lane and batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future

import numpy as np

from actcache.batch_memory import BatchMemory
from actcache.checked_reads import CheckedReads, row_sizes
from actcache.order import Epoch, OrderPlan
from actcache.pool import Filled
from actcache.read_ahead import write_addresses
from actcache.reader import flat
from actcache.storage import StoredRows

GROUP_BYTES = 64 << 20
"""Of batches that are filled at once."""

GROUPS = 2
"""One is handed out while the other is filled."""

_READS = 8  # of a group, at least: so that threads end at about the same time


Stored = Filled[dict[str, StoredRows]]


def steps_at_once(plan: OrderPlan, batch_bytes: int) -> int:
    """Steps of a group: as many as make reads of a block, in bounded memory."""
    longest = plan.block_rows // plan.rows_per_lane_and_batch
    return max(1, min(longest, GROUP_BYTES // batch_bytes))


def in_order(
    reads: CheckedReads,
    memory: BatchMemory,
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
        batches = [
            Filled(t, memory.take(len(lanes) * b), np.empty((len(lanes) * b, 2), dtype=np.int64))
            for t in range(step, min(step + each, plan.steps_per_epoch))
        ]
        futures = [
            threads.submit(_fill, reads, line, lanes[i : i + share], i, batches)
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


def _fill(
    reads: CheckedReads, line: Epoch, lanes: Sequence[int], at: int, batches: Sequence[Stored]
) -> None:
    """Read some lanes' part of several batches. `at`: number of the first lane in a batch."""
    plan, b = line.plan, line.plan.rows_per_lane_and_batch
    memory = [
        (name, [flat(batch.rows[name]) for batch in batches], row_sizes(rows))
        for name, rows in batches[0].rows.items()
    ]
    addresses = np.empty((len(batches) * b, 2), dtype=np.int64)
    for i, lane in enumerate(lanes, at):
        first = lane * plan.lane_rows + batches[0].step * b
        spans = list(line.spans(first, first + len(batches) * b))
        begin, places = 0, []
        for span in spans:
            cuts = _cuts(begin, span.rows, b, i * b)
            places.append(
                {
                    name: {
                        part: [views[n][part][j * size : k * size] for n, j, k in cuts]
                        for part, size in sizes.items()
                    }
                    for name, views, sizes in memory
                }
            )
            begin += span.rows
        reads.load_views(spans, places)
        write_addresses(spans, addresses)
        for n, batch in enumerate(batches):
            batch.addresses[i * b : (i + 1) * b] = addresses[n * b : (n + 1) * b]


def _cuts(begin: int, rows: int, b: int, offset: int) -> list[tuple[int, int, int]]:
    """Where rows `begin` and on of a lane go: (number of the batch, first row there, end).

    b of them go to each batch, from its row `offset` on.
    """
    cuts = []
    while rows:
        number, inside = divmod(begin, b)
        n = min(b - inside, rows)
        cuts.append((number, offset + inside, offset + inside + n))
        begin, rows = begin + n, rows - n
    return cuts
