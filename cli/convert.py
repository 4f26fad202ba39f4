"""`actcache convert`: rewrite a cache in another backend, compression or dtype."""

from __future__ import annotations

from actcache.config import ConvertConfig

from .error_handling import print_json


def run(config: ConvertConfig, as_json: bool) -> None:
    """Copy the cache SOURCE into another backend, compression or dtype, shard by shard.

    Every file is checked against its receipt as it is read. The same command resumes an interrupted
    conversion. Of an unfinished source, the existing shards are converted; run the command again
    for later ones.
    """
    import dataclasses

    from actcache.cache.convert import convert
    from actcache.cache.reader import Cache
    from actcache.core.progress import format_bytes

    summary = convert(config)
    if as_json:
        print_json(dataclasses.asdict(summary))
        return
    cache = Cache.open(summary.cache)
    state = "complete" if summary.complete else "incomplete, as the source is: convert again later"
    if summary.new_shards == 0:
        did = "nothing left to do"
    else:
        did = (
            f"converted {summary.new_shards} shards, {summary.new_rows:,} rows x "
            f"{len(cache.hookpoints)} hookpoints, {format_bytes(summary.read_bytes)} to "
            f"{format_bytes(summary.new_bytes)} in {summary.seconds:.0f} s"
        )
    print(f"{summary.cache}: {did}; {state}, {cache.rows:,} rows in {len(cache.shards)} shards")
