"""Waiting for a harvest: what is said meanwhile, and for the first segment of all."""

from __future__ import annotations

import time
from collections.abc import Mapping

from actcache.errors import ConfigError
from actcache.follow import POLL_SECONDS, Following
from actcache.lock import is_free
from actcache.order import OrderPlan
from actcache.place import as_folder
from actcache.progress import Progress
from actcache.reader import Cache
from actcache.receipt import read_end_of, receipt_path
from actcache.segments import Segmentation


class Waiting:
    """Says what is waited for: in the bar; where there is none, once a segment.

    Args:
        cache: whose shards are waited for.
        shards_each: shards of a segment.
        bar: where to say it.
    """

    def __init__(self, cache: Cache, shards_each: int, bar: Progress) -> None:
        self._root, self._manifest = as_folder(cache.root), cache.manifest
        self._shards_each, self._bar = shards_each, bar
        self._segment: int | None = None
        self._warned = False

    def __call__(self, shard: int) -> None:
        """A shard is waited for. Warns, once a segment, if no harvest is at work."""
        segment = shard // self._shards_each
        begins = segment != self._segment
        if begins:
            self._segment, self._warned = segment, False
        self._bar.wait(f"waiting for shard {shard} of the harvest", begins=begins)
        # Free first, then still missing: the last act of a harvest is to leave.
        if not self._warned and is_free(self._root) and self._is_missing(shard):
            self._warned = True
            self._bar.say(
                f"warning: no harvest is at work in {self._root}; run its harvest command again. "
                "Still waiting; Ctrl-C leaves, and --resume goes on"
            )

    def _is_missing(self, shard: int) -> bool:
        if receipt_path(self._root, shard).exists():
            return False
        end = read_end_of(self._root, self._manifest)
        return end is None or shard <= end.last_shard


def first_segment(cache: Cache, segmentation: Segmentation) -> OrderPlan:
    """The order of the first segment, once its shards are there: a run begins with it.

    Raises:
        ConfigError: it has fewer training rows than a batch.
    """
    following = Following(cache, segmentation)
    bar = Progress("fit", None, "rows")
    waiting = Waiting(cache, segmentation.shards_each, bar)
    try:
        while (missing := following.look(0)) is not None:
            waiting(missing)
            time.sleep(POLL_SECONDS)
    finally:
        bar.close()
    rows = {shard: cache.receipts[shard].rows for shard in following.shards(0)}
    return require_batch(segmentation, rows)


def require_batch(segmentation: Segmentation, rows: Mapping[int, int]) -> OrderPlan:
    """The order of the first segment, given the rows of its shards; raises `ConfigError`."""
    plan = segmentation.plan(0, rows)
    if plan is None:
        training = [n for shard, n in rows.items() if not segmentation.is_held_out(shard)]
        raise ConfigError(
            "the first segment has fewer rows to train on than a batch",
            expected=f">= {segmentation.batch_size:,}",
            got=f"{sum(training):,} in {len(training)} shards",
            remedy="more --segment-shards, a smaller --batch-size, or more text",
        )
    return plan
