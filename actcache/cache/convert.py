"""Move a cache to another backend, compression or type, shard by shard.

The rows keep their numbers, order and text; what they are rounded to may change, and then their
statistics are counted anew. Where the model's own rows went through nothing lossy before, the
result is, byte for byte, what a harvest with those options makes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from actcache.cache.folder import (
    choose_block_rows,
    create_or_resume,
    data_paths,
    discard,
    publish_extension,
    require_cache_folder,
    require_chunks,
    require_free,
    shard_bytes,
    tokens_path,
)
from actcache.cache.reader import Cache
from actcache.cache.writer import publish_checked_receipt, write_statistics
from actcache.config import ConvertConfig
from actcache.core.progress import Progress
from actcache.errors import ActcacheError, ConfigError
from actcache.filesystem.atomic import DirectoryLock, FileDigest, write_atomic
from actcache.format import receipts as receipts_module
from actcache.format.dtypes import ScaledRowDtype
from actcache.format.manifest import (
    MANIFEST,
    DiskDtype,
    Identity,
    Manifest,
    library_versions,
    read_manifest,
)
from actcache.format.receipts import ShardReceipt, write_completion_marker
from actcache.format.statistics import Statistics, compute
from actcache.storage import BACKENDS, ROW_DTYPES, RowDtype, StoredRows, check_overflow

_EXACT = {
    ("bfloat16", "float32"),
    ("float16", "float32"),
    ("int8", "float32"),
    ("float8_e4m3", "float32"),
}
"""(from, to) where every number of the first is one of the second; as is each type in itself."""


@dataclass(frozen=True)
class ConversionSummary:
    """What a conversion did, for the one line at its end and for `--json`."""

    source: str
    cache: str
    cache_id: str
    dtype: str
    via: tuple[str, ...]
    """Types to which the rows were rounded before that."""
    complete: bool
    """Whether the new cache is complete; else the source is not."""
    new_shards: int
    """Shards that were published now."""
    new_rows: int
    """Rows in them, at each hookpoint."""
    new_bytes: int
    """Bytes of them."""
    read_bytes: int
    """Bytes of the same shards in the source."""
    seconds: float


def convert(config: ConvertConfig) -> ConversionSummary:
    """Make, or finish, the cache that a configuration describes.

    Raises:
        CorruptShardError: a file of the source is not what its receipt promises; nothing of its
            shard is published.
        ConfigError: rows do not fit float16; nothing of their shard is published.
        ActcacheError: one of its kinds, for anything else that a user can mend.
    """
    source, root = Cache.open(config.source), Path(config.out)
    source.require_shards()
    if isinstance(source.root, Path):
        _refuse_same_folder(source.root, root)
    require_cache_folder(root)
    manifest = converted_manifest(source.manifest, config)
    require_chunks(manifest)
    lock = DirectoryLock(root, work="harvest or conversion")
    try:
        create_or_resume(root, _begun(root, manifest), lock, partial(_require_room, source))
        _extend(root, manifest)
        return _finish(source, root, manifest)
    finally:
        lock.release()


def _begun(root: Path, manifest: Manifest) -> Manifest:
    """The manifest with as many of its extensions as an earlier conversion has left in the folder.

    Where others are there, with all of them: then the folder holds another cache, and is refused.
    """
    there = read_manifest(root).extensions if (root / MANIFEST).exists() else ()
    begun = manifest.truncated_to(len(there))
    return begun if begun.extensions == there else manifest


def _extend(root: Path, manifest: Manifest) -> None:
    """Publish the extensions that the source has and the new cache lacks; its seal then waits."""
    existing = read_manifest(root)
    for number in range(len(existing.extensions) + 1, len(manifest.extensions) + 1):
        publish_extension(root, manifest.truncated_to(number))


def converted_manifest(manifest: Manifest, config: ConvertConfig) -> Manifest:
    """What the converted cache says of itself.

    Raises:
        ConfigError: the options cannot be combined, or not with this source.
    """
    backend = manifest.backend if config.backend == "auto" else config.backend
    compression = config.compress
    if compression == "auto":
        compression = manifest.compression if backend == manifest.backend else "none"
    if compression != "none" and backend != "zarr":
        raise ConfigError(
            f"--compress {compression} needs --backend zarr",
            expected="--compress none, or --backend zarr",
            got=f"--backend {backend}",
        )
    if backend == "zarr" and manifest.plan.goal is None:
        raise ConfigError(
            "the source does not say how many sequences it is going to have, as zarr arrays must",
            expected="--backend memmap",
            got="--backend zarr",
        )
    identity, block_rows = manifest.identity, manifest.block_rows
    dtype = identity.dtype if config.dtype == "auto" else config.dtype
    if dtype != identity.dtype:
        block_rows = choose_block_rows(identity.hookpoints, dtype)
    identity = dataclasses.replace(identity, dtype=dtype, via=roundings_before(identity, dtype))
    versions = {name: of for name, of in manifest.versions.items() if name != "numcodecs"}
    if compression != "none":
        versions["numcodecs"] = library_versions(compression)["numcodecs"]
    cache_id = identity.digest()
    return dataclasses.replace(
        manifest,
        identity=identity,
        cache_id=cache_id,
        extensions=tuple(dataclasses.replace(e, cache_id=cache_id) for e in manifest.extensions),
        backend=backend,
        compression=compression,
        block_rows=block_rows,
        versions=versions,
    )


def roundings_before(identity: Identity, dtype: DiskDtype) -> tuple[DiskDtype, ...]:
    """`via` of a cache that is converted to `dtype`: what rows were rounded to before, with loss.

    So the id is that of a harvest where the rows are, and another where they cannot be known to be.
    """
    if dtype == identity.dtype:
        return identity.via
    before = identity.via[-1] if identity.via else identity.model_dtype
    roundings = [*identity.via]
    if identity.dtype != before and (before, identity.dtype) not in _EXACT:
        roundings.append(identity.dtype)
    # Rounding to one type twice is rounding once; but a new scale may differ in its last bit.
    if roundings and roundings[-1] == dtype and not isinstance(ROW_DTYPES[dtype], ScaledRowDtype):
        roundings.pop()
    return tuple(roundings)


def recode(rows: StoredRows, source: RowDtype, target: RowDtype, hookpoint: str) -> StoredRows:
    """Rows as one type stores them to rows as another does; raises `ConfigError` on overflow."""
    if source == target:
        return rows
    tensor = source.to_torch(rows)
    stored = target.from_torch(tensor)
    check_overflow(tensor, stored, target, hookpoint)
    return stored


def _finish(source: Cache, root: Path, manifest: Manifest) -> ConversionSummary:
    began = time.monotonic()
    done = receipts_module.read_receipts(root, manifest)
    waiting = [receipt for shard, receipt in source.receipts.items() if shard not in done]
    total = sum(_bytes(receipt) for receipt in waiting)
    bar = Progress("convert", total, "B")
    fresh = []
    try:
        for receipt in waiting:
            try:
                made = _convert_shard(source, receipt, root, manifest, bar)
            except ActcacheError:
                discard(data_paths(root, manifest, receipt.shard))
                raise
            fresh.append(made)
    finally:
        bar.close()
    return ConversionSummary(
        source=str(source.root),
        cache=str(root),
        cache_id=manifest.cache_id,
        dtype=manifest.identity.dtype,
        via=manifest.identity.via,
        complete=_seal(source, root, manifest),
        new_shards=len(fresh),
        new_rows=sum(receipt.rows for receipt in fresh),
        new_bytes=sum(_bytes(receipt) for receipt in fresh),
        read_bytes=total,
        seconds=time.monotonic() - began,
    )


def _convert_shard(
    source: Cache, receipt: ShardReceipt, root: Path, manifest: Manifest, bar: Progress
) -> ShardReceipt:
    shard, row_dtype = receipt.shard, ROW_DTYPES[manifest.identity.dtype]
    statistics: dict[str, Statistics] = {}
    files: dict[str, FileDigest] = {}
    for hookpoint in source.hookpoints:
        # A file is compared with its receipt, then read: the second time from the page cache.
        for name in _files_of(source, hookpoint):
            source.check_file(shard, name)
        rows = recode(source.read(hookpoint, shard), source.row_dtype, row_dtype, hookpoint)
        statistics[hookpoint] = compute(rows, row_dtype)
        written = BACKENDS[manifest.backend].write(root, manifest, hookpoint, shard, rows)
        files |= written
        read = sum(receipt.files[name].bytes for name in _files_of(source, hookpoint))
        bar.advance(read, sum(file.bytes for file in written.values()))
    text = source.check_file(shard, "tokens").read_bytes()
    files["tokens"] = write_atomic(tokens_path(root, shard), [text])
    files["stats"] = write_statistics(root, shard, statistics)
    made = dataclasses.replace(
        receipt,
        cache_id=manifest.cache_id,
        non_finite={name: found.non_finite for name, found in statistics.items()},
        near_overflow={name: found.near_overflow for name, found in statistics.items()},
        files=files,
    )
    publish_checked_receipt(root, manifest, made)
    bar.advance(receipt.files["tokens"].bytes + receipt.files["stats"].bytes)
    return made


def _files_of(cache: Cache, hookpoint: str) -> Iterator[str]:
    """What receipts call the files that hold a hookpoint's rows."""
    names = sorted(cache.manifest.file_names)
    return (name for name in names if name.partition("/")[2] == hookpoint)


def _seal(source: Cache, root: Path, manifest: Manifest) -> bool:
    """Seal what is whole, if the source is sealed; whether it is whole."""
    if source.end is None:
        return False
    done = receipts_module.read_receipts(root, manifest)
    if list(done) != list(range(source.end.last_shard + 1)):
        return False
    end = dataclasses.replace(source.end, cache_id=manifest.cache_id)
    if receipts_module.read_end(root, manifest) != end:
        write_completion_marker(root, end)
    return True


def _refuse_same_folder(source: Path, root: Path) -> None:
    ours, theirs = root.resolve(), source.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise ConfigError(
            "--out must lie apart from the cache that is converted",
            expected=f"a folder outside {source}, that does not hold it either",
            got=root,
        )


def _require_room(source: Cache, root: Path, manifest: Manifest, done: Collection[int]) -> None:
    """Ask, before starting, whether what is missing fits on the disk; what zstd saves is unknown.

    Raises:
        DiskFullError: it does not fit.
    """
    waiting = [receipt for shard, receipt in source.receipts.items() if shard not in done]
    needed = sum(sum(shard_bytes(manifest, r.shard, r.sequences, r.rows).values()) for r in waiting)
    require_free(root, needed, "conversion", "a smaller --dtype, or another --out")


def _bytes(receipt: ShardReceipt) -> int:
    return sum(file.bytes for file in receipt.files.values())
