"""How large a cache will be: every file of every shard, from shapes alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from actcache.config import HarvestConfig
from actcache.core.json_codec import to_json
from actcache.filesystem.atomic import FileDigest
from actcache.filesystem.paths import CachePathT
from actcache.format.manifest import MANIFEST, Hookpoint, Manifest
from actcache.format.receipts import END, CompletionMarker, ShardReceipt
from actcache.format.row_filters import FILTERS
from actcache.format.schema import statistics_tensors, token_tensors
from actcache.storage import BACKENDS, ROW_DTYPES
from actcache.storage import blosc as blosc_chunk
from actcache.storage import safetensors_io as safetensors_file

_BLOCK = 4096  # of most file systems


def shard_bytes(manifest: Manifest, shard: int, sequences: int, rows: int) -> dict[str, int]:
    """Bytes of every file of a shard, by its name in the receipt; the receipt itself as 'receipt'.

    Exact, but for compressed files, which are counted as if they were not, and for a few digits of
    the receipt.

    Args:
        manifest: of the cache.
        shard: the shard's number.
        sequences: in the shard.
        rows: at each hookpoint.
    """
    identity = manifest.identity
    sizes = BACKENDS[manifest.backend].sizes(manifest, rows)
    sizes["tokens"] = safetensors_file.size(token_tensors(sequences, identity.ctx_len, rows))
    sizes["stats"] = safetensors_file.size(statistics_tensors(identity.hookpoints))
    zeros = dict.fromkeys((h.name for h in identity.hookpoints), 0)
    receipt = ShardReceipt(
        cache_id=manifest.cache_id,
        shard=shard,
        first_sequence=manifest.plan.first_sequence(shard),
        sequences=sequences,
        rows=rows,
        dropped=dict.fromkeys(FILTERS, 0),
        non_finite=zeros,
        near_overflow=zeros,
        files={name: FileDigest(size, "0" * 32) for name, size in sizes.items()},
    )
    return sizes | {"receipt": len(to_json(receipt))}


def bytes_to_come(manifest: Manifest, published: Collection[int]) -> int:
    """The most that the planned shards can take which are not published yet.

    That is, if no filter leaves out a row and compression saves nothing; 0 if there is no goal.
    """
    known: dict[int, int] = {}
    total = 0
    for shard in range(manifest.plan.shards or 0):
        if shard not in published:
            count = manifest.plan.max_sequences(shard)
            if count not in known:
                rows = count * manifest.identity.rows_per_sequence
                known[count] = _on_disk(shard_bytes(manifest, shard, count, rows))
            total += known[count]
    return total + _on_disk(other_files(manifest)) if total else 0


def _on_disk(sizes: Mapping[str, int]) -> int:
    """Bytes that files of these sizes take: whole blocks of the file system."""
    return sum(-(-size // _BLOCK) * _BLOCK for size in sizes.values())


def other_files(manifest: Manifest) -> dict[str, int]:
    """Bytes of the files that belong to no shard, by name; the seal within a few digits."""
    root = Path()
    documents = BACKENDS[manifest.backend].metadata_files(root, manifest)
    end = CompletionMarker(manifest.cache_id, 0, manifest.planned_sequences or 1, "goal", 0)
    return {MANIFEST: len(to_json(manifest)), END: len(to_json(end))} | {
        str(path): len(accepted[-1]) for path, accepted in documents.items()
    }


def data_paths(root: CachePathT, manifest: Manifest, shard: int) -> dict[str, CachePathT]:
    """Where every file of a shard lies, by the name that its receipt has for it."""
    paths = BACKENDS[manifest.backend].files(root, manifest, shard)
    return paths | {"tokens": tokens_path(root, shard), "stats": statistics_path(root, shard)}


def tokens_path(root: CachePathT, shard: int) -> CachePathT:
    """Where a shard's token ids and row addresses lie."""
    return root / "tokens" / f"{shard:05d}.safetensors"


def statistics_path(root: CachePathT, shard: int) -> CachePathT:
    """Where a shard's statistics lie."""
    return root / "stats" / f"{shard:05d}.safetensors"


def choose_block_rows(hookpoints: tuple[Hookpoint, ...], dtype: str) -> int:
    """The power of two of rows nearest to 1 MiB of the widest hookpoint."""
    row = max(h.width for h in hookpoints) * ROW_DTYPES[dtype].itemsize
    below = 1 << max(0, (_BLOCK_BYTES // row).bit_length() - 1)
    return below if _BLOCK_BYTES - below * row <= 2 * below * row - _BLOCK_BYTES else 2 * below


_BLOCK_BYTES = 1 << 20


def sequences_per_shard(
    config: HarvestConfig, planned: int, hookpoints: tuple[Hookpoint, ...], dtype: str
) -> int:
    """Size of a shard by formula: a 128th of the harvest, in whole batches, of bounded bytes."""
    if config.shard_size is not None:
        return config.shard_size
    number = ROW_DTYPES[dtype].itemsize * (config.ctx_len - config.skip_positions)
    most = _MAX_SHARD_BYTES // (sum(h.width for h in hookpoints) * number)
    if config.compress != "none":
        most = min(most, blosc_chunk.MAX_BYTES // (max(h.width for h in hookpoints) * number))
    batches = -(-min(-(-planned // _SHARDS), max(1, most)) // config.batch_size)
    if batches * config.batch_size > most:
        batches -= 1
    return max(1, batches) * config.batch_size


_SHARDS = 128
_MAX_SHARD_BYTES = 4 << 30
