"""Publish one shard: activations of every hookpoint, tokens, statistics, and last the receipt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache import retraction, rng
from actcache.manifest import Manifest
from actcache.receipt import ShardReceipt, publish_receipt
from actcache.statistics import Statistics, compute
from actcache.storage import BACKENDS, CODECS, Array, safetensors_file

Ints = NDArray[np.int32]


def tokens_path(root: Path, shard: int) -> Path:
    """Where a shard's token ids and row addresses lie."""
    return root / "tokens" / f"{shard:05d}.safetensors"


def statistics_path(root: Path, shard: int) -> Path:
    """Where a shard's statistics lie."""
    return root / "stats" / f"{shard:05d}.safetensors"


def data_paths(root: Path, manifest: Manifest, shard: int) -> dict[str, Path]:
    """Where every file of a shard lies, by the name that its receipt has for it."""
    backend = BACKENDS[manifest.backend]
    names = [hookpoint.name for hookpoint in manifest.identity.hookpoints]
    paths = {f"activations/{name}": backend.path(root, name, shard) for name in names}
    return paths | {"tokens": tokens_path(root, shard), "stats": statistics_path(root, shard)}


@dataclass(frozen=True)
class RowLayout:
    """Which token position each row of a shard is: equal at every hookpoint.

    C is the context length, S the shard's sequences, N its rows.
    """

    sequence: Ints
    """Sequence within the shard. [N]"""
    position: Ints
    """Position within the sequence. [N]"""
    row_of: NDArray[np.int64]
    """Row of a kept (sequence, position), numbered in natural order. [N]"""

    @classmethod
    def of(cls, manifest: Manifest, shard: int, sequences: int) -> RowLayout:
        """Shuffle (or not) the rows of a shard that holds `sequences` sequences."""
        identity = manifest.identity
        kept = identity.rows_per_sequence
        natural = np.arange(sequences * kept, dtype=np.int64)
        if identity.row_order == "shuffled":
            order = rng.stream("rows in shard", identity.seed, shard).permutation(natural)
        else:
            order = natural
        row_of = np.empty_like(natural)
        row_of[order] = natural
        return cls(
            sequence=(order // kept).astype(np.int32),
            position=(order % kept + identity.skip_positions).astype(np.int32),
            row_of=row_of,
        )


@dataclass(frozen=True)
class FilledShard:
    """A shard in memory, ready to be published."""

    shard: int
    tokens: Ints
    """Token ids. [S, C]"""
    layout: RowLayout
    rows: Mapping[str, Array]
    """Rows as stored, by hookpoint. Each [N, D]"""


def publish_shard(root: Path, manifest: Manifest, filled: FilledShard) -> ShardReceipt:
    """Write a shard's files, then its receipt. Killed anywhere before, there is no shard.

    Raises:
        DiskFullError: no room; the cache stays valid without this shard.
        CacheMismatchError: the shard was retracted and this is not what it was; nothing of it is
            left behind.
    """
    identity, shard, layout = manifest.identity, filled.shard, filled.layout
    codec, backend = CODECS[identity.dtype], BACKENDS[manifest.backend]
    statistics = {name: compute(rows, codec) for name, rows in filled.rows.items()}
    files = {
        f"activations/{name}": backend.write(root, manifest, name, shard, rows)
        for name, rows in filled.rows.items()
    }
    files["tokens"] = safetensors_file.write(
        tokens_path(root, shard),
        {
            "tokens": (filled.tokens, None),
            "row_sequence": (layout.sequence, None),
            "row_position": (layout.position, None),
        },
    )
    files["stats"] = safetensors_file.write(
        statistics_path(root, shard),
        {
            f"{name}/{key}": (array, None)
            for name, statistic in statistics.items()
            for key, array in statistics_arrays(statistic).items()
        },
    )
    sequences = len(filled.tokens)
    receipt = ShardReceipt(
        cache_id=manifest.cache_id,
        shard=shard,
        first_sequence=shard * manifest.sequences_per_shard,
        sequences=sequences,
        rows=len(layout.sequence),
        dropped={"skip_positions": sequences * identity.skip_positions},
        non_finite={name: statistic.non_finite for name, statistic in statistics.items()},
        files=files,
    )
    paths = data_paths(root, manifest, shard)
    restored = retraction.require_restored(root, manifest, receipt, paths)
    publish_receipt(root, receipt)
    if restored:
        retraction.forget(root, shard)
    return receipt


def statistics_arrays(statistics: Statistics) -> dict[str, Array]:
    """The tensors of one hookpoint's statistics, as they lie in `stats/`."""
    return {
        "sum": statistics.total,
        "sum_squares": statistics.total_squares,
        "norm_sum_max": np.array([statistics.norm_total, statistics.norm_max]),
        "norm_histogram": statistics.norm_histogram,
    }
