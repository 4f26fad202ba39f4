"""Mend what needs no model, and retract damaged shards, so that the next harvest makes them again.

Retraction removes nothing but the receipt, and the record keeps its contents. `restore` replaces
the damaged files once the new ones are there, or publishes the receipt again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from actcache.cache.flipped_bits import BitSearch
from actcache.cache.folder import data_paths, require_plain_files, shard_bytes
from actcache.cache.restore import plain_digest
from actcache.cache.verify import SEAL, Finding, Verification
from actcache.core.json_codec import SEAL as SEAL_KEY
from actcache.core.json_codec import read_json, to_json
from actcache.errors import CorruptShardError, FormatError
from actcache.filesystem.atomic import write_atomic
from actcache.filesystem.lock import DirectoryLock
from actcache.filesystem.rooted import fsync_dir, require_plain, rooted
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


def mend(found: Verification, search: BitSearch | None = None) -> list[str]:
    """Mend the files of a verified cache that follow from themselves or from its manifest.

    Those are sealed files with one flipped bit, and the metadata of the backend. Verify again
    afterwards.

    Args:
        found: result of `verify`.
        search: the search for flipped bits, which bounds the work of several calls.

    Returns:
        The files that were mended.

    Raises:
        CacheBusyError: a harvest is running in the cache; nothing was changed.
    """
    root = rooted(found.cache)
    damaged = [root / damage.file for damage in found.damages]
    corrected = (search or BitSearch()).corrected
    contents = {path: text for path in damaged if (text := corrected(path)) is not None}
    documents = _documents(root)
    metadata = [path for path in damaged if path in documents and not path.is_dir()]
    contents |= {path: documents[path] for path in metadata}
    if not contents:
        return []
    lock = DirectoryLock(root)
    lock.acquire()
    try:
        for path, text in contents.items():
            write_atomic(path, [text])
    finally:
        lock.release()
    return [str(path.relative_to(root)) for path in contents]


def require_repairable(found: Verification) -> None:
    """Check a verified cache before it is repaired.

    Raises:
        CorruptShardError: a file is damaged that no harvest can write again.
        FormatError: a file or folder of the cache is a link, a pipe or a device.
    """
    root = rooted(found.cache)
    require_plain(root, [damage.file for damage in found.damages])
    planned, manifest = None, _manifest(root)
    if manifest is not None:
        planned = manifest.plan.shards
        require_plain_files(root, manifest)
    strays = {f"{FOLDER}/{p.name}" for n, p in receipt_files(root) if p != receipt_path(root, n)}
    made_anew = {SEAL, *strays, *(str(path.relative_to(root)) for path in _documents(root))}
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


def retract_damaged(found: Verification) -> list[int]:
    """Retract every damaged shard of a verified cache.

    Returns:
        The shards that were retracted by this call.

    Raises:
        CorruptShardError, FormatError: as of `require_repairable`; nothing was changed.
        CacheBusyError: a harvest is running in the cache; nothing was changed.
    """
    require_repairable(found)
    root = rooted(found.cache)
    lock = DirectoryLock(root)
    lock.acquire()
    try:
        return _retract(root, found.damages)
    finally:
        lock.release()


def _retract(root: Path, damages: Sequence[Finding]) -> list[int]:
    manifest = read_manifest(root)
    standing = {number for number, _ in receipt_files(root)}
    records = {f"{FOLDER}/{retraction_path(root, s).name}": s for s in retracted_shards(root)}
    damaged = sorted(
        {d.shard for d in damages if d.shard is not None} & standing
        | {records[d.file] for d in damages if d.file in records}
    )
    for damage in damages:
        if damage.shard is None:  # the seal, backend metadata, or a file named like a receipt
            (root / damage.file).unlink(missing_ok=True)
    for shard in damaged:
        retract(root, manifest, shard)
    drop_restored_records(root, standing - set(damaged))
    return damaged


def _documents(root: Path) -> dict[Path, bytes]:
    """Return the backend's metadata files and their contents; none without a manifest."""
    manifest = _manifest(root)
    if manifest is None:
        return {}
    documents = BACKENDS[manifest.backend].metadata_files(root, manifest)
    return {path: accepted[-1] for path, accepted in documents.items()}


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
    promised = {} if receipt is None else receipt.files
    is_trusted = receipt is not None and manifest.format_version >= SEALED_FROM
    found, most = {}, _most_bytes(manifest, shard)
    for name, file in data_paths(root, manifest, shard).items():
        sizes = {promised[name].bytes} if is_trusted and name in promised else range(most + 1)
        if digest := plain_digest(file, sizes):
            found[name] = digest
    record = Retraction(manifest.cache_id, shard, promised, found, receipt, seal)
    text = to_json(record, sealed=manifest.format_version >= SEALED_FROM)
    write_atomic(retraction_path(root, shard), [text])
    path.unlink(missing_ok=True)
    fsync_dir(path.parent)


def _most_bytes(manifest: Manifest, shard: int) -> int:
    """Return an upper bound on the size of a shard's files."""
    sequences = manifest.plan.max_sequences(shard)
    rows = sequences * manifest.identity.rows_per_sequence
    # Compressed files may be somewhat larger than the rows.
    return 2 * max(shard_bytes(manifest, shard, sequences, rows).values()) + (1 << 20)


def _seal_found(path: Path) -> str | None:
    """Return the value of the key `seal` of a damaged receipt, if there is one."""
    try:
        obj = read_json(path, links=False)
    except FormatError:
        return None
    seal = obj.get(SEAL_KEY) if isinstance(obj, dict) else None
    return seal if isinstance(seal, str) else None


def _manifest(root: Path) -> Manifest | None:
    """Return the manifest, or None if it cannot be read."""
    try:
        return read_manifest(root)
    except FormatError:
        return None
