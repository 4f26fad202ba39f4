"""One call of `fit`, from options to a finished run: start or resume it, set it up, train it.

`run_session` enters and leaves the lock of the run folder, the signal handlers, the processes and
`exit.json` as one. `exit.json` records how the last call in a run ended: launchers swallow exit
codes. It lies directly in the run folder, where sparsify takes every subfolder for an SAE.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from actcache.cache.reader import Cache
from actcache.core.json_codec import read_json, to_json
from actcache.core.process import use_device
from actcache.errors import (
    ActcacheError,
    ConfigError,
    CorruptShardError,
    DiskFullError,
    FormatError,
    RunError,
)
from actcache.filesystem.atomic import remove_partials, write_atomic
from actcache.filesystem.lock import DirectoryLock, is_unlocked
from actcache.filesystem.rooted import is_stray, require_plain, rooted
from actcache.format.manifest import MANIFEST
from saetrain.config.fit_config import FitConfig
from saetrain.distributed.coordinator import Coordinator, init_coordinator, reports_outcome
from saetrain.distributed.signals import RunStopped, StopSignals, exit_code_of
from saetrain.launch.resolve import open_cache, resolve_run, resume_record, write_option_changes
from saetrain.launch.setup import RunBroadcast, set_up_run
from saetrain.launch.summary import FitSummary, summarize_fit
from saetrain.runs.checkpoint import newest_step
from saetrain.runs.own_files import is_plain
from saetrain.runs.record import (
    LOCK,
    RUN,
    check_same_cache,
    read_run,
    require_same_options,
    with_massive_rows,
    write_run,
)
from saetrain.runs.segments import SEGMENTS
from saetrain.tracking.jsonl import METRICS, TIMINGS
from saetrain.training.loop import train
from saetrain.training.run_state import RunState

EXIT = "exit.json"
_LINES = METRICS, TIMINGS
_BEFORE_RECORD = str(LOCK), EXIT
_BEFORE_STEPS = *_BEFORE_RECORD, SEGMENTS, *_LINES, RUN
"""Files that a run may write before its first step, in the order in which they are removed."""


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
        set_up_run(session.root, config, run, session.coordinator)
        commit_run_record(session, run)
        result = train(session.root, config, run, session.coordinator)
        return summarize_fit(session.root, config, run, result, session.coordinator.is_rank_zero)


@dataclass(frozen=True)
class ExitStatus:
    """Contents of `exit.json`."""

    code: int
    """The exit code: 0 finished, 143 SIGTERM, 130 Ctrl-C (both saved: requeue with --resume), those
    of `actcache.errors`, 1 anything else."""
    reason: str
    """finished, SIGTERM, SIGINT, or an error's class and its first line."""
    step: int
    """Step of the newest checkpoint; 0 if there is none."""


@dataclass(frozen=True)
class RunSession:
    """Configuration, folder, lock and coordinator of one call of `fit`."""

    config: FitConfig
    root: Path
    """Folder of the run."""
    lock: DirectoryLock
    coordinator: Coordinator

    def lock_run(self, resume: bool) -> None:
        """Lock the folder on rank 0, and remove exit.json and partial files of an earlier call.

        Raises:
            CacheBusyError: another fit holds the lock.
            RunError: the run is new, and another fit has started one in the folder.
        """
        if not self.lock.held:
            self.lock.acquire()
        if not resume and (self.root / RUN).exists():
            raise RunError(
                f"another fit has started a run in {self.root}", remedy="--resume, or wait"
            )
        (self.root / EXIT).unlink(missing_ok=True)  # else a killed call would appear finished
        remove_partials(self.root)

    def discard_unused(self) -> None:
        """Lock a folder whose run made no step, and remove the files of that run.

        Raises:
            CacheBusyError: another fit holds the lock.
            RunError: the run has made a step meanwhile.
        """
        self.lock.acquire()
        if not made_no_step(self.root):
            raise RunError(
                f"another fit has started a run in {self.root}", remedy="--resume, or wait"
            )
        for name in _BEFORE_STEPS[1:]:  # run.json last: until it is gone, this is done again
            (self.root / name).unlink(missing_ok=True)

    def share_lock(self) -> None:
        """Hold the lock that rank 0 has taken; raises `RunError` if its file is not visible."""
        try:
            self.lock.acquire_shared()
        except FileNotFoundError as error:
            raise RunError(
                f"the run that rank 0 has locked in {self.root} is not visible to another process",
                expected="--out in a folder that all machines share",
                got=f"no {error.filename}",
            ) from error


@contextmanager
def run_session(config: FitConfig) -> Iterator[RunSession]:
    """Handle signals, connect the processes, and at the end write exit.json and free the lock."""
    root = rooted(config.out)
    lock = DirectoryLock(root, LOCK, "fit")

    def record_exit(error: BaseException | None) -> None:
        started = lock.held and (root / RUN).exists()
        if (started or stopped_before_start(root, error)) and reports_outcome(error):
            write_exit_status(root, error)

    try:
        with StopSignals() as stop_signals:
            try:
                with init_coordinator(config, stop_signals, record_exit) as coordinator:
                    yield RunSession(config, root, lock, coordinator)
            except BaseException as error:
                record_exit(error)
                raise
            record_exit(None)
    except DiskFullError as error:
        remedy = "free space; the same command with --resume continues from the newest checkpoint"
        raise DiskFullError(
            error.what, expected=error.expected, got=error.got, remedy=remedy
        ) from error
    finally:
        lock.release()


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
        run.record = with_massive_rows(run.record, run.cache)
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
    record, changes, warnings = resume_record(config, cache, root, parts, device)
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
    device = use_device(config.device)
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


def made_no_step(root: Path) -> bool:
    """Return whether a folder holds a run that ended before its first step, and nothing else.

    Strays of notebooks and file managers are ignored. A line of metrics, a record of rows that are
    not finite, an SAE and a checkpoint are the work of a step. A run that has finished made steps,
    wherever they are now. A run.json that is not ours, or damaged, is none of such a run.
    """
    try:
        read_run(root)
        status = read_json(root / EXIT) if (root / EXIT).exists() else None
    except FormatError:
        return False
    finished = isinstance(status, dict) and status.get("code") == 0
    return not finished and holds_only(root, _BEFORE_STEPS)


def is_empty(root: Path) -> bool:
    """Return whether a folder holds nothing but strays, and a lock and exit.json without a run."""
    return holds_only(root, _BEFORE_RECORD)


def holds_only(root: Path, names: tuple[str, ...]) -> bool:
    """Return whether a folder holds only plain files of these names, and strays.

    metrics.jsonl and timings.jsonl must be empty.
    """
    for path in root.iterdir():
        is_own = path.name in names and is_plain(path)
        if is_own and path.name in _LINES and path.stat().st_size:
            return False
        if not (is_own or is_stray(path.name)):
            return False
    return True


def stopped_before_start(root: Path, error: BaseException | None) -> bool:
    """Return whether a signal ended a run whose folder has no file but exit.json, or is absent.

    That happens while the first segment of a harvest is waited for. A folder with other files may
    belong to something else.
    """
    if not isinstance(error, KeyboardInterrupt):
        return False
    try:
        return all(path.name == EXIT for path in root.iterdir())
    except FileNotFoundError:
        return True
    except OSError:  # --out is a file
        return False


def write_exit_status(root: Path, error: BaseException | None) -> None:
    """Write `exit.json` for a run that has ended with an error, or with None."""
    code, reason = (0, "finished") if error is None else (exit_code_of(error), _reason(error))
    with suppress(ActcacheError, OSError):  # must not hide the error that ended the run
        step = newest_step(root) if (root / RUN).exists() else None
        write_atomic(root / EXIT, [to_json(ExitStatus(code, reason, step or 0))])


def _reason(error: BaseException) -> str:
    if isinstance(error, RunStopped):
        return error.signal.name
    if isinstance(error, KeyboardInterrupt):
        return "SIGTERM" if exit_code_of(error) == 143 else "SIGINT"
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
