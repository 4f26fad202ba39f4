"""Facts about a cache, for `actcache inspect` as text, JSON or an HTML page.

Facts are frozen dataclasses of plain numbers and text, so that `dataclasses.asdict` gives the JSON;
`facts` formats them once for text and HTML. They come from receipts, statistics and logs. Only
`samples` reads activations, one row at a time.
"""

from __future__ import annotations

from actcache.inspection.html.page import render_page
from actcache.inspection.samples import Sample, SequenceView, read_sequences, sample_rows
from actcache.inspection.shards import ShardFacts, shard_facts
from actcache.inspection.summary import CacheSummary, HookpointSummary, summarize

__all__ = [
    "CacheSummary",
    "HookpointSummary",
    "Sample",
    "SequenceView",
    "ShardFacts",
    "read_sequences",
    "render_page",
    "sample_rows",
    "shard_facts",
    "summarize",
]
