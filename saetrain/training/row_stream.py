"""The stream of a run's rows: its memory budget, how files are read, and its first batch."""

from __future__ import annotations

from actcache.cache.reader import Cache
from actcache.core.progress import format_bytes
from actcache.stream.activation_stream import ActivationStream
from actcache.stream.memory_budget import (
    PREFETCH_BATCHES,
    MemoryBudget,
    extra_windows,
    plan_memory,
)
from actcache.stream.verified_reads import ProbeResult, probe_read_settings
from saetrain.config.fit_config import FitConfig
from saetrain.distributed.coordinator import Coordinator
from saetrain.model.hookpoint_io import hookpoints_of
from saetrain.runs.record import RunRecord
from saetrain.training.run_state import RunState


def budget_of(config: FitConfig, cache: Cache, hookpoints: list[str]) -> MemoryBudget:
    """Return the rows of the shuffle buffer, and the batches to prefetch."""
    if config.pool_rows is not None:
        return MemoryBudget(config.pool_rows, PREFETCH_BATCHES)
    return plan_memory(config.buffer_bytes, cache.manifest, hookpoints, config.batch_size)


def open_stream(
    config: FitConfig, run: RunState, coordinator: Coordinator
) -> tuple[ActivationStream, str]:
    """Open the stream at the run's step, and describe in one line how it is read."""
    record, cache = run.record, run.cache
    hookpoints = hookpoints_of([trainer.entry for trainer in run.trainers])
    probe = probe_read_settings(cache, hookpoints, record.plan)
    segments = run.segment_tracker
    stream = ActivationStream(
        cache,
        hookpoints,
        record.plan if segments is None else segments.plans,
        epochs=None if segments is None else record.epochs,
        verify=config.verify,
        rank=coordinator.batch_rank,
        world_size=coordinator.batch_parts,
        prefetch=budget_of(config, cache, hookpoints).prefetch,
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
