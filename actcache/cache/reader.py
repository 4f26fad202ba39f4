"""`Cache`: read-only access to a harvested cache, by shard and row.

Letters: S sequences of a shard, C context length, N rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache.cache.folder import (
    data_paths,
    statistics_path,
    statistics_tensors,
    token_tensors,
    tokens_path,
)
from actcache.cache.writer import ShardText
from actcache.errors import CorruptShardError, EmptyCacheError, FormatError, HookpointError
from actcache.filesystem.atomic import digest_file
from actcache.filesystem.paths import CachePath, open_path, prefetch_files, require_remote
from actcache.format import receipts as receipts_module
from actcache.format.dtypes import VALUES
from actcache.format.manifest import Manifest, read_manifest
from actcache.format.receipts import CompletionMarker, ShardReceipt
from actcache.format.statistics import Statistics, merge
from actcache.storage import (
    BACKENDS,
    ROW_DTYPES,
    CompressedExtent,
    RowDtype,
    StoredRows,
    TensorExtent,
    safetensors_io,
)
from actcache.storage.preadv import WHOLE, preadv_into, readahead

Views = Mapping[str, Sequence[memoryview]]
"""By row component, buffers for the bytes of consecutive rows, one after another."""


@dataclass(frozen=True)
class ShardTokens(ShardText):
    """The text of a shard, and the token position of each row."""

    row_sequence: NDArray[np.int32]
    """Sequence, within the shard, of every row. [N]"""
    row_position: NDArray[np.int32]
    """Position, within its sequence, of every row. [N]"""


class Cache:
    """The shards of a cache that were published when it was opened, or at the last `refresh`.

    Reading is thread-safe.
    """

    def __init__(
        self,
        root: CachePath,
        manifest: Manifest,
        receipts: dict[int, ShardReceipt],
        end: CompletionMarker | None,
    ) -> None:
        self.root, self.manifest, self.receipts, self.end = root, manifest, receipts, end
        self.row_dtype: RowDtype = ROW_DTYPES[manifest.identity.dtype]
        self._checked: set[CachePath] = set()
        self._extents: dict[tuple[str, int, str], TensorExtent | CompressedExtent] = {}
        self._files: dict[tuple[str, int], dict[str, CachePath]] = {}
        self._merged: dict[tuple[str, tuple[int, ...]], Statistics] = {}

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str] | CachePath,
        *,
        block_cache: str | os.PathLike[str] | None = None,
        block_cache_bytes: int | None = None,
    ) -> Cache:
        """Open the cache in a folder, or at a URL that fsspec reads (s3://, gs://, hf://, ...).

        Args:
            root: folder or URL.
            block_cache: with a URL, local folder for fetched blocks.
            block_cache_bytes: capacity of that folder; defaults as in `urls.open_url`.

        Raises:
            EmptyCacheError: there is no manifest.
            FormatError: the manifest or a receipt is damaged, or a folder is a symbolic link.
            ConfigError: the URL cannot be used.
            RemoteError: the store does not respond, or denies access.
        """
        root = open_path(root, block_cache, block_cache_bytes)
        manifest = read_manifest(root)
        if linked := symlinked_dirs(root, manifest):
            raise FormatError(
                f"{linked[0]} is a symbolic link",
                expected="a folder, since files outside the cache's folder are not read",
                remedy="replace the link by the folder itself, or a bind mount",
            )
        return cls(root, *receipts_module.read_cache_state(root, manifest))

    @property
    def codec(self) -> RowDtype:
        """Former name of `row_dtype`, for notebooks."""
        return self.row_dtype

    @property
    def hookpoints(self) -> list[str]:
        """Names of the hookpoints, in the manifest's order."""
        return [hookpoint.name for hookpoint in self.manifest.identity.hookpoints]

    @property
    def shards(self) -> list[int]:
        """Numbers of the published shards, ascending."""
        return list(self.receipts)

    @property
    def rows(self) -> int:
        """Rows at every hookpoint."""
        return sum(receipt.rows for receipt in self.receipts.values())

    @property
    def complete(self) -> bool:
        """True if the cache is sealed and all its shards have receipts."""
        if self.end is None or len(self.receipts) != self.end.last_shard + 1:
            return False
        return self.shards == list(range(self.end.last_shard + 1))

    def refresh(self, shards: Iterable[int]) -> int | None:
        """Read the seal and the receipts of `shards` that were published since.

        Returns:
            The first of the shards that is not published; None if all are.

        Raises:
            FormatError: a receipt or the seal is damaged.
        """
        if self.end is None:
            self.end = receipts_module.read_completion_marker(self.root, self.manifest)
        found, missing = {}, None
        planned = self.manifest.plan.shards  # shards beyond belong to a later extension
        for shard in shards:
            if shard in self.receipts:
                continue
            path = receipts_module.receipt_path(self.root, shard)
            if (planned is None or shard < planned) and path.exists():
                found[shard] = receipts_module.read_receipt(path, self.manifest)
            elif missing is None:
                missing = shard
        if found:  # replaced, not updated, as other threads read the dictionary
            self.receipts = dict(sorted((self.receipts | found).items()))
        return missing

    def truncated_to(self, extensions: int) -> Cache:
        """Return the cache without its later extensions."""
        if extensions >= len(self.manifest.extensions):
            return self
        manifest = self.manifest.truncated_to(extensions)
        inside = {s: r for s, r in self.receipts.items() if manifest.plan.max_sequences(s)}
        end = receipts_module.read_completion_marker(self.root, manifest)
        return Cache(self.root, manifest, inside, end)

    def missing_files(self) -> list[CachePath]:
        """List published files that are missing or have another size, without reading them."""
        return [
            path
            for shard, receipt in self.receipts.items()
            for name, path in data_paths(self.root, self.manifest, shard).items()
            if not path.is_file() or path.stat().st_size != receipt.files[name].bytes
        ]

    def require_shards(self) -> None:
        """Raise `EmptyCacheError` unless at least one shard is complete."""
        if not self.receipts:
            raise EmptyCacheError(
                f"{self.root} holds no complete shard",
                remedy="run its actcache harvest command again, which resumes it",
            )

    def require_hookpoint(self, name: str) -> None:
        """Raise `HookpointError` unless the cache holds the hookpoint."""
        if name not in self.hookpoints:
            raise HookpointError(
                f"{self.root} does not hold hookpoint {name!r}",
                expected=" | ".join(self.hookpoints),
                got=name,
            )

    def digest(self, shards: Sequence[int]) -> str:
        """Compute a digest over the receipts of some shards, which pins every byte of them."""
        return receipts_module.digest([self.receipts[shard] for shard in shards])

    def read_into(self, hookpoint: str, shard: int, start: int, out: StoredRows) -> None:
        """Read `len(out)` consecutive rows, as stored, into `out`; see `read_views`."""
        self.read_views(hookpoint, shard, start, {k: [v] for k, v in byte_views(out).items()})

    def read_views(
        self, hookpoint: str, shard: int, start: int, views: Views, piece: int = WHOLE
    ) -> None:
        """Read consecutive rows, as stored, into several buffers, one after another.

        Args:
            hookpoint: name of the hookpoint.
            shard: number of the shard.
            start: first row.
            views: buffers, whose length decides the number of rows.
            piece: largest number of bytes of one system call.

        Raises:
            CorruptShardError: the file is missing, has another header or size, or ends early.
        """
        for part, buffers in views.items():
            extent = self.locate(hookpoint, shard, part)
            offset = start * (extent.bytes // max(1, extent.shape[0]))
            length = sum(map(len, buffers))
            assert offset + length <= extent.bytes
            if not isinstance(extent, CompressedExtent):
                preadv_into(extent.path, buffers, extent.offset + offset, piece)
            elif len(buffers) == 1:
                extent.read_into(buffers[0], offset)
            else:  # one read, since separate ones would decode the same blocks repeatedly
                whole = memoryview(bytearray(length))
                extent.read_into(whole, offset)
                for buffer in buffers:
                    buffer[:], whole = whole[: len(buffer)], whole[len(buffer) :]

    def readahead(self, hookpoint: str, shard: int, start: int, rows: int) -> None:
        """Call posix_fadvise(WILLNEED) for uncompressed rows."""
        for part in self.row_dtype.parts(self.manifest.width(hookpoint)):
            extent = self.locate(hookpoint, shard, part)
            size = extent.bytes // max(1, extent.shape[0])
            if not isinstance(extent, CompressedExtent):
                readahead(extent.path, extent.offset + start * size, rows * size)

    def read(
        self, hookpoint: str, shard: int, start: int = 0, rows: int | None = None
    ) -> StoredRows:
        """Read rows [start, start + rows) of a shard, as stored."""
        self.locate(hookpoint, shard)  # check the file before allocating by the receipt's count
        rows = self.receipts[shard].rows - start if rows is None else rows
        out = self.row_dtype.empty(rows, self.manifest.width(hookpoint))
        self.read_into(hookpoint, shard, start, out)
        return out

    def tokens(self, shard: int) -> ShardTokens:
        """Read the token ids of a shard and the position of each row, checked by the receipt."""
        receipt = self.receipts[shard]
        identity = self.manifest.identity
        path = tokens_path(self.root, shard)
        self._check(path, receipt, "tokens")
        extents = self.locate_tokens(shard).values()
        text = ShardTokens(*safetensors_io.read(extents))
        _check_range(path, "lengths", text.lengths, identity.ctx_len + 1)
        _check_range(path, "row_sequence", text.row_sequence, receipt.sequences)
        _check_range(path, "row_position", text.row_position, identity.ctx_len)
        return text

    def statistics(self, hookpoint: str, shards: Sequence[int] | None = None) -> Statistics:
        """Read and merge a hookpoint's statistics over some shards (None: all), checked."""
        self.require_hookpoint(hookpoint)
        self.require_shards()
        chosen = tuple(self.shards if shards is None else shards)
        if (hookpoint, chosen) not in self._merged:
            self.fetch_statistics(chosen)
            found = [of_shard[hookpoint] for of_shard in self._statistics(chosen, [hookpoint])]
            self._merged[hookpoint, chosen] = merge(found)
        return self._merged[hookpoint, chosen]

    def shard_statistics(
        self, shard: int, hookpoints: Sequence[str] | None = None
    ) -> dict[str, Statistics]:
        """Read the statistics of one shard at some hookpoints (None: all), checked."""
        return self._statistics([shard], self.hookpoints if hookpoints is None else hookpoints)[0]

    def fetch_statistics(self, shards: Sequence[int]) -> None:
        """Prefetch the statistics files of shards if the cache is behind a URL."""
        if not isinstance(self.root, Path):
            for _ in prefetch_files(statistics_path(self.root, shard) for shard in shards):
                pass

    def _statistics(
        self, shards: Sequence[int], hookpoints: Sequence[str]
    ) -> list[dict[str, Statistics]]:
        """Read the statistics of each shard, by hookpoint."""
        paths = [statistics_path(self.root, shard) for shard in shards]
        expected = statistics_tensors(self.manifest.identity.hookpoints)
        found = []
        for shard, path in zip(shards, paths, strict=True):
            receipt = self.receipts[shard]
            self._check(path, receipt, "stats")
            extents = dict(zip(expected, safetensors_io.locate(path, expected), strict=True))
            found.append({name: _parse_statistics(name, extents, receipt) for name in hookpoints})
        return found

    def check_file(self, shard: int, name: str) -> CachePath:
        """Compare a shard's file, by logical name, with its receipt, once per `Cache`.

        Returns:
            Path of the file.

        Raises:
            CorruptShardError: the file differs or is missing.
        """
        path = data_paths(self.root, self.manifest, shard)[name]
        self._check(path, self.receipts[shard], name)
        return path

    def files_of(self, hookpoint: str, shard: int) -> dict[str, CachePath]:
        """Return the files of a shard's rows of one hookpoint, by logical name."""
        key = (hookpoint, shard)
        if key not in self._files:
            paths = data_paths(self.root, self.manifest, shard)
            parts = self.row_dtype.parts(self.manifest.width(hookpoint))
            names = [f"{part}/{hookpoint}" for part in parts]
            self._files[key] = {name: paths[name] for name in names if name in paths}
        return self._files[key]

    def compare_file(self, shard: int, name: str) -> CachePath:
        """Compare a shard's file with its receipt, even if `check_file` did before."""
        path = data_paths(self.root, self.manifest, shard)[name]
        _compare(path, self.receipts[shard], name)
        return path

    def _check(self, path: CachePath, receipt: ShardReceipt, name: str) -> None:
        if path not in self._checked:
            _compare(path, receipt, name)
            self._checked.add(path)

    def locate(
        self, hookpoint: str, shard: int, part: str = VALUES
    ) -> TensorExtent | CompressedExtent:
        """Locate one component of a shard's rows; header and size are checked once.

        Raises:
            HookpointError: the cache does not hold the hookpoint.
            CorruptShardError: the file is missing, or its header or size differs.
        """
        key = (hookpoint, shard, part)
        if key not in self._extents:
            self.require_hookpoint(hookpoint)
            rows, backend = self.receipts[shard].rows, BACKENDS[self.manifest.backend]
            self._extents[key] = backend.locate(
                self.root, self.manifest, hookpoint, shard, rows, part
            )
        return self._extents[key]

    def locate_tokens(self, shard: int) -> dict[str, TensorExtent]:
        """Locate the tensors of a shard's text, by name; raises `CorruptShardError`."""
        receipt, ctx_len = self.receipts[shard], self.manifest.identity.ctx_len
        expected = token_tensors(receipt.sequences, ctx_len, receipt.rows)
        extents = safetensors_io.locate(tokens_path(self.root, shard), expected)
        return dict(zip(expected, extents, strict=True))

    def locate_statistics(self, shard: int) -> dict[str, TensorExtent]:
        """Locate the tensors of a shard's statistics, by name; raises `CorruptShardError`."""
        expected = statistics_tensors(self.manifest.identity.hookpoints)
        extents = safetensors_io.locate(statistics_path(self.root, shard), expected)
        return dict(zip(expected, extents, strict=True))


def byte_views(rows: StoredRows) -> dict[str, memoryview]:
    """View the memory of rows as bytes, by component."""
    return {name: part.reshape(-1).view(np.uint8).data for name, part in rows.parts.items()}


def symlinked_dirs(root: CachePath, manifest: Manifest) -> list[Path]:
    """List subfolders of a cache that are symbolic links. The cache's folder itself may be one."""
    if not isinstance(root, Path):
        return []  # stores have none
    folders = {root / receipts_module.FOLDER}
    for path in data_paths(root, manifest, 0).values():
        folders |= {parent for parent in path.parents if root in parent.parents}
    return sorted(folder for folder in folders if folder.is_symlink())


def _parse_statistics(
    hookpoint: str, extents: dict[str, TensorExtent], receipt: ShardReceipt
) -> Statistics:
    keys = ("sum", "sum_squares", "abs_max", "norm_sum_max", "norm_histogram")
    tensors = safetensors_io.read([extents[f"{hookpoint}/{key}"] for key in keys])
    total, total_squares, abs_max, (norm_total, norm_max), norm_histogram = tensors
    non_finite = receipt.non_finite[hookpoint]
    return Statistics(
        count=receipt.rows - non_finite,
        total=total,
        total_squares=total_squares,
        abs_max=abs_max,
        norm_total=float(norm_total),
        norm_max=float(norm_max),
        norm_histogram=norm_histogram,
        non_finite=non_finite,
        near_overflow=receipt.near_overflow[hookpoint],
    )


def _compare(path: CachePath, receipt: ShardReceipt, name: str) -> None:
    """Raise `CorruptShardError` unless a file has the size and digest of `name` in the receipt."""
    promised = receipt.files[name]
    got = _found(path, promised.bytes)
    if got != promised and not isinstance(path, Path):
        require_remote(path).forget()  # the block cache may be wrong: fetch the file again
        got = _found(path, promised.bytes)
    if got != promised:
        raise CorruptShardError(
            f"{path} differs from the receipt of shard {receipt.shard}",
            expected=promised,
            got=got,
            remedy="actcache verify CACHE --repair, or restore a copy",
        )


def _found(path: CachePath, size: int) -> object:
    """Return the digest of a plain file of `size` bytes, or else a description of the file."""
    if not path.is_file() or path.is_symlink():
        return "no plain file"
    found = path.stat().st_size  # checked first, so that an inflated file is not read
    local = path if isinstance(path, Path) else require_remote(path)
    return digest_file(local) if found == size else f"{found} bytes"


def _check_range(path: CachePath, name: str, numbers: NDArray[np.int32], end: int) -> None:
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < end:
        raise CorruptShardError(
            f"{path} holds {name} out of range",
            expected=f"0 to {end - 1}",
            got=f"{numbers.min()} to {numbers.max()}",
            remedy="actcache verify CACHE --repair, or restore a copy",
        )
