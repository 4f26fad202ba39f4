"""Everything before the first forward pass: load, decide, agree, lay the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actcache.cache.folder import (
    _goes_beyond,
    create_or_resume,
    require_cache_folder,
    require_chunks,
    require_room,
)
from actcache.config import HarvestConfig
from actcache.core.device import input_device, require_whole_machine
from actcache.core.distributed import World
from actcache.core.json_codec import to_json
from actcache.data.sequences import Sequence, iter_sequences
from actcache.errors import CacheMismatchError
from actcache.filesystem.atomic import DirectoryLock
from actcache.format.manifest import (
    MANIFEST,
    Identity,
    Manifest,
    read_manifest,
)
from actcache.harvester.build_manifest import build_identity, build_manifest
from actcache.harvester.resolve import ResolvedHarvest, planned_sequences, resolve, stored_dtype
from actcache.model.loading import dtype_name, fingerprint_model, load_model


@dataclass(frozen=True)
class HarvestJob:
    """A harvest that has been decided, agreed on, and can begin."""

    root: Path
    manifest: Manifest
    model: Any
    device: torch.device
    ranks: World
    sequences: Iterator[Sequence]
    """All sequences of the text, from the first."""
    asked: int | None
    """Sequences that --max-tokens asks for; the plan may hold fewer, if the text does."""
    extend_to: int | None
    """Sequences in all that --extend is to go on to, where the plan ends before; None: nowhere."""
    warnings: tuple[str, ...]
    """What the user should know."""
    lock: DirectoryLock
    """Held until the harvest ends."""


def prepare_job(config: HarvestConfig, ranks: World) -> HarvestJob:
    """Load, plan, and agree on the manifest. What can fail cheaply fails first.

    Raises:
        ActcacheError: one of its kinds, for anything a user can mend.
    """
    root = Path(config.out)
    require_cache_folder(root)
    if config.device_map == "auto":
        require_whole_machine()
    resolved = resolve(config)
    planned = planned_sequences(config, resolved.source, resolved.tokenizer, resolved.pipeline)
    model, identity = _identify(config, resolved)
    manifest = build_manifest(config, resolved, identity, planned, type(model).__name__)
    if config.shard_size is None:
        manifest = _with_laid_shards(root, manifest, extend=config.extend)
    require_chunks(manifest)
    lock = DirectoryLock(root)
    try:
        ranks.check_equal_then_run_on_rank_zero(
            to_json(manifest),
            lambda: create_or_resume(root, manifest, lock, require_room, extend=config.extend),
        )
        if ranks.rank > 0:
            lock.acquire_shared()
        existing = read_manifest(root)
    except BaseException:
        lock.release()
        raise
    warnings = tuple(
        f"{name} is {manifest.versions.get(name)} now; this cache was begun with {version}"
        for name, version in existing.versions.items()
        if manifest.versions.get(name) != version
    )
    extend_to = planned if config.extend and _goes_beyond(manifest, existing) else None
    if config.extend and planned == existing.plan.goal and planned != config.goal:
        warnings += (f"--extend: the text has {planned:,} sequences, all of them planned already",)
    return HarvestJob(
        root=root,
        manifest=existing,
        model=model,
        device=input_device(model),
        ranks=ranks,
        sequences=iter_sequences(resolved.source, resolved.tokenizer, resolved.pipeline),
        asked=config.goal,
        extend_to=extend_to,
        warnings=warnings,
        lock=lock,
    )


def _identify(config: HarvestConfig, resolved: ResolvedHarvest) -> tuple[Any, Identity]:
    """The model with its weights, and what the cache's numbers will be."""
    # Quantised weights may be rounded again by a forward pass: they are loaded afresh.
    loaded = input_device(resolved.surveyed).type != "meta"
    usable = loaded and not getattr(resolved.surveyed, "is_quantized", False)
    model = resolved.surveyed if usable else load_model(config)
    model_dtype = dtype_name(model)
    dtype = stored_dtype(config, model_dtype)
    fingerprint = fingerprint_model(model)
    return model, build_identity(config, resolved, fingerprint, model_dtype, dtype)


def require_same_harvest(config: HarvestConfig, root: Path) -> None:
    """Check, before anything is touched, that a harvest would make the cache in a folder.

    Raises:
        CacheMismatchError: it would make another.
        ActcacheError: whatever else would stop it before its first shard.
    """
    existing = read_manifest(root)
    _, identity = _identify(config, resolve(config))
    if identity.digest() != existing.cache_id:
        raise CacheMismatchError(
            f"these arguments are not those of the harvest that made {root}; nothing was done",
            expected=f"id {existing.cache_id} ({existing.model} on {existing.dataset})",
            got=f"id {identity.digest()}",
            remedy="repeat model, text and options of that harvest",
        )


def _with_laid_shards(root: Path, manifest: Manifest, *, extend: bool) -> Manifest:
    """The manifest with shards of the size in the folder, where it is or will be extended.

    By formula the larger goal has larger shards; but theirs is settled.
    """
    if not (root / MANIFEST).exists():
        return manifest
    existing = read_manifest(root)
    if existing.cache_id != manifest.cache_id or not (extend or existing.extensions):
        return manifest
    return dataclasses.replace(manifest, sequences_per_shard=existing.sequences_per_shard)
