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

from actcache.cache.create import publish_extension
from actcache.cache.reader import Cache
from actcache.cache.writer import Memory, Workers, publish_shard
from actcache.config import HarvestConfig
from actcache.core.distributed import Ranks
from actcache.core.progress import Progress
from actcache.filesystem.atomic import tell_full_disk
from actcache.format import receipts as receipts_module
from actcache.format.manifest import extended
from actcache.format.receipts import EndReceipt, ShardReceipt, publish_end
from actcache.harvester.capture_shard import fill_shard
from actcache.harvester.job import Job, prepare
from actcache.model.hooks import Capture


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
    job = prepare(config, Ranks.from_environment())
    try:
        return carry_out(job)
    finally:
        job.lock.release()


def carry_out(job: Job) -> HarvestSummary:
    """Make what is missing of a prepared harvest."""
    job, done, end = _as_published(job)
    began = time.monotonic()
    log = HarvestLog(job.root, job.ranks.rank)
    fresh: list[ShardReceipt] = []
    if end is None or len(done) <= end.last_shard or job.extend_to is not None:
        job, done, end = _go_through(job, done, fresh, log)
    seconds = time.monotonic() - began
    tokens = sum(receipt.sequences for receipt in fresh) * job.manifest.identity.ctx_len
    return HarvestSummary(
        cache=str(job.root),
        cache_id=job.manifest.cache_id,
        rank=job.ranks.rank,
        world_size=job.ranks.world_size,
        complete=end is not None,
        reason=end.reason if end is not None else "",
        new_shards=len(fresh),
        new_rows=sum(receipt.rows for receipt in fresh),
        new_bytes=sum(file.bytes for receipt in fresh for file in receipt.files.values()),
        seconds=seconds,
        tokens_per_second=tokens / seconds if fresh else 0.0,
        warnings=(
            *job.warnings,
            *_about_text(job),
            *_about_rows(fresh),
            *_about_files(job, done),
        ),
    )


def _about_text(job: Job) -> tuple[str, ...]:
    """A warning if there was no text for --extend: with a large goal only the end shows it."""
    goal = job.manifest.plan.goal
    if job.extend_to is None or goal is None or job.extend_to <= goal:
        return ()
    return ("--extend: the text has ended; there was nothing to go on with",)


def _about_rows(fresh: list[ShardReceipt]) -> tuple[str, ...]:
    """A warning for each hookpoint with rows that no SAE can be trained on."""
    counts: Counter[str] = Counter()
    for receipt in fresh:
        counts.update(receipt.non_finite)
    return tuple(
        f"{count:,} rows of {hookpoint} hold an infinity or NaN; they are kept, and training on "
        "them stops: another --model-dtype may help"
        for hookpoint, count in counts.items()
        if count
    )


def _about_files(job: Job, receipts: dict[int, ShardReceipt]) -> tuple[str, ...]:
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


_State = tuple[Job, dict[int, ShardReceipt], EndReceipt | None]
"""A job, the shards that are there, and the seal."""


def _as_published(job: Job) -> _State:
    """How things stand: other processes make shards, and may have extended the harvest."""
    manifest, done, end = receipts_module.read_published(job.root)
    return dataclasses.replace(job, manifest=manifest), done, end


def _go_through(
    job: Job, done: dict[int, ShardReceipt], fresh: list[ShardReceipt], log: HarvestLog
) -> _State:
    """Make what is missing up to the goal; then, with --extend, go on to the next."""
    part = count = 0
    while True:
        count += _make_shards(job, part, set(done), fresh, log)
        part = len(job.manifest.extensions) + 1
        job, done, end = _as_published(job)
        if part <= len(job.manifest.extensions):
            continue  # another process was here first and has extended the harvest
        further = _further(job, count)
        end = _seal(job, count, done, end, goes_on=further is not None)
        if further is None:
            return job, done, end
        publish_extension(further.root, further.manifest)
        job = further


def _further(job: Job, count: int) -> Job | None:
    """The job extended as it is asked, or None: nothing is asked, or the text ends here."""
    goal = job.manifest.plan.goal
    if job.extend_to is None or count != goal or job.extend_to <= goal:
        return None
    following = next(job.sequences, None)
    if following is None:
        return None
    return dataclasses.replace(
        job,
        manifest=extended(job.manifest, job.extend_to),
        sequences=itertools.chain([following], job.sequences),
    )


def _make_shards(
    job: Job, part: int, done: set[int], fresh: list[ShardReceipt], log: HarvestLog
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
        total = sum(map(plan.most_sequences, mine)) * manifest.identity.ctx_len
    bar = Progress("harvest", total, "tok", show=None if ranks.rank == 0 else False)
    count = 0
    # One shard is written, hashed and synced while the model fills the next.
    hookpoints = manifest.identity.hookpoints
    memory = itertools.cycle([Memory(), Memory()])  # of the shard being filled, of the one before
    with (
        Capture(job.model, hookpoints) as capture,
        Workers.threads(len(hookpoints)) as workers,
        ThreadPoolExecutor(max_workers=1) as publisher,
    ):
        writing: Future[ShardReceipt] | None = None
        for shard, group in plan.groups(job.sequences, part):
            count += len(group)
            if shard % ranks.world_size != ranks.rank or shard in done:
                continue
            filled = fill_shard(job, shard, group, capture, bar, next(memory))
            if writing is not None:
                fresh.append(log.shard(writing.result()))
            writing = publisher.submit(publish_shard, job.root, manifest, filled, workers)
        if writing is not None:
            fresh.append(log.shard(writing.result()))
    bar.close()
    return count


def _seal(
    job: Job,
    count: int,
    receipts: dict[int, ShardReceipt],
    before: EndReceipt | None,
    *,
    goes_on: bool,
) -> EndReceipt | None:
    """Write END.json if every shard is there; whichever process comes last does it."""
    manifest = job.manifest
    last = manifest.plan.shards_of(count) - 1
    if list(receipts) != list(range(last + 1)):
        return None
    if before is not None and (before.last_shard, before.sequences) == (last, count):
        return before  # why it ended then is not for a command with another --max-tokens to say
    reached = goes_on or (job.asked is not None and count >= job.asked)
    reason: Literal["goal", "text"] = "goal" if reached else "text"
    end = EndReceipt(manifest.cache_id, last, count, reason, len(manifest.extensions))
    publish_end(job.root, end)
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
            raise tell_full_disk(error, self._path, len(line)) from error
        return receipt
