"""`actcache bench`: speed at which this machine reads a cache."""

from __future__ import annotations

from typing import Annotated

import typer

from .error_handling import print_json, report_errors
from .options import BlockCache, BlockCacheBytes, require_names
from .tables import table


@report_errors
def run(
    cache: Annotated[str, typer.Argument(help="Folder of the cache, or its URL.")],
    hookpoint: Annotated[
        list[str] | None,
        typer.Option(help="Read this hookpoint; repeatable. Default: all together."),
    ] = None,
    max_bytes: Annotated[
        int, typer.Option(min=1, max=2**53, help="Limit on the bytes of shards.")
    ] = 2**30,
    batch_size: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Rows of a batch.")] = 4096,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Reading threads. Default: by a short probe."),
    ] = None,
    block_cache: BlockCache = None,
    block_cache_bytes: BlockCacheBytes = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how fast CACHE is read and streamed on this machine, from disk and from memory."""
    import dataclasses

    from actcache.cache.reader import Cache
    from actcache.core.progress import format_bytes
    from actcache.stream.benchmark import benchmark_reads

    require_names(CACHE=cache, **{"--block-cache": block_cache})
    found = benchmark_reads(
        Cache.open(cache, block_cache=block_cache, block_cache_bytes=block_cache_bytes),
        hookpoint or (),
        max_bytes=max_bytes,
        batch_size=batch_size,
        threads=threads,
    )
    if json:
        facts = dataclasses.asdict(found)
        keys = "threads", "piece", "ahead"
        print_json(facts | {"reading": dict(zip(keys, facts["reading"].values(), strict=True))})
        return
    rows = [
        [speed.what, f"{format_bytes(speed.bytes_per_second)}/s", f"{speed.rows_per_second:,.0f}"]
        for speed in found.speeds
    ]
    print(table(["", "bytes", "rows/s"], rows))
    print(
        f"{found.rows:,} rows of {', '.join(found.hookpoints)} ({format_bytes(found.bytes)}), "
        f"read by {found.reading}; batches of {found.batch_size:,} rows; "
        f"mixed: {found.pool_rows:,} rows in memory"
    )
