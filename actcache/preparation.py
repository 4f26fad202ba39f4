"""Everything before the first forward pass: load, decide, agree, lay the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actcache import receipt as receipts_module
from actcache.atomic import publish, remove_partials
from actcache.config import HarvestConfig
from actcache.decision import Decision, decide
from actcache.device import input_device, require_whole_machine
from actcache.drafting import draft_identity, draft_manifest
from actcache.errors import CacheMismatchError
from actcache.extension import extended
from actcache.lock import LOCK, FolderLock
from actcache.manifest import (
    MANIFEST,
    Identity,
    Manifest,
    differences,
    read_manifest,
)
from actcache.model import (
    dtype_name,
    fingerprint_model,
    load_model,
)
from actcache.parse import to_json
from actcache.planning import (
    count_planned,
    require_chunks,
    require_room,
    stored_dtype,
)
from actcache.ranks import Ranks
from actcache.receipt import END, ShardReceipt
from actcache.retraction import forget_restored, retracted_shards
from actcache.storage import BACKENDS
from actcache.tokens import Sequence, sequences


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


def refuse_foreign_folder(root: Path) -> None:
    """Raise `CacheMismatchError` if a folder holds anything but a cache, whole or begun."""
    if root.is_file():
        raise CacheMismatchError(f"--out {root} is a file", expected="a folder, or nothing yet")
    if not root.is_dir() or (root / MANIFEST).exists():
        return
    # A harvest that was killed before or while it wrote the manifest leaves these: they are ours.
    ours = (LOCK.parts[0], f".{MANIFEST}.")
    if any(not path.name.startswith(ours) for path in root.iterdir()):
        raise CacheMismatchError(
            f"--out {root} holds other things and no {MANIFEST}",
            expected="an empty folder, or a cache",
            remedy="choose another folder",
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


def _goes_beyond(manifest: Manifest, laid: Manifest) -> bool:
    """Whether a manifest has a larger goal than the one in the folder."""
    ours, theirs = manifest.plan.goal, laid.plan.goal
    return theirs is not None and (ours is None or ours > theirs)


def _different(manifest: Manifest, laid: Manifest, extend: bool) -> list[str]:
    """What keeps a harvest from going on in the folder; with --extend, another goal does not."""
    if extend and laid.plan.goal is not None:
        manifest = dataclasses.replace(manifest, planned_sequences=laid.plan.goal)
    return differences(manifest, laid)


def lay_manifest(
    root: Path,
    manifest: Manifest,
    lock: FolderLock,
    ask: Callable[[Path, Manifest, Collection[int]], None],
    *,
    extend: bool = False,
) -> None:
    """Write the manifest, or check that the one there asks for the same bytes.

    Args:
        root: folder of the cache.
        manifest: what it is going to hold.
        lock: taken here, and held.
        ask: raises unless there is room for all but the shards that are published, which it gets.
        extend: the harvest may have a larger goal than the one that is there.

    Raises:
        CacheMismatchError: the folder holds another cache.
        CacheBusyError: someone is at work there.
    """
    receipts = _published(root, manifest, extend)
    coming = read_manifest(root) if receipts else manifest
    if extend and _goes_beyond(manifest, coming):
        coming = extended(coming, manifest.plan.goal)
    ask(root, coming, receipts)
    lock.take()
    # Again: before the lock was ours, anyone could lay another manifest or publish.
    forget_restored(root, _published(root, manifest, extend))
    remove_partials(root)
    if (root / MANIFEST).exists() and _different(manifest, read_manifest(root), extend):
        _withdraw(root)
    if not (root / MANIFEST).exists():
        publish(root / MANIFEST, [to_json(manifest)])
    laid = read_manifest(root)
    BACKENDS[laid.backend].lay(root, laid)


def _published(root: Path, manifest: Manifest, extend: bool) -> dict[int, ShardReceipt]:
    """Shards that are there already, by number.

    Raises:
        CacheMismatchError: the folder holds another cache.
    """
    if not (root / MANIFEST).exists():
        return {}
    laid, receipts, _ = receipts_module.read_published(root)
    sealed = (root / receipts_module.FOLDER / END).exists()  # however many extensions it counts
    kept = receipts or retracted_shards(root) or sealed or laid.extensions
    if kept and (different := _different(manifest, laid, extend)):
        remedy = "choose another --out, or repeat the options that it was made with"
        if manifest.cache_id == laid.cache_id and _goes_beyond(manifest, laid):
            remedy += "; or add --extend, to go on with more tokens"
        raise CacheMismatchError(
            f"{root} holds another cache ({laid.model} on {laid.dataset})",
            expected=f"id {manifest.cache_id}",
            got="\n            ".join([f"id {laid.cache_id}", *different]),
            remedy=remedy,
        )
    return receipts


def _withdraw(root: Path) -> None:
    """Remove the manifest of a harvest that published nothing: there is nothing to protect.

    Such is left when memory runs out at the first batch; its options are the ones to change.
    """
    laid = read_manifest(root)
    for path in (*BACKENDS[laid.backend].documents(root, laid), root / MANIFEST):
        path.unlink(missing_ok=True)
