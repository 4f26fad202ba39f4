"""What a resumed or extended harvest takes from the cache: its goal, and a place in the text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from actcache.cache.reader import Cache
from actcache.config import HarvestConfig
from actcache.data.sequences import Anchor, Sequence
from actcache.errors import CorruptShardError, FormatError
from actcache.format.manifest import IDENTIFIED_FROM, MANIFEST, Manifest, read_manifest
from actcache.format.receipts import ShardReceipt
from actcache.harvester.resolve import ResolvedHarvest, build_identity, identity_before

_TRIED = 4  # shards whose text may be damaged before the text is read from the beginning


def find_anchor(
    root: Path, manifest: Manifest, published: Mapping[int, ShardReceipt], number: int
) -> Anchor | None:
    """Return the last sequence of the nearest published shard that ends before a number.

    Shards whose text is damaged are passed over: `verify` finds them.
    """
    before = [s for s, r in published.items() if 0 < r.sequences <= number - r.first_sequence]
    cache = Cache(root, manifest, dict(published), None)
    for shard in sorted(before)[: -_TRIED - 1 : -1]:
        try:
            text = cache.tokens(shard)
        except (CorruptShardError, FormatError, OSError):
            continue
        last = Sequence(
            text.tokens[-1], int(text.lengths[-1]), int(text.documents[-1]), int(text.starts[-1])
        )
        receipt = published[shard]
        return Anchor(receipt.first_sequence + receipt.sequences - 1, last)
    return None


def find_cache_of_text(
    config: HarvestConfig, resolved: ResolvedHarvest, root: Path
) -> Manifest | None:
    """Return the manifest of the cache in a folder if all but its model is what is asked for."""
    if not (root / MANIFEST).exists():
        return None
    manifest = read_manifest(root)
    same = manifest.identity
    identity = build_identity(config, resolved, same.model_fingerprint, same.model_dtype)
    if manifest.format_version < IDENTIFIED_FROM:
        identity = identity_before(identity, resolved, same)
    return manifest if identity == same else None
