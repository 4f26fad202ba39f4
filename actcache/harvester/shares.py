"""The text of a harvest of several processes: each tokenises its own share of the documents."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path

from actcache.cache.folder import TEXT
from actcache.config import HarvestConfig
from actcache.core.process import World
from actcache.data.datasets import TokenFile
from actcache.data.shared_sequences import SharedSequences, documents_of_a_block
from actcache.errors import EmptyCacheError, FormatError
from actcache.format.manifest import MANIFEST, Manifest, read_manifest
from actcache.format.receipts import ShardReceipt, read_end, receipt_files
from actcache.harvester.anchors import find_anchor, find_cache_of_text
from actcache.harvester.resolve import ResolvedHarvest, build_identity


def share_text(
    config: HarvestConfig, resolved: ResolvedHarvest, root: Path, ranks: World, goal: int | None
) -> SharedSequences | None:
    """Return the text, tokenised together with the other ranks; None: there is nothing to share.

    The folder of the blocks is named by everything that decides them, models among it.
    """
    source = resolved.source
    if ranks.world_size == 1 or isinstance(source, TokenFile) or source.column.kind == "ids":
        return None
    if (root / MANIFEST).exists() and find_cache_of_text(config, resolved, root) is None:
        return None  # another cache, which is left as it is
    size = documents_of_a_block(source, resolved.pipeline, goal)
    key = build_identity(config, resolved, "", "float32").digest()[:16]
    return SharedSequences(
        source,
        resolved.tokenizer,
        resolved.pipeline,
        root / f"{TEXT}{key}-{size}-{goal}",
        size,
        ranks.rank,
        ranks.world_size,
        goal,
        lambda: _sequences_of_complete(root),
    )


def enter_text(
    shared: SharedSequences, root: Path, manifest: Manifest, published: Mapping[int, ShardReceipt]
) -> None:
    """Enter the text before the first missing shard of all ranks."""
    missing = next(shard for shard in count() if shard not in published)
    anchor = find_anchor(root, manifest, published, manifest.plan.first_sequence(missing))
    if anchor is not None:
        shared.enter(anchor)


def _sequences_of_complete(root: Path) -> tuple[int, bool]:
    """Return the sequences of a complete cache (else 0), and whether the text has no more."""
    try:
        end = read_end(root, read_manifest(root))
    except (EmptyCacheError, FormatError):  # it has no manifest yet, or is being extended
        return 0, False
    if end is None or len(receipt_files(root)) <= end.last_shard:
        return 0, False
    return end.sequences, end.reason == "text"
