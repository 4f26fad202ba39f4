"""A cache of random rows, written as a harvest writes them, without a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from common import synthetic_manifest

from actcache.cache.writer import ShardData, ShardText, publish_shard
from actcache.core.json_codec import to_json
from actcache.filesystem.atomic import write_atomic
from actcache.format.manifest import Hookpoint, kept_positions
from actcache.format.receipts import CompletionMarker, write_completion_marker
from actcache.storage import BACKENDS, StoredRows

HOOKPOINT = "layers.0"
CTX = 512


def write_cache(root: Path, backend: str, rows: int, width: int, shards: int = 128) -> None:
    """Write one hookpoint in bfloat16, in sequences of 512 rows, to fresh files.

    Args:
        root: a folder that does not exist.
        backend: memmap or zarr.
        rows: all together, rounded down to whole shards.
        width: of a row.
        shards: how many.
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
    write_atomic(root / "manifest.json", [to_json(manifest, sealed=True)])
    BACKENDS[backend].initialize(root, manifest)
    count = sequences * CTX
    for shard in range(shards):
        numbers = np.arange(sequences, dtype=np.int64)
        lengths = np.full(sequences, CTX, dtype=np.int32)
        text = ShardText(np.zeros((sequences, CTX), np.int32), lengths, numbers, numbers * 0)
        kept, dropped = kept_positions(manifest.identity, text.tokens, text.lengths)
        random = np.random.default_rng(shard).integers(0, 2**15, (count, width), dtype=np.uint16)
        values = (random & 0x80FF) | 0x3F00  # bfloat16 numbers between 0.5 and 2
        stored = {HOOKPOINT: StoredRows({"activations": values.astype("<u2")})}
        publish_shard(root, manifest, ShardData(shard, text, kept, dropped, stored, {}))
    end = CompletionMarker(manifest.cache_id, shards - 1, sequences * shards, "goal", 0)
    write_completion_marker(root, manifest, end)
