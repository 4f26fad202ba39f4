"""From a model and a text to a cache: everything behind `actcache harvest` and `actcache plan`.

`resolve` turns options into decisions, `build_manifest` writes them down, `job` checks them
against the folder and loads the model, `run` is the loop over shards, `capture_shard` makes one
shard, and `estimate` and `trial` predict size and time without a harvest.
"""

__all__ = [
    "build_manifest",
    "capture_shard",
    "estimate",
    "job",
    "resolve",
    "run",
    "trial",
]
