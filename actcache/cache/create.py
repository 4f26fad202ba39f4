"""Create a cache folder: room on the disk, the manifest, and its extensions."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from actcache.cache.layout import bytes_to_come
from actcache.cache.retraction import drop_restored_records, retracted_shards
from actcache.core.file_lock import LOCK, DirectoryLock
from actcache.core.json_codec import to_json
from actcache.core.progress import format_bytes
from actcache.errors import CacheMismatchError, ConfigError, DiskFullError
from actcache.filesystem.atomic import remove_partials, write_atomic
from actcache.format import receipts as receipts_module
from actcache.format.manifest import (
    MANIFEST,
    Manifest,
    differences,
    extension_path,
    read_manifest,
    with_extension,
)
from actcache.format.receipts import END, ShardReceipt
from actcache.storage import BACKENDS, ROW_DTYPES
from actcache.storage import blosc as blosc_chunk


def create_or_resume(
    root: Path,
    manifest: Manifest,
    lock: DirectoryLock,
    ask: Callable[[Path, Manifest, Collection[int]], None],
    *,
    extend: bool = False,
) -> None:
    """Write the manifest, or check that the one there asks for the same bytes.

    Args:
        root: folder of the cache.
        manifest: what it is going to hold.
        lock: taken here, and held.
        ask: raises unless there is room for all but the shards that are published, which it gets.
        extend: the harvest may have a larger goal than the one that is there.

    Raises:
        CacheMismatchError: the folder holds another cache.
        CacheBusyError: someone is at work there.
    """
    receipts = _published(root, manifest, extend)
    coming = read_manifest(root) if receipts else manifest
    if extend and _goes_beyond(manifest, coming):
        coming = with_extension(coming, manifest.plan.goal)
    ask(root, coming, receipts)
    lock.acquire()
    # Again: before the lock was ours, anyone could lay another manifest or publish.
    drop_restored_records(root, _published(root, manifest, extend))
    remove_partials(root)
    if (root / MANIFEST).exists() and _different(manifest, read_manifest(root), extend):
        _delete_manifest(root)
    if not (root / MANIFEST).exists():
        write_atomic(root / MANIFEST, [to_json(manifest)])
    existing = read_manifest(root)
    BACKENDS[existing.backend].initialize(root, existing)


def _published(root: Path, manifest: Manifest, extend: bool) -> dict[int, ShardReceipt]:
    """Shards that are there already, by number.

    Raises:
        CacheMismatchError: the folder holds another cache.
    """
    if not (root / MANIFEST).exists():
        return {}
    existing, receipts, _ = receipts_module.read_cache_state(root)
    sealed = (root / receipts_module.FOLDER / END).exists()  # however many extensions it counts
    kept = receipts or retracted_shards(root) or sealed or existing.extensions
    if kept and (different := _different(manifest, existing, extend)):
        remedy = "choose another --out, or repeat the options that it was made with"
        if manifest.cache_id == existing.cache_id and _goes_beyond(manifest, existing):
            remedy += "; or add --extend, to go on with more tokens"
        raise CacheMismatchError(
            f"{root} holds another cache ({existing.model} on {existing.dataset})",
            expected=f"id {manifest.cache_id}",
            got="\n            ".join([f"id {existing.cache_id}", *different]),
            remedy=remedy,
        )
    return receipts


def _delete_manifest(root: Path) -> None:
    """Remove the manifest of a harvest that published nothing: there is nothing to protect.

    Such is left when memory runs out at the first batch; its options are the ones to change.
    """
    existing = read_manifest(root)
    for path in (
        *BACKENDS[existing.backend].metadata_files(root, existing),
        root / MANIFEST,
    ):
        path.unlink(missing_ok=True)


def _different(manifest: Manifest, existing: Manifest, extend: bool) -> list[str]:
    """What keeps a harvest from going on in the folder; with --extend, another goal does not."""
    if extend and existing.plan.goal is not None:
        manifest = dataclasses.replace(manifest, planned_sequences=existing.plan.goal)
    return differences(manifest, existing)


def require_cache_folder(root: Path) -> None:
    """Raise `CacheMismatchError` if a folder holds anything but a cache, whole or begun."""
    if root.is_file():
        raise CacheMismatchError(f"--out {root} is a file", expected="a folder, or nothing yet")
    if not root.is_dir() or (root / MANIFEST).exists():
        return
    # A harvest that was killed before or while it wrote the manifest leaves these: they are ours.
    ours = (LOCK.parts[0], f".{MANIFEST}.")
    if any(not path.name.startswith(ours) for path in root.iterdir()):
        raise CacheMismatchError(
            f"--out {root} holds other things and no {MANIFEST}",
            expected="an empty folder, or a cache",
            remedy="choose another folder",
        )


def _goes_beyond(manifest: Manifest, existing: Manifest) -> bool:
    """Whether a manifest has a larger goal than the one in the folder."""
    ours, theirs = manifest.plan.goal, existing.plan.goal
    return theirs is not None and (ours is None or ours > theirs)


def require_free(root: Path, needed: int, work: str, remedy: str) -> None:
    """Raise `DiskFullError` unless the disk of a folder, made or not, has `needed` bytes free."""
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
    """Ask, before starting, whether the rest of the harvest fits on the disk.

    Args:
        root: folder of the cache.
        manifest: what will be harvested.
        published: shards that are there already.

    Raises:
        DiskFullError: it does not fit.
    """
    needed = bytes_to_come(manifest, published)
    remedy = "fewer --max-tokens or hookpoints, a smaller --dtype, or another --out"
    require_free(root, needed, "harvest", remedy)


def require_chunks(manifest: Manifest) -> None:
    """Refuse shards of more bytes than the compressor takes at once; raises `ConfigError`."""
    if manifest.compression == "none":
        return
    identity = manifest.identity
    row = max(h.width for h in identity.hookpoints) * ROW_DTYPES[identity.dtype].itemsize
    size = manifest.shard_rows * row
    if size > blosc_chunk.MAX_BYTES:
        most = blosc_chunk.MAX_BYTES // (identity.rows_per_sequence * row)
        raise ConfigError(
            "a shard of one hookpoint is too large for --compress zstd",
            expected=f"<= {blosc_chunk.MAX_BYTES:,} bytes",
            got=f"{size:,} bytes in {manifest.sequences_per_shard} sequences",
            remedy=f"harvest with --shard-size {most} or less" if most else "--compress none",
        )


def publish_extension(root: Path, manifest: Manifest) -> None:
    """Publish the last extension of a manifest. From here on, earlier seals seal nothing.

    Several processes of one harvest may do so at once: they write the same bytes. Killed before the
    backend's documents are renewed, the next harvest renews them.
    """
    last = manifest.extensions[-1]
    write_atomic(extension_path(root, last.number), [to_json(last)])
    BACKENDS[manifest.backend].initialize(root, manifest)
