"""Everything before the first forward pass: load, decide, agree, lay the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actcache.cache.create import (
    _goes_beyond,
    lay_manifest,
    refuse_foreign_folder,
    require_chunks,
    require_room,
)
from actcache.config import HarvestConfig
from actcache.core.device import input_device, require_whole_machine
from actcache.core.distributed import Ranks
from actcache.core.file_lock import FolderLock
from actcache.core.json_codec import to_json
from actcache.data.sequences import Sequence, sequences
from actcache.errors import CacheMismatchError
from actcache.format.manifest import (
    MANIFEST,
    Identity,
    Manifest,
    read_manifest,
)
from actcache.harvester.build_manifest import draft_identity, draft_manifest
from actcache.harvester.resolve import Decision, count_planned, decide, stored_dtype
from actcache.model.loading import dtype_name, fingerprint_model, load_model


@dataclass(frozen=True)
class Job:
    """A harvest that has been decided, agreed on, and can begin."""

    root: Path
    manifest: Manifest
    model: Any
    device: torch.device
    ranks: Ranks
    sequences: Iterator[Sequence]
    """All sequences of the text, from the first."""
    asked: int | None
    """Sequences that --max-tokens asks for; the plan may hold fewer, if the text does."""
    extend_to: int | None
    """Sequences in all that --extend is to go on to, where the plan ends before; None: nowhere."""
    warnings: tuple[str, ...]
    """What the user should know."""
    lock: FolderLock
    """Held until the harvest ends."""


def prepare(config: HarvestConfig, ranks: Ranks) -> Job:
    """Load, plan, and agree on the manifest. What can fail cheaply fails first.

    Raises:
        ActcacheError: one of its kinds, for anything a user can mend.
    """
    root = Path(config.out)
    refuse_foreign_folder(root)
    if config.device_map == "auto":
        require_whole_machine()
    decided = decide(config)
    planned = count_planned(config, decided.source, decided.tokenizer, decided.pipeline)
    model, identity = _identify(config, decided)
    manifest = draft_manifest(config, decided, identity, planned, type(model).__name__)
    if config.shard_size is None:
        manifest = _with_laid_shards(root, manifest, extend=config.extend)
    require_chunks(manifest)
    lock = FolderLock(root)
    try:
        ranks.agree(
            to_json(manifest),
            lambda: lay_manifest(root, manifest, lock, require_room, extend=config.extend),
        )
        if ranks.rank > 0:
            lock.join()
        laid = read_manifest(root)
    except BaseException:
        lock.release()
        raise
    warnings = tuple(
        f"{name} is {manifest.versions.get(name)} now; this cache was begun with {version}"
        for name, version in laid.versions.items()
        if manifest.versions.get(name) != version
    )
    extend_to = planned if config.extend and _goes_beyond(manifest, laid) else None
    if config.extend and planned == laid.plan.goal and planned != config.goal:
        warnings += (f"--extend: the text has {planned:,} sequences, all of them planned already",)
    return Job(
        root=root,
        manifest=laid,
        model=model,
        device=input_device(model),
        ranks=ranks,
        sequences=sequences(decided.source, decided.tokenizer, decided.pipeline),
        asked=config.goal,
        extend_to=extend_to,
        warnings=warnings,
        lock=lock,
    )


def _identify(config: HarvestConfig, decided: Decision) -> tuple[Any, Identity]:
    """The model with its weights, and what the cache's numbers will be."""
    # Quantised weights may be rounded again by a forward pass: they are loaded afresh.
    loaded = input_device(decided.surveyed).type != "meta"
    usable = loaded and not getattr(decided.surveyed, "is_quantized", False)
    model = decided.surveyed if usable else load_model(config)
    model_dtype = dtype_name(model)
    dtype = stored_dtype(config, model_dtype)
    fingerprint = fingerprint_model(model)
    return model, draft_identity(config, decided, fingerprint, model_dtype, dtype)


def require_same_harvest(config: HarvestConfig, root: Path) -> None:
    """Check, before anything is touched, that a harvest would make the cache in a folder.

    Raises:
        CacheMismatchError: it would make another.
        ActcacheError: whatever else would stop it before its first shard.
    """
    laid = read_manifest(root)
    _, identity = _identify(config, decide(config))
    if identity.digest() != laid.cache_id:
        raise CacheMismatchError(
            f"these arguments are not those of the harvest that made {root}; nothing was done",
            expected=f"id {laid.cache_id} ({laid.model} on {laid.dataset})",
            got=f"id {identity.digest()}",
            remedy="repeat model, text and options of that harvest",
        )


def _with_laid_shards(root: Path, manifest: Manifest, *, extend: bool) -> Manifest:
    """The manifest with shards of the size in the folder, where it is or will be extended.

    By formula the larger goal has larger shards; but theirs is settled.
    """
    if not (root / MANIFEST).exists():
        return manifest
    laid = read_manifest(root)
    if laid.cache_id != manifest.cache_id or not (extend or laid.extensions):
        return manifest
    return dataclasses.replace(manifest, sequences_per_shard=laid.sequences_per_shard)
