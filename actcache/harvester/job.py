"""Prepare a harvest: check the folder, load the model, agree on the manifest and write it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actcache.cache.folder import (
    _goes_beyond,
    create_or_resume,
    different_fields,
    require_cache_folder,
    require_chunks,
    require_room,
)
from actcache.cache.reader import Cache
from actcache.config import HarvestConfig
from actcache.core.json_codec import to_json, truncated_repr
from actcache.core.process import World, captured_warnings, require_whole_machine
from actcache.data.sequences import NumberedSequences, SequenceReader, iter_sequences
from actcache.data.template_clock import now
from actcache.errors import CacheMismatchError, ConfigError
from actcache.filesystem.lock import DirectoryLock
from actcache.filesystem.rooted import rooted
from actcache.format.manifest import (
    IDENTIFIED_FROM,
    MANIFEST,
    Identity,
    Manifest,
    read_manifest,
)
from actcache.format.receipts import (
    FOLDER,
    CompletionMarker,
    ShardReceipt,
    read_cache_state,
)
from actcache.harvester.anchors import find_anchor, find_cache_of_text
from actcache.harvester.resolve import (
    ResolvedHarvest,
    build_identity,
    build_manifest,
    goal_sequences,
    identity_before,
    planned_sequences,
    resolve,
    resolve_before,
)
from actcache.harvester.shares import enter_text, share_text
from actcache.model.hooks import input_device
from actcache.model.loading import dtype_name, fingerprint_model, load_model


@dataclass(frozen=True)
class HarvestJob:
    """A prepared harvest: the model, its input, and the state of the cache folder."""

    root: Path
    manifest: Manifest
    """As read from the folder, with its extensions."""
    published: dict[int, ShardReceipt]
    """Receipts of the published shards, of every rank, by shard number."""
    marker: CompletionMarker | None
    """Contents of END.json, if it is there and valid."""
    model: Any
    device: torch.device
    """Device of the model's input."""
    ranks: World
    sequences: NumberedSequences
    """The sequences of the text."""
    goal: int | None
    """Sequences by --max-tokens (None: all); the manifest plans fewer if the text is shorter."""
    extend_to: int | None
    """Goal of the extension that --extend adds, in sequences; None: no extension to add."""
    warnings: tuple[str, ...]
    """Warnings for the user."""
    renamed: dict[str, list[str]]
    """Names of other libraries, and layers counted from the end, with the hookpoints they mean."""
    text_warnings: Callable[[], tuple[str, ...]]
    """Function to warnings about the text; a stream may have more when it has been read."""
    lock: DirectoryLock
    """Lock on the folder, held until the harvest ends."""

    def reread(self) -> HarvestJob:
        """Read manifest, receipts and marker again: other processes may have written them."""
        manifest, published, marker = read_cache_state(self.root)
        return dataclasses.replace(self, manifest=manifest, published=published, marker=marker)


def prepare_job(config: HarvestConfig, ranks: World) -> HarvestJob:
    """Load model and text, compare the manifest across ranks, and write it or check the old one.

    Cheap checks come first: the weights are loaded after the text has been opened and counted.

    Raises:
        ActcacheError: an option, the model, the text or the folder does not allow the harvest.
    """
    if not config.out:
        raise ConfigError("--out is empty", expected="the folder of the cache", got="''")
    with captured_warnings() as captured:
        job = _prepare(config, ranks)
    if ranks.rank > 0:  # rank 0 has the same
        return job
    return dataclasses.replace(job, warnings=(*captured.lines, *job.warnings))


def _prepare(config: HarvestConfig, ranks: World) -> HarvestJob:
    root = rooted(config.out)
    lock = DirectoryLock(root)
    require_cache_folder(root)
    if config.device_map == "auto":
        require_whole_machine()

    def date() -> str:
        given = read_manifest(root).identity.date if (root / MANIFEST).exists() else None
        return ranks.broadcast(given or now())

    resolved = (resolve if _begun_before(root) is None else resolve_before)(config, date)
    goal = goal_sequences(config)
    shared = share_text(config, resolved, root, ranks, goal) if ranks.world_size > 1 else None
    reader = SequenceReader(resolved.source, resolved.tokenizer, resolved.pipeline)
    try:
        planned = _planned(config, resolved, root, goal, shared or reader)
        model, identity = _load_and_identify(config, resolved, root)
        manifest = build_manifest(config, resolved, identity, planned, type(model).__name__)
        if config.shard_size is None:
            manifest = _with_existing_shard_size(root, manifest, extend=config.extend)
        require_chunks(manifest)
        state = ranks.check_equal_then_run_on_rank_zero(
            to_json(manifest),
            lambda: create_or_resume(root, manifest, lock, require_room, extend=config.extend),
        )
        if state is None:
            lock.acquire_shared()
            state = read_cache_state(root)
        existing, published, marker = state
        is_resumed_before = existing.format_version < IDENTIFIED_FROM and (
            marker is None or config.extend
        )
        if is_resumed_before and published:
            _require_same_text(root, existing, published, resolved)
    except BaseException:
        if shared is not None:
            shared.close()
        lock.release()
        raise
    warnings = tuple(
        f"{name} is {manifest.versions.get(name)} now; this cache was begun with {version}"
        for name, version in existing.versions.items()
        if manifest.versions.get(name) != version
    )
    if is_resumed_before:
        warnings += (
            f"this cache follows format version {existing.format_version}, which does not record "
            "all of the tokenizer, the date that a chat template reads, nor commits of the hub: "
            "its first shard was compared instead",
        )
    if config.date is not None and resolved.date is None:
        warnings += ("--date has no effect: no chat template reads the clock",)
    warnings += resolved.warnings if ranks.rank == 0 else ()
    if config.extend and planned == existing.plan.goal and planned != goal:
        warnings += (f"--extend: the text has {planned:,} sequences, all of them planned already",)
    reader.find_anchor = lambda number: find_anchor(root, existing, published, number)
    if shared is not None and published:
        enter_text(shared, root, existing, published)
    return HarvestJob(
        root=root,
        manifest=existing,
        published=published,
        marker=marker,
        model=model,
        device=input_device(model),
        ranks=ranks,
        sequences=shared or reader,
        goal=goal,
        extend_to=planned if config.extend and _goes_beyond(manifest, existing) else None,
        warnings=warnings,
        renamed=resolved.renamed,
        text_warnings=resolved.text_warnings,
        lock=lock,
    )


def _load_and_identify(
    config: HarvestConfig, resolved: ResolvedHarvest, root: Path
) -> tuple[Any, Identity]:
    """Load the weights, unless `resolve` did, and build the cache's identity from them.

    A cache in `root` that an earlier format version began is identified as that version did.
    """
    model = resolved.model
    # Quantised weights may have been repacked by the probe's forward pass: load them again.
    if not resolved.has_weights or getattr(model, "is_quantized", False):
        if resolved.commit is not None:
            config = dataclasses.replace(config, revision=resolved.commit)
        model = load_model(config)
    made = _begun_before(root)
    fingerprint = fingerprint_model(model, before=made is not None)
    identity = build_identity(config, resolved, fingerprint, dtype_name(model))
    return model, identity if made is None else identity_before(identity, resolved, made)


def _begun_before(root: Path) -> Identity | None:
    """Return the identity of a cache of an earlier format version, if it has shards; else None."""
    if not (root / MANIFEST).exists():
        return None
    manifest = read_manifest(root)
    if manifest.format_version >= IDENTIFIED_FROM or not _has_records(root):
        return None
    return manifest.identity


def _has_records(root: Path) -> bool:
    """Return whether a folder has receipts, retractions or a seal."""
    folder = root / FOLDER
    return folder.is_dir() and any(path.suffix == ".json" for path in folder.iterdir())


def _require_same_text(
    root: Path, manifest: Manifest, published: Mapping[int, ShardReceipt], resolved: ResolvedHarvest
) -> None:
    """Compare the text of a shard with that of the cache, whose identity does not cover all of it.

    Raises:
        CacheMismatchError: it differs.
    """
    shard = min(published)
    words, first = Cache.open(root).tokens(shard), published[shard].first_sequence
    text = resolved.source, resolved.tokenizer, resolved.pipeline
    made = iter_sequences(*text, int(words.documents[0]), int(words.starts[0]))
    today = list(itertools.islice(made, len(words.lengths)))
    for number, tokens in enumerate(words.tokens):
        if number < len(today) and np.array_equal(today[number].tokens, tokens):
            continue
        found = today[number].tokens.tolist() if number < len(today) else []
        raise CacheMismatchError(
            f"the text of {root} is no longer what it was made from: other tokens in sequence "
            f"{first + number}",
            expected=truncated_repr(tokens.tolist()),
            got=truncated_repr(found),
            remedy=f"format version {manifest.format_version} does not record all of the "
            "tokenizer: go on with that of the first harvest, its chat template (--date, if it "
            "writes the date) and versions of libraries; or choose another --out",
        )


def _planned(
    config: HarvestConfig,
    resolved: ResolvedHarvest,
    root: Path,
    goal: int | None,
    text: NumberedSequences | None = None,
) -> int:
    """Return the number of sequences to harvest; not counted anew if the cache in `root` has it."""
    if goal is None or not (root / MANIFEST).exists():
        return planned_sequences(config, resolved, text)
    if existing := find_cache_of_text(config, resolved, root):
        planned = existing.plan.goal
        if planned is not None and planned >= goal:
            return goal
    return planned_sequences(config, resolved, text)


def require_same_harvest(config: HarvestConfig, root: Path) -> None:
    """Check, before anything is changed, that a harvest would recreate the cache in a folder.

    Raises:
        CacheMismatchError: the options make another cache.
        ActcacheError: the harvest could not run at all.
    """
    existing = read_manifest(root)
    if config.date is None:
        config = dataclasses.replace(config, date=existing.identity.date)
    with captured_warnings():  # the harvest that follows reports them
        resolved = (resolve if _begun_before(root) is None else resolve_before)(config)
        planned = _planned(config, resolved, root, goal_sequences(config))
        model, identity = _load_and_identify(config, resolved, root)
    manifest = build_manifest(config, resolved, identity, planned, type(model).__name__)
    if config.shard_size is None:
        manifest = _with_existing_shard_size(root, manifest, extend=config.extend)
    if different := different_fields(manifest, existing, extend=config.extend):
        raise CacheMismatchError(
            f"these arguments are not those of the harvest that made {root}; nothing was done",
            expected=f"id {existing.cache_id} ({existing.model} on {existing.dataset})",
            got="\n            ".join([f"id {identity.digest()}", *different]),
            remedy="repeat model, text and options of that harvest; after --extend, with the "
            "--max-tokens of the last one",
        )


def _with_existing_shard_size(root: Path, manifest: Manifest, *, extend: bool) -> Manifest:
    """Take over the shard size of the folder's cache where it is or will be extended.

    The formula would give larger shards for the larger goal, but a cache's shard size is fixed.
    """
    if not (root / MANIFEST).exists():
        return manifest
    existing = read_manifest(root)
    if existing.cache_id != manifest.cache_id or not (extend or existing.extensions):
        return manifest
    return dataclasses.replace(manifest, sequences_per_shard=existing.sequences_per_shard)
