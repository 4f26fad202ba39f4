"""Convert a cache to another backend, compression or type, shard by shard.

Numbering, order and text of the rows stay. If the type changes, the statistics are computed again.
If the rows were not rounded with loss before, the result equals, byte for byte, a harvest with
those options.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection
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
from actcache.cache.restore import write_folder
from actcache.cache.writer import publish_written, write_statistics
from actcache.config import ConvertConfig
from actcache.core.progress import Progress
from actcache.errors import ActcacheError, ConfigError, RestoreError
from actcache.filesystem.atomic import FileDigest, write_atomic
from actcache.filesystem.lock import DirectoryLock
from actcache.filesystem.rooted import rooted
from actcache.format import receipts as receipts_module
from actcache.format.dtypes import ScaledRowDtype
from actcache.format.manifest import (
    MANIFEST,
    SEALED_FROM,
    DiskDtype,
    Identity,
    Manifest,
    library_versions,
    read_manifest,
)
from actcache.format.receipts import ShardReceipt, retraction_path, write_completion_marker
from actcache.format.statistics import Statistics, compute
from actcache.storage import BACKENDS, ROW_DTYPES, check_overflow

_EXACT = {(name, "float32") for name in ("bfloat16", "float16", "int8", "float8_e4m3")}
"""(from, to) of different types where every value of the first is exact in the second."""


@dataclass(frozen=True)
class ConversionSummary:
    """Result of a conversion, printed at its end and by `--json`."""

    source: str
    cache: str
    cache_id: str
    dtype: str
    via: tuple[str, ...]
    """Types to which the rows were rounded before."""
    complete: bool
    """Whether the new cache is complete; False if the source is not."""
    new_shards: int
    new_rows: int
    """Rows of those shards, at each hookpoint."""
    new_bytes: int
    """Bytes of those shards."""
    read_bytes: int
    """Bytes of the same shards in the source."""
    seconds: float


def convert(config: ConvertConfig) -> ConversionSummary:
    """Create, or resume, the converted cache that a configuration describes.

    Raises:
        CorruptShardError: a file of the source differs from its receipt; its shard is not
            published.
        ConfigError: rows do not fit float16; their shard is not published.
        ActcacheError: a subclass, for other errors of the user.
    """
    source, root = Cache.open(config.source), rooted(config.out)
    source.require_shards()
    if isinstance(source.root, Path):
        _refuse_same_folder(source.root, root)
    require_cache_folder(root)
    manifest = converted_manifest(source.manifest, config)
    require_chunks(manifest)
    lock = DirectoryLock(root, work="harvest or conversion")
    try:
        create_or_resume(
            root, _with_published_extensions(root, manifest), lock, partial(_require_room, source)
        )
        existing = _extend(root, manifest)
        return _finish(source, root, existing)
    finally:
        lock.release()


def _with_published_extensions(root: Path, manifest: Manifest) -> Manifest:
    """Return the manifest with only the extensions that an earlier conversion has published.

    If the folder's extensions differ from the source's, return the full manifest, which
    `create_or_resume` then rejects as another cache.
    """
    existing = read_manifest(root).extensions if (root / MANIFEST).exists() else ()
    shortened = manifest.truncated_to(len(existing))
    return shortened if shortened.extensions == existing else manifest


def _extend(root: Path, manifest: Manifest) -> Manifest:
    """Publish the extensions that the source has and the new cache lacks.

    Returns:
        The manifest in the folder, which may be of an earlier format version.
    """
    existing = read_manifest(root)
    full = dataclasses.replace(existing, extensions=manifest.extensions)
    for number in range(len(existing.extensions) + 1, len(manifest.extensions) + 1):
        publish_extension(root, full.truncated_to(number))
    return full


def converted_manifest(manifest: Manifest, config: ConvertConfig) -> Manifest:
    """Derive the manifest of the converted cache.

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
            "zarr arrays need a planned number of sequences, which the source does not have",
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
        format_version=max(manifest.format_version, SEALED_FROM),  # the identity stays what it is
        identity=identity,
        cache_id=cache_id,
        extensions=tuple(dataclasses.replace(e, cache_id=cache_id) for e in manifest.extensions),
        backend=backend,
        compression=compression,
        block_rows=block_rows,
        versions=versions,
    )


def roundings_before(identity: Identity, dtype: DiskDtype) -> tuple[DiskDtype, ...]:
    """Derive `via` of a cache converted to `dtype`: the earlier roundings that lose bits.

    It is empty, and the cache id that of a harvest, if the rows equal those of a harvest.
    """
    if dtype == identity.dtype:
        return identity.via
    before = identity.via[-1] if identity.via else identity.model_dtype
    roundings = [*identity.via]
    if identity.dtype != before and (before, identity.dtype) not in _EXACT:
        roundings.append(identity.dtype)
    # Rounding twice to one type equals rounding once, except that a scale may change in its last
    # bit.
    if roundings and roundings[-1] == dtype and not isinstance(ROW_DTYPES[dtype], ScaledRowDtype):
        roundings.pop()
    return tuple(roundings)


def _finish(source: Cache, root: Path, manifest: Manifest) -> ConversionSummary:
    began = time.monotonic()
    done = receipts_module.read_receipts(root, manifest)
    waiting = [receipt for shard, receipt in source.receipts.items() if shard not in done]
    total = sum(_bytes(receipt) for receipt in waiting)
    bar = Progress("convert", total, "B")
    fresh, failed = [], []
    try:
        for receipt in waiting:
            try:
                made = _convert_shard(source, receipt, root, manifest, bar)
            except RestoreError as error:  # the cache is as it was: go on with the others
                failed.append(error)
            except ActcacheError:
                if not retraction_path(root, receipt.shard).exists():
                    discard(data_paths(root, manifest, receipt.shard))
                raise
            else:
                fresh.append(made)
    finally:
        bar.close()
    if failed:
        raise failed[0]
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
    folder = write_folder(root, manifest, shard)
    for hookpoint in source.hookpoints:
        # The file is compared with its receipt first; the second read hits the page cache.
        for name in (names := source.files_of(hookpoint, shard)):
            source.check_file(shard, name)
        rows = source.read(hookpoint, shard)
        if source.row_dtype != row_dtype:
            tensor = source.row_dtype.to_torch(rows)
            rows = row_dtype.from_torch(tensor)
            check_overflow(tensor, rows, row_dtype, hookpoint)
        statistics[hookpoint] = compute(rows, row_dtype)
        written = BACKENDS[manifest.backend].write(folder, manifest, hookpoint, shard, rows)
        files |= written
        read = sum(receipt.files[name].bytes for name in names)
        bar.advance(read, sum(file.bytes for file in written.values()))
    text = source.check_file(shard, "tokens").read_bytes()
    files["tokens"] = write_atomic(tokens_path(folder, shard), [text])
    files["stats"] = write_statistics(folder, shard, statistics)
    made = dataclasses.replace(
        receipt,
        cache_id=manifest.cache_id,
        non_finite={name: found.non_finite for name, found in statistics.items()},
        near_overflow={name: found.near_overflow for name, found in statistics.items()},
        files=files,
    )
    publish_written(root, manifest, made, folder)
    bar.advance(receipt.files["tokens"].bytes + receipt.files["stats"].bytes)
    return made


def _seal(source: Cache, root: Path, manifest: Manifest) -> bool:
    """Seal the new cache if the source is sealed and all shards exist; return whether they do."""
    if source.end is None:
        return False
    done = receipts_module.read_receipts(root, manifest)
    if list(done) != list(range(source.end.last_shard + 1)):
        return False
    end = dataclasses.replace(source.end, cache_id=manifest.cache_id)
    if receipts_module.read_end(root, manifest) != end:
        write_completion_marker(root, manifest, end)
    return True


def _refuse_same_folder(source: Path, root: Path) -> None:
    new, old = root.resolve(), source.resolve()
    if new == old or new in old.parents or old in new.parents:
        raise ConfigError(
            "--out must be separate from the cache that is converted",
            expected=f"a folder that neither contains {source} nor is inside it",
            got=root,
        )


def _require_room(source: Cache, root: Path, manifest: Manifest, done: Collection[int]) -> None:
    """Raise `DiskFullError` unless the missing shards, uncompressed, fit on the disk."""
    waiting = [receipt for shard, receipt in source.receipts.items() if shard not in done]
    needed = sum(sum(shard_bytes(manifest, r.shard, r.sequences, r.rows).values()) for r in waiting)
    require_free(root, needed, "conversion", "a smaller --dtype, or another --out")


def _bytes(receipt: ShardReceipt) -> int:
    return sum(file.bytes for file in receipt.files.values())
