"""Where a cache is read from: a folder on this machine, or a place in a store behind a URL.

`CachePath` is the part of `pathlib.Path` that reading a cache needs. A folder is a `Path` itself,
whose files are read at the speed of the disk; a URL is a `RemotePath`. Functions that build the
name of a file from its folder take and return either. The few functions that touch bytes
distinguish them: `preadv_into`, `digest_file`, `safetensors_io.locate`, `VerifiedReader`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

from actcache.errors import ConfigError

if TYPE_CHECKING:
    from actcache.filesystem.remote_path import RemotePath


_AT_ONCE = 256
_THREADS = 16


class Stat(Protocol):
    """What is asked of a file before it is read."""

    @property
    def st_mode(self) -> int:
        """Kind of file."""

    @property
    def st_size(self) -> int:
        """Bytes."""


class CachePath(Protocol):
    """A file or folder; each method as `pathlib.Path` has it."""

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
    def stat(self) -> Stat: ...  # noqa: D102
    def lstat(self) -> Stat: ...  # noqa: D102
    def read_bytes(self) -> bytes: ...  # noqa: D102


CachePathT = TypeVar("CachePathT", bound=CachePath)


def is_url(where: object) -> bool:
    """Whether a cache is named by a URL, not by a folder."""
    return isinstance(where, str) and "://" in where


def open_path(
    where: str | CachePath, block_cache: str | None = None, block_cache_bytes: int | None = None
) -> Path | RemotePath:
    """The place that a folder or URL names; see `remote.open_url`."""
    if isinstance(where, str) and is_url(where):
        from actcache.filesystem.urls import open_url

        return open_url(where, block_cache, block_cache_bytes)
    from actcache.filesystem.remote_path import RemotePath

    return where if isinstance(where, RemotePath) else Path(str(where))


def require_remote(place: CachePath) -> RemotePath:
    """A place that is no folder of this machine."""
    from actcache.filesystem.remote_path import RemotePath

    assert isinstance(place, RemotePath)
    return place


def require_local(place: CachePath) -> Path:
    """The place as a folder of this machine; raises `ConfigError` where it is none."""
    if not isinstance(place, Path):
        raise ConfigError(
            f"{place} is not a folder of this machine",
            expected="a folder",
            remedy="copy the cache to a disk for this",
        )
    return place


def reject_url(value: str, option: str, why: str) -> None:
    """Raise `ConfigError` if an option that needs a folder was given a URL."""
    if is_url(value):
        from actcache.filesystem.urls import redact_url

        raise ConfigError(
            f"{option} cannot be a URL: {why}", expected="a folder", got=redact_url(value)
        )


def prefetch_files(paths: Iterable[CachePathT]) -> Iterator[CachePathT]:
    """The paths as they are; those of a store with their bytes fetched by several threads before.

    One after another, ten thousand small files would take as many times the way to the store.
    """
    from actcache.filesystem.remote_path import RemotePath

    rest = iter(paths)
    while some := list(islice(rest, _AT_ONCE)):
        remote = [path for path in some if isinstance(path, RemotePath)]
        if len(remote) > 1:
            with ThreadPoolExecutor(_THREADS, "actcache-fetch") as pool:
                list(pool.map(RemotePath.warm, remote))
        yield from some
