"""Shards that were published, found damaged, and taken back until they are made again.

A retracted shard's receipt makes way for `shards/NNNNN.retracted.json`, which keeps what the shard
has to become again. So a repair can neither change a cache that runs are pinned to, nor leave it
half and half: at any instant a shard is there as it is, or not there at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from actcache.core.json_codec import parse_dataclass, read_json, to_json
from actcache.errors import CacheMismatchError, FormatError
from actcache.filesystem.atomic import FileDigest, digest_file, fsync_dir, write_atomic
from actcache.filesystem.paths import CachePath, CachePathT
from actcache.format.manifest import Manifest
from actcache.format.receipts import FOLDER, ShardReceipt, read_receipt, receipt_path

_MAX_BYTES = 8 << 20
_NAME = re.compile(r"([0-9]{5,9})\.retracted\.json")


@dataclass(frozen=True)
class Retraction:
    """What a retracted shard was."""

    cache_id: str
    """Cache that the shard belongs to."""
    shard: int
    """Number of the shard."""
    promised: dict[str, FileDigest]
    """Its files by its receipt; empty if that could not be read."""
    found: dict[str, FileDigest]
    """Its files as they lay there. Where the receipt was what was damaged, these were right."""


def retraction_path(root: CachePathT, shard: int) -> CachePathT:
    """Where the record of a retracted shard lies."""
    return root / FOLDER / f"{shard:05d}.retracted.json"


def retracted_shards(root: CachePath) -> list[int]:
    """Numbers of the shards that wait to be made again, ascending."""
    return [s for s in _recorded(root) if not receipt_path(root, s).exists()]


def _recorded(root: CachePath) -> list[int]:
    folder = root / FOLDER
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name[1]) for name in map(_NAME.fullmatch, names) if name)


def retract(root: Path, manifest: Manifest, shard: int, files: Mapping[str, Path]) -> None:
    """Take a published shard back: from here on it does not exist.

    Killed anywhere, either the shard is still there or its record is: done again, it goes on.

    Args:
        root: folder of the cache.
        manifest: the cache's.
        shard: which shard.
        files: where its files lie, by logical name.
    """
    path = receipt_path(root, shard)
    try:
        promised = read_receipt(path, manifest).files
    except FormatError:
        promised = {}
    plain = {n: file for n, file in files.items() if file.is_file() and not file.is_symlink()}
    found = {name: digest_file(file) for name, file in plain.items()}
    record = Retraction(manifest.cache_id, shard, promised, found)
    write_atomic(retraction_path(root, shard), [to_json(record)])
    path.unlink()
    fsync_dir(path.parent)  # the receipt is gone for good before a file of its shard is
    discard(files)


def discard(files: Mapping[str, Path]) -> None:
    """Delete the files of a shard that has no receipt."""
    for file in files.values():
        file.unlink(missing_ok=True)


def check_restored(
    root: Path, manifest: Manifest, made: ShardReceipt, files: Mapping[str, Path]
) -> bool:
    """Before a shard is published: if it was retracted, it must be what it was.

    Each file must be the one that was promised, or the one that lay there: damage does not turn a
    file into what another run of the model gives.

    Returns:
        Whether it was retracted.

    Raises:
        CacheMismatchError: it is another; its files are deleted.
        FormatError: the record is damaged.
    """
    path = retraction_path(root, made.shard)
    try:
        obj = read_json(path, _MAX_BYTES, links=False)
    except FileNotFoundError:
        return False
    record = parse_dataclass(Retraction, obj, str(path))
    if (record.cache_id, record.shard) != (manifest.cache_id, made.shard):
        raise FormatError(
            f"{path} is of another shard",
            expected=f"shard {made.shard} of {manifest.cache_id}",
            got=f"shard {record.shard} of {record.cache_id}",
        )
    different = {
        name: (record.promised.get(name) or record.found.get(name), file)
        for name, file in made.files.items()
        if file not in (record.promised.get(name), record.found.get(name))
    }
    if not different:
        return True
    discard(files)
    name, (expected, got) = next(iter(different.items()))
    raise CacheMismatchError(
        f"shard {made.shard} of {root} cannot be restored here: this machine makes other bytes of "
        f"{len(different)} of its {len(made.files)} files. Nothing of it was published",
        expected=f"{name} {expected}",
        got=f"{got}; {_versions(manifest)}",
        remedy="repeat the harvest command on the kind of device and with the library versions "
        f"that made the cache, or restore the shard from a copy. {path} keeps what it was; without "
        "that record the harvest publishes what it makes, and runs on this cache refuse it",
    )


def forget(root: Path, shard: int) -> None:
    """Drop the record of a shard that has its receipt again."""
    retraction_path(root, shard).unlink(missing_ok=True)


def drop_restored_records(root: Path, published: Iterable[int]) -> None:
    """Drop the records that a killed repair left beside the receipts of published shards."""
    for shard in set(published) & set(_recorded(root)):
        forget(root, shard)


def _versions(manifest: Manifest) -> str:
    from actcache.format.manifest import library_versions

    now = library_versions(manifest.compression)
    changed = [
        f"{name} is {now.get(name)}, was {version}"
        for name, version in manifest.versions.items()
        if now.get(name) != version
    ]
    return ", ".join(changed) or "library versions are those of the manifest, so not the device"
