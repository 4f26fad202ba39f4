"""Runs that follow a harvest (--follow): segments.json pins the shards used so far.

The digest of a segment's receipts is written when the segment is first used, and checked on resume.
Like metrics.jsonl, segments.json is reproducible.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from actcache.cache.reader import Cache
from actcache.core.json_codec import parse_dataclass, read_json, to_json
from actcache.core.progress import Progress
from actcache.errors import CacheMismatchError, ConfigError, FormatError
from actcache.filesystem.atomic import write_atomic
from actcache.filesystem.lock import is_unlocked
from actcache.filesystem.paths import require_local
from actcache.format.manifest import MAX_SHARDS
from actcache.format.receipts import read_completion_marker, receipt_path
from actcache.stream.activation_stream import Batch
from actcache.stream.order import OrderPlan
from actcache.stream.segments import POLL_SECONDS, Segmentation, SegmentFollower
from saetrain.runs.checkpoint import State
from saetrain.runs.record import RunRecord

SEGMENTS = "segments.json"


@dataclass(frozen=True)
class UsedSegment:
    """A segment that a run has trained on or skipped."""

    first_shard: int
    last_shard: int
    receipts_digest: str
    """Digest over the receipts of all its shards."""

    def __post_init__(self) -> None:
        """Check the range, before it is compared with the cache."""
        if not 0 <= self.first_shard <= self.last_shard < MAX_SHARDS:
            raise FormatError("a segment of impossible shards", got=self)


@dataclass(frozen=True)
class UsedSegments:
    """Contents of `segments.json`."""

    segments: tuple[UsedSegment, ...]
    """All segments used so far, in order."""
    last_shard: int | None
    """Last shard of the cache; null until the run reaches it."""


def segmentation_of(record: RunRecord) -> Segmentation:
    """Return how a run with --follow divides its cache into segments."""
    pool_rows = record.pool_rows or record.options.pool_rows
    assert record.segment_shards is not None
    assert pool_rows is not None
    return Segmentation(
        shards_each=record.segment_shards,
        block_rows=record.plan.block_rows,
        batch_size=record.plan.batch_size,
        seed=record.options.order_seed,
        pool_rows=pool_rows,
        val_fraction=record.options.val_fraction,
    )


def held_out_shards(record: RunRecord, cache: Cache) -> list[int]:
    """Return the shards to evaluate on; with --follow, all held-out shards present so far."""
    if record.segment_shards is None:
        return list(record.held_out)
    segmentation = segmentation_of(record)
    return [shard for shard in cache.shards if segmentation.is_held_out(shard)]


def has_ended(record: RunRecord, state: State) -> bool:
    """Return whether a run finished its last epoch in fewer steps than planned."""
    by_epochs = record.segment_shards is not None and record.options.max_tokens is None
    return by_epochs and state.stream.get("epoch") == record.options.epochs


def read_used(root: Path, record: RunRecord, cache: Cache) -> UsedSegments:
    """Read segments.json and compare it with the cache.

    Raises:
        CacheMismatchError: a segment has changed or is missing.
        FormatError: the file is damaged.
    """
    path, segmentation = root / SEGMENTS, segmentation_of(record)
    if not path.exists():
        return UsedSegments((), None)
    obj = read_json(path, links=False, sealed=record.format_version > 1)
    used = parse_dataclass(UsedSegments, obj, str(path))
    for number, segment in enumerate(used.segments):
        shards = range(segment.first_shard, segment.last_shard + 1)
        if not shards or shards != segmentation.shards(number, segment.last_shard):
            raise FormatError(
                f"{path} holds a segment that cannot be",
                expected=f"{segmentation.shards(number)} or its start",
                got=segment,
                remedy="restore it from a copy",
            )
        name = f"segment {number} (shards {shards[0]} to {shards[-1]}) of {cache.root}"
        if missing := [shard for shard in shards if shard not in cache.receipts]:
            raise CacheMismatchError(
                f"{name} is incomplete, but this run has used it",
                expected=f"{len(shards)} shards",
                got=f"without {missing[:8]}",
                remedy="harvest again: the same command restores them",
            )
        if (digest := cache.digest(shards)) != segment.receipts_digest:
            raise CacheMismatchError(
                f"{name} has changed since this run first used it",
                expected=f"receipts digest {segment.receipts_digest}",
                got=digest,
                remedy="restore the cache, or start another run",
            )
    return used


class SegmentTracker:
    """Segments of a run that follows a harvest: their plans, and the pins in segments.json.

    Args:
        root: folder of the run.
        record: the run's record.
        cache: the cache that is being harvested.
        writes: whether this process writes segments.json.

    Raises:
        CacheMismatchError: a segment that was used has changed.
        FormatError: segments.json is damaged.
    """

    def __init__(self, root: Path, record: RunRecord, cache: Cache, writes: bool = True) -> None:
        self._root, self._cache, self._writes = root, cache, writes
        self._used, self._sealed = read_used(root, record, cache), record.format_version > 1
        self.plans = SegmentFollower(cache, segmentation_of(record), self._used.last_shard)

    def pin(self, batch: Batch) -> None:
        """Pin the segment of a batch, if it is new, before the batch is trained on.

        Raises:
            DiskFullError: no space for segments.json.
        """
        known = len(self._used.segments)
        # In the last batch and after the first epoch, all segments are in use.
        ended = batch.last or batch.epoch > 0
        if batch.segment < known and (not ended or self._used.last_shard is not None):
            return
        segments, number = list(self._used.segments), known
        while (number <= batch.segment or ended) and (shards := self.plans.shards(number)):
            segments.append(UsedSegment(shards[0], shards[-1], self._cache.digest(shards)))
            number += 1
        last = segments[-1].last_shard
        ended = ended or (last + 1) % self.plans.segmentation.shards_each > 0
        self._used = UsedSegments(tuple(segments), last if ended else None)
        if self._writes:
            text = to_json(self._used, sealed=self._sealed)
            write_atomic(self._root / SEGMENTS, [text])

    def position_after(self, step: int, epochs: int | None) -> dict[str, int] | None:
        """Return the stream's state after `step` steps; None if the pinned segments end before.

        Args:
            step: steps done.
            epochs: epochs of the run; None: as many as its steps need.
        """
        steps = [0 if plan is None else plan.steps_per_epoch for plan in self._pinned_plans()]
        epoch = 0
        if self._used.last_shard is not None and step > 0:
            if step == sum(steps) * (epochs or 0):
                return _position(epochs or 0, 0, 0)
            epoch, step = divmod(step - 1, sum(steps))
            step += 1
        if step == 0:
            return _position(0, 0, 0)
        for number, count in enumerate(steps):
            if step <= count:
                return _position(epoch, *((number, step) if step < count else (number + 1, 0)))
            step -= count
        return None

    def _pinned_plans(self) -> list[OrderPlan | None]:
        return [self.plans.plan(number) for number in range(len(self._used.segments))]

    def plan_of(self, step: int) -> tuple[OrderPlan, int, int]:
        """Return the plan of a past step (from 0), its epoch, and the step within both."""
        used = [plan for plan in self._pinned_plans() if plan is not None]
        epoch, step = divmod(step, sum(plan.steps_per_epoch for plan in used))
        for plan in used:
            if step < plan.steps_per_epoch:
                return plan, epoch, step
            step -= plan.steps_per_epoch
        raise AssertionError("no pinned segment has this step")


def _position(epoch: int, segment: int, step: int) -> dict[str, int]:
    return {"epoch": epoch, "segment": segment, "step": step}


def plan_of_step(
    record: RunRecord, segment_tracker: SegmentTracker | None, step: int
) -> tuple[OrderPlan, int, int]:
    """Return the plan of step `step` (from 0) of a run, its epoch, and the step within both."""
    if segment_tracker is None:
        return record.plan, *divmod(step, record.plan.steps_per_epoch)
    return segment_tracker.plan_of(step)


class HarvestWaitNotice:
    """Notice of the shard that a run waits for: in the progress bar, or else a line a segment.

    Args:
        cache: the cache that is being harvested.
        shards_each: shards per segment.
        bar: progress bar of the run.
    """

    def __init__(self, cache: Cache, shards_each: int, bar: Progress) -> None:
        self._root, self._manifest = require_local(cache.root), cache.manifest
        self._shards_each, self._bar = shards_each, bar
        self._segment: int | None = None
        self._warned = False

    def __call__(self, shard: int) -> None:
        """Show that `shard` is missing. Warn once a segment if no harvest is running."""
        segment = shard // self._shards_each
        begins = segment != self._segment
        if begins:
            self._segment, self._warned = segment, False
        self._bar.wait(f"waiting for shard {shard} of the harvest", begins=begins)
        # Test the lock first: a harvest writes its last shard before it releases the lock.
        if not self._warned and is_unlocked(self._root) and self._is_missing(shard):
            self._warned = True
            self._bar.print_line(
                f"warning: no harvest is at work in {self._root}; run its harvest command again. "
                "Still waiting; Ctrl-C stops, and --resume continues"
            )

    def _is_missing(self, shard: int) -> bool:
        if receipt_path(self._root, shard).exists():
            return False
        end = read_completion_marker(self._root, self._manifest)
        return end is None or shard <= end.last_shard


def first_segment(cache: Cache, segmentation: Segmentation) -> OrderPlan:
    """Wait for the shards of the first segment, and return the order of its rows.

    Raises:
        ConfigError: it has fewer training rows than a batch.
    """
    follower = SegmentFollower(cache, segmentation)
    bar = Progress("fit", None, "rows")
    notice = HarvestWaitNotice(cache, segmentation.shards_each, bar)
    try:
        while (missing := follower.poll(0)) is not None:
            notice(missing)
            time.sleep(POLL_SECONDS)
    finally:
        bar.close()
    rows = {shard: cache.receipts[shard].rows for shard in follower.shards(0)}
    return require_batch(segmentation, rows)


def require_batch(segmentation: Segmentation, rows: Mapping[int, int]) -> OrderPlan:
    """Return the order of the first segment, given its shards' rows; raises `ConfigError`."""
    plan = segmentation.plan(0, rows)
    if plan is None:
        training = [n for shard, n in rows.items() if not segmentation.is_held_out(shard)]
        raise ConfigError(
            "the first segment has fewer training rows than a batch",
            expected=f">= {segmentation.batch_size:,}",
            got=f"{sum(training):,} in {len(training)} shards",
            remedy="more --segment-shards, a smaller --batch-size, or more text",
        )
    return plan
