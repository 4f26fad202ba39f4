"""Publish one shard: filter and shuffle its rows, write its files, and last its receipt.

Letters: S sequences of a shard, C context length, N rows, n rows before the norm filter, D width.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Executor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.cache.folder import statistics_path, tokens_path
from actcache.cache.restore import publish_restored, write_folder
from actcache.core import rng
from actcache.filesystem.atomic import FileDigest
from actcache.format.dtypes import RowBuffers
from actcache.format.manifest import Identity, Manifest
from actcache.format.receipts import ShardReceipt, publish_receipt
from actcache.format.statistics import Statistics, merge, parts
from actcache.storage import (
    BACKENDS,
    ROW_DTYPES,
    Array,
    RowDtype,
    StoredRows,
    check_infinite,
    safetensors_io,
)

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Mask = NDArray[np.bool_]
Norms = NDArray[np.float64]


@dataclass(frozen=True)
class ShardText:
    """The text of a shard."""

    tokens: Ints
    """Token ids, padding included. [S, C]"""
    lengths: Ints
    """Tokens before the padding. [S]"""
    documents: Longs
    """Number, in harvest order, of the document in which each sequence begins. [S]"""
    starts: Longs
    """Offset, in tokens, of each sequence's first token in that document. [S]"""


@dataclass(frozen=True)
class ShardData:
    """A captured shard in memory, ready to be published."""

    shard: int
    text: ShardText
    kept: Mask
    """True at positions that have a row, before the norm filter. [S, C]"""
    dropped: Mapping[str, int]
    """Number of positions without a row, by filter."""
    rows: Mapping[str, StoredRows]
    """Rows as stored, by hookpoint, ordered by sequence, then position. n each"""
    norms: Mapping[str, Norms]
    """Norms of the captured rows, by hookpoint; empty without --max-norm-ratio. [n]"""
    left_out: dict[str, int] = field(default_factory=dict)
    """Documents left out, by reason."""


@dataclass(frozen=True)
class RowLayout:
    """Token position of each row of a shard, equal at every hookpoint."""

    sequence: Ints
    """Sequence within the shard. [N]"""
    position: Ints
    """Position within the sequence. [N]"""
    source: Longs
    """Index into the captured rows. [N]"""

    @classmethod
    def of(cls, identity: Identity, shard: int, kept: Mask, outliers: Mask) -> RowLayout:
        """Order the rows that are not outliers: shuffled, or in sequence order.

        Args:
            identity: holds the seed and the row order.
            shard: number of the shard.
            kept: True at positions that have a row. [S, C], n of them
            outliers: True for rows that the norm filter drops. [n]
        """
        remaining = np.flatnonzero(~outliers)
        source = remaining
        if identity.row_order == "shuffled":
            order = rng.stream("rows in shard", identity.seed, shard).permutation(len(remaining))
            source = remaining[order]
        sequence, position = (index.astype(np.int32)[source] for index in np.nonzero(kept))
        return cls(sequence, position, source)


def publish_shard(
    root: Path, manifest: Manifest, filled: ShardData, workers: WriterPool | None = None
) -> ShardReceipt:
    """Write a shard's files, then its receipt, which makes the shard exist.

    Args:
        root: folder of the cache.
        manifest: manifest of the cache.
        filled: the captured shard.
        workers: threads and buffers; by default the caller's thread does everything.

    Raises:
        DiskFullError: the disk is full; the cache stays valid without this shard.
        ConfigError: rows that the norm filter keeps do not fit float16.
        RestoreError: the shard was retracted and the new files differ; nothing was replaced.
    """
    identity, shard = manifest.identity, filled.shard
    row_dtype, backend = ROW_DTYPES[identity.dtype], BACKENDS[manifest.backend]
    outliers = np.zeros(int(filled.kept.sum()), dtype=bool)
    if identity.max_norm_ratio is not None:
        outliers = norm_outliers(filled.norms, identity.max_norm_ratio)
    layout = RowLayout.of(identity, shard, filled.kept, outliers)
    pool = workers or WriterPool()
    files: dict[str, FileDigest] = {}
    statistics: dict[str, Statistics] = {}
    folder = write_folder(root, manifest, shard)

    def write_text() -> None:
        rows = {"row_sequence": layout.sequence, "row_position": layout.position}
        arrays: dict[str, Array] = vars(filled.text) | rows
        tensors = {name: (array, None) for name, array in arrays.items()}
        files["tokens"] = safetensors_io.write(tokens_path(folder, shard), tensors)

    def write_rows(name: str) -> None:
        rows = pool.gather(filled.rows[name], layout.source, row_dtype)
        if identity.max_norm_ratio is not None:  # capture did not check rows that it may drop
            check_infinite(rows, row_dtype, name)
        found = parts(rows, row_dtype, pool.blocks)  # runs while the file is written
        files.update(backend.write(folder, manifest, name, shard, rows))
        statistics[name] = merge(found)

    pool.do([*(partial(write_rows, name) for name in filled.rows), write_text])
    in_order = {name: statistics[name] for name in filled.rows}
    files["stats"] = write_statistics(folder, shard, in_order)
    receipt = ShardReceipt(
        cache_id=manifest.cache_id,
        shard=shard,
        first_sequence=manifest.plan.first_sequence(shard),
        sequences=len(filled.text.tokens),
        rows=len(layout.source),
        dropped={**filled.dropped, "max_norm_ratio": int(outliers.sum())},
        non_finite={name: statistic.non_finite for name, statistic in statistics.items()},
        near_overflow={name: statistic.near_overflow for name, statistic in statistics.items()},
        files=files,
        left_out=filled.left_out,
    )
    publish_written(root, manifest, receipt, folder)
    return receipt


def publish_written(root: Path, manifest: Manifest, receipt: ShardReceipt, folder: Path) -> None:
    """Publish a shard whose files were written below `folder`, the result of `write_folder`."""
    if folder == root:
        publish_receipt(root, manifest, receipt)
    else:
        publish_restored(root, manifest, receipt, folder)


def write_statistics(root: Path, shard: int, statistics: Mapping[str, Statistics]) -> FileDigest:
    """Write the statistics file of a shard, hookpoints in the manifest's order."""
    return safetensors_io.write(
        statistics_path(root, shard),
        {
            f"{name}/{key}": (array, None)
            for name, statistic in statistics.items()
            for key, array in {
                "sum": statistic.total,
                "sum_squares": statistic.total_squares,
                "abs_max": statistic.abs_max,
                "norm_sum_max": np.array([statistic.norm_total, statistic.norm_max]),
                "norm_histogram": statistic.norm_histogram,
            }.items()
        },
    )


Mapper = Callable[..., Iterable[Any]]
"""`map`, or an executor's `map`."""


class WriterPool:
    """Thread pools that write a shard's files and compute its statistics.

    Without executors, all tasks run one after another in the caller's thread.
    """

    def __init__(self, files: Executor | None = None, blocks: Mapper = map) -> None:
        self._files = files
        self.blocks = blocks
        """Map function for the statistics of blocks of rows."""
        self._scratch = threading.local()

    @classmethod
    @contextmanager
    def threads(cls, hookpoints: int) -> Iterator[WriterPool]:
        """Create pools sized for this many hookpoints and this machine's cores."""
        with (
            ThreadPoolExecutor(files_at_once(hookpoints), "files") as files,
            ThreadPoolExecutor(_most(), "blocks") as blocks,
        ):
            yield cls(files, blocks.map)

    def do(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Run tasks and wait for them. After an error, tasks that have not started are dropped."""
        if self._files is None:
            for task in tasks:
                task()
            return
        futures = [self._files.submit(task) for task in tasks]
        wait(futures, return_when=FIRST_EXCEPTION)
        started = [future for future in futures if not future.cancel()]
        wait(started)
        for future in started:
            future.result()

    def gather(
        self, rows: StoredRows, source: NDArray[np.int64], row_dtype: RowDtype
    ) -> StoredRows:
        """Return `rows[source]` in a per-thread buffer, valid until this thread's next call."""
        if not hasattr(self._scratch, "memory"):
            self._scratch.memory = RowBuffers()
        memory: RowBuffers = self._scratch.memory
        width = rows.values.shape[1]
        out = memory.rows(width, len(source), width, row_dtype)
        rows.take(source, out)
        return out


def files_at_once(hookpoints: int) -> int:
    """Return how many hookpoints are permuted and written concurrently, each in its own buffer."""
    return min(hookpoints, _most())


def _most() -> int:
    return max(2, min(4, len(os.sched_getaffinity(0)) // 2))


def norm_outliers(norms: Mapping[str, Norms], ratio: float) -> Mask:
    """Mark rows whose norm, at any hookpoint, exceeds `ratio` times the median there.

    A row that holds an infinity or NaN is marked. The median is that of the finite rows.

    Args:
        norms: Euclidean norms by hookpoint. Each [n]
        ratio: largest accepted multiple of the median.

    Returns:
        Mask. [n]
    """
    over = np.zeros(len(next(iter(norms.values()))), dtype=bool)
    for norm in norms.values():
        finite = norm[np.isfinite(norm)]
        median = float(np.median(finite)) if len(finite) else 0.0
        over |= ~(norm <= ratio * median)  # NaN compares false
    return over


def row_norms(rows: NDArray[np.float32]) -> Norms:
    """Compute the Euclidean norm of each row [n, D], summed in float64 by one thread. [n]"""
    wide = rows.astype(np.float64)
    norms: Norms = np.sqrt(np.square(wide, out=wide).sum(axis=1))
    return norms
