"""Caches behind a URL: read through fsspec, by way of a bounded cache of blocks on this machine.

`url` what is taken · `connection` to a store, with retries · `blocks` what is kept here · `path`
files of a store as a reader of caches sees them. fsspec is imported when a URL is opened.
"""

from __future__ import annotations

from actcache.remote.blocks import BlockCache, open_blocks
from actcache.remote.connection import Connection
from actcache.remote.path import RemoteFiles, RemotePath
from actcache.remote.url import require_plain

__all__ = ["BlockCache", "RemotePath", "open_url"]


def open_url(
    url: str, block_cache: str | None = None, block_cache_bytes: int | None = None
) -> RemotePath:
    """The place that a URL names. Nothing is asked of the store yet.

    Args:
        url: of the cache's folder.
        block_cache: folder of this machine for blocks that were fetched; by default
            $ACTCACHE_BLOCK_CACHE, or actcache/blocks in the user's folder for caches.
        block_cache_bytes: bytes that it may hold, 0 for none; by default
            $ACTCACHE_BLOCK_CACHE_BYTES, or 16 GiB.

    Raises:
        ConfigError: the URL cannot be taken, a library for it is missing, or the folder for blocks
            cannot be used.
    """
    require_plain(url)
    connection = Connection(url)
    return RemotePath(RemoteFiles(connection, open_blocks(block_cache, block_cache_bytes)), "")
