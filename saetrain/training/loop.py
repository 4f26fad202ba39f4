"""The training loop: open rows and logs; read a batch, step, log, validate, save."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from actcache.cache.sinks import as_lines, find_sinks, read_statistics
from actcache.core.progress import format_bytes
from actcache.errors import ActcacheError
from actcache.stream.activation_stream import ActivationStream, Batch
from actcache.stream.memory_budget import extra_windows, plan_memory
from actcache.stream.verified_reads import ProbeResult, probe_read_settings
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import hookpoints_of
from saetrain.distributed.coordinator import Coordinator
from saetrain.distributed.process_group import LostRankError
from saetrain.distributed.signals import RunStopped, StopRequested
from saetrain.runs.record import RunRecord
from saetrain.runs.segments import HarvestWaitNotice, plan_of_step
from saetrain.tracking.jsonl import JsonlTracker
from saetrain.tracking.wandb_mirror import open_wandb
from saetrain.training import health
from saetrain.training.checkpointing import Checkpointer
from saetrain.training.cuda_graphs import with_cuda_graphs
from saetrain.training.health import Watch, findings_at_start
from saetrain.training.non_finite import require_finite_loss, with_row_addresses
from saetrain.training.run_state import RunState, TrainResult
from saetrain.training.sae_trainer import by_hookpoint
from saetrain.training.step import train_batch
from saetrain.training.validation import validate


def train(root: Path, config: FitConfig, run: RunState, coordinator: Coordinator) -> TrainResult:
    """Train from the run's step to its last one, or to the end of its data.

    Args:
        root: folder of the run.
        config: the options of this call.
        run: its record, and the SAEs of this process.
        coordinator: the processes of the run.

    Raises:
        RunStopped: a signal requested it; the steps before it are saved.
        NonFiniteError: a loss is not finite. It has changed no weight, and the last checkpoint
            before it stays.
        CorruptShardError: a shard has changed or is missing; the steps before it are saved, as
            they are for any other read error.
    """
    record, trainers, segments = run.record, run.trainers, run.segment_tracker
    groups, options = by_hookpoint(trainers), record.options
    make_step = with_cuda_graphs(groups) if options.cuda_graphs else train_batch
    stream, read_message = _open_stream(config, run, coordinator)
    coordinator.init_throttle(run.step, record, run.cache)
    done, position = run.step, stream.state_dict()

    def on_wait(shard: int) -> None:
        notice(shard)
        coordinator.throttle(done)
        checkpointer.save_while_waiting(done, position)
        coordinator.check_stop_request(done, waits=True)

    def on_slow() -> None:
        coordinator.check_stop_request(done, waits=True)

    stream.on_slow = on_slow
    plan_of = functools.partial(plan_of_step, record, segments)
    with (
        stream,
        _open_tracker(root, run, coordinator, stream.row_bytes, read_message) as tracker,
        with_row_addresses(root, stream.cache, plan_of),
    ):
        version = record.format_version
        checkpointer = Checkpointer(root, trainers, tracker, coordinator, options, done, version)
        if segments is not None:
            notice = HarvestWaitNotice(
                stream.cache, segments.plans.segmentation.shards_each, tracker.bar
            )
            stream.on_wait = on_wait
        try:
            for step in range(run.step, record.steps):
                coordinator.throttle(step)
                coordinator.check_stop_request(done)
                batch = _next_batch(coordinator, stream, checkpointer, done, position)
                if batch is None:
                    break
                # Not earlier: before the first batch there is nothing to save.
                coordinator.stop_signals.install()
                if segments is not None:
                    segments.pin(batch)
                make_step(groups, batch, step)
                done, position = step + 1, stream.state_dict()
                last = done == record.steps or batch.last
                if done % options.log_every == 0 or last:
                    histogram, metrics = options.has_histogram(done, last=last), {}
                    for trainer in trainers:
                        figures = trainer.pop_metrics(
                            done, done * record.plan.batch_size, histogram
                        )
                        require_finite_loss(root, trainer, figures["fvu"] + figures["auxk"], done)
                        metrics[trainer.entry.name] = figures
                    tracker.log(done, metrics, stream.seconds_waited)
                if run.validation and (done % (options.val_every or 1) == 0 or last):
                    found = validate(root, groups, run.validation, done, options.save_best)
                    tracker.log_held_out(done, found, run.validation.rows)
                if checkpointer.is_due(done) or last:
                    checkpointer.save(done, position)
                if last:
                    break
        except StopRequested as stop:
            checkpointer.save(done, position)
            raise RunStopped(stop.signal, done) from None
    coordinator.barrier()  # rank 0 has written the last line
    seconds = tracker.seconds or math.inf
    return TrainResult(
        done,
        tracker.rows_per_second,
        tracker.rows_per_second * stream.row_bytes,
        data_wait=stream.seconds_waited / seconds,
        first_wait=stream.seconds_to_first / seconds,
        shard_wait=stream.seconds_for_shards / seconds,
    )


def _next_batch(
    coordinator: Coordinator,
    stream: ActivationStream,
    checkpointer: Checkpointer,
    done: int,
    position: dict[str, int],
) -> Batch | None:
    """Return the next batch; after an error, save the steps done and raise it."""
    try:
        return coordinator.next_batch(stream)
    except LostRankError:
        with suppress(ActcacheError, OSError):  # the lost rank is the error to raise
            checkpointer.save_while_waiting(done, position)
        raise
    except Exception:
        checkpointer.save_after_read_error(done, position)
        raise


def _open_stream(
    config: FitConfig, run: RunState, coordinator: Coordinator
) -> tuple[ActivationStream, str]:
    """Open the stream at the run's step, and describe in one line how it is read."""
    record, cache, segments = run.record, run.cache, run.segment_tracker
    hookpoints = hookpoints_of([trainer.entry for trainer in run.trainers])
    probe = probe_read_settings(cache, hookpoints, record.plan)
    stream = ActivationStream(
        cache,
        hookpoints,
        record.plan if segments is None else segments.plans,
        epochs=None if segments is None else record.epochs,
        verify=config.verify,
        rank=coordinator.batch_rank,
        world_size=coordinator.batch_parts,
        prefetch=plan_memory(
            config.buffer_bytes, cache.manifest, hookpoints, config.batch_size, config.pool_rows
        ).prefetch,
        reading=probe.reading,
        device=run.device if run.device.type == "cuda" else None,
    )
    if run.stream_state:
        stream.load_state_dict(run.stream_state)
    return stream, _read_message(record, probe, stream.row_bytes)


def _read_message(record: RunRecord, probe: ProbeResult, row_bytes: int) -> str:
    """Describe in one line the buffer and the settings of reads."""
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


def _watch(root: Path, run: RunState, tracker: JsonlTracker) -> None:
    """Report what is wrong with the rows or the options, and from then on what goes wrong."""
    record = run.record
    names = hookpoints_of(record.saes)
    shards, massive = record.training_shards, record.massive
    if massive is None:
        statistics = read_statistics(run.cache, names, shards)
    else:
        statistics = dict(massive.training.statistics)
    watch = run.watch = Watch(record, findings_at_start(record, statistics))

    def warn(lines: Sequence[str]) -> None:
        for line in lines:
            tracker.bar.print_line(f"warning: {line}")

    if run.step < record.steps:
        if massive is not None:
            tracker.bar.print_line(f"fit: --max-norm-ratio {massive.describe(run.cache)}")
        left_out = record.plan.left_out
        sinks = find_sinks(run.cache, names, shards, statistics, left_out)
        warn([*as_lines(sinks), *health.as_lines(watch.findings)])
    watch.replay(root)
    tracker.on_line = lambda step, metrics: warn(health.as_lines(watch.read(step, metrics)))


@contextmanager
def _open_tracker(
    root: Path, run: RunState, coordinator: Coordinator, row_bytes: int, read_message: str
) -> Iterator[JsonlTracker]:
    """Open the metrics of the run, print what it starts with, and at the end close them."""
    record = run.record
    tracker = coordinator.make_tracker(
        (root, run.step, record.steps, record.plan.batch_size, row_bytes), record.saes
    )
    for warning in run.restore_warnings:
        tracker.bar.print_line(f"warning: {warning}")
    if run.step == 0:
        for sae, origin in zip(record.saes, record.origins, strict=False):
            sizes = f"{sae.config.num_latents:,} latents, k {sae.config.k}"
            tracker.bar.print_line(f"fit: {sae.name} starts from {origin.path} ({sizes})")
    if run.step < record.steps:
        tracker.bar.print_line(read_message)
    if coordinator.is_rank_zero:
        _watch(root, run, tracker)
    try:
        if coordinator.is_rank_zero:
            tracker.mirror = open_wandb(root, record, tracker.bar.print_line)
        yield tracker
        tracker.end()
    finally:
        tracker.close()
