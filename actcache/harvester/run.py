"""Run a model once over a text and write its activations to a cache.

The process of rank r writes the shards s with s mod world_size = r and skips published ones. A
harvest that was killed, or that is resumed with another number of processes, therefore ends in the
same bytes.

Letters: S sequences of a shard, C context length, B batch size, N rows.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from actcache.cache.folder import TEXT, publish_extension
from actcache.cache.reader import Cache
from actcache.cache.sinks import as_lines, find_sinks
from actcache.cache.writer import ShardData, ShardText, WriterPool, publish_shard, row_norms
from actcache.config import HarvestConfig
from actcache.core.process import World
from actcache.core.progress import Progress
from actcache.data.left_out import by_reason
from actcache.data.sequences import Sequence
from actcache.errors import ConfigError, RestoreError
from actcache.filesystem.atomic import as_disk_full_error, open_log
from actcache.filesystem.rooted import remove_trees
from actcache.format.dtypes import RowBuffers
from actcache.format.manifest import Identity, kept_positions, with_extension
from actcache.format.receipts import (
    CompletionMarker,
    ShardReceipt,
    count_left_out,
    write_completion_marker,
)
from actcache.harvester.job import HarvestJob, prepare_job
from actcache.model.hooks import ActivationCapture
from actcache.storage import ROW_DTYPES, check_overflow


@dataclass(frozen=True)
class HarvestSummary:
    """Result of a harvest, printed in its last line and with --json."""

    cache: str
    cache_id: str
    rank: int
    """Rank of this process."""
    world_size: int
    """Number of processes."""
    complete: bool
    """Whether every shard of every rank is published."""
    reason: str
    """Why it is complete: goal or text; empty while other processes still write shards."""
    new_shards: int
    """Shards published by this process."""
    new_rows: int
    """Rows of these shards, at each hookpoint."""
    new_bytes: int
    """Bytes of these shards."""
    seconds: float
    """Duration without loading."""
    tokens_per_second: float
    """Tokens run through the model by this process per second."""
    renamed: dict[str, list[str]]
    """Names of other libraries, and layers counted from the end, with the hookpoints they mean."""
    left_out: dict[str, int]
    """Documents that could not be used, by reason, as far as shards are published."""
    warnings: tuple[str, ...]
    """Warnings for the user."""


def harvest(config: HarvestConfig) -> HarvestSummary:
    """Create, resume or extend the cache that a configuration describes.

    Raises:
        ActcacheError: the harvest cannot start or continue; shards published so far stay valid.
    """
    if not isinstance(config, HarvestConfig):
        raise ConfigError("config has another type", expected="HarvestConfig", got=type(config))
    job = prepare_job(config, World.from_environment())
    try:
        return run_job(job)
    finally:
        job.sequences.close()
        job.lock.release()


def run_job(job: HarvestJob) -> HarvestSummary:
    """Write the missing shards of a prepared harvest."""
    began = time.monotonic()
    log = HarvestLog(job.root, job.ranks.rank)
    for warning in job.warnings:
        log.add_warning(warning)
    marker = job.marker
    if marker is None or len(job.published) <= marker.last_shard or job.extend_to is not None:
        job = _harvest_ranges(job, log)
    if job.marker is not None:  # a command killed here, or that only counted, leaves its text
        job.sequences.close()
        remove_trees(job.root, TEXT)
    seconds = time.monotonic() - began
    if log.not_restored:
        raise _restore_error(log.not_restored)
    new_receipts, marker = log.receipts, job.marker
    tokens = sum(receipt.sequences for receipt in new_receipts) * job.manifest.identity.ctx_len
    return HarvestSummary(
        cache=str(job.root),
        cache_id=job.manifest.cache_id,
        rank=job.ranks.rank,
        world_size=job.ranks.world_size,
        complete=marker is not None,
        reason=marker.reason if marker is not None else "",
        new_shards=len(new_receipts),
        new_rows=sum(receipt.rows for receipt in new_receipts),
        new_bytes=sum(file.bytes for receipt in new_receipts for file in receipt.files.values()),
        seconds=seconds,
        tokens_per_second=tokens / seconds if new_receipts else 0.0,
        renamed=job.renamed,
        left_out=count_left_out(job.published.values()),
        warnings=(
            *job.warnings,
            *_text_warnings(job),
            *_left_out_warnings(job, log),
            *_row_warnings(new_receipts),
            *_file_warnings(job),
            *_sink_warnings(job),
        ),
    )


def _restore_error(errors: list[RestoreError]) -> RestoreError:
    """Combine the errors of all shards that could not be restored; the others are published."""
    first = errors[0]
    what = first.what
    if len(errors) > 1:
        what = f"{len(errors)} shards cannot be restored. The first of them: {what}"
    return RestoreError(what, expected=first.expected, got=first.got, remedy=first.remedy)


def _text_warnings(job: HarvestJob) -> tuple[str, ...]:
    """Warn, on rank 0, about the text; and if --extend found no more of it.

    A goal that is not counted shows that only at the end.
    """
    goal, warnings = job.manifest.plan.goal, job.text_warnings() if job.ranks.rank == 0 else ()
    if job.extend_to is None or goal is None or job.extend_to <= goal:
        return warnings
    return (
        *warnings,
        "--extend: the text has ended; there is nothing to extend the cache with",
    )


def _left_out_warnings(job: HarvestJob, log: HarvestLog) -> tuple[str, ...]:
    """Warn, on rank 0 and the last process to finish, about documents that could not be used."""
    counts = count_left_out(job.published.values())
    is_last = job.marker is not None and bool(log.receipts)
    if not counts or not (job.ranks.rank == 0 or is_last):
        return ()
    so_far = "" if job.marker is not None else " so far"
    first = (
        f"; the first of rank {job.ranks.rank}: {log.first_left_out}" if log.first_left_out else ""
    )
    total = sum(counts.values())
    return (
        f"{total:,} document{'s' if total > 1 else ''} could not be used and "
        f"{'were' if total > 1 else 'was'} left out{so_far} ({by_reason(counts)}): see "
        f"{job.root}/logs/left-out-rank*.jsonl{first}",
    )


def _row_warnings(new_receipts: list[ShardReceipt]) -> tuple[str, ...]:
    """Warn about each hookpoint with rows that hold an infinity or NaN."""
    counts: Counter[str] = Counter()
    for receipt in new_receipts:
        counts.update(receipt.non_finite)
    return tuple(
        f"{count:,} rows of {hookpoint} hold an infinity or NaN; they are kept, and training on "
        "them stops: another --model-dtype may help"
        for hookpoint, count in counts.items()
        if count
    )


def _file_warnings(job: HarvestJob) -> tuple[str, ...]:
    """Warn, on rank 0, about missing or truncated files of published shards."""
    if job.ranks.rank > 0:
        return ()
    missing = Cache(job.root, job.manifest, job.published, None).missing_files()
    if not missing:
        return ()
    return (
        f"{len(missing)} files of published shards are missing or cut, such as {missing[0]}: "
        f"actcache verify {job.root} --repair",
    )


def _sink_warnings(job: HarvestJob) -> tuple[str, ...]:
    """Warn, on rank 0, if a few rows of large norm hold much of the variance of a hookpoint."""
    if job.ranks.rank > 0 or not job.published:
        return ()
    return tuple(as_lines(find_sinks(Cache(job.root, job.manifest, job.published, None))))


def _harvest_ranges(job: HarvestJob, log: HarvestLog) -> HarvestJob:
    """Write the missing shards up to the goal; with --extend, extend the goal and continue."""
    number = 0
    while True:
        count = _make_shards(job, number, log)
        number = len(job.manifest.extensions) + 1
        job = job.reread()
        if number <= len(job.manifest.extensions):
            continue  # another process has already published the extension
        extended = _next_extension(job, count)
        marker = _mark_complete(job, count, is_goal=extended is not None)
        if extended is None:
            return dataclasses.replace(job, marker=marker)
        publish_extension(extended.root, extended.manifest)
        job = extended


def _next_extension(job: HarvestJob, count: int) -> HarvestJob | None:
    """Return the job with the extension of --extend, or None without one or without more text."""
    goal = job.manifest.plan.goal
    if job.extend_to is None or count != goal or job.extend_to <= goal:
        return None
    if not job.sequences.count(goal, 1):
        return None
    return dataclasses.replace(job, manifest=with_extension(job.manifest, job.extend_to))


def _make_shards(job: HarvestJob, number: int, log: HarvestLog) -> int:
    """Write this rank's missing shards, from the given shard range of the plan on.

    Returns:
        The number of sequences up to the goal, including published and other ranks' shards.
    """
    manifest, ranks, plan = job.manifest, job.ranks, job.manifest.plan
    identity = manifest.identity
    total, shards = None, plan.shards
    if shards is not None:
        numbers = range(plan.parts[number].first_shard, shards)
        mine = [s for s in numbers if s % ranks.world_size == ranks.rank and s not in job.published]
        total = sum(map(plan.max_sequences, mine)) * identity.ctx_len
    bar: Progress | None = None

    def advance(tokens: int, written: int) -> None:
        # Begun after the first batch, whose time includes the warm-up: the bar shows later rates.
        nonlocal bar
        if bar is None:
            show = None if ranks.rank == 0 else False
            bar = Progress("harvest", total, "tok", initial=tokens, show=show)
            resources.callback(bar.close)
        else:
            bar.advance(tokens, written)

    count = plan.parts[number].first_sequence
    # One shard is written, hashed and synced by threads while the model fills the next.
    with (
        ActivationCapture(job.model, identity.hookpoints) as capture,
        ExitStack() as resources,
        ThreadPoolExecutor(max_workers=1) as publisher,
    ):
        workers: WriterPool | None = None  # until there is something to write
        buffers = itertools.cycle([RowBuffers(), RowBuffers()])
        writing: Future[ShardReceipt] | None = None
        for shard in itertools.count(plan.parts[number].first_shard):
            most = plan.max_sequences(shard)
            sequences: list[Sequence] = []
            if shard in job.published:
                found = job.published[shard].sequences
            elif shard % ranks.world_size != ranks.rank:
                found = job.sequences.count(count, most)
            else:
                sequences = job.sequences.read(count, most)
                found = len(sequences)
            count += found
            if sequences:
                captured = capture_shard(job, shard, sequences, capture, advance, next(buffers))
                log.add_left_out(shard, sequences)
                if writing is not None:
                    log.add_result(writing)
                if workers is None:
                    workers = resources.enter_context(WriterPool.threads(len(identity.hookpoints)))
                writing = publisher.submit(publish_shard, job.root, manifest, captured, workers)
            if not most or found < most:
                break
        if writing is not None:
            log.add_result(writing)
    return count


def capture_shard(
    job: HarvestJob,
    shard: int,
    sequences: list[Sequence],
    capture: ActivationCapture,
    advance: Callable[[int, int], None],
    buffers: RowBuffers,
) -> ShardData:
    """Run the model over a shard's sequences and copy the rows that pass the token filters.

    After each batch `advance` is called with its tokens and the bytes of its rows.
    """
    identity = job.manifest.identity
    hookpoints, size = identity.hookpoints, identity.batch_size
    row_dtype = ROW_DTYPES[identity.dtype]
    text = ShardText(
        tokens=np.stack([sequence.tokens for sequence in sequences]),
        lengths=np.array([sequence.length for sequence in sequences], dtype=np.int32),
        documents=np.array([sequence.document for sequence in sequences], dtype=np.int64),
        starts=np.array([sequence.start for sequence in sequences], dtype=np.int64),
    )
    kept, dropped = kept_positions(identity, text.tokens, text.lengths)
    count = int(kept.sum())
    rows = {h.name: buffers.rows(h.name, count, h.width, row_dtype) for h in hookpoints}
    needs_norms = identity.max_norm_ratio is not None
    norms = {h.name: np.empty(count) for h in hookpoints if needs_norms}
    filled = 0
    for start in range(0, len(sequences), size):
        chosen = torch.from_numpy(np.flatnonzero(kept[start : start + size])).to(job.device)
        captured = capture.run(*_batch(identity, text, start, job.device), chosen)
        target = slice(filled, filled + len(chosen))
        for name, activations in captured.items():
            stored = row_dtype.from_torch(activations)
            rows[name][target] = stored
            if needs_norms:  # the norm filter needs the norms of the whole shard
                norms[name][target] = row_norms(activations.float().cpu().numpy())
            else:
                check_overflow(activations, stored, row_dtype, name)
        filled += len(chosen)
        written = len(chosen) * sum(row_dtype.row_bytes(h.width) for h in hookpoints)
        advance(min(size, len(sequences) - start) * identity.ctx_len, written)
    left_out = Counter(found.reason for sequence in sequences for found in sequence.left_out)
    return ShardData(shard, text, kept, dropped, rows, norms, dict(sorted(left_out.items())))


def _batch(
    identity: Identity, text: ShardText, start: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return token ids and attention mask of one forward pass, [B, C] each.

    A last batch with fewer sequences is padded to B: kernels may round differently for other
    shapes. With the pack pipeline there is no padding within sequences, and no mask.
    """
    shape = (identity.batch_size, identity.ctx_len)
    selected = slice(start, start + identity.batch_size)
    tokens = np.zeros(shape, dtype=np.int64)
    tokens[: len(text.tokens[selected])] = text.tokens[selected]
    ids = torch.from_numpy(tokens).to(device)
    if identity.pipeline == "pack":
        return ids, None
    mask = np.ones(shape, dtype=np.int64)  # 1 in unused rows: attention to no position gives NaN
    lengths = text.lengths[selected]
    mask[: len(lengths)] = np.arange(identity.ctx_len) < lengths[:, None]
    return ids, torch.from_numpy(mask).to(device)


def _mark_complete(job: HarvestJob, count: int, *, is_goal: bool) -> CompletionMarker | None:
    """Write END.json if every shard is published; the last process to finish does."""
    manifest, before = job.manifest, job.marker
    last = manifest.plan.shards_of(count) - 1
    if list(job.published) != list(range(last + 1)):
        return None
    if before is not None and (before.last_shard, before.sequences) == (last, count):
        return before  # its reason stays, even if this command has another --max-tokens
    reached = is_goal or (job.goal is not None and count >= job.goal)
    reason: Literal["goal", "text"] = "goal" if reached else "text"
    marker = CompletionMarker(manifest.cache_id, last, count, reason, len(manifest.extensions))
    write_completion_marker(job.root, manifest, marker)
    return marker


class HarvestLog:
    """Receipts of the shards that this process publishes, and a JSON line on disk for each.

    Warnings from before the first shard are in a file of their own.
    """

    def __init__(self, root: Path, rank: int) -> None:
        self.receipts: list[ShardReceipt] = []
        self.not_restored: list[RestoreError] = []
        self.first_left_out = ""
        """Description of the first document that was left out of this process's shards."""
        self._rank = rank
        self._path = root / "logs" / f"harvest-rank{rank}.jsonl"
        self._last = time.monotonic()

    def add_result(self, writing: Future[ShardReceipt]) -> None:
        """Wait for a shard and record it. One that cannot be restored is recorded as such."""
        try:
            self.add(writing.result())
        except RestoreError as error:
            self.not_restored.append(error)

    def add(self, receipt: ShardReceipt) -> None:
        """Record a published shard."""
        now = time.monotonic()
        entry = {
            "shard": receipt.shard,
            "rows": receipt.rows,
            "bytes": sum(file.bytes for file in receipt.files.values()),
            "seconds": round(now - self._last, 3),
            "host": socket.gethostname(),
            "time": _now(),
        }
        self._last = now
        self._write(self._path, entry)
        self.receipts.append(receipt)

    def add_left_out(self, shard: int, sequences: list[Sequence]) -> None:
        """Record the documents that were left out of a shard."""
        for found in (found for sequence in sequences for found in sequence.left_out):
            place = f" ({found.place})" if found.place else ""
            line = f"document {found.document}{place}: {found.detail}"
            self.first_left_out = self.first_left_out or line
            entry = {"shard": shard, **dataclasses.asdict(found), "time": _now()}
            self._write(self._path.with_name(f"left-out-rank{self._rank}.jsonl"), entry)

    def add_warning(self, text: str) -> None:
        """Record a warning from before the first shard."""
        entry = {"warning": text, "time": _now()}
        self._write(self._path.with_name(f"warnings-rank{self._rank}.jsonl"), entry)

    def _write(self, path: Path, entry: dict[str, Any]) -> None:
        line = json.dumps(entry) + "\n"
        try:
            path.parent.mkdir(exist_ok=True)
            with open_log(path) as file:
                file.write(line.encode())
        except OSError as error:
            raise as_disk_full_error(error, path, len(line)) from error


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
