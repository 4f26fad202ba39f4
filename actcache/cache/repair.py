"""Retract damaged shards, so that the next harvest writes them, and only them, again.

Nothing but the receipt is removed, and the retraction record keeps its contents. `restore` replaces
the damaged files once the new ones are there, or publishes the receipt again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from actcache.cache.folder import data_paths
from actcache.cache.restore import plain_digest
from actcache.cache.verify import SEAL, Finding, Verification
from actcache.core.json_codec import SEAL as SEAL_KEY
from actcache.core.json_codec import read_json, to_json
from actcache.errors import CorruptShardError, FormatError
from actcache.filesystem.atomic import DirectoryLock, fsync_dir, rooted, write_atomic
from actcache.format.manifest import SEALED_FROM, Manifest, read_manifest
from actcache.format.receipts import (
    FOLDER,
    Retraction,
    drop_restored_records,
    read_receipt,
    receipt_files,
    receipt_path,
    retracted_shards,
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
    planned = _planned(root)
    strays = {f"{FOLDER}/{p.name}" for n, p in receipt_files(root) if p != receipt_path(root, n)}
    made_anew = {SEAL, *strays, *_document_names(root)}
    for damage in found.damages:
        made_by_harvests = damage.file in made_anew
        if damage.shard is not None:  # without a plan for it, its extension is lost
            made_by_harvests = planned is None or damage.shard < planned
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
    known = standing | set(retracted_shards(root))
    damaged = sorted({d.shard for d in damages if d.shard is not None} & known)
    for damage in damages:
        if damage.shard is None:  # the seal, backend metadata, or a file named like a receipt
            (root / damage.file).unlink(missing_ok=True)
    for shard in damaged:
        retract(root, manifest, shard)
    drop_restored_records(root, standing - set(damaged))
    return damaged


def _document_names(root: Path) -> set[str]:
    try:
        manifest = read_manifest(root)
    except FormatError:
        return set()
    documents = BACKENDS[manifest.backend].metadata_files(root, manifest)
    return {str(path.relative_to(root)) for path in documents}


def retract(root: Path, manifest: Manifest, shard: int) -> None:
    """Replace the receipt of a published shard by a retraction record; its files stay.

    The record is written first, so a killed retraction is completed by repeating it.

    Args:
        root: folder of the cache.
        manifest: manifest of the cache.
        shard: number of the shard.
    """
    path = receipt_path(root, shard)
    receipt = seal = None
    try:
        receipt = read_receipt(path, manifest)
    except FormatError:
        seal = _seal_found(path)
    except FileNotFoundError:  # it was retracted before, but the record is damaged
        pass
    files = data_paths(root, manifest, shard)
    found = {name: digest for name, file in files.items() if (digest := plain_digest(file))}
    promised = {} if receipt is None else receipt.files
    record = Retraction(manifest.cache_id, shard, promised, found, receipt, seal)
    text = to_json(record, sealed=manifest.format_version >= SEALED_FROM)
    write_atomic(retraction_path(root, shard), [text])
    path.unlink(missing_ok=True)
    fsync_dir(path.parent)


def _seal_found(path: Path) -> str | None:
    """Return the value of the key `seal` of a damaged receipt, if there is one."""
    try:
        obj = read_json(path, links=False)
    except FormatError:
        return None
    seal = obj.get(SEAL_KEY) if isinstance(obj, dict) else None
    return seal if isinstance(seal, str) else None


def _planned(root: Path) -> int | None:
    """Return the number of planned shards; None if there is no goal, or no readable manifest."""
    try:
        return read_manifest(root).plan.shards
    except FormatError:
        return None
