"""`Cache`: a harvested cache, read by shard and row. Nothing here writes."""

from __future__ import annotations

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
    Array,
    CompressedExtent,
    RowDtype,
    StoredRows,
    TensorExtent,
    safetensors_io,
)
from actcache.storage.preadv import WHOLE, preadv_into, readahead

Views = Mapping[str, Sequence[memoryview]]
"""By part, places for the bytes of consecutive rows, one after another."""


@dataclass(frozen=True)
class ShardTokens:
    """The text of a shard: C context length, S sequences, N rows."""

    tokens: NDArray[np.int32]
    """Token ids, padding included. [S, C]"""
    lengths: NDArray[np.int32]
    """Tokens before the padding. [S]"""
    documents: NDArray[np.int64]
    """Number of the document in which a sequence begins, in the order they were taken. [S]"""
    starts: NDArray[np.int64]
    """Token of that document with which it begins. [S]"""
    row_sequence: NDArray[np.int32]
    """Sequence, within the shard, of every row. [N]"""
    row_position: NDArray[np.int32]
    """Position, within its sequence, of every row. [N]"""


class Cache:
    """The published shards of a cache at the moment it was opened, and those taken in since.

    Reading is safe from several threads at once.
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

    @classmethod
    def open(
        cls,
        root: str | CachePath,
        *,
        block_cache: str | None = None,
        block_cache_bytes: int | None = None,
    ) -> Cache:
        """Open the cache in a folder, or at a URL that fsspec reads (s3://, gs://, hf://, ...).

        Args:
            root: folder or URL.
            block_cache: with a URL, folder of this machine for blocks that were fetched.
            block_cache_bytes: bytes that it may hold; both by default as in `remote.open_url`.

        Raises:
            EmptyCacheError: there is no manifest.
            FormatError: manifest or receipts are damaged, or a folder is a symbolic link.
            ConfigError: a URL that cannot be read.
            RemoteError: the store behind the URL does not answer, or does not let us in.
        """
        root = open_path(root, block_cache, block_cache_bytes)
        if linked := symlinked_dirs(root, read_manifest(root)):
            raise FormatError(
                f"{linked[0]} is a symbolic link",
                expected="a folder: nothing outside the cache's own is read",
                remedy="put the folder itself there, or a bind mount",
            )
        return cls(root, *receipts_module.read_cache_state(root))

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
        """Whether the harvest reached its end and all its shards are here."""
        if self.end is None or len(self.receipts) != self.end.last_shard + 1:
            return False
        return self.shards == list(range(self.end.last_shard + 1))

    def refresh(self, shards: Iterable[int]) -> int | None:
        """Take in what a harvest has published since: the seal, and the receipts of some shards.

        Returns:
            The first of the shards that is not there yet; None if all are.

        Raises:
            FormatError: a receipt or the seal is damaged.
        """
        if self.end is None:
            self.end = receipts_module.read_completion_marker(self.root, self.manifest)
        found, missing = {}, None
        planned = self.manifest.plan.shards  # what lies beyond is of a later extension
        for shard in shards:
            if shard in self.receipts:
                continue
            path = receipts_module.receipt_path(self.root, shard)
            if (planned is None or shard < planned) and path.exists():
                found[shard] = receipts_module.read_receipt(path, self.manifest)
            elif missing is None:
                missing = shard
        if found:  # as a whole: other threads read it
            self.receipts = dict(sorted((self.receipts | found).items()))
        return missing

    def truncated_to(self, extensions: int) -> Cache:
        """The cache as it is without its later extensions."""
        if extensions >= len(self.manifest.extensions):
            return self
        manifest = self.manifest.truncated_to(extensions)
        inside = {s: r for s, r in self.receipts.items() if manifest.plan.max_sequences(s)}
        end = receipts_module.read_completion_marker(self.root, manifest)
        return Cache(self.root, manifest, inside, end)

    def missing_files(self) -> list[CachePath]:
        """Published files that are gone or have another size; their bytes are not read."""
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
                remedy="run its actcache harvest command again: it goes on where it was",
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
        """Digest over the receipts of some shards: pins every byte that training reads."""
        return receipts_module.digest([self.receipts[shard] for shard in shards])

    def read_into(self, hookpoint: str, shard: int, start: int, out: StoredRows) -> None:
        """Read consecutive rows, as stored, into `out`, which is as many rows; see `read_views`."""
        self.read_views(hookpoint, shard, start, {k: [v] for k, v in byte_views(out).items()})

    def read_views(
        self, hookpoint: str, shard: int, start: int, views: Views, piece: int = WHOLE
    ) -> None:
        """Read consecutive rows, as stored, into several places, one after another.

        Args:
            hookpoint: which activations.
            shard: which shard.
            start: first row.
            views: memory for as many rows as are wanted.
            piece: bytes that the system is asked for at once, at most.

        Raises:
            CorruptShardError: the file is missing, has another header or size, or ends early.
        """
        for part, places in views.items():
            extent = self.locate(hookpoint, shard, part)
            offset = start * (extent.bytes // max(1, extent.shape[0]))
            length = sum(map(len, places))
            assert offset + length <= extent.bytes
            if not isinstance(extent, CompressedExtent):
                preadv_into(extent.path, places, extent.offset + offset, piece)
            elif len(places) == 1:
                extent.read_into(places[0], offset)
            else:  # as one: a block would be decoded for every place
                whole = memoryview(bytearray(length))
                extent.read_into(whole, offset)
                for place in places:
                    place[:], whole = whole[: len(place)], whole[len(place) :]

    def readahead(self, hookpoint: str, shard: int, start: int, rows: int) -> None:
        """Tell the system that these rows will be read soon."""
        for part in self.row_dtype.parts(self.manifest.width(hookpoint)):
            extent = self.locate(hookpoint, shard, part)
            size = extent.bytes // max(1, extent.shape[0])
            if not isinstance(extent, CompressedExtent):
                readahead(extent.path, extent.offset + start * size, rows * size)

    def read(
        self, hookpoint: str, shard: int, start: int = 0, rows: int | None = None
    ) -> StoredRows:
        """Rows [start, start + rows) of a shard, as stored."""
        self.locate(hookpoint, shard)  # before memory is taken for what the receipt promises
        rows = self.receipts[shard].rows - start if rows is None else rows
        out = self.row_dtype.empty(rows, self.manifest.width(hookpoint))
        self.read_into(hookpoint, shard, start, out)
        return out

    def tokens(self, shard: int) -> ShardTokens:
        """Token ids of a shard, and which of them each row is; checked against the receipt."""
        receipt = self.receipts[shard]
        identity = self.manifest.identity
        path = tokens_path(self.root, shard)
        self._check(path, receipt, "tokens")
        extents = self.locate_tokens(shard).values()
        words = ShardTokens(*(safetensors_io.read(extent) for extent in extents))
        _check_range(path, "lengths", words.lengths, identity.ctx_len + 1)
        _check_range(path, "row_sequence", words.row_sequence, receipt.sequences)
        _check_range(path, "row_position", words.row_position, identity.ctx_len)
        return words

    def statistics(self, hookpoint: str, shards: Sequence[int] | None = None) -> Statistics:
        """Statistics of a hookpoint over some shards, at least one; checked by receipt.

        Args:
            hookpoint: which activations.
            shards: which shards; None: all.
        """
        self.require_hookpoint(hookpoint)
        self.require_shards()
        chosen = self.shards if shards is None else shards
        self.fetch_statistics(chosen)
        return merge(self._statistics(shard, [hookpoint])[hookpoint] for shard in chosen)

    def shard_statistics(self, shard: int) -> dict[str, Statistics]:
        """Statistics of one shard at every hookpoint; its file is opened and checked once."""
        return self._statistics(shard, self.hookpoints)

    def fetch_statistics(self, shards: Sequence[int]) -> None:
        """Have the statistics of shards of a store on this machine; nothing with a folder."""
        if not isinstance(self.root, Path):
            for _ in prefetch_files(statistics_path(self.root, shard) for shard in shards):
                pass

    def _statistics(self, shard: int, hookpoints: Sequence[str]) -> dict[str, Statistics]:
        receipt = self.receipts[shard]
        self._check(statistics_path(self.root, shard), receipt, "stats")
        extents = self.locate_statistics(shard)
        return {name: _parse_statistics(name, extents, receipt) for name in hookpoints}

    def check_file(self, shard: int, name: str) -> CachePath:
        """Compare every byte of a shard's file, named as in receipts, with what was promised.

        Returns:
            Where it lies.

        Raises:
            CorruptShardError: it is another, or gone.
        """
        path = data_paths(self.root, self.manifest, shard)[name]
        self._check(path, self.receipts[shard], name)
        return path

    def files_of(self, hookpoint: str, shard: int) -> dict[str, CachePath]:
        """The files of a shard's rows of one hookpoint, by their names in the receipt."""
        key = (hookpoint, shard)
        if key not in self._files:
            paths = data_paths(self.root, self.manifest, shard)
            parts = self.row_dtype.parts(self.manifest.width(hookpoint))
            names = [f"{part}/{hookpoint}" for part in parts]
            self._files[key] = {name: paths[name] for name in names if name in paths}
        return self._files[key]

    def compare_file(self, shard: int, name: str) -> CachePath:
        """As `check_file`, however often that was done before."""
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
        """Where one part of a shard's rows lies; header and size are checked once.

        Raises:
            HookpointError: the cache does not hold the hookpoint.
            CorruptShardError: the file is missing or is not what the receipt promises.
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
        """Where the tensors of a shard's text lie, by name; raises `CorruptShardError`."""
        receipt, ctx_len = self.receipts[shard], self.manifest.identity.ctx_len
        expected = token_tensors(receipt.sequences, ctx_len, receipt.rows)
        extents = safetensors_io.locate(tokens_path(self.root, shard), expected)
        return dict(zip(expected, extents, strict=True))

    def locate_statistics(self, shard: int) -> dict[str, TensorExtent]:
        """Where the tensors of a shard's statistics lie, by name; raises `CorruptShardError`."""
        expected = statistics_tensors(self.manifest.identity.hookpoints)
        extents = safetensors_io.locate(statistics_path(self.root, shard), expected)
        return dict(zip(expected, extents, strict=True))


def byte_views(rows: StoredRows) -> dict[str, memoryview]:
    """The memory of some rows, by part, as bytes."""
    return {name: part.reshape(-1).view(np.uint8).data for name, part in rows.parts.items()}


def symlinked_dirs(root: CachePath, manifest: Manifest) -> list[Path]:
    """Folders below a cache's own that are symbolic links. The cache's own may be one."""
    if not isinstance(root, Path):
        return []  # stores have none
    folders = {root / receipts_module.FOLDER}
    for path in data_paths(root, manifest, 0).values():
        folders |= {parent for parent in path.parents if root in parent.parents}
    return sorted(folder for folder in folders if folder.is_symlink())


def _parse_statistics(
    hookpoint: str, extents: dict[str, TensorExtent], receipt: ShardReceipt
) -> Statistics:
    def tensor(key: str) -> Array:
        return safetensors_io.read(extents[f"{hookpoint}/{key}"])

    norm_total, norm_max = (float(x) for x in tensor("norm_sum_max"))
    non_finite = receipt.non_finite[hookpoint]
    return Statistics(
        count=receipt.rows - non_finite,
        total=tensor("sum"),
        total_squares=tensor("sum_squares"),
        abs_max=tensor("abs_max"),
        norm_total=norm_total,
        norm_max=norm_max,
        norm_histogram=tensor("norm_histogram"),
        non_finite=non_finite,
        near_overflow=receipt.near_overflow[hookpoint],
    )


def _compare(path: CachePath, receipt: ShardReceipt, name: str) -> None:
    """Raise `CorruptShardError` unless a file is, byte for byte, what a receipt calls `name`."""
    promised = receipt.files[name]
    got = _found(path, promised.bytes)
    if got != promised and not isinstance(path, Path):
        require_remote(path).forget()  # it may be what is kept on this machine that is wrong
        got = _found(path, promised.bytes)
    if got != promised:
        raise CorruptShardError(
            f"{path} is not what the receipt of shard {receipt.shard} promises",
            expected=promised,
            got=got,
            remedy="actcache verify CACHE --repair, or restore a copy",
        )


def _found(path: CachePath, size: int) -> object:
    """Size and digest of a plain file of so many bytes; else, what it is."""
    if not path.is_file() or path.is_symlink():
        return "no plain file"
    found = path.stat().st_size  # first: one that was blown up must not be read to its end
    return digest_file(path) if found == size else f"{found} bytes"


def _check_range(path: CachePath, name: str, numbers: NDArray[np.int32], end: int) -> None:
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < end:
        raise CorruptShardError(
            f"{path} holds a {name} that cannot be",
            expected=f"0 to {end - 1}",
            got=f"{numbers.min()} to {numbers.max()}",
            remedy="actcache verify CACHE --repair, or restore a copy",
        )
