"""Retract damaged shards, so that the next harvest writes them, and only them, again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from actcache.cache.folder import data_paths, discard
from actcache.cache.verify import SEAL, Finding, Verification
from actcache.core.json_codec import to_json
from actcache.errors import CorruptShardError, FormatError
from actcache.filesystem.atomic import DirectoryLock, digest_file, fsync_dir, rooted, write_atomic
from actcache.format.manifest import Manifest, read_manifest
from actcache.format.receipts import (
    FOLDER,
    Retraction,
    drop_restored_records,
    read_receipt,
    receipt_files,
    receipt_path,
    retraction_path,
)
from actcache.storage import BACKENDS


def retract_damaged(found: Verification) -> list[int]:
    """Retract every damaged shard of a verified cache.

    Returns:
        The shards that were retracted by this call.

    Raises:
        CorruptShardError: a file is damaged that no harvest can write again; nothing was changed.
        CacheBusyError: a harvest is running in the cache; nothing was changed.
    """
    root = rooted(found.cache)
    strays = {f"{FOLDER}/{p.name}" for n, p in receipt_files(root) if p != receipt_path(root, n)}
    made_anew = {SEAL, *strays, *_document_names(root)}
    for damage in found.damages:
        made_by_harvests = damage.shard is not None or damage.file in made_anew
        if not made_by_harvests or (root / damage.file).is_dir():
            raise CorruptShardError(
                f"{root / damage.file} cannot be repaired",
                expected=damage.expected,
                got=damage.got,
                remedy="restore it from a copy, or harvest into another folder",
            )
    lock = DirectoryLock(root)
    lock.acquire()
    try:
        return _retract(root, found.damages)
    finally:
        lock.release()


def _retract(root: Path, damages: Sequence[Finding]) -> list[int]:
    manifest = read_manifest(root)
    standing = {number for number, _ in receipt_files(root)}
    damaged = sorted({d.shard for d in damages if d.shard is not None} & standing)
    for damage in damages:
        if damage.shard is None:  # the seal, backend metadata, or a file named like a receipt
            (root / damage.file).unlink(missing_ok=True)
    for shard in damaged:
        retract(root, manifest, shard, data_paths(root, manifest, shard))
    drop_restored_records(root, standing - set(damaged))
    return damaged


def _document_names(root: Path) -> set[str]:
    try:
        manifest = read_manifest(root)
    except FormatError:
        return set()
    documents = BACKENDS[manifest.backend].metadata_files(root, manifest)
    return {str(path.relative_to(root)) for path in documents}


def retract(root: Path, manifest: Manifest, shard: int, files: Mapping[str, Path]) -> None:
    """Replace the receipt of a published shard by a retraction record, then delete its files.

    The record is written first, so a killed retraction is completed by repeating it.

    Args:
        root: folder of the cache.
        manifest: manifest of the cache.
        shard: number of the shard.
        files: paths of its files, by logical name.
    """
    path = receipt_path(root, shard)
    try:
        promised = read_receipt(path, manifest).files
    except FormatError:
        promised = {}
    plain = {n: file for n, file in files.items() if file.is_file() and not file.is_symlink()}
    found = {name: digest_file(file) for name, file in plain.items()}
    record = Retraction(manifest.cache_id, shard, promised, found)
    text = to_json(record, sealed=manifest.is_sealed)
    write_atomic(retraction_path(root, shard), [text])
    path.unlink()
    fsync_dir(path.parent)  # the receipt's removal is durable before any file is deleted
    discard(files)
