"""From options to a finished run: what it is, what is built for it, and how it goes."""

from __future__ import annotations

from pathlib import Path

from actcache.cache.reader import Cache
from actcache.core.file_lock import FolderLock
from actcache.core.progress import format_bytes
from actcache.errors import DiskFullError
from actcache.stream.activation_stream import ActivationStream
from actcache.stream.memory_budget import spare_windows
from actcache.stream.read_tuning import Tuning, tune
from saetrain.config.fit_config import FitConfig
from saetrain.distributed.coordinator import Crew, assemble, tells
from saetrain.distributed.signals import Stopping
from saetrain.launch.exit_status import is_early, tell, told
from saetrain.launch.resolve import budget_of
from saetrain.launch.setup import Built, build_run
from saetrain.launch.start import Agreed, agree, lay_down
from saetrain.launch.summary import FitSummary, Tracked, summarise
from saetrain.model.hookpoint_io import hookpoints_of
from saetrain.runs.record import LOCK, RunRecord
from saetrain.tracking.jsonl import Tracker
from saetrain.tracking.wandb_mirror import open_wandb
from saetrain.training.loop import train


def fit(config: FitConfig) -> FitSummary:
    """Train the SAEs of each hookpoint chosen from one pass over its rows, or go on with a run.

    SIGTERM and Ctrl-C let it save at the next step; a second one ends it at once.

    Raises:
        ActcacheError: one of its kinds, for anything a user can mend.
        Stopped: a signal asked for it, and the steps before it are saved.
    """
    root = Path(config.out)
    lock = FolderLock(root, LOCK, "fit")

    def is_ours(error: BaseException | None) -> bool:
        return (lock.held or is_early(root, error)) and tells(error)

    def last_words(error: BaseException) -> None:
        if is_ours(error):
            tell(root, error)

    try:
        with (
            Stopping() as stopping,
            told(root, is_ours),
            assemble(config, stopping, last_words) as crew,
        ):
            agreed = agree(config, root, lock, crew)
            built = build_run(root, agreed.record, agreed.cache, agreed.device, crew, agreed.begun)
            lay_down(agreed, built.restored.step, root, lock, crew)
            return _carry_out(config, root, agreed, built, crew)
    except DiskFullError as error:
        remedy = "free space; the same command with --resume goes on from what is saved"
        raise DiskFullError(
            error.what, expected=error.expected, got=error.got, remedy=remedy
        ) from error
    finally:
        lock.release()


def _carry_out(
    config: FitConfig, root: Path, agreed: Agreed, built: Built, crew: Crew
) -> FitSummary:
    """Train what is built to the run's end."""
    record, restored, first_step = agreed.record, built.restored, built.restored.step
    stream, how_it_reads = _open_stream(config, agreed, built, crew)
    crew.set_pace(first_step, record.plan.batch_size, _row_bytes(record, agreed.cache))
    tracker = crew.tracker(
        lambda: Tracker(root, first_step, record.steps, record.plan.batch_size, stream.row_bytes),
        record.saes,
    )
    for warning in restored.warnings:
        tracker.bar.say(f"warning: {warning}")
    if first_step == 0:
        for sae, source in zip(record.saes, record.origins, strict=False):
            sizes = f"{sae.config.num_latents:,} latents, k {sae.config.k}"
            tracker.bar.say(f"fit: {sae.name} begins with {source.path} ({sizes})")
    if first_step < record.steps:
        tracker.bar.say(how_it_reads)
    try:
        if crew.leads:
            tracker.mirror = open_wandb(root, record, tracker.bar.say)
        steps = train(
            root,
            record,
            built.trainees,
            stream,
            tracker,
            first_step,
            built.follower,
            built.validation,
            crew,
        )
        tracker.end()
    finally:
        stream.close()
        seconds = tracker.seconds
        tracked = Tracked(seconds, *tracker.close())
    crew.wait()  # for the last line
    warnings = (*agreed.warnings, *restored.warnings)
    return summarise(root, record, stream, tracked, config.verify, first_step, steps, warnings)


def _open_stream(
    config: FitConfig, agreed: Agreed, built: Built, crew: Crew
) -> tuple[ActivationStream, str]:
    """The batches from where the run goes on, and a line on how they are read."""
    record, cache, follower = agreed.record, agreed.cache, built.follower
    hookpoints = hookpoints_of([trainee.entry for trainee in built.trainees])
    tuning = tune(cache, hookpoints, record.plan)
    budget = budget_of(config, cache, hookpoints)
    stream = ActivationStream(
        cache,
        hookpoints,
        record.plan if follower is None else follower.plans,
        epochs=None if follower is None else record.epochs,
        verify=config.verify,
        rank=crew.rank if crew.shares_batches else 0,
        world_size=crew.processes if crew.shares_batches else 1,
        prefetch=budget.prefetch,
        reading=tuning.reading,
        device=agreed.device if agreed.device.type == "cuda" else None,
    )
    if built.restored.stream:
        stream.load_state_dict(built.restored.stream)
    return stream, _how_it_reads(record, tuning, stream.row_bytes)


def _how_it_reads(record: RunRecord, tuning: Tuning, row_bytes: int) -> str:
    """One line: what is held, and how it is read."""
    plan = record.plan
    pool = min(plan.window, plan.lane_rows) * plan.lanes
    speed = tuning.why_not
    if tuning.bytes_per_second is not None:
        speed = f"{format_bytes(tuning.bytes_per_second)}/s in a probe"
    return (
        f"fit: {pool:,} rows are mixed in memory ({format_bytes(pool * row_bytes)}); read by "
        f"{tuning.reading}, up to {spare_windows(plan.lanes)} of {plan.lanes} windows ahead "
        f"({speed})"
    )


def _row_bytes(record: RunRecord, cache: Cache) -> int:
    """Bytes of a row, of all hookpoints of the run."""
    hookpoints = hookpoints_of(record.saes)
    return sum(cache.codec.row_bytes(cache.manifest.width(name)) for name in hookpoints)
