"""`actcache harvest`: run a model once and write its activations to a cache."""

from __future__ import annotations

from actcache.config import HarvestConfig

from .error_handling import only_results_on_stdout, print_json, print_stderr


def run(config: HarvestConfig, as_json: bool) -> None:
    """Run MODEL over DATASET once and write its activations to a cache.

    On several GPUs: torchrun --no-python --nproc_per_node N actcache harvest ...
    """
    import dataclasses

    from actcache.cache.reader import Cache
    from actcache.core.progress import format_bytes
    from actcache.harvester.run import harvest

    with only_results_on_stdout():
        summary = harvest(config)
    for warning in summary.warnings:
        print_stderr(f"warning: {warning}")
    if summary.rank > 0:  # rank 0 prints for all
        return
    if as_json:
        print_json(dataclasses.asdict(summary))
        return
    for asked, names in summary.renamed.items():
        print(f"{asked} -> {', '.join(names)}")
    cache = Cache.open(summary.cache)
    state = "complete" if summary.complete else "other ranks are still running"
    if summary.complete and summary.reason == "text" and config.max_tokens is not None:
        state = "complete: the text ended before --max-tokens"
    if summary.new_shards == 0:
        did = "nothing left to do"
    else:
        did = (
            f"wrote {summary.new_shards} shards, {summary.new_rows:,} rows x "
            f"{len(cache.hookpoints)} hookpoints, {format_bytes(summary.new_bytes)} in "
            f"{summary.seconds:.0f} s ({summary.tokens_per_second:,.0f} tokens/s)"
        )
    rank = f" (rank {summary.rank} of {summary.world_size})" if summary.world_size > 1 else ""
    print(
        f"{summary.cache}{rank}: {did}; {state}, {cache.rows:,} rows in {len(cache.shards)} shards"
    )
