"""Plans for a stream from a cache that grows while it is read: it waits for its shards.

The order does not depend on when they come: a segment begins once all its shards are published, and
the last, shorter one once the harvest is sealed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from actcache.order import OrderPlan
from actcache.reader import Cache
from actcache.segments import Segmentation

POLL_SECONDS = 1.0
"""Between two looks for a shard: a few calls of stat, however large the cache is."""


class Following:
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

    def look(self, number: int) -> int | None:
        """Look for a segment's shards: the first that is missing, or None if all are there."""
        missing = self.cache.take_in(self.segmentation.shards(number, self.last))
        if self.last is None and self.cache.end is not None:
            self.last = self.cache.end.last_shard
            return self.look(number)  # what is missing may lie beyond the end
        return missing

    def shards(self, number: int) -> range:
        """Shards of a segment as far as is known; none after the last."""
        return self.segmentation.shards(number, self.last)

    def plan(self, number: int) -> OrderPlan | None:
        """The order of a segment that is there; None if it has fewer training rows than a batch."""
        receipts = self.cache.receipts
        return self.segmentation.plan(number, {s: receipts[s].rows for s in self.shards(number)})

    def walk(self, first: int, stop: threading.Event) -> Iterator[tuple[int, OrderPlan]]:
        """Number and plan of each segment from `first` on, waiting for it, until the last.

        Segments with fewer training rows than a batch are passed over.

        Args:
            first: number of the segment to begin with.
            stop: ends the walk when it is set, in the middle of waiting too.
        """
        number = first
        while True:
            while (missing := self.look(number)) is not None:
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
