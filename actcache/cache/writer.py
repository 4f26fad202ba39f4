"""Publish one shard: activations of every hookpoint, tokens, statistics, and last the receipt."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Executor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.cache import retraction
from actcache.cache.layout import data_paths, statistics_path, tokens_path
from actcache.core import rng
from actcache.filesystem.atomic import FileDigest
from actcache.format.manifest import Identity, Manifest
from actcache.format.receipts import ShardReceipt, publish_receipt
from actcache.format.row_filters import Mask, Norms, norm_outliers
from actcache.format.statistics import Statistics, merge, parts
from actcache.storage import BACKENDS, ROW_DTYPES, Array, RowDtype, StoredRows, check_infinite
from actcache.storage import safetensors_io as safetensors_file

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]


@dataclass(frozen=True)
class ShardText:
    """The text of a shard: S sequences of context length C."""

    tokens: Ints
    """Token ids, padding included. [S, C]"""
    lengths: Ints
    """Tokens before the padding. [S]"""
    documents: Longs
    """Number of the document in which a sequence begins, in the order they were taken. [S]"""
    starts: Longs
    """Token of that document with which it begins. [S]"""


@dataclass(frozen=True)
class ShardData:
    """A shard in memory, ready to be published. n rows, before filters that look at norms."""

    shard: int
    text: ShardText
    kept: Mask
    """Positions that have a row here. [S, C]"""
    dropped: Mapping[str, int]
    """Positions that have none, by filter."""
    rows: Mapping[str, StoredRows]
    """Rows as stored, by hookpoint, in natural order: by sequence, then position. n each"""
    norms: Mapping[str, Norms]
    """Norms of the rows as they were captured, by hookpoint; empty unless a filter asks. [n]"""


@dataclass(frozen=True)
class RowLayout:
    """Which token position each row of a shard is: equal at every hookpoint. N rows."""

    sequence: Ints
    """Sequence within the shard. [N]"""
    position: Ints
    """Position within the sequence. [N]"""
    source: Longs
    """Which of the rows in natural order it is. [N]"""

    @classmethod
    def of(cls, identity: Identity, shard: int, kept: Mask, outliers: Mask) -> RowLayout:
        """Shuffle (or not) the rows that remain.

        Args:
            identity: says seed and order.
            shard: the shard's number.
            kept: positions that have a row. [S, C], n of them
            outliers: which of those rows are left out after all. [n]
        """
        remaining = np.flatnonzero(~outliers)
        source = remaining
        if identity.row_order == "shuffled":
            order = rng.stream("rows in shard", identity.seed, shard).permutation(len(remaining))
            source = remaining[order]
        sequence, position = (place.astype(np.int32)[source] for place in np.nonzero(kept))
        return cls(sequence, position, source)


def publish_shard(
    root: Path, manifest: Manifest, filled: ShardData, workers: WriterPool | None = None
) -> ShardReceipt:
    """Write a shard's files, then its receipt. Killed anywhere before, there is no shard.

    Args:
        root: folder of the cache.
        manifest: its manifest.
        filled: the shard.
        workers: who does it; by default the caller's thread.

    Raises:
        DiskFullError: no room; the cache stays valid without this shard.
        ConfigError: rows that the norm filter keeps do not fit float16.
        CacheMismatchError: the shard was retracted and this is not what it was; nothing of it is
            left behind.
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

    def write_text() -> None:
        files["tokens"] = _write_text(tokens_path(root, shard), filled.text, layout)

    def write_rows(name: str) -> None:
        rows = pool.gather(filled.rows[name], layout.source, row_dtype)
        if identity.max_norm_ratio is not None:  # which leaves out what is not finite
            check_infinite(rows, row_dtype, name)
        found = parts(rows, row_dtype, pool.blocks)  # while the file is written
        files.update(backend.write(root, manifest, name, shard, rows))
        statistics[name] = merge(found)

    pool.do([*(partial(write_rows, name) for name in filled.rows), write_text])
    in_order = {name: statistics[name] for name in filled.rows}
    files["stats"] = write_statistics(root, shard, in_order)
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
    )
    publish_checked_receipt(root, manifest, receipt)
    return receipt


def publish_checked_receipt(root: Path, manifest: Manifest, receipt: ShardReceipt) -> None:
    """Publish the receipt of a shard whose files are written; see `publish_shard`."""
    paths = data_paths(root, manifest, receipt.shard)
    restored = retraction.check_restored(root, manifest, receipt, paths)
    publish_receipt(root, receipt)
    if restored:
        retraction.forget(root, receipt.shard)


def write_statistics(root: Path, shard: int, statistics: Mapping[str, Statistics]) -> FileDigest:
    """Write the statistics of a shard, by hookpoint in the manifest's order."""
    return safetensors_file.write(
        statistics_path(root, shard),
        {
            f"{name}/{key}": (array, None)
            for name, statistic in statistics.items()
            for key, array in statistics_arrays(statistic).items()
        },
    )


def _write_text(path: Path, text: ShardText, layout: RowLayout) -> FileDigest:
    return safetensors_file.write(
        path,
        {
            "tokens": (text.tokens, None),
            "lengths": (text.lengths, None),
            "documents": (text.documents, None),
            "starts": (text.starts, None),
            "row_sequence": (layout.sequence, None),
            "row_position": (layout.position, None),
        },
    )


def statistics_arrays(statistics: Statistics) -> dict[str, Array]:
    """The tensors of one hookpoint's statistics, as they lie in `stats/`."""
    return {
        "sum": statistics.total,
        "sum_squares": statistics.total_squares,
        "abs_max": statistics.abs_max,
        "norm_sum_max": np.array([statistics.norm_total, statistics.norm_max]),
        "norm_histogram": statistics.norm_histogram,
    }


Mapper = Callable[..., Iterable[Any]]
"""`map`, or something like it."""


class WriterPool:
    """How the parts of a shard are done: by default one after the other, in the caller's thread."""

    def __init__(self, files: Executor | None = None, blocks: Mapper = map) -> None:
        self._files = files
        self.blocks = blocks
        """For blocks of rows, whose statistics are taken while the hookpoint is written."""
        self._scratch = threading.local()

    @classmethod
    @contextmanager
    def threads(cls, hookpoints: int) -> Iterator[WriterPool]:
        """As many as are of use to this many hookpoints on this machine."""
        with (
            ThreadPoolExecutor(files_at_once(hookpoints), "files") as files,
            ThreadPoolExecutor(_most(), "blocks") as blocks,
        ):
            yield cls(files, blocks.map)

    def do(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Write files. After an error no other is begun; then, as ever, all have ended."""
        if self._files is None:
            for task in tasks:
                task()
            return
        futures = [self._files.submit(task) for task in tasks]
        wait(futures, return_when=FIRST_EXCEPTION)
        begun = [future for future in futures if not future.cancel()]
        wait(begun)
        for future in begun:
            future.result()

    def gather(
        self, rows: StoredRows, source: NDArray[np.int64], row_dtype: RowDtype
    ) -> StoredRows:
        """`rows[source]`, which is valid until this thread gathers again."""
        if not hasattr(self._scratch, "memory"):
            self._scratch.memory = RowBuffers()
        memory: RowBuffers = self._scratch.memory
        width = rows.values.shape[1]
        out = memory.rows(width, len(source), width, row_dtype)
        rows.take(source, out)
        return out


def files_at_once(hookpoints: int) -> int:
    """Hookpoints that are permuted and written side by side, each in memory of its own."""
    return min(hookpoints, _most())


def _most() -> int:
    return max(2, min(4, len(os.sched_getaffinity(0)) // 2))


class RowBuffers:
    """Memory for rows, used again and again: fresh pages cost as much as filling them."""

    def __init__(self) -> None:
        self._rows: dict[Hashable, StoredRows] = {}

    def rows(self, owner: Hashable, count: int, width: int, row_dtype: RowDtype) -> StoredRows:
        """Room for `count` rows; what the owner had there before is lost.

        Args:
            owner: whose they are; always of this width and type.
            count: how many rows.
            width: numbers of a row.
            row_dtype: their type.
        """
        found = self._rows.get(owner)
        if found is None or len(found) < count:
            found = self._rows[owner] = row_dtype.empty(count, width)
        return found[:count]
