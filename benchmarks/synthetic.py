"""Caches of random or given rows, written as a harvest writes them, without a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import synthetic_manifest
from torch import Tensor

from actcache.cache.writer import ShardData, ShardText, publish_shard
from actcache.core.json_codec import to_json
from actcache.filesystem.atomic import write_atomic
from actcache.format.dtypes import ROW_DTYPES
from actcache.format.manifest import Hookpoint, Manifest, kept_positions
from actcache.format.receipts import CompletionMarker, write_completion_marker
from actcache.storage import BACKENDS, StoredRows

HOOKPOINT = "layers.0"
CTX = 512


def write_cache(
    root: Path, backend: str, rows: int, width: int, shards: int = 128, massive: int = 0
) -> None:
    """Write one hookpoint in bfloat16, in sequences of 512 rows, to fresh files.

    Args:
        root: a folder that does not exist.
        backend: memmap or zarr.
        rows: all together, rounded down to whole shards.
        width: of a row.
        shards: how many.
        massive: the first so many shards hold a row of 128 times the norm.
    """
    sequences = max(1, rows // CTX // shards)
    manifest = replace(
        synthetic_manifest(
            (Hookpoint(HOOKPOINT, width),),
            sequences_per_shard=sequences,
            shards=shards,
            ctx_len=CTX,
            skip_positions=0,
        ),
        backend=backend,  # type: ignore[arg-type]
    )
    _begin(root, manifest)
    for shard in range(shards):
        random = np.random.default_rng(shard)
        bits = random.integers(0, 2**15, (sequences * CTX, width), dtype=np.uint16)
        values = (bits & 0x80FF) | 0x3F00  # bfloat16 numbers between 0.5 and 2
        values[:1] += (7 << 7) * (shard < massive)
        stored = {HOOKPOINT: StoredRows({"activations": values.astype("<u2")})}
        _publish(root, manifest, shard, stored)
    _end(root, manifest)


def write_rows(root: Path, shards: int, rows: Iterator[Mapping[str, Tensor]]) -> None:
    """Write given rows in float32 to fresh files.

    Args:
        root: a folder that does not exist.
        shards: how many.
        rows: of each shard, by hookpoint: [N, D]. N is the same for all; what is beyond whole
            sequences of 512 is left out.
    """
    manifest: Manifest | None = None
    for shard, of_shard in enumerate(rows):
        if manifest is None:
            manifest = synthetic_manifest(
                tuple(Hookpoint(name, x.shape[1]) for name, x in of_shard.items()),
                sequences_per_shard=len(next(iter(of_shard.values()))) // CTX,
                shards=shards,
                ctx_len=CTX,
                skip_positions=0,
                dtype="float32",
            )
            _begin(root, manifest)
        kept = manifest.sequences_per_shard * CTX
        float32 = ROW_DTYPES["float32"]
        stored = {name: float32.from_torch(x[:kept]) for name, x in of_shard.items()}
        _publish(root, manifest, shard, stored)
    assert manifest is not None
    _end(root, manifest)


def sparse_rows(shards: int, rows: int, width: int, features: int) -> Iterator[Tensor]:
    """Rows of shards, [rows, width]: each a sum of some 8 features and a little noise, plus a mean.

    How often a feature occurs falls with its number, as 1 / (number + 8): some are rare.
    """
    start = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(features, width, generator=start))
    mean = 2 * torch.randn(width, generator=start) / math.sqrt(width)
    often = 1 / (torch.arange(features) + 8.0)
    often *= 8 / often.sum()
    for shard in range(shards):
        random = torch.Generator().manual_seed(1 + shard)
        strengths = 0.5 + torch.rand(rows, features, generator=random)
        present = torch.rand(rows, features, generator=random) < often
        noise = 0.1 * torch.randn(rows, width, generator=random) / math.sqrt(width)
        yield (strengths * present) @ directions + mean + noise


def _begin(root: Path, manifest: Manifest) -> None:
    write_atomic(root / "manifest.json", [to_json(manifest, sealed=True)])
    BACKENDS[manifest.backend].initialize(root, manifest)


def _publish(root: Path, manifest: Manifest, shard: int, stored: dict[str, StoredRows]) -> None:
    """Publish a full shard of rows, with tokens 0."""
    count, ctx_len = manifest.sequences_per_shard, manifest.identity.ctx_len
    numbers = np.arange(count, dtype=np.int64)
    lengths = np.full(count, ctx_len, dtype=np.int32)
    text = ShardText(np.zeros((count, ctx_len), np.int32), lengths, numbers, numbers * 0)
    kept, dropped = kept_positions(manifest.identity, text.tokens, text.lengths)
    publish_shard(root, manifest, ShardData(shard, text, kept, dropped, stored, {}))


def _end(root: Path, manifest: Manifest) -> None:
    total = manifest.planned_sequences
    assert total is not None
    shards = total // manifest.sequences_per_shard
    end = CompletionMarker(manifest.cache_id, shards - 1, total, "goal", 0)
    write_completion_marker(root, manifest, end)
