"""Segments: groups of shards in which a cache is trained on while it is still being harvested.

Segment n has the shards [n·G, (n + 1)·G), the last one the remaining shards. Each segment has a
plan of its own (see `order`), so that training on it can begin as soon as its shards are published,
independent of later ones. An epoch is all segments in turn. Letters: G shards of a segment, B rows
of a batch.
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
"""Least number of batches of a segment: so less than 1/64 of its rows is left over at its end."""


@dataclass(frozen=True)
class Segmentation:
    """Settings that determine the order of segments, besides the rows of each shard."""

    shards_each: int
    """Shards of a segment, G."""
    block_rows: int
    """Rows of a block."""
    batch_size: int
    """Rows of a global batch, B."""
    seed: int
    """Seed of the order and of the held-out split."""
    pool_rows: int
    """Rows to hold in memory over all lanes."""
    val_fraction: float
    """Share of the shards that is held out."""

    def shards(self, number: int, last: int | None = None) -> range:
        """Return the shards of a segment; empty after the last one.

        Args:
            number: number of the segment, from 0.
            last: number of the cache's last shard, if known.
        """
        first = number * self.shards_each
        stop = first + self.shards_each
        return range(first, stop if last is None else min(stop, last + 1))

    def is_held_out(self, shard: int) -> bool:
        """Return whether a shard is held out of training: depends only on its number."""
        return self._rule is not None and shard % self._rule[0] == self._rule[1]

    @cached_property
    def _rule(self) -> tuple[int, int] | None:
        return held_out_rule(self.val_fraction, self.seed)

    def plan(self, number: int, rows: Mapping[int, int]) -> OrderPlan | None:
        """Plan the order of one segment's training rows; None if they are fewer than a batch.

        The first segment uses the run's seed, each later one the seed plus its number. So a cache
        of one segment has the same order as without segments.

        Args:
            number: number of the segment.
            rows: rows of each of its shards.
        """
        training = [(shard, n) for shard, n in rows.items() if not self.is_held_out(shard)]
        if sum(n for _, n in training) < self.batch_size:
            return None
        seed = (self.seed + number) % 2**32
        return make_plan(training, self.block_rows, self.batch_size, seed, self.pool_rows)

    def steps(self, rows: Mapping[int, int]) -> int:
        """Count the global batches of an epoch over all shards, given the rows of each."""
        segments = range(-(-len(rows) // self.shards_each))
        parts = [{s: rows[s] for s in self.shards(n, len(rows) - 1)} for n in segments]
        plans = [self.plan(number, part) for number, part in enumerate(parts)]
        return sum(plan.steps_per_epoch for plan in plans if plan is not None)


def default_shards_each(manifest: Manifest, batch_size: int, pool_rows: int) -> int:
    """Return the fewest shards, at least 2, whose rows fill the buffer and 64 batches.

    With fewer rows than the buffer, batches would be mixed less than memory allows; with fewer
    batches, more than 1/64 of the rows could be left over. At least one of any two consecutive
    shards is trained on.
    """
    rows = max(pool_rows, _BATCHES * batch_size)
    return max(2, math.ceil(rows / manifest.shard_rows))


def goal_rows(manifest: Manifest, sequences: int) -> dict[int, int]:
    """Return the largest possible number of rows of each shard of a harvest, by shard number."""
    plan, each = manifest.plan, manifest.identity.rows_per_sequence
    most = {
        s: (plan.max_sequences(s), plan.first_sequence(s)) for s in range(plan.shards_of(sequences))
    }
    return {s: min(count, sequences - first) * each for s, (count, first) in most.items()}


POLL_SECONDS = 1.0
"""Interval between polls for a shard. A poll is a few calls of stat, for any size of cache."""


class SegmentFollower:
    """A `PlanSource` of the segments of a cache, in the order in which the harvest publishes them.

    Args:
        cache: the cache; its receipts are refreshed as they are needed.
        segmentation: division of the cache into segments.
        last: number of the last shard, if known; else it is read from the completion marker.
    """

    def __init__(self, cache: Cache, segmentation: Segmentation, last: int | None = None) -> None:
        self.cache, self.segmentation, self.last = cache, segmentation, last
        self.missing: int | None = None
        """The shard that `iter_plans` waits for now."""

    def poll(self, number: int) -> int | None:
        """Refresh a segment's shards. Return the first missing one; None if all exist."""
        missing = self.cache.refresh(self.segmentation.shards(number, self.last))
        if self.last is None and self.cache.end is not None:
            self.last = self.cache.end.last_shard
            return self.poll(number)  # the missing shard may lie beyond the end
        return missing

    def shards(self, number: int) -> range:
        """Return the shards of a segment as far as known; empty after the last one."""
        return self.segmentation.shards(number, self.last)

    def plan(self, number: int) -> OrderPlan | None:
        """Plan the order of a published segment; None if it has fewer rows than a batch."""
        receipts = self.cache.receipts
        return self.segmentation.plan(number, {s: receipts[s].rows for s in self.shards(number)})

    def iter_plans(self, first: int, stop: threading.Event) -> Iterator[tuple[int, OrderPlan]]:
        """Yield number and plan of each segment from `first` to the last, waiting until published.

        Segments with fewer training rows than a batch are skipped.

        Args:
            first: number of the first segment.
            stop: ends the iteration when set, also while it waits.
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
