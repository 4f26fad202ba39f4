"""From a cache to batches: shuffled, resumable, and the same on any machine.

`order` computes which rows are in which batch, `segments` does so for a cache that is still being
harvested. `activation_stream` is the public stream and builds its batches from a `shuffle_buffer`
(or `device_buffer` on a GPU), `prefetcher` runs that in a thread, `verified_reads` checks files
against their receipts and probes for fast read settings, `massive_rows` finds rows to leave out,
`memory_budget` chooses sizes, `row_tokens` adds the tokens of rows, and `benchmark` measures
reading speed.
"""

__all__ = [
    "activation_stream",
    "benchmark",
    "device_buffer",
    "massive_rows",
    "memory_budget",
    "order",
    "prefetcher",
    "row_tokens",
    "segments",
    "shuffle_buffer",
    "verified_reads",
]
