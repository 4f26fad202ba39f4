"""Options of every command that reads a cache by its URL."""

from __future__ import annotations

from typing import Annotated

import typer

BlockCache = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="With a URL: folder for blocks that were fetched. Default: $ACTCACHE_BLOCK_CACHE, or "
        "actcache/blocks in the user's folder for caches.",
    ),
]
BlockCacheBytes = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Bytes that it may hold. Default: $ACTCACHE_BLOCK_CACHE_BYTES, or 16 GiB.",
    ),
]
