"""Which URLs are taken, and how they are shown: without whatever may be a secret."""

from __future__ import annotations

import re

from actcache.errors import ConfigError
from actcache.filesystem.block_cache import open_blocks
from actcache.filesystem.object_store import ObjectStore
from actcache.filesystem.remote_path import RemoteFiles, RemotePath

_USER = re.compile(r"(?<=://)[^/?#]*@")
_QUERY = re.compile(r"[?#].*", re.DOTALL)
_LOCAL = ("file", "local")


def redact_url(url: str) -> str:
    """The URL as errors show it: user, password, query and fragment as stars."""
    return _QUERY.sub("?***", _USER.sub("***@", url))


def validate_url(url: str) -> None:
    """Refuse URLs that are chained, or that hold what belongs into nobody's run.json.

    Raises:
        ConfigError: it is no plain URL.
    """
    protocol, _, rest = url.partition("://")
    shown = redact_url(url)
    if "::" in url:
        raise ConfigError(
            "chained URLs are not taken",
            expected="one URL, such as s3://bucket/cache",
            got=shown,
            remedy="blocks are kept on this machine in any case; see --block-cache",
        )
    if protocol in _LOCAL:
        raise ConfigError(
            "a folder of this machine is named by its path", expected="a path", got=shown
        )
    if shown != url:
        raise ConfigError(
            "the URL of a cache holds a user, a query or a fragment, which may be a secret",
            expected="scheme://place/of/the/cache",
            got=shown,
            remedy="give credentials and endpoints by the environment, or in fsspec's own "
            "configuration (~/.config/fsspec)",
        )
    if not protocol or not rest.strip("/") or ".." in rest.split("/"):
        raise ConfigError(
            "not the URL of a cache", expected="scheme://place/of/the/cache", got=shown
        )


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
    validate_url(url)
    connection = ObjectStore(url)
    return RemotePath(RemoteFiles(connection, open_blocks(block_cache, block_cache_bytes)), "")
