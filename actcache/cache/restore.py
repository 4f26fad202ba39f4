"""Make retracted shards again: publish what equals the shard's record, and keep all else.

A shard with a retraction record is written below a temporary folder. A file replaces the one in the
cache only if it has the digest that the record requires, so that a machine whose arithmetic differs
changes nothing.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from actcache.cache.folder import RESTORED, data_paths
from actcache.core.json_codec import SEAL, decode_json, to_json
from actcache.errors import RestoreError
from actcache.filesystem.atomic import FileDigest, digest_file
from actcache.filesystem.lock import DirectoryLock
from actcache.filesystem.rooted import fsync_dir, remove_tree, remove_trees
from actcache.format.manifest import SEALED_FROM, Manifest, library_versions
from actcache.format.receipts import (
    Retraction,
    ShardReceipt,
    forget,
    publish_receipt,
    read_retraction,
    receipt_path,
    retracted_shards,
    retraction_path,
)

_TEXT = ("tokens", "stats")
"""Files of a shard that hold no rows."""


def write_folder(root: Path, manifest: Manifest, shard: int) -> Path:
    """Return the folder below which a shard's files are written: that of the cache, or a new one.

    Raises:
        FormatError: the shard's retraction record is damaged.
    """
    if read_retraction(root, manifest, shard) is None:
        return root
    folder = root / f"{RESTORED}{shard:05d}-{secrets.token_hex(8)}"
    folder.mkdir()
    return folder


def publish_restored(root: Path, manifest: Manifest, made: ShardReceipt, folder: Path) -> None:
    """Publish a retracted shard from the files below `folder`, which is deleted.

    Files in the cache that have the right digest stay. Others are replaced if the new ones have it.

    Args:
        root: folder of the cache.
        manifest: manifest of the cache.
        made: receipt of the new files.
        folder: result of `write_folder`.

    Raises:
        RestoreError: some files cannot be restored. They and their receipt are as they were before
            the shard was retracted; without a readable receipt the shard stays retracted.
    """
    record = read_retraction(root, manifest, made.shard)
    assert record is not None
    try:
        paths, new = (data_paths(at, manifest, made.shard) for at in (root, folder))
        disk = {}
        for name, path in paths.items():
            sources = (made.files, record.promised, record.found)
            sizes = {files[name].bytes for files in sources if name in files}
            if digest := plain_digest(path, sizes):
                disk[name] = digest
        choice = _choose(manifest, record, made, disk)
        if record.receipt is not None or not choice.lost:
            for name, digest in choice.files.items():
                if disk.get(name) != digest:
                    _move(new[name], paths[name])
            old = {} if record.receipt is None else record.receipt.files
            receipt = dataclasses.replace(record.receipt or made, files={**old, **choice.files})
            publish_receipt(root, manifest, receipt)
            forget(root, made.shard)
    finally:
        remove_tree(folder)
    if choice.lost:
        raise _restore_error(root, manifest, record, choice.lost)


def reinstate(root: Path, manifest: Manifest, shard: int) -> bool:
    """Publish the receipt of a retracted shard again as it was, if it could be read.

    Returns:
        Whether it could.
    """
    record = read_retraction(root, manifest, shard)
    if record is None or record.receipt is None:
        return False
    publish_receipt(root, manifest, record.receipt)
    forget(root, shard)
    return True


def reinstate_all(root: Path, manifest: Manifest) -> None:
    """Undo the retraction of the shards that a failed harvest did not reach.

    Raises:
        CacheBusyError: another harvest is running in the cache.
    """
    lock = DirectoryLock(root)
    lock.acquire()
    try:
        remove_trees(root, RESTORED)
        for shard in retracted_shards(root):
            reinstate(root, manifest, shard)
    finally:
        lock.release()


def plain_digest(path: Path, sizes: Container[int]) -> FileDigest | None:
    """Return the digest of a plain file that has one of these sizes, or None for anything else.

    A file of another size cannot be the right one, and could take hours to read.
    """
    if path.is_symlink() or not path.is_file() or path.stat().st_size not in sizes:
        return None
    return digest_file(path)


@dataclass(frozen=True)
class _Choice:
    """Files of a shard that are right, and files that could not be restored."""

    files: dict[str, FileDigest]
    """Files that are right on disk or as made, by name."""
    lost: dict[str, tuple[FileDigest | None, FileDigest]]
    """Files that are neither: the digest required, if known, and the one of the file made."""


def _choose(
    manifest: Manifest, record: Retraction, made: ShardReceipt, disk: dict[str, FileDigest]
) -> _Choice:
    """Compare the files of a shard on disk and as made with its retraction record.

    A new file is right if the receipt names its digest, or if it equals the file on disk, now or
    when it was retracted: damage does not turn a file into the result of another run of the model.
    The digests of a receipt that cannot be read, or has no seal, may be damaged: then a new file is
    right too if the new receipt has the seal of the old one, or if it holds rows whose statistics
    are, bit for bit, those of the shard.
    """
    promised = record.promised
    doubtful = record.receipt is None or manifest.format_version < SEALED_FROM
    same_seal = record.seal_found is not None and record.seal_found == _seal(made)
    statistics = made.files["stats"]
    same_rows = statistics in (promised.get("stats"), disk.get("stats"))
    same_rows &= manifest.compression == "none"  # compressed bytes depend on a library's version
    files, lost = {}, {}
    for name, new in made.files.items():
        old, found = promised.get(name), disk.get(name)
        proved = same_seal or (same_rows and name not in _TEXT)
        if found is not None and found == old:
            files[name] = found
        elif new in (old, found, record.found.get(name)) or (doubtful and proved):
            files[name] = new
        else:
            lost[name] = (old or found, new)
    return _Choice(files, lost)


def _seal(receipt: ShardReceipt) -> object:
    obj = decode_json(to_json(receipt, sealed=True))
    assert isinstance(obj, dict)
    return obj[SEAL]


def _move(new: Path, path: Path) -> None:
    """Replace a file of the cache, atomically and durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new.replace(path)
    fsync_dir(path.parent)


def _restore_error(
    root: Path,
    manifest: Manifest,
    record: Retraction,
    lost: dict[str, tuple[FileDigest | None, FileDigest]],
) -> RestoreError:
    shard = record.shard
    name, (expected, got) = next(iter(lost.items()))
    state = f"{receipt_path(root, shard)} is as it was, with the damage that actcache verify names"
    if record.receipt is None:
        state = f"Its receipt was damaged: {retraction_path(root, shard)} keeps what is known of it"
    return RestoreError(
        f"shard {shard} of {root} cannot be restored here: this machine makes other bytes of "
        f"{len(lost)} of its {len(manifest.file_names)} files. They are left as they are. {state}",
        expected=f"{name} {expected}",
        got=f"{got}; {_versions(manifest)}",
        remedy="repeat the command on the kind of device and with the library versions that made "
        "the cache, or restore the shard from a copy",
    )


def _versions(manifest: Manifest) -> str:
    now = library_versions(manifest.compression)
    changed = [
        f"{name} is {now.get(name)}, was {version}"
        for name, version in manifest.versions.items()
        if now.get(name) != version
    ]
    return ", ".join(changed) or "library versions are those of the manifest, so not the device"
