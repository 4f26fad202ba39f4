"""`fit` from options to a finished run: start or resume it, set it up, train it, summarize it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from actcache.cache.reader import Cache
from actcache.core.process import choose_device
from actcache.errors import ConfigError, CorruptShardError, RunError
from actcache.filesystem.lock import is_unlocked
from actcache.filesystem.rooted import require_plain
from actcache.format.manifest import MANIFEST
from saetrain.config.fit_config import FitConfig
from saetrain.launch.resolve import open_cache, resolve_run, resume_record, write_option_changes
from saetrain.launch.session import (
    EXIT,
    RunSession,
    is_empty,
    made_no_step,
    run_session,
)
from saetrain.launch.setup import RunBroadcast, set_up_run
from saetrain.launch.summary import FitSummary, summarize_fit
from saetrain.runs.record import LOCK, RUN, check_same_cache, require_same_options, write_run
from saetrain.training.loop import train
from saetrain.training.run_state import RunState


def fit(config: FitConfig) -> FitSummary:
    """Train the SAEs of each selected hookpoint from one pass over its rows, or resume a run.

    SIGTERM and Ctrl-C save a checkpoint at the next step; a second one ends the run at once.

    Raises:
        ActcacheError: one of its subclasses, for anything a user can mend.
        RunStopped: a signal has stopped the run, and its steps are saved.
    """
    if not isinstance(config, FitConfig):
        raise ConfigError("config has another type", expected="FitConfig", got=type(config))
    with run_session(config) as session:
        run = start_or_resume(session)
        set_up_run(session, run)
        commit_run_record(session, run)
        result = train(session.root, config, run, session.coordinator)
        return summarize_fit(session, run, result)


def start_or_resume(session: RunSession) -> RunState:
    """Resolve the record of a new run, or read and check that of a run to resume.

    Rank 0 does it and broadcasts the record. The run folder of a resumed run is locked from here
    on, and exit.json of the call before is removed.

    Raises:
        ActcacheError: one of its subclasses: the options cannot be carried out.
    """
    config, coordinator = session.config, session.coordinator
    if coordinator.is_rank_zero:
        run = _resolve(session)
        coordinator.check_supported(run.record)
        coordinator.broadcast(RunBroadcast(run.resumed, run.record))
    else:
        received = coordinator.receive(RunBroadcast)
        require_same_options(received.record.options, config)
        if received.resumed:
            session.share_lock()
        run = RunState(received.record, open_cache(config), _device(config), received.resumed)
        check_same_cache(run.record, run.cache)
    if run.record.extensions is not None:  # extensions made after the start are no part of the run
        run.cache = run.cache.truncated_to(run.record.extensions)
    return run


def _resolve(session: RunSession) -> RunState:
    config, root, parts = session.config, session.root, session.coordinator.batch_parts
    cache, device = open_cache(config), _device(config)
    found = find_run(config, root)
    if found != "resumed":
        record = resolve_run(config, cache, device, parts)
        warnings = () if config.follow else _missing_shards(cache)
        return RunState(record, cache, device, warnings=warnings, replaces=found == "unused")
    session.lock_run(resume=True)
    record, changes, warnings = resume_record(config, cache, root, parts)
    return RunState(record, cache, device, True, changes, warnings)


def commit_run_record(session: RunSession, run: RunState) -> None:
    """Write run.json once all ranks have built the run: a run that cannot be built leaves no file.

    Raises:
        RunError: another fit has started a run in the folder meanwhile.
        CacheBusyError: another fit is just starting one.
    """
    root, coordinator = session.root, session.coordinator
    coordinator.barrier()
    if coordinator.is_rank_zero and run.resumed:
        write_option_changes(root, run.record, run.step, run.changes)
    elif coordinator.is_rank_zero:
        if run.replaces:
            session.discard_unused()
        session.lock_run(resume=False)
        write_run(root, run.record)
    coordinator.barrier()
    session.share_lock()


def _device(config: FitConfig) -> torch.device:
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: the encoder's product is most of a step
    return device


def _missing_shards(cache: Cache) -> tuple[str, ...]:
    """Return a warning if the harvest of the cache has not finished.

    Raises:
        CorruptShardError: it had finished, and a shard was lost or taken back since.
    """
    if cache.complete:
        return ()
    if cache.end is not None:
        missing = sorted(set(range(cache.end.last_shard + 1)) - set(cache.shards))
        raise CorruptShardError(
            f"the harvest of {cache.root} was complete, and shards are gone since",
            expected=f"receipts of shards 0 to {cache.end.last_shard}",
            got=f"without {missing[:8]}, {len(missing)} in all",
            remedy="actcache verify CACHE --repair, the harvest command again, or restore a copy",
        )
    planned = "all of the text"  # a harvest without --max-tokens
    if cache.manifest.plan.shards is not None:
        planned = str(cache.manifest.plan.shards)
    return (
        f"{cache.root} is not complete: shards there {len(cache.shards)}, planned {planned}; the "
        "run uses those that are there now (--follow waits for more)",
    )


def find_run(config: FitConfig, root: Path) -> Literal["resumed", "unused", "none"]:
    """Return whether the folder holds a run to resume; raises `RunError` if it cannot be used.

    A run that ended before its first step is unused, unless --resume is given: the command may be
    repeated, also with other options.
    """
    has_record = (root / RUN).exists()
    if has_record:
        if config.resume:
            return "resumed"
        if not (is_unlocked(root, LOCK) and made_no_step(root)):
            raise RunError(
                f"{root} holds a run already", remedy="--resume to continue it, or another --out"
            )
    if root.is_symlink() and not root.exists():
        raise RunError(
            f"--out {root} is a link that leads nowhere",
            expected="a new or empty folder",
            remedy=f"create the folder that it points to: {root.readlink()}",
        )
    if root.exists():
        if not root.is_dir():
            raise RunError(f"--out {root} is a file", expected="a new or empty folder")
        require_plain(root, [str(LOCK), EXIT])
        if not (has_record or is_empty(root)):
            content = "a cache" if (root / MANIFEST).exists() else "other things"
            raise RunError(f"--out {root} holds {content}", expected="a new or empty folder")
    return "unused" if has_record else "none"
