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
from actcache.errors import RunError
from actcache.filesystem.atomic import DirectoryLock, remove_partials
from actcache.format.manifest import MANIFEST
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeConfig
from saetrain.distributed.coordinator import Coordinator, RunBroadcast
from saetrain.launch.exit_status import EXIT, clear_exit_status
from saetrain.launch.resolve import (
    library_versions,
    planned_steps,
    resolve_run,
    run_options,
    sae_entries,
    whole_updates,
    with_default_lr,
)
from saetrain.runs.checkpoint import newest_step
from saetrain.runs.overrides import apply_overrides, with_history_entry
from saetrain.runs.record import (
    LOCK,
    RUN,
    RunRecord,
    SaeEntry,
    absolute_cache,
    changed_options,
    check_same_cache,
    check_same_run,
    read_run,
    write_run,
)
from saetrain.tracking.wandb_mirror import new_id


@dataclass(frozen=True)
class RunStart:
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


def start_or_resume(
    config: FitConfig, root: Path, lock: DirectoryLock, coordinator: Coordinator
) -> RunStart:
    """Decide what the run is, or hear it.

    A run that was begun before is locked from here on, and nothing is left of how it ended.

    Raises:
        ActcacheError: one of its kinds: what is asked for cannot be.
    """
    run_start = (
        _start_rank_zero(config, root, lock, coordinator)
        if coordinator.is_rank_zero
        else _start_worker(config, root, lock, coordinator)
    )
    extensions = run_start.record.extensions
    if extensions is None:
        return run_start
    # Those that came later are no part of the run.
    return dataclasses.replace(run_start, cache=run_start.cache.truncated_to(extensions))


def _start_rank_zero(
    config: FitConfig, root: Path, lock: DirectoryLock, coordinator: Coordinator
) -> RunStart:
    cache, device = _open(config), _device(config)
    begun = has_run(config, root)
    changes: tuple[str, ...] = ()
    if begun:
        lock.acquire()
        clear_exit_status(root)
        remove_partials(root)
        record, changes, warnings = resume_record(config, cache, root, coordinator)
    else:
        record = resolve_run(config, cache, device, coordinator)
        warnings = () if config.follow else _missing_shards(cache)
    coordinator.check_supported(record)
    coordinator.broadcast(RunBroadcast(begun, record))
    return RunStart(begun, record, cache, device, changes, warnings)


def _start_worker(
    config: FitConfig, root: Path, lock: DirectoryLock, coordinator: Coordinator
) -> RunStart:
    decided = coordinator.receive(RunBroadcast)
    if decided.begun:
        _acquire_shared(lock, root)
    cache, device = _open(config), _device(config)
    check_same_cache(decided.record, cache)
    return RunStart(decided.begun, decided.record, cache, device)


def commit_run_record(
    run_start: RunStart, first_step: int, root: Path, lock: DirectoryLock, coordinator: Coordinator
) -> None:
    """Write down what the run is, once all have built it: one that cannot be leaves nothing behind.

    Raises:
        RunError: another run has been begun there meanwhile.
        CacheBusyError: one is just beginning.
    """
    coordinator.barrier()
    if coordinator.is_rank_zero and run_start.begun:
        write_option_changes(root, run_start.record, first_step, run_start.changes)
    elif coordinator.is_rank_zero:
        lock.acquire()
        if (root / RUN).exists():
            raise RunError(f"another fit has begun a run in {root}", remedy="--resume, or wait")
        clear_exit_status(root)
        remove_partials(root)
        write_run(root, run_start.record)
    coordinator.barrier()
    _acquire_shared(lock, root)


def _acquire_shared(lock: DirectoryLock, root: Path) -> None:
    """Hold the lock that the leader has taken; raises `RunError` if it is not to be seen here."""
    try:
        lock.acquire_shared()
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


def has_run(config: FitConfig, root: Path) -> bool:
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


def resume_record(
    config: FitConfig, cache: Cache, root: Path, coordinator: Coordinator
) -> tuple[RunRecord, tuple[str, ...], tuple[str, ...]]:
    """The record of the run that is there, checked against what is asked now.

    Returns:
        It with the options of now, what has changed since it was last written, and warnings.
    """
    config = run_options(config)
    record = read_run(root)
    check_same_cache(record, cache)
    options = changed_options(record, config)
    record = dataclasses.replace(record, wandb_id=record.wandb_id or new_id(config))
    asked = dataclasses.replace(record, options=config)
    if options and config.force_config:
        steps, done = _forced_steps(record, config), newest_step(root) or 0
        saes = with_default_lr(
            sae_entries(config, cache, functools.partial(_kinds_of, record)), steps
        )
        asked = apply_overrides(record, config, options, saes, steps, done)
    else:
        check_same_run(record, asked)
    now = library_versions()
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
    parts = coordinator.world_size if coordinator.is_data_parallel else 1
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
    return planned_steps(config, record.plan.steps_per_epoch)


def write_option_changes(
    root: Path, record: RunRecord, first_step: int, changes: tuple[str, ...]
) -> None:
    """Write down what is not as it was when the run was last started.

    Options that touch no result are left as they were given first. The cache's place is that of
    now: `saetrain eval` must find it.
    """
    old = read_run(root)
    new = dataclasses.replace(
        old, cache=absolute_cache(record.options.cache), wandb_id=record.wandb_id
    )
    if first_step < record.steps:
        if changed_options(old, record.options):
            new = dataclasses.replace(record, cache=new.cache)
        new = dataclasses.replace(new, batch_parts=record.batch_parts)
        new = with_history_entry(new, first_step, changes, library_versions())
    if new != old:
        write_run(root, new)
