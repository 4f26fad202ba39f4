"""Open URLs of caches: validation, and redaction of secrets in error messages."""

from __future__ import annotations

import os
import re

from actcache.errors import ConfigError
from actcache.filesystem.block_cache import open_blocks
from actcache.filesystem.object_store import ObjectStore
from actcache.filesystem.remote_path import RemoteFiles, RemotePath

_USER = re.compile(r"(?<=://)[^/?#]*@")
_QUERY = re.compile(r"[?#].*", re.DOTALL)
_LOCAL = ("file", "local")
_WEB = ("http", "https")


def redact_url(url: str) -> str:
    """Replace user, password, query and fragment of a URL by stars, for error messages."""
    return _QUERY.sub("?***", _USER.sub("***@", url))


def validate_url(url: str) -> None:
    """Raise `ConfigError` for chained URLs and those with parts that may be secret."""
    protocol, _, rest = url.partition("://")
    shown = redact_url(url)
    if "::" in url:
        raise ConfigError(
            "chained URLs are not supported",
            expected="one URL, such as s3://bucket/cache",
            got=shown,
            remedy="fetched blocks are cached on this machine anyway; see --block-cache",
        )
    if protocol in _LOCAL:
        raise ConfigError(
            "a local folder is given by its path, not by a URL", expected="a path", got=shown
        )
    if protocol in _WEB:
        raise ConfigError(
            "a cache cannot be read from a web server, which does not list the files of a folder",
            expected="s3://, gs://, hf:// or another object store that fsspec lists",
            got=shown,
            remedy="download the cache, for example with wget --recursive, and name the folder",
        )
    if shown != url:
        raise ConfigError(
            "the URL of a cache contains a user, a query or a fragment, which may be a secret",
            expected="scheme://path/of/the/cache",
            got=shown,
            remedy="pass credentials and endpoints in the environment, or in fsspec's own "
            "configuration (~/.config/fsspec)",
        )
    if not protocol or not rest.strip("/") or ".." in rest.split("/"):
        raise ConfigError(
            "not the URL of a cache", expected="scheme://path/of/the/cache", got=shown
        )


def open_url(
    url: str,
    block_cache: str | os.PathLike[str] | None = None,
    block_cache_bytes: int | None = None,
) -> RemotePath:
    """Return the path of a URL, without a request to the store.

    Args:
        url: URL of the cache's folder.
        block_cache: local folder for fetched blocks; by default $ACTCACHE_BLOCK_CACHE, or
            actcache/blocks in the user's cache folder.
        block_cache_bytes: capacity of that folder, 0 to disable it; by default
            $ACTCACHE_BLOCK_CACHE_BYTES, or 16 GiB.

    Raises:
        ConfigError: the URL is invalid, a library for it is missing, or the folder for blocks
            cannot be used.
    """
    validate_url(url)
    connection = ObjectStore(url)
    return RemotePath(RemoteFiles(connection, open_blocks(block_cache, block_cache_bytes)), "")
