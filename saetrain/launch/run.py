"""From options to a finished run: what it is, what is built for it, and how it goes."""

from __future__ import annotations

from pathlib import Path

from actcache.cache.reader import Cache
from actcache.core.progress import format_bytes
from actcache.errors import DiskFullError
from actcache.filesystem.atomic import DirectoryLock
from actcache.stream.activation_stream import ActivationStream
from actcache.stream.memory_budget import extra_windows
from actcache.stream.verified_reads import ProbeResult, probe_read_settings
from saetrain.config.fit_config import FitConfig
from saetrain.distributed.coordinator import Coordinator, init_coordinator, reports_outcome
from saetrain.distributed.signals import StopSignals
from saetrain.launch.exit_status import recorded_exit_status
from saetrain.launch.resolve import budget_of
from saetrain.launch.session import stopped_before_start, write_exit_status
from saetrain.launch.setup import RunState, set_up_run
from saetrain.launch.start import RunStart, commit_run_record, start_or_resume
from saetrain.launch.summary import FitSummary, Throughput, summarize_fit
from saetrain.model.hookpoint_io import hookpoints_of
from saetrain.runs.record import LOCK, RunRecord
from saetrain.tracking.jsonl import JsonlTracker
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
    lock = DirectoryLock(root, LOCK, "fit")

    def is_ours(error: BaseException | None) -> bool:
        return (lock.held or stopped_before_start(root, error)) and reports_outcome(error)

    def last_words(error: BaseException) -> None:
        if is_ours(error):
            write_exit_status(root, error)

    try:
        with (
            StopSignals() as stop_signals,
            recorded_exit_status(root, is_ours),
            init_coordinator(config, stop_signals, last_words) as coordinator,
        ):
            run_start = start_or_resume(config, root, lock, coordinator)
            run_state = set_up_run(
                root,
                run_start.record,
                run_start.cache,
                run_start.device,
                coordinator,
                run_start.begun,
            )
            commit_run_record(run_start, run_state.resume_point.step, root, lock, coordinator)
            return _carry_out(config, root, run_start, run_state, coordinator)
    except DiskFullError as error:
        remedy = "free space; the same command with --resume goes on from what is saved"
        raise DiskFullError(
            error.what, expected=error.expected, got=error.got, remedy=remedy
        ) from error
    finally:
        lock.release()


def _carry_out(
    config: FitConfig,
    root: Path,
    run_start: RunStart,
    run_state: RunState,
    coordinator: Coordinator,
) -> FitSummary:
    """Train what is built to the run's end."""
    record, resume_point, first_step = (
        run_start.record,
        run_state.resume_point,
        run_state.resume_point.step,
    )
    stream, how_it_reads = _open_stream(config, run_start, run_state, coordinator)
    coordinator.init_throttle(
        first_step, record.plan.batch_size, _row_bytes(record, run_start.cache)
    )
    tracker = coordinator.make_tracker(
        lambda: JsonlTracker(
            root, first_step, record.steps, record.plan.batch_size, stream.row_bytes
        ),
        record.saes,
    )
    for warning in resume_point.warnings:
        tracker.bar.print_line(f"warning: {warning}")
    if first_step == 0:
        for sae, source in zip(record.saes, record.origins, strict=False):
            sizes = f"{sae.config.num_latents:,} latents, k {sae.config.k}"
            tracker.bar.print_line(f"fit: {sae.name} begins with {source.path} ({sizes})")
    if first_step < record.steps:
        tracker.bar.print_line(how_it_reads)
    try:
        if coordinator.is_rank_zero:
            tracker.mirror = open_wandb(root, record, tracker.bar.print_line)
        steps = train(
            root,
            record,
            run_state.trainers,
            stream,
            tracker,
            first_step,
            run_state.segment_tracker,
            run_state.validation,
            coordinator,
        )
        tracker.end()
    finally:
        stream.close()
        seconds = tracker.seconds
        tracked = Throughput(seconds, *tracker.close())
    coordinator.barrier()  # for the last line
    warnings = (*run_start.warnings, *resume_point.warnings)
    return summarize_fit(root, record, stream, tracked, config.verify, first_step, steps, warnings)


def _open_stream(
    config: FitConfig, run_start: RunStart, run_state: RunState, coordinator: Coordinator
) -> tuple[ActivationStream, str]:
    """The batches from where the run goes on, and a line on how they are read."""
    record, cache, segment_tracker = run_start.record, run_start.cache, run_state.segment_tracker
    hookpoints = hookpoints_of([trainer.entry for trainer in run_state.trainers])
    probe = probe_read_settings(cache, hookpoints, record.plan)
    budget = budget_of(config, cache, hookpoints)
    stream = ActivationStream(
        cache,
        hookpoints,
        record.plan if segment_tracker is None else segment_tracker.plans,
        epochs=None if segment_tracker is None else record.epochs,
        verify=config.verify,
        rank=coordinator.rank if coordinator.is_data_parallel else 0,
        world_size=coordinator.world_size if coordinator.is_data_parallel else 1,
        prefetch=budget.prefetch,
        reading=probe.reading,
        device=run_start.device if run_start.device.type == "cuda" else None,
    )
    if run_state.resume_point.stream:
        stream.load_state_dict(run_state.resume_point.stream)
    return stream, _how_it_reads(record, probe, stream.row_bytes)


def _how_it_reads(record: RunRecord, probe: ProbeResult, row_bytes: int) -> str:
    """One line: what is held, and how it is read."""
    plan = record.plan
    pool = min(plan.window, plan.lane_rows) * plan.lanes
    speed = probe.why_not
    if probe.bytes_per_second is not None:
        speed = f"{format_bytes(probe.bytes_per_second)}/s in a probe"
    return (
        f"fit: {pool:,} rows are mixed in memory ({format_bytes(pool * row_bytes)}); read by "
        f"{probe.reading}, up to {extra_windows(plan.lanes)} of {plan.lanes} windows ahead "
        f"({speed})"
    )


def _row_bytes(record: RunRecord, cache: Cache) -> int:
    """Bytes of a row, of all hookpoints of the run."""
    hookpoints = hookpoints_of(record.saes)
    return sum(cache.row_dtype.row_bytes(cache.manifest.width(name)) for name in hookpoints)
