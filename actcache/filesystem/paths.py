"""Paths of caches: a local folder (`pathlib.Path`) or a URL (`RemotePath`), behind one protocol.

`CachePath` is the subset of `pathlib.Path` that reading a cache needs. Functions that build file
names accept and return either kind. Functions that read bytes distinguish them: `preadv_into`,
`digest_file`, `safetensors_io.locate`, `VerifiedReader`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

from actcache.errors import ConfigError
from actcache.filesystem.rooted import RootedPath, rooted

if TYPE_CHECKING:
    from actcache.filesystem.remote_path import RemotePath


_AT_ONCE = 256
_THREADS = 16


class CachePath(Protocol):
    """A file or folder, with the methods of `pathlib.Path`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def parent(self) -> Self: ...  # noqa: D102
    @property
    def parents(self) -> Sequence[Self]: ...  # noqa: D102
    def __truediv__(self, part: str, /) -> Self: ...
    def __lt__(self, other: Self, /) -> bool: ...
    def __hash__(self) -> int: ...
    def joinpath(self, *parts: str) -> Self: ...  # noqa: D102
    def relative_to(self, other: Self, /) -> PurePath: ...  # noqa: D102
    def exists(self) -> bool: ...  # noqa: D102
    def is_file(self) -> bool: ...  # noqa: D102
    def is_dir(self) -> bool: ...  # noqa: D102
    def is_symlink(self) -> bool: ...  # noqa: D102
    def iterdir(self) -> Iterator[Self]: ...  # noqa: D102
    def stat(self) -> os.stat_result: ...  # noqa: D102
    def lstat(self) -> os.stat_result: ...  # noqa: D102
    def read_bytes(self) -> bytes: ...  # noqa: D102


CachePathT = TypeVar("CachePathT", bound=CachePath)


def is_url(where: object) -> bool:
    """Return whether the location of a cache is a URL, not a folder."""
    return isinstance(where, str) and "://" in where


def open_path(
    where: str | os.PathLike[str] | CachePath,
    block_cache: str | os.PathLike[str] | None = None,
    block_cache_bytes: int | None = None,
) -> RootedPath | RemotePath:
    """Return the path of a folder, as the root of those below it, or of a URL (`urls.open_url`).

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(where, str) and is_url(where):
        from actcache.filesystem.urls import open_url

        return open_url(where, block_cache, block_cache_bytes)
    from actcache.filesystem.remote_path import RemotePath

    if isinstance(where, RemotePath):
        return where
    folder = os.fspath(where) if isinstance(where, os.PathLike) else where
    if not isinstance(folder, str) or "\0" in folder:
        got = f"{type(where).__name__} {str(where)[:80]!r}"
        raise ConfigError("not the path of a cache", expected="a folder or URL", got=got)
    return rooted(where if isinstance(where, Path) else folder)


def require_remote(path: CachePath) -> RemotePath:
    """Narrow the type of a path that is not local to `RemotePath`."""
    from actcache.filesystem.remote_path import RemotePath

    assert isinstance(path, RemotePath)
    return path


def require_local(path: CachePath) -> Path:
    """Narrow the type of a path to a local `Path`; raises `ConfigError` if it is remote."""
    if not isinstance(path, Path):
        raise ConfigError(
            f"{path} is not a local folder",
            expected="a folder",
            remedy="copy the cache to a local disk for this",
        )
    return path


def reject_url(value: str, option: str, why: str) -> None:
    """Raise `ConfigError` if the value of an option that needs a folder is a URL."""
    if is_url(value):
        from actcache.filesystem.urls import redact_url

        raise ConfigError(
            f"{option} cannot be a URL: {why}", expected="a folder", got=redact_url(value)
        )


def prefetch_files(paths: Iterable[CachePathT]) -> Iterator[CachePathT]:
    """Yield the paths after fetching the remote ones to the block cache, 16 files at a time.

    Fetching ten thousand small files one after another would cost as many round trips.
    """
    from actcache.filesystem.remote_path import RemotePath

    rest = iter(paths)
    while some := list(islice(rest, _AT_ONCE)):
        remote = [path for path in some if isinstance(path, RemotePath)]
        if len(remote) > 1:
            with ThreadPoolExecutor(_THREADS, "actcache-fetch") as pool:
                list(pool.map(RemotePath.warm, remote))
        yield from some
