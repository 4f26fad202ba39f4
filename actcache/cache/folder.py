"""The folder of a cache: names, tensors and sizes of its files, and its creation.

Letters: S sequences of a shard, C context length, N rows, D width.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from actcache.config import HarvestConfig
from actcache.core.json_codec import to_json
from actcache.core.progress import format_bytes
from actcache.errors import CacheMismatchError, ConfigError, DiskFullError, FileSystemError
from actcache.filesystem.atomic import FileDigest, remove_partials, write_atomic
from actcache.filesystem.lock import LOCK, DirectoryLock
from actcache.filesystem.paths import CachePathT
from actcache.filesystem.rooted import is_stray, remove_trees, require_plain, require_plain_entries
from actcache.format.manifest import (
    EXTENSIONS,
    FILTERS,
    MANIFEST,
    SEALED_FROM,
    Hookpoint,
    Manifest,
    differences,
    extension_path,
    read_manifest,
    with_extension,
)
from actcache.format.receipts import (
    END,
    FOLDER,
    CacheState,
    CompletionMarker,
    ShardReceipt,
    drop_restored_records,
    read_cache_state,
    retracted_shards,
)
from actcache.format.statistics import NORM_BINS
from actcache.storage import BACKENDS, ROW_DTYPES, blosc, safetensors_io
from actcache.storage.safetensors_io import Spec

RESTORED = ".restored-"
"""Prefix of the folder below which a retracted shard is written until it is compared."""
TEXT = ".text-"
"""Prefix of the folder of tokenised documents that the processes of a harvest exchange."""
_BLOCK = 4096  # bytes of a block of most file systems
_BLOCK_BYTES = 1 << 20
_SHARDS = 128
_LONGEST = "n/" * 128  # about as long as the path of any file within a cache
_OURS = re.compile(
    r"[0-9]{5,}(\..*)?|[0-9]+|c|(END|zarr)\.json|(harvest|warnings)-rank[0-9]+\.jsonl"
)
_MAX_SHARD_BYTES = 4 << 30


def data_paths(root: CachePathT, manifest: Manifest, shard: int) -> dict[str, CachePathT]:
    """Return the paths of all files of a shard, by their logical names in the receipt."""
    paths = BACKENDS[manifest.backend].files(root, manifest, shard)
    return paths | {"tokens": tokens_path(root, shard), "stats": statistics_path(root, shard)}


def tokens_path(root: CachePathT, shard: int) -> CachePathT:
    """Return the path of a shard's token ids and row addresses."""
    return root / "tokens" / f"{shard:05d}.safetensors"


def statistics_path(root: CachePathT, shard: int) -> CachePathT:
    """Return the path of a shard's statistics."""
    return root / "stats" / f"{shard:05d}.safetensors"


def token_tensors(sequences: int, ctx_len: int, rows: int) -> dict[str, Spec]:
    """Describe the tensors of a shard's text file."""
    ids, count, row = (sequences, ctx_len), (sequences,), (rows,)
    return {
        "tokens": (ids, "<i4", "I32"),  # [S, C]
        "lengths": (count, "<i4", "I32"),  # [S]
        "documents": (count, "<i8", "I64"),  # [S]
        "starts": (count, "<i8", "I64"),  # [S]
        "row_sequence": (row, "<i4", "I32"),  # [N]
        "row_position": (row, "<i4", "I32"),  # [N]
    }


def statistics_tensors(hookpoints: Sequence[Hookpoint]) -> dict[str, Spec]:
    """Describe the tensors of a shard's statistics file."""
    specs: dict[str, Spec] = {}
    for point in hookpoints:
        for name in ("sum", "sum_squares", "abs_max"):
            specs[f"{point.name}/{name}"] = ((point.width,), "<f8", "F64")  # [D]
        specs[f"{point.name}/norm_sum_max"] = ((2,), "<f8", "F64")
        specs[f"{point.name}/norm_histogram"] = ((NORM_BINS,), "<i8", "I64")
    return specs


def shard_bytes(manifest: Manifest, shard: int, sequences: int, rows: int) -> dict[str, int]:
    """Compute the bytes of every file of a shard, by logical name; the receipt's as 'receipt'.

    Exact except for the receipt (a few digits) and compressed files (counted uncompressed).

    Args:
        manifest: manifest of the cache.
        shard: number of the shard.
        sequences: sequences in the shard.
        rows: rows at each hookpoint.
    """
    identity = manifest.identity
    tokens = token_tensors(sequences, identity.ctx_len, rows)
    statistics = statistics_tensors(identity.hookpoints)
    sizes = BACKENDS[manifest.backend].sizes(manifest, rows)
    sizes |= {"tokens": safetensors_io.size(tokens), "stats": safetensors_io.size(statistics)}
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
    return sizes | {"receipt": len(to_json(receipt, sealed=manifest.format_version >= SEALED_FROM))}


def bytes_to_come(manifest: Manifest, published: Collection[int]) -> int:
    """Compute an upper bound on the disk space of the planned shards that are not published.

    It assumes that no filter drops a row and that compression saves nothing; 0 without a goal.
    """
    plan, total = manifest.plan, 0
    to_come = sorted({*range(plan.shards or 0)}.difference(published))
    for sequences, shards in Counter(map(plan.max_sequences, to_come)).items():
        rows = sequences * manifest.identity.rows_per_sequence
        total += shards * _on_disk(shard_bytes(manifest, to_come[-1], sequences, rows))
    return total + _on_disk(other_files(manifest)) if total else 0


def _on_disk(sizes: Mapping[str, int]) -> int:
    """Round sizes up to whole blocks of the file system and add them."""
    return sum(-(-size // _BLOCK) * _BLOCK for size in sizes.values())


def other_files(manifest: Manifest) -> dict[str, int]:
    """Compute the bytes of the files that belong to no shard (the seal's within a few digits)."""
    root = Path()
    documents = BACKENDS[manifest.backend].metadata_files(root, manifest)
    end = CompletionMarker(manifest.cache_id, 0, manifest.planned_sequences or 1, "goal", 0)
    sealed = manifest.format_version >= SEALED_FROM
    own = {MANIFEST: to_json(manifest, sealed=sealed), END: to_json(end, sealed=sealed)}
    return {name: len(text) for name, text in own.items()} | {
        str(path): len(accepted[-1]) for path, accepted in documents.items()
    }


def choose_block_rows(hookpoints: tuple[Hookpoint, ...], dtype: str) -> int:
    """Return the power of two of rows that is nearest to 1 MiB of the widest hookpoint."""
    row = max(h.width for h in hookpoints) * ROW_DTYPES[dtype].itemsize
    below = 1 << max(0, (_BLOCK_BYTES // row).bit_length() - 1)
    return below if _BLOCK_BYTES - below * row <= 2 * below * row - _BLOCK_BYTES else 2 * below


def sequences_per_shard(
    config: HarvestConfig, planned: int, hookpoints: tuple[Hookpoint, ...], dtype: str
) -> int:
    """Return the default shard size: 1/128 of the harvest, in whole batches, at most 4 GiB."""
    if config.shard_size is not None:
        return config.shard_size
    number = ROW_DTYPES[dtype].itemsize * (config.ctx_len - config.skip_positions)
    most = _MAX_SHARD_BYTES // (sum(h.width for h in hookpoints) * number)
    if config.compress != "none":
        most = min(most, blosc.MAX_BYTES // (max(h.width for h in hookpoints) * number))
    batches = -(-min(-(-planned // _SHARDS), max(1, most)) // config.batch_size)
    if batches * config.batch_size > most:
        batches -= 1
    return max(1, batches) * config.batch_size


def create_or_resume(
    root: Path,
    manifest: Manifest,
    lock: DirectoryLock,
    check_room: Callable[[Path, Manifest, Collection[int]], None],
    *,
    extend: bool = False,
) -> CacheState:
    """Write the manifest, or check that the existing one describes the same bytes.

    Args:
        root: folder of the cache.
        manifest: manifest of the harvest or conversion.
        lock: lock of the folder; acquired here and left held.
        check_room: called with the published shards; raises unless the rest fits on the disk.
        extend: allow a larger goal than that of the existing cache.

    Returns:
        Manifest, receipts and seal of the folder, which no other process changes any more.

    Raises:
        CacheMismatchError: the folder holds another cache.
        CacheBusyError: another process holds the lock.
    """
    existing, receipts, _ = _state(root, manifest, extend) or (manifest, {}, None)
    coming = existing if receipts else manifest
    if extend and _goes_beyond(manifest, coming):
        coming = with_extension(coming, manifest.plan.goal)
    check_room(root, coming, receipts)
    lock.acquire()
    remove_partials(root)
    remove_trees(root, RESTORED)
    # Check again: until the lock was acquired, another process could write or publish.
    state = _state(root, manifest, extend)
    if state is not None:
        existing, receipts, _ = state
        drop_restored_records(root, receipts)
        if different_fields(manifest, existing, extend=extend):
            # A harvest that published nothing left it, such as one that ran out of memory at its
            # first batch; the next attempt needs other options.
            documents = BACKENDS[existing.backend].metadata_files(root, existing)
            for path in (*documents, root / MANIFEST):
                path.unlink(missing_ok=True)
            state = None
    if state is None:
        write_atomic(
            root / MANIFEST, [to_json(manifest, sealed=manifest.format_version >= SEALED_FROM)]
        )
        state = manifest.truncated_to(0), {}, None
    existing, *_ = state
    BACKENDS[existing.backend].initialize(root, existing)
    return state


def _state(root: Path, manifest: Manifest, extend: bool) -> CacheState | None:
    """Read the folder's state, None without a manifest.

    Raises:
        CacheMismatchError: it is another cache's.
    """
    if not (root / MANIFEST).exists():
        return None
    existing, receipts, marker = read_cache_state(root)
    sealed = (root / FOLDER / END).exists()  # a void seal counts too
    kept = receipts or retracted_shards(root) or sealed or existing.extensions
    if kept and (different := different_fields(manifest, existing, extend=extend)):
        remedy = "choose another --out, or repeat the options that it was made with"
        if manifest.cache_id == existing.cache_id and _goes_beyond(manifest, existing):
            remedy += "; or add --extend, to continue with more tokens"
        raise CacheMismatchError(
            f"{root} holds another cache ({existing.model} on {existing.dataset})",
            expected=f"id {manifest.cache_id}",
            got="\n            ".join([f"id {existing.cache_id}", *different]),
            remedy=remedy,
        )
    return existing, receipts, marker


def different_fields(manifest: Manifest, existing: Manifest, *, extend: bool) -> list[str]:
    """List the fields that prevent resuming in the folder; with --extend, the goal may differ."""
    if extend and existing.plan.goal is not None:
        manifest = dataclasses.replace(manifest, planned_sequences=existing.plan.goal)
    return differences(manifest, existing)


def require_cache_folder(root: Path) -> None:
    """Check a folder before the work: it must be missing, empty, or a cache without links.

    Raises:
        CacheMismatchError: it is a file or below one, or holds other files.
        FileSystemError: it may not be written to, or its name is too long.
        FormatError: a file or folder that a harvest reads or writes is a link or a device, or the
            manifest is damaged.
    """
    place = _nearest_existing(root)
    if place.is_symlink() and not place.exists():
        raise CacheMismatchError(
            f"--out {root}: {place} is a link that leads nowhere",
            expected="a folder, or nothing yet",
            remedy=f"create the folder that it points to: {place.readlink()}",
        )
    if not place.is_dir():
        raise CacheMismatchError(
            f"--out {root} cannot be a folder: {place} is a file or device",
            expected="a folder, or nothing yet",
            remedy="choose another --out",
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise FileSystemError(
            f"--out {root} cannot be written to: {place} is read-only for this user",
            remedy="choose another --out, or change the permissions of that folder",
        )
    if not root.is_dir():
        return
    require_plain(root, [MANIFEST, str(LOCK)], [EXTENSIONS])
    if (root / MANIFEST).exists():
        require_plain_files(root, read_manifest(root))
        return
    # The lock is left by a harvest that was killed before it wrote the manifest.
    if any(path.name != LOCK.parts[0] and not is_stray(path.name) for path in root.iterdir()):
        raise CacheMismatchError(
            f"--out {root} holds other files and no {MANIFEST}",
            expected="an empty folder, or a cache",
            remedy="choose another folder",
        )


def _nearest_existing(root: Path) -> Path:
    """Return a folder, or the nearest one above it that exists, even if it is no folder."""
    place = Path(root).absolute() / _LONGEST
    while True:
        try:
            place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            place = place.parent
        except OSError as error:  # a name that is too long, or a folder that may not be read
            raise FileSystemError(
                f"--out {root} cannot be a folder",
                got=error.strerror,
                remedy="choose another --out, such as one with a shorter name",
            ) from error
        else:
            return place


def require_plain_files(root: Path, manifest: Manifest) -> None:
    """Raise `FormatError` if a file of a cache, or its folder, is a link or a device."""
    paths = {*data_paths(root, manifest, 0).values(), extension_path(root, 1), root / LOCK}
    paths |= {root / FOLDER / END, *BACKENDS[manifest.backend].metadata_files(root, manifest)}
    require_plain(root, sorted(str(path.relative_to(root)) for path in paths))
    for folder in sorted({path.parent for path in paths}):
        require_plain_entries(folder, _OURS)


def _goes_beyond(manifest: Manifest, existing: Manifest) -> bool:
    """Return whether a manifest has a larger goal than the existing one."""
    goal, previous = manifest.plan.goal, existing.plan.goal
    return previous is not None and (goal is None or goal > previous)


def require_free(root: Path, needed: int, work: str, remedy: str) -> None:
    """Raise `DiskFullError` unless the disk of a folder, existing or not, has `needed` bytes."""
    folder = root
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"the {work} does not fit on the disk of {root}",
            expected=f"{format_bytes(needed)} free",
            got=f"{format_bytes(free)} free",
            remedy=remedy,
        )


def require_room(root: Path, manifest: Manifest, published: Collection[int]) -> None:
    """Raise `DiskFullError` unless the shards that are not `published` fit on the disk."""
    remedy = "fewer --max-tokens or hookpoints, a smaller --dtype, or another --out"
    require_free(root, bytes_to_come(manifest, published), "harvest", remedy)


def require_chunks(manifest: Manifest) -> None:
    """Raise `ConfigError` if a shard exceeds the largest chunk that blosc can compress."""
    if manifest.compression == "none":
        return
    identity = manifest.identity
    row = max(h.width for h in identity.hookpoints) * ROW_DTYPES[identity.dtype].itemsize
    size = manifest.shard_rows * row
    if size > blosc.MAX_BYTES:
        most = blosc.MAX_BYTES // (identity.rows_per_sequence * row)
        raise ConfigError(
            "a shard of one hookpoint is too large for --compress zstd",
            expected=f"<= {blosc.MAX_BYTES:,} bytes",
            got=f"{size:,} bytes in {manifest.sequences_per_shard} sequences",
            remedy=f"harvest with --shard-size {most} or less" if most else "--compress none",
        )


def publish_extension(root: Path, manifest: Manifest) -> None:
    """Publish the last extension of a manifest, which makes an earlier seal void.

    Several ranks may do so at once, as they write the same bytes. If it is killed before the
    backend metadata is rewritten, the next harvest rewrites it.
    """
    last = manifest.extensions[-1]
    text = to_json(last, sealed=manifest.format_version >= SEALED_FROM)
    write_atomic(extension_path(root, last.number), [text])
    BACKENDS[manifest.backend].initialize(root, manifest)


def discard(files: Mapping[str, Path]) -> None:
    """Delete the files of a shard that has no receipt."""
    for file in files.values():
        file.unlink(missing_ok=True)
