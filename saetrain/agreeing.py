"""What a run is, as its leader decides it and its other processes hear it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from actcache.atomic import remove_partials
from actcache.device import choose_device
from actcache.errors import RunError
from actcache.lock import FolderLock
from actcache.reader import Cache
from saetrain.config import FitConfig
from saetrain.crew import Crew, Decided
from saetrain.deciding import decide
from saetrain.ending import forget
from saetrain.going_on import go_on, is_begun, write_changes
from saetrain.run import RUN, RunRecord, check_same_cache, write_run


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
