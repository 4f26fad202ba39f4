"""Run a model once over a text and leave its activations in a cache.

Every process makes the shards s with s mod world_size = rank, from sequences that it makes for
itself; what is published already is skipped. So a harvest that was killed, or is run again with
another number of processes, ends in the same bytes.
"""

from __future__ import annotations

import itertools
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from actcache import receipt as receipts_module
from actcache.atomic import tell_full_disk
from actcache.config import HarvestConfig
from actcache.filters import kept_positions, row_norms
from actcache.hooks import Capture
from actcache.preparation import Job, prepare
from actcache.progress import Progress
from actcache.ranks import Ranks
from actcache.reader import Cache
from actcache.receipt import EndReceipt, ShardReceipt, publish_end
from actcache.storage import CODECS, refuse_overflow
from actcache.tokens import Sequence
from actcache.workers import Memory, Workers
from actcache.writer import FilledShard, ShardText, publish_shard


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
    manifest = job.manifest
    done = receipts_module.read_receipts(job.root, manifest)
    end = receipts_module.read_end(job.root, manifest.cache_id)
    began = time.monotonic()
    log = _Log(job.root, job.ranks.rank)
    fresh: list[ShardReceipt] = []
    if end is None or len(done) <= end.last_shard:
        count = _make_shards(job, set(done), fresh, log)
        done = receipts_module.read_receipts(job.root, manifest)  # with those of other processes
        end = _seal(job, count, done)
    seconds = time.monotonic() - began
    tokens = sum(receipt.sequences for receipt in fresh) * manifest.identity.ctx_len
    return HarvestSummary(
        cache=str(job.root),
        cache_id=manifest.cache_id,
        rank=job.ranks.rank,
        world_size=job.ranks.world_size,
        complete=end is not None,
        reason=end.reason if end is not None else "",
        new_shards=len(fresh),
        new_rows=sum(receipt.rows for receipt in fresh),
        new_bytes=sum(file.bytes for receipt in fresh for file in receipt.files.values()),
        seconds=seconds,
        tokens_per_second=tokens / seconds if fresh else 0.0,
        warnings=(*job.warnings, *_about_rows(fresh), *_about_files(job, done)),
    )


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


def _make_shards(job: Job, done: set[int], fresh: list[ShardReceipt], log: _Log) -> int:
    """Make this process's missing shards; returns how many sequences there are in all."""
    manifest, ranks = job.manifest, job.ranks
    size, goal = manifest.sequences_per_shard, manifest.planned_sequences
    total = None
    if goal is not None:
        mine = range(ranks.rank, -(-goal // size), ranks.world_size)
        total = sum(min(size, goal - shard * size) for shard in mine if shard not in done)
        total *= manifest.identity.ctx_len
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
        for shard, group in _shard_groups(job.sequences, size, goal):
            count += len(group)
            if shard % ranks.world_size != ranks.rank or shard in done:
                continue
            filled = _fill(job, shard, group, capture, bar, next(memory))
            if writing is not None:
                fresh.append(log.shard(writing.result()))
            writing = publisher.submit(publish_shard, job.root, manifest, filled, workers)
        if writing is not None:
            fresh.append(log.shard(writing.result()))
    bar.close()
    return count


def _shard_groups(
    stream: Iterator[Sequence], size: int, goal: int | None
) -> Iterator[tuple[int, list[Sequence]]]:
    """(shard, its sequences), up to the goal or the end of the text."""
    shard = 0
    group: list[Sequence] = []
    for count, sequence in enumerate(itertools.islice(stream, goal), start=1):
        group.append(sequence)
        if len(group) == size or count == goal:
            yield shard, group
            shard, group = shard + 1, []
    if group:
        yield shard, group


def _fill(
    job: Job, shard: int, group: list[Sequence], capture: Capture, bar: Progress, memory: Memory
) -> FilledShard:
    """Run the model over a shard's sequences and keep the rows that the filters leave."""
    identity = job.manifest.identity
    codec, size = CODECS[identity.dtype], identity.batch_size
    text = _text(group)
    kept, dropped = kept_positions(identity, text.tokens, text.lengths)
    count = int(kept.sum())
    rows = {h.name: memory.rows(h.name, count, h.width, codec) for h in identity.hookpoints}
    asks_norms = identity.max_norm_ratio is not None
    norms = {h.name: np.empty(count) for h in identity.hookpoints if asks_norms}
    filled = 0
    for start in range(0, len(group), size):
        chosen = torch.from_numpy(np.flatnonzero(kept[start : start + size])).to(job.device)
        captured = capture.run(*_batch(job, text, start), chosen)
        place = slice(filled, filled + len(chosen))
        for name, found in captured.items():
            stored = codec.from_torch(found)
            refuse_overflow(found, stored, codec, name)
            rows[name][place] = stored
            if asks_norms:
                norms[name][place] = row_norms(found.float().cpu().numpy())
        filled += len(chosen)
        written = len(chosen) * sum(codec.row_bytes(h.width) for h in identity.hookpoints)
        bar.advance(min(size, len(group) - start) * identity.ctx_len, written)
    return FilledShard(shard, text, kept, dropped, rows, norms)


def _text(group: list[Sequence]) -> ShardText:
    return ShardText(
        tokens=np.stack([sequence.tokens for sequence in group]),
        lengths=np.array([sequence.length for sequence in group], dtype=np.int32),
        documents=np.array([sequence.document for sequence in group], dtype=np.int64),
        starts=np.array([sequence.start for sequence in group], dtype=np.int64),
    )


def _batch(job: Job, text: ShardText, start: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids of one forward pass, and the mask that hides padding where there can be any.

    Always of the same shape, whatever is left: kernels may round differently at another.
    """
    identity = job.manifest.identity
    shape = (identity.batch_size, identity.ctx_len)
    part = slice(start, start + identity.batch_size)
    tokens = np.zeros(shape, dtype=np.int64)
    tokens[: len(text.tokens[part])] = text.tokens[part]
    ids = torch.from_numpy(tokens).to(job.device)
    if identity.pipeline == "pack":
        return ids, None
    mask = np.ones(shape, dtype=np.int64)  # where no sequence is left: attention to nothing is NaN
    lengths = text.lengths[part]
    mask[: len(lengths)] = np.arange(identity.ctx_len) < lengths[:, None]
    return ids, torch.from_numpy(mask).to(job.device)


def _seal(job: Job, count: int, receipts: dict[int, ShardReceipt]) -> EndReceipt | None:
    """Write END.json if every shard is there; whichever process comes last does it."""
    last = -(-count // job.manifest.sequences_per_shard) - 1
    if list(receipts) != list(range(last + 1)):
        return None
    reason: Literal["goal", "text"] = "goal" if count == job.asked else "text"
    end = EndReceipt(job.manifest.cache_id, last, count, reason)
    publish_end(job.root, end)
    return end


class _Log:
    """What varies from run to run, under `logs/` and nowhere else."""

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
