"""What a run is, as its leader decides it and its other processes hear it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from actcache.cache.reader import Cache
from actcache.core.device import choose_device
from actcache.core.file_lock import FolderLock
from actcache.errors import RunError
from actcache.filesystem.atomic import remove_partials
from actcache.format.manifest import MANIFEST
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeConfig
from saetrain.distributed.coordinator import Crew, Decided
from saetrain.launch.exit_status import EXIT, forget
from saetrain.launch.resolve import (
    decide,
    entries_of,
    of_the_run,
    steps_of,
    versions_now,
    whole_updates,
    with_rates,
)
from saetrain.runs.checkpoint import newest_step
from saetrain.runs.overrides import force, with_change
from saetrain.runs.record import (
    LOCK,
    RUN,
    RunRecord,
    SaeEntry,
    changed_options,
    check_same_cache,
    check_same_run,
    place_of,
    read_run,
    write_run,
)
from saetrain.tracking.wandb_mirror import new_id


@dataclass(frozen=True)
class Agreed:
    """What all processes of a run begin with."""

    begun: bool
    """Whether the run was begun before."""
    record: RunRecord
    """What it is."""
    cache: Cache
    """As far as the run uses it."""
    device: torch.device
    """Of this process."""
    changes: tuple[str, ...] = ()
    """What has changed since the run was last started; known to the leader."""
    warnings: tuple[str, ...] = ()
    """What the user should know; known to the leader."""


def agree(config: FitConfig, root: Path, lock: FolderLock, crew: Crew) -> Agreed:
    """Decide what the run is, or hear it.

    A run that was begun before is locked from here on, and nothing is left of how it ended.

    Raises:
        ActcacheError: one of its kinds: what is asked for cannot be.
    """
    agreed = _lead(config, root, lock, crew) if crew.leads else _follow(config, root, lock, crew)
    extensions = agreed.record.extensions
    if extensions is None:
        return agreed
    # Those that came later are no part of the run.
    return dataclasses.replace(agreed, cache=agreed.cache.before(extensions))


def _lead(config: FitConfig, root: Path, lock: FolderLock, crew: Crew) -> Agreed:
    cache, device = _open(config), _device(config)
    begun = is_begun(config, root)
    changes: tuple[str, ...] = ()
    if begun:
        lock.take()
        forget(root)
        remove_partials(root)
        record, changes, warnings = go_on(config, cache, root, crew)
    else:
        record = decide(config, cache, device, crew)
        warnings = () if config.follow else _missing_shards(cache)
    crew.require(record)
    crew.tell(Decided(begun, record))
    return Agreed(begun, record, cache, device, changes, warnings)


def _follow(config: FitConfig, root: Path, lock: FolderLock, crew: Crew) -> Agreed:
    decided = crew.hear(Decided)
    if decided.begun:
        _join(lock, root)
    cache, device = _open(config), _device(config)
    check_same_cache(decided.record, cache)
    return Agreed(decided.begun, decided.record, cache, device)


def lay_down(agreed: Agreed, first_step: int, root: Path, lock: FolderLock, crew: Crew) -> None:
    """Write down what the run is, once all have built it: one that cannot be leaves nothing behind.

    Raises:
        RunError: another run has been begun there meanwhile.
        CacheBusyError: one is just beginning.
    """
    crew.wait()
    if crew.leads and agreed.begun:
        write_changes(root, agreed.record, first_step, agreed.changes)
    elif crew.leads:
        lock.take()
        if (root / RUN).exists():
            raise RunError(f"another fit has begun a run in {root}", remedy="--resume, or wait")
        forget(root)
        remove_partials(root)
        write_run(root, agreed.record)
    crew.wait()
    _join(lock, root)


def _join(lock: FolderLock, root: Path) -> None:
    """Hold the lock that the leader has taken; raises `RunError` if it is not to be seen here."""
    try:
        lock.join()
    except FileNotFoundError as error:
        raise RunError(
            f"the run that rank 0 sees in {root} is not there for another process",
            expected="--out in a folder that all machines share",
            got=f"no {error.filename}",
        ) from error


def _open(config: FitConfig) -> Cache:
    return Cache.open(
        config.cache,
        block_cache=config.block_cache,
        block_cache_bytes=config.block_cache_bytes,
    )


def _device(config: FitConfig) -> torch.device:
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: the encoder's product is most of a step
    return device


def _missing_shards(cache: Cache) -> tuple[str, ...]:
    """A warning if the harvest of the cache is not at its end."""
    if cache.complete:
        return ()
    planned = "all that the text gives"  # a harvest without --max-tokens
    if cache.end is not None:
        planned = str(cache.end.last_shard + 1)
    elif cache.manifest.plan.shards is not None:
        planned = str(cache.manifest.plan.shards)
    return (
        f"{cache.root} is not complete: shards there {len(cache.shards)}, planned {planned}; the "
        "run uses those that are there now (--follow waits for more)",
    )


def is_begun(config: FitConfig, root: Path) -> bool:
    """Whether the folder holds a run to go on with; raises `RunError` if it must not be used."""
    if (root / RUN).exists():
        if not config.resume:
            raise RunError(
                f"{root} holds a run already",
                remedy="--resume to go on with it, or another --out",
            )
        return True
    if root.exists():
        if not root.is_dir():
            raise RunError(f"--out {root} is a file", expected="a new or empty folder")
        # A run stopped or killed before or while it wrote its first file has not begun.
        names = {path.name for path in root.iterdir()} - {str(LOCK), EXIT}
        if any(not name.startswith(f".{RUN}.") for name in names):
            what = "a cache" if (root / MANIFEST).exists() else "other things"
            raise RunError(f"--out {root} holds {what}", expected="a new or empty folder")
    return False


def go_on(
    config: FitConfig, cache: Cache, root: Path, crew: Crew
) -> tuple[RunRecord, tuple[str, ...], tuple[str, ...]]:
    """The record of the run that is there, checked against what is asked now.

    Returns:
        It with the options of now, what has changed since it was last written, and warnings.
    """
    config = of_the_run(config)
    record = read_run(root)
    check_same_cache(record, cache)
    options = changed_options(record, config)
    record = dataclasses.replace(record, wandb_id=record.wandb_id or new_id(config))
    asked = dataclasses.replace(record, options=config)
    if options and config.force_config:
        steps, done = _forced_steps(record, config), newest_step(root) or 0
        saes = with_rates(entries_of(config, cache, functools.partial(_kinds_of, record)), steps)
        asked = force(record, config, options, saes, steps, done)
    else:
        check_same_run(record, asked)
    now = versions_now()
    last = record.history[-1].versions if record.history else record.versions
    libraries = [
        f"{name}: {then} then, {now.get(name)} now"
        for name, then in last.items()
        if now.get(name) != then
    ]
    warnings = tuple(
        f"{name} is {now.get(name)} now; this run was begun with {then}"
        for name, then in record.versions.items()
        if now.get(name) != then
    )
    parts = crew.processes if crew.shares_batches else 1
    shares = []
    if parts != record.batch_parts:
        shares = [f"processes that share each batch: {record.batch_parts} then, {parts} now"]
        warnings += (f"{shares[0]}: the batches are the same, but sums are rounded otherwise",)
    asked = dataclasses.replace(asked, batch_parts=parts)
    return asked, (*options.values(), *libraries, *shares), warnings


def _kinds_of(record: RunRecord, entries: Sequence[SaeEntry]) -> list[SaeConfig]:
    """What the SAEs of a run with --finetune are under other options: where they began is past."""
    return [
        sae.config
        if entry.options.sparsity is None
        else dataclasses.replace(sae.config, sparsity=entry.options.sparsity)
        for sae, entry in zip(record.saes, entries, strict=False)
    ]


def _forced_steps(record: RunRecord, config: FitConfig) -> int:
    """Steps of a run under other options."""
    if config.follow:
        return whole_updates(config, record.steps)
    return steps_of(config, record.plan.steps_per_epoch)


def write_changes(root: Path, record: RunRecord, first_step: int, changes: tuple[str, ...]) -> None:
    """Write down what is not as it was when the run was last started.

    Options that touch no result are left as they were given first. The cache's place is that of
    now: `saetrain eval` must find it.
    """
    old = read_run(root)
    new = dataclasses.replace(old, cache=place_of(record.options.cache), wandb_id=record.wandb_id)
    if first_step < record.steps:
        if changed_options(old, record.options):
            new = dataclasses.replace(record, cache=new.cache)
        new = dataclasses.replace(new, batch_parts=record.batch_parts)
        new = with_change(new, first_step, changes, versions_now())
    if new != old:
        write_run(root, new)
