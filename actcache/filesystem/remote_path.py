"""`RemotePath`: files of an object store with the interface of `pathlib.Path`, read in blocks."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import PurePath, PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING, BinaryIO

import xxhash

from actcache.errors import CorruptShardError
from actcache.filesystem.block_cache import BlockCache
from actcache.filesystem.object_store import Info, ObjectStore

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


BLOCK = 256 << 10
"""Bytes of a block. A stream reads about 1 MiB at random, unaligned to blocks; much larger blocks
would waste transfer if the block cache is smaller than the activation cache."""
RUN = 32
"""Largest number of consecutive blocks in one request: 8 MiB."""
_PIECE = 1 << 16


class RemoteFiles:
    """The files below one URL. Thread-safe.

    Folders are listed once, so a cache is read as it was when it was opened. Blocks are cached
    under the file's URL and version, so blocks of a replaced object are not reused. `digest`
    records the digest of each block, and later reads, from the block cache or the store, must
    match it.

    Args:
        connection: the object store.
        blocks: block cache on this machine.
    """

    def __init__(self, connection: ObjectStore, blocks: BlockCache) -> None:
        self.connection, self.blocks = connection, blocks
        self._lock = Lock()
        self._folders: dict[str, dict[str, Info]] = {}
        self._digests: dict[str, tuple[str, list[bytes]]] = {}  # version, and of every block
        self._nonce = os.urandom(16).hex()

    def __reduce__(self) -> tuple[type[RemoteFiles], tuple[ObjectStore, BlockCache]]:
        """Pickle without listings and digests, which another process must obtain itself."""
        return RemoteFiles, (self.connection, self.blocks)

    def listing(self, folder: str) -> dict[str, Info]:
        """List a folder, by name; the result is kept."""
        with self._lock:
            known = self._folders.get(folder)
        if known is None:
            known = self.connection.listing(folder)
            with self._lock:
                self._folders[folder] = known
        return known

    def info(self, key: str) -> Info:
        """Return kind, size and version of a file or folder; raises `FileNotFoundError`."""
        if not key:
            return Info(True, 0, None)
        folder, _, name = key.rpartition("/")
        try:
            return self.listing(folder)[name]
        except KeyError:
            raise FileNotFoundError(f"{self.connection.url}/{key}") from None

    def version(self, key: str) -> str:
        """Return a string that changes with the file's content."""
        # Without versions in the store, a per-process nonce prevents reuse by other processes.
        return self.info(key).version or self._nonce

    def forget(self, key: str) -> None:
        """Drop a file's cached blocks, digests and listing, so that the store is read again."""
        with suppress(FileNotFoundError):
            version = self.version(key)
            for index in range(_blocks(self.info(key).bytes)):
                self.blocks.drop(self._name(key, version, index))
        with self._lock:
            self._digests.pop(key, None)
            self._folders.pop(key.rpartition("/")[0], None)

    def read(self, key: str, start: int, stop: int) -> Iterator[memoryview]:
        """Yield bytes [start, stop) of a file, in pieces.

        Raises:
            CorruptShardError: the file is gone, or differs from the recorded digests.
            RemoteError: the store does not deliver it.
        """
        for index, block in self._blocks(key, start // BLOCK, _blocks(stop)):
            first = index * BLOCK
            yield memoryview(block)[max(0, start - first) : stop - first]

    def digest(self, key: str, advance: Callable[[int], None]) -> tuple[int, str]:
        """Compute size and XXH3-128 of a file and record its block digests for later reads."""
        info, version = self.info(key), self.version(key)
        whole, each = xxhash.xxh3_128(), []
        with self._lock:
            self._digests.pop(key, None)
        for _, block in self._blocks(key, 0, _blocks(info.bytes)):
            whole.update(block)
            each.append(xxhash.xxh3_128(block).digest())
            advance(len(block))
        with self._lock:
            self._digests[key] = version, each
        return info.bytes, whole.hexdigest()

    def _blocks(self, key: str, first: int, end: int) -> Iterator[tuple[int, bytes | memoryview]]:
        """Yield (index, block) for blocks [first, end) of a file."""
        try:
            info, version = self.info(key), self.version(key)
        except FileNotFoundError as error:
            raise self._gone(key) from error
        end = min(end, _blocks(info.bytes))
        name = functools.partial(self._name, key, version)
        known = self._digests.get(key)
        wanted = known[1] if known is not None and known[0] == version else None
        index = first
        while index < end:
            size = min(BLOCK, info.bytes - index * BLOCK)
            here = self.blocks.get(name(index), size)
            if here is not None and _is(here, wanted, index):
                yield index, here
                index += 1
                continue
            stop = index + 1
            while stop < min(end, index + RUN) and not self.blocks.holds(name(stop)):
                stop += 1
            try:
                fetched = memoryview(
                    self.connection.fetch(key, index * BLOCK, min(stop * BLOCK, info.bytes))
                )
            except FileNotFoundError as error:
                raise self._gone(key) from error
            for start in range(0, len(fetched), BLOCK):
                block = fetched[start : start + BLOCK]
                if not _is(block, wanted, index):
                    raise CorruptShardError(
                        f"{self.connection.url}/{key} has changed since it was compared with its "
                        "receipt",
                        expected="the same bytes",
                        got="other bytes",
                        remedy="restore it from a copy, or open the cache again if it was replaced",
                    )
                self.blocks.put(name(index), block)
                yield index, block
                index += 1

    def _name(self, key: str, version: str, index: int) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.connection.url, key, version, str(BLOCK)):
            digest.update(f"{len(part)}:{part}".encode())
        return f"{digest.hexdigest()}-{index}"

    def _gone(self, key: str) -> CorruptShardError:
        return CorruptShardError(
            f"{self.connection.url}/{key} is gone",
            expected="the file that the receipt describes",
            got="nothing",
            remedy="restore it from a copy",
        )


def _blocks(size: int) -> int:
    """Return the number of blocks of a file of `size` bytes."""
    return -(-size // BLOCK)


def _is(block: bytes | memoryview, wanted: Sequence[bytes] | None, index: int) -> bool:
    return wanted is None or xxhash.xxh3_128(block).digest() == wanted[index]


@functools.total_ordering
class RemotePath:
    """A file or folder below a URL. Methods up to `read_bytes` behave as those of `pathlib.Path`.

    Args:
        files: files of the URL.
        key: path relative to the URL, '' for the URL itself.
    """

    def __init__(self, files: RemoteFiles, key: str) -> None:
        self.files, self.key = files, key

    def __str__(self) -> str:
        url = self.files.connection.url
        return f"{url}/{self.key}" if self.key else url

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __hash__(self) -> int:
        return hash(str(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __lt__(self, other: RemotePath) -> bool:
        return str(self) < str(other)

    def __truediv__(self, part: str) -> RemotePath:
        # Names are built from numbers and from hookpoint names that the manifest has checked.
        assert not part.startswith("/")
        assert not {"", ".", ".."} & set(part.split("/"))
        return RemotePath(self.files, f"{self.key}/{part}" if self.key else part)

    def joinpath(self, *parts: str) -> RemotePath:
        """Append path components."""
        return functools.reduce(RemotePath.__truediv__, parts, self)

    @property
    def name(self) -> str:
        """Last component of the path."""
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """Parent folder; the URL itself is its own parent."""
        return RemotePath(self.files, self.key.rpartition("/")[0])

    @property
    def parents(self) -> list[RemotePath]:
        """Parent folders, up to the URL itself."""
        return [self.parent, *self.parent.parents] if self.key else []

    def relative_to(self, other: RemotePath) -> PurePath:
        """Return the path relative to another."""
        return PurePosixPath(self.key).relative_to(other.key)

    def exists(self) -> bool:
        """Return whether the file or folder exists."""
        return self._info() is not None

    def is_file(self) -> bool:
        """Return whether the path is a file."""
        info = self._info()
        return info is not None and not info.is_folder

    def is_dir(self) -> bool:
        """Return whether the path is a folder."""
        info = self._info()
        return info is not None and info.is_folder

    def is_symlink(self) -> bool:
        """Return False, since object stores have no links."""
        return False

    def iterdir(self) -> Iterator[RemotePath]:
        """List the folder."""
        return iter([self / name for name in self.files.listing(self.key)])

    def stat(self) -> os.stat_result:
        """Return kind and size, other fields 0; raises `FileNotFoundError`."""
        info = self.files.info(self.key)
        mode = stat.S_IFDIR if info.is_folder else stat.S_IFREG
        return os.stat_result((mode, 0, 0, 0, 0, 0, info.bytes, 0, 0, 0))

    def lstat(self) -> os.stat_result:
        """Return `stat()`, since object stores have no links."""
        return self.stat()

    def read_bytes(self) -> bytes:
        """Read the whole file."""
        return b"".join(self.files.read(self.key, 0, self.stat().st_size))

    def open(self) -> BinaryIO:
        """Open the file for buffered binary reading."""
        return io.BufferedReader(_Reader(self), _PIECE)

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill views, one after another, with consecutive bytes from `offset` on.

        Raises:
            CorruptShardError: the file is gone, ends early, or has changed.
        """
        stop = offset + sum(map(len, views))
        if stop > self.stat().st_size:
            raise CorruptShardError(
                f"{self} ends early",
                expected=f"at least {stop} bytes",
                got=f"{self.stat().st_size} bytes",
                remedy="restore it from a copy",
            )
        left = [view for view in views if len(view)]
        for piece in self.files.read(self.key, offset, stop):
            while piece:
                n = min(len(piece), len(left[0]))
                left[0][:n] = piece[:n]
                piece, left[0] = piece[n:], left[0][n:]
                if not left[0]:
                    left.pop(0)

    def digest(self, advance: Callable[[int], None]) -> tuple[int, str]:
        """Compute size and XXH3-128; later reads of other bytes raise `CorruptShardError`."""
        return self.files.digest(self.key, advance)

    def version(self) -> str:
        """Return a string that changes with the file's content, if the store has versions."""
        return self.files.version(self.key)

    def forget(self) -> None:
        """Drop cached data of the file, so that the store is read again."""
        self.files.forget(self.key)

    def warm(self) -> None:
        """Fetch the file's blocks to the block cache."""
        if self.is_file():
            for _ in self.files.read(self.key, 0, self.stat().st_size):
                pass

    def _info(self) -> Info | None:
        try:
            return self.files.info(self.key)
        except FileNotFoundError:
            return None


class _Reader(io.RawIOBase):
    """Seekable raw reader of a `RemotePath`."""

    def __init__(self, path: RemotePath) -> None:
        self._path, self._at, self._size = path, 0, path.stat().st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begins = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}
        self._at = max(0, begins[whence] + offset)
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, min(len(view), self._size - self._at))]
        if view:
            self._path.read_into([view], self._at)
        self._at += len(view)
        return len(view)
