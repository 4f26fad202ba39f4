"""Segments: how a cache that is still being harvested is cut up for training. Pure functions.

Segment n is the shards [n·G, (n + 1)·G), the last one what is left. Each has a plan of its own (see
`order`), so that it can be trained on as soon as its shards are there, whatever comes later. An
epoch is all segments in turn. Letters: G shards of a segment, B rows of a batch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from actcache.cache.reader import Cache
from actcache.format.manifest import Manifest
from actcache.stream.order import OrderPlan, held_out_rule, make_plan

_BATCHES = 64
"""Batches that a segment should hold: less than one is left over at its end, 1/64 of its rows."""


@dataclass(frozen=True)
class Segmentation:
    """All that the order of segments depends on, besides how many rows each shard has."""

    shards_each: int
    """Shards of a segment, G."""
    block_rows: int
    """Rows of a block."""
    batch_size: int
    """Rows of a global batch, B."""
    seed: int
    """Seed of the order and of the held-out split."""
    pool_rows: int
    """Rows to hold in memory."""
    val_fraction: float
    """Share of the shards that is held out."""

    def shards(self, number: int, last: int | None = None) -> range:
        """Shards of a segment; none after the last.

        Args:
            number: which segment, from 0.
            last: number of the cache's last shard, where it is known.
        """
        first = number * self.shards_each
        stop = first + self.shards_each
        return range(first, stop if last is None else min(stop, last + 1))

    def is_held_out(self, shard: int) -> bool:
        """Whether a shard is never trained on: by its number alone."""
        return self._rule is not None and shard % self._rule[0] == self._rule[1]

    @cached_property
    def _rule(self) -> tuple[int, int] | None:
        return held_out_rule(self.val_fraction, self.seed)

    def plan(self, number: int, rows: Mapping[int, int]) -> OrderPlan | None:
        """The order of one segment's training rows; None if they are fewer than a batch.

        The first segment has the run's own seed, each other the next number: a cache of one segment
        is trained on as it is without segments.

        Args:
            number: which segment.
            rows: of each of its shards.
        """
        training = [(shard, n) for shard, n in rows.items() if not self.is_held_out(shard)]
        if sum(n for _, n in training) < self.batch_size:
            return None
        seed = (self.seed + number) % 2**32
        return make_plan(training, self.block_rows, self.batch_size, seed, self.pool_rows)

    def steps(self, rows: Mapping[int, int]) -> int:
        """Global batches in an epoch over all shards of a cache, given the rows of each."""
        segments = range(-(-len(rows) // self.shards_each))
        parts = [{s: rows[s] for s in self.shards(n, len(rows) - 1)} for n in segments]
        plans = [self.plan(number, part) for number, part in enumerate(parts)]
        return sum(plan.steps_per_epoch for plan in plans if plan is not None)


def default_shards_each(manifest: Manifest, batch_size: int, pool_rows: int) -> int:
    """The fewest shards, at least 2, whose rows fill the pool and hold 64 batches.

    With fewer rows than the pool, batches would be mixed worse than memory allows; with fewer
    batches, more than 1/64 of the rows could be left over. Of two neighbours one is trained on.
    """
    rows = max(pool_rows, _BATCHES * batch_size)
    return max(2, math.ceil(rows / manifest.shard_rows))


def goal_rows(manifest: Manifest, sequences: int) -> dict[int, int]:
    """The most rows that each shard of a harvest of so many sequences can have, by number."""
    plan, each = manifest.plan, manifest.identity.rows_per_sequence
    most = {
        s: (plan.max_sequences(s), plan.first_sequence(s)) for s in range(plan.shards_of(sequences))
    }
    return {s: min(count, sequences - first) * each for s, (count, first) in most.items()}


POLL_SECONDS = 1.0
"""Between two looks for a shard: a few calls of stat, however large the cache is."""


class SegmentFollower:
    """The segments of a cache, one after another, as the harvest publishes them.

    Args:
        cache: the cache; takes in receipts as they are needed.
        segmentation: how it is cut up.
        last: number of the last shard, if that is settled; else the seal tells it.
    """

    def __init__(self, cache: Cache, segmentation: Segmentation, last: int | None = None) -> None:
        self.cache, self.segmentation, self.last = cache, segmentation, last
        self.missing: int | None = None
        """The shard that `walk` waits for now."""

    def poll(self, number: int) -> int | None:
        """Look for a segment's shards: the first that is missing, or None if all are there."""
        missing = self.cache.refresh(self.segmentation.shards(number, self.last))
        if self.last is None and self.cache.end is not None:
            self.last = self.cache.end.last_shard
            return self.poll(number)  # what is missing may lie beyond the end
        return missing

    def shards(self, number: int) -> range:
        """Shards of a segment as far as is known; none after the last."""
        return self.segmentation.shards(number, self.last)

    def plan(self, number: int) -> OrderPlan | None:
        """The order of a segment that is there; None if it has fewer training rows than a batch."""
        receipts = self.cache.receipts
        return self.segmentation.plan(number, {s: receipts[s].rows for s in self.shards(number)})

    def iter_plans(self, first: int, stop: threading.Event) -> Iterator[tuple[int, OrderPlan]]:
        """Number and plan of each segment from `first` on, waiting for it, until the last.

        Segments with fewer training rows than a batch are passed over.

        Args:
            first: number of the segment to begin with.
            stop: ends the walk when it is set, in the middle of waiting too.
        """
        number = first
        while True:
            while (missing := self.poll(number)) is not None:
                self.missing = missing
                if stop.wait(POLL_SECONDS):
                    return
            self.missing = None
            if not self.shards(number):
                return
            plan = self.plan(number)
            if plan is not None:
                yield number, plan
            number += 1
