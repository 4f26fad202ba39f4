"""From a cache to batches: shuffled, resumable, and the same on any machine.

`order` computes which rows are in which batch, `segments` does so for a cache that is still being
harvested. `activation_stream` is the public stream; `batches` builds batches from a
`shuffle_buffer` (or `device_buffer` on a GPU) that `window_loader` fills, `prefetcher` runs that in
a thread, `verified_reads` checks files against their receipts, `memory_budget` and `read_tuning`
choose sizes, `row_tokens` adds the text of rows, and `benchmark` measures reading speed.
"""

__all__ = [
    "activation_stream",
    "batches",
    "benchmark",
    "device_buffer",
    "memory_budget",
    "order",
    "prefetcher",
    "read_tuning",
    "row_tokens",
    "segments",
    "shuffle_buffer",
    "unshuffled",
    "verified_reads",
    "window_loader",
]
