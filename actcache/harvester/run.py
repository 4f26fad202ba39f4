"""Run a model once over a text and leave its activations in a cache.

Every process makes the shards s with s mod world_size = rank, from sequences that it makes for
itself; what is published already is skipped. So a harvest that was killed, or is run again with
another number of processes, ends in the same bytes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import socket
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actcache.cache.folder import publish_extension
from actcache.cache.reader import Cache
from actcache.cache.writer import RowBuffers, WriterPool, publish_shard
from actcache.config import HarvestConfig
from actcache.core.distributed import World
from actcache.core.progress import Progress
from actcache.filesystem.atomic import as_disk_full_error
from actcache.format import receipts as receipts_module
from actcache.format.manifest import with_extension
from actcache.format.receipts import CompletionMarker, ShardReceipt, write_completion_marker
from actcache.harvester.capture_shard import capture_shard
from actcache.harvester.job import HarvestJob, prepare_job
from actcache.model.hooks import ActivationCapture


@dataclass(frozen=True)
class HarvestSummary:
    """What a harvest did, for the one line at its end and for `--json`."""

    cache: str
    cache_id: str
    rank: int
    """This process's number, of `world_size`."""
    world_size: int
    """Processes of this harvest."""
    complete: bool
    """Whether the whole cache is complete, all processes' shards together."""
    reason: str
    """Why it ended: goal, text, or empty while other processes are at work."""
    new_shards: int
    """Shards that this process published."""
    new_rows: int
    """Rows in them, at each hookpoint."""
    new_bytes: int
    """Bytes of them."""
    seconds: float
    """Time in the loop, without loading."""
    tokens_per_second: float
    """Tokens run through the model by this process in a second."""
    warnings: tuple[str, ...]
    """What the user should know."""


def harvest(config: HarvestConfig) -> HarvestSummary:
    """Make, or finish, the cache that a configuration describes.

    Raises:
        ActcacheError: one of its kinds, for anything a user can mend; what was published by then
            stays valid.
    """
    job = prepare_job(config, World.from_environment())
    try:
        return run_job(job)
    finally:
        job.lock.release()


def run_job(job: HarvestJob) -> HarvestSummary:
    """Make what is missing of a prepared harvest."""
    job, done, end = _as_published(job)
    began = time.monotonic()
    log = HarvestLog(job.root, job.ranks.rank)
    new_receipts: list[ShardReceipt] = []
    if end is None or len(done) <= end.last_shard or job.extend_to is not None:
        job, done, end = _harvest_ranges(job, done, new_receipts, log)
    seconds = time.monotonic() - began
    tokens = sum(receipt.sequences for receipt in new_receipts) * job.manifest.identity.ctx_len
    return HarvestSummary(
        cache=str(job.root),
        cache_id=job.manifest.cache_id,
        rank=job.ranks.rank,
        world_size=job.ranks.world_size,
        complete=end is not None,
        reason=end.reason if end is not None else "",
        new_shards=len(new_receipts),
        new_rows=sum(receipt.rows for receipt in new_receipts),
        new_bytes=sum(file.bytes for receipt in new_receipts for file in receipt.files.values()),
        seconds=seconds,
        tokens_per_second=tokens / seconds if new_receipts else 0.0,
        warnings=(
            *job.warnings,
            *_about_text(job),
            *_about_rows(new_receipts),
            *_about_files(job, done),
        ),
    )


def _about_text(job: HarvestJob) -> tuple[str, ...]:
    """A warning if there was no text for --extend: with a large goal only the end shows it."""
    goal = job.manifest.plan.goal
    if job.extend_to is None or goal is None or job.extend_to <= goal:
        return ()
    return ("--extend: the text has ended; there was nothing to go on with",)


def _about_rows(new_receipts: list[ShardReceipt]) -> tuple[str, ...]:
    """A warning for each hookpoint with rows that no SAE can be trained on."""
    counts: Counter[str] = Counter()
    for receipt in new_receipts:
        counts.update(receipt.non_finite)
    return tuple(
        f"{count:,} rows of {hookpoint} hold an infinity or NaN; they are kept, and training on "
        "them stops: another --model-dtype may help"
        for hookpoint, count in counts.items()
        if count
    )


def _about_files(job: HarvestJob, receipts: dict[int, ShardReceipt]) -> tuple[str, ...]:
    """A warning if files of shards that count as done are not there: rank 0 looks for all."""
    if job.ranks.rank > 0:
        return ()
    missing = Cache(job.root, job.manifest, receipts, None).missing_files()
    if not missing:
        return ()
    return (
        f"{len(missing)} files of published shards are missing or cut, such as {missing[0]}: "
        f"actcache verify {job.root} --repair",
    )


_State = tuple[HarvestJob, dict[int, ShardReceipt], CompletionMarker | None]
"""A job, the shards that are there, and the seal."""


def _as_published(job: HarvestJob) -> _State:
    """How things stand: other processes make shards, and may have extended the harvest."""
    manifest, done, end = receipts_module.read_cache_state(job.root)
    return dataclasses.replace(job, manifest=manifest), done, end


def _harvest_ranges(
    job: HarvestJob,
    done: dict[int, ShardReceipt],
    new_receipts: list[ShardReceipt],
    log: HarvestLog,
) -> _State:
    """Make what is missing up to the goal; then, with --extend, go on to the next."""
    part = count = 0
    while True:
        count += _make_shards(job, part, set(done), new_receipts, log)
        part = len(job.manifest.extensions) + 1
        job, done, end = _as_published(job)
        if part <= len(job.manifest.extensions):
            continue  # another process was here first and has extended the harvest
        further = _next_extension(job, count)
        end = _mark_complete(job, count, done, end, goes_on=further is not None)
        if further is None:
            return job, done, end
        publish_extension(further.root, further.manifest)
        job = further


def _next_extension(job: HarvestJob, count: int) -> HarvestJob | None:
    """The job extended as it is asked, or None: nothing is asked, or the text ends here."""
    goal = job.manifest.plan.goal
    if job.extend_to is None or count != goal or job.extend_to <= goal:
        return None
    following = next(job.sequences, None)
    if following is None:
        return None
    return dataclasses.replace(
        job,
        manifest=with_extension(job.manifest, job.extend_to),
        sequences=itertools.chain([following], job.sequences),
    )


def _make_shards(
    job: HarvestJob, part: int, done: set[int], new_receipts: list[ShardReceipt], log: HarvestLog
) -> int:
    """Make this process's missing shards from one part of the plan on.

    Returns:
        How many sequences there are in those parts.
    """
    manifest, ranks, plan = job.manifest, job.ranks, job.manifest.plan
    total = None
    if plan.shards is not None:
        numbers = range(plan.parts[part].first_shard, plan.shards)
        mine = (s for s in numbers if s % ranks.world_size == ranks.rank and s not in done)
        total = sum(map(plan.max_sequences, mine)) * manifest.identity.ctx_len
    bar = Progress("harvest", total, "tok", show=None if ranks.rank == 0 else False)
    count = 0
    # One shard is written, hashed and synced while the model fills the next.
    hookpoints = manifest.identity.hookpoints
    memory = itertools.cycle(
        [RowBuffers(), RowBuffers()]
    )  # of the shard being filled, of the one before
    with (
        ActivationCapture(job.model, hookpoints) as capture,
        WriterPool.threads(len(hookpoints)) as workers,
        ThreadPoolExecutor(max_workers=1) as publisher,
    ):
        writing: Future[ShardReceipt] | None = None
        for shard, group in plan.iter_shards(job.sequences, part):
            count += len(group)
            if shard % ranks.world_size != ranks.rank or shard in done:
                continue
            filled = capture_shard(job, shard, group, capture, bar, next(memory))
            if writing is not None:
                new_receipts.append(log.shard(writing.result()))
            writing = publisher.submit(publish_shard, job.root, manifest, filled, workers)
        if writing is not None:
            new_receipts.append(log.shard(writing.result()))
    bar.close()
    return count


def _mark_complete(
    job: HarvestJob,
    count: int,
    receipts: dict[int, ShardReceipt],
    before: CompletionMarker | None,
    *,
    goes_on: bool,
) -> CompletionMarker | None:
    """Write END.json if every shard is there; whichever process comes last does it."""
    manifest = job.manifest
    last = manifest.plan.shards_of(count) - 1
    if list(receipts) != list(range(last + 1)):
        return None
    if before is not None and (before.last_shard, before.sequences) == (last, count):
        return before  # why it ended then is not for a command with another --max-tokens to say
    reached = goes_on or (job.asked is not None and count >= job.asked)
    reason: Literal["goal", "text"] = "goal" if reached else "text"
    end = CompletionMarker(manifest.cache_id, last, count, reason, len(manifest.extensions))
    write_completion_marker(job.root, end)
    return end


class HarvestLog:
    """A line for each shard that one process publishes."""

    def __init__(self, root: Path, rank: int) -> None:
        self._path = root / "logs" / f"harvest-rank{rank}.jsonl"
        self._last = time.monotonic()

    def shard(self, receipt: ShardReceipt) -> ShardReceipt:
        """Note a published shard."""
        now = time.monotonic()
        entry = {
            "shard": receipt.shard,
            "rows": receipt.rows,
            "bytes": sum(file.bytes for file in receipt.files.values()),
            "seconds": round(now - self._last, 3),
            "host": socket.gethostname(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self._last = now
        line = json.dumps(entry) + "\n"
        try:
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("a") as file:
                file.write(line)
        except OSError as error:
            raise as_disk_full_error(error, self._path, len(line)) from error
        return receipt
