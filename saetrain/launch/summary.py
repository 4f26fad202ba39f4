"""Summary of a call of `fit`, with a sentence on the bottleneck."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actcache.core.progress import format_bytes
from actcache.errors import ActcacheError, FormatError
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeEntry, SaeOptions, hookpoints_of
from saetrain.formats.sparsify import read_sae
from saetrain.runs.checkpoint import Best, SaeState, newest_state
from saetrain.runs.record import RunRecord
from saetrain.tracking.jsonl import METRICS, last_line, sae_metrics
from saetrain.training.health import Finding
from saetrain.training.run_state import RunState, TrainResult
from saetrain.training.validation import Validation

_NEAR = 0.05  # relative distance of L0 from --target-l0 that is not reported
_FEW_SHARDS = 8  # held-out shards that are read at the end: each is compared with its receipt


@dataclass(frozen=True)
class FitSummary:
    """Result of a call of `fit`; printed, or written as JSON with --json."""

    run: str
    steps: int
    """Steps of the whole run."""
    new_steps: int
    """Steps done by this call."""
    rows: int
    """Rows of the whole run's steps."""
    rows_per_second: float
    """Rows per second of this call, each counted once for all SAEs; 0 if no step was left."""
    bytes_per_second: float
    """Bytes per second of rows on disk, likewise."""
    data_wait: float
    """Share of the time spent waiting for rows."""
    limit: str | None
    """One sentence on the bottleneck and its remedy; None if no step was left."""
    dead_after: int
    """Rows without firing after which a latent is dead."""
    saes: dict[str, dict[str, Any]]
    """Metrics of the last line of metrics.jsonl, by the SAE's name."""
    held_out: dict[str, dict[str, Any]]
    """FVU and L0 on at most --val-rows held-out rows at the end, by the SAE's name: the validation
    of the last step, or without one of the saved SAEs. Empty if nothing is held out, or on
    another rank than 0."""
    best: dict[str, Best]
    """With --save-best, each SAE's best validation, by name."""
    warnings: tuple[str, ...]
    """Warnings for the user."""
    findings: tuple[Finding, ...]
    """Signs that training went wrong, in any call of the run; empty on another rank than 0."""


def summarize_fit(
    root: Path, config: FitConfig, run: RunState, result: TrainResult, is_rank_zero: bool = True
) -> FitSummary:
    """Summarize a finished run from its files and the result of this call.

    Rank 0 measures the saved SAEs on held-out rows. The SAEs in training are freed before.

    Raises:
        FormatError: metrics.jsonl is missing or damaged.
    """
    record, metrics = run.record, root / METRICS
    line = last_line(metrics, key="saes")
    if line is None:  # lost after the run had finished: training always writes it
        raise FormatError(f"{metrics} is missing or empty", remedy="restore it from a copy")
    steps, limit = result.steps, bottleneck_message(result, config.verify)
    missing: tuple[str, ...] = ()
    validated = last_line(metrics, key="val")
    held_out: dict[str, dict[str, Any]] = {}
    if validated is not None and validated["step"] == steps:
        held_out = validated["val"]
    elif is_rank_zero:
        run.trainers.clear()
        held_out, missing = measure_saved(root, config, run)
    return FitSummary(
        run=str(root),
        steps=steps,
        new_steps=steps - run.step,
        rows=steps * record.plan.batch_size,
        rows_per_second=result.rows_per_second,
        bytes_per_second=result.bytes_per_second,
        data_wait=result.data_wait,
        limit=limit if steps > run.step else None,
        dead_after=record.dead_after,
        saes=sae_metrics(metrics, line, [entry.name for entry in record.saes]),
        held_out=held_out,
        best=_bests(root, record),
        warnings=(
            *run.warnings,
            *run.restore_warnings,
            *_ended_early(record, steps),
            *missing,
            *_off_target(record, held_out),
        ),
        findings=() if run.watch is None else tuple(run.watch.findings),
    )


def measure_saved(
    root: Path, config: FitConfig, run: RunState
) -> tuple[dict[str, dict[str, float]], tuple[str, ...]]:
    """Measure the saved SAEs on at most --val-rows held-out rows.

    The run has finished and is saved, so an error does not end it.

    Returns:
        FVU and L0 by the SAE's name, of those that can be measured; and a warning if some cannot.
    """
    record, state = run.record, newest_state(root)
    held_out = {shard: run.cache.receipts[shard].rows for shard in record.held_out}
    shards = enough_shards(held_out, record.options.val_rows)
    if state is None or not any(held_out[shard] for shard in shards):
        return {}, ()
    groups: dict[str, list[tuple[SaeEntry, SaeState]]] = {}
    for entry, saved in zip(record.saes, state.saes, strict=True):
        groups.setdefault(entry.hookpoint, []).append((entry, saved))
    figures, errors = {}, []
    for group in groups.values():
        try:
            rows = Validation(
                run.cache,
                hookpoints_of([entry for entry, _ in group]),
                record.training_shards,
                shards,
                record.options.val_rows,
                config.verify,
                record.massive,
            )
            on_device = rows.on(group[0][0], run.device)
            for entry, saved in group:
                sae, _ = read_sae(root / entry.name, run.device, saved.export)
                figures[entry.name] = rows.measure(sae, {}, entry, on_device)
        except (ActcacheError, torch.OutOfMemoryError) as error:
            errors.append(f"{group[0][0].hookpoint}: {str(error).splitlines()[0]}")
    if not errors:
        return figures, ()
    more = f", and {len(errors) - 1:,} more hookpoints" if errors[1:] else ""
    return figures, (f"held-out FVU was not measured at {errors[0]}{more}",)


def _off_target(record: RunRecord, held_out: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    """Return a warning for SAEs whose L0 on held-out rows is not within 5% of --target-l0."""
    off = [
        f"{entry.name}: L0 on held-out rows is {found['l0']:.1f}, and --target-l0 {target:g}"
        for entry in record.saes
        if (target := entry.options.target_l0) and (found := held_out.get(entry.name))
        if abs(found["l0"] / target - 1) > _NEAR
    ]
    if not off:
        return ()
    more = f" ({len(off) - 1:,} more SAEs likewise)" if off[1:] else ""
    return (f"{off[0]}{more}: a longer run, with --epochs or a smaller --batch-size",)


def enough_shards(rows: Mapping[int, int], needed: int) -> list[int]:
    """Choose shards evenly, 8 or as many more as hold enough rows on average.

    Args:
        rows: rows of each shard.
        needed: number of rows.
    """
    shards, mean = sorted(rows), sum(rows.values()) / max(1, len(rows))
    count = min(len(shards), max(_FEW_SHARDS, math.ceil(needed / max(1.0, mean))))
    return [shards[i * len(shards) // count] for i in range(count)]


def _ended_early(record: RunRecord, steps: int) -> tuple[str, ...]:
    """Return a warning if the cache had fewer rows than the goal of its harvest."""
    if steps == record.steps:
        return ()
    decays = any(_decays(entry.options) for entry in record.saes)
    rate = "; the learning rate did not reach its end" if decays else ""
    return (
        f"the run ended after {steps:,} of {record.steps:,} planned steps: the text ended before "
        f"the harvest's goal, or filters dropped rows{rate}",
    )


def _decays(options: SaeOptions) -> bool:
    """Return whether the schedule decays the learning rate."""
    signum = options.optimizer == "signum"
    return (options.lr_schedule or ("constant" if signum else "linear")) != "constant"


def _bests(root: Path, record: RunRecord) -> dict[str, Best]:
    """Read each SAE's best validation from the newest checkpoint."""
    state = newest_state(root)
    saes = () if state is None else state.saes
    named = zip(record.saes, saes, strict=False)
    return {entry.name: sae.best for entry, sae in named if sae.best is not None}


_DISK = 0.3  # share of time spent waiting for rows from which the disk is the limit
_COMPUTE = 0.1  # share up to which compute is the limit


def bottleneck_message(result: TrainResult, verify: str) -> str:
    """Name the bottleneck of a run in one sentence, and a remedy that suits the option --verify."""
    share, speed = result.data_wait, f"{format_bytes(result.bytes_per_second)}/s"
    waited = f"{share:.0%} of the time went into waiting for rows, at {speed}"
    if share <= _COMPUTE:
        return (
            f"Compute was the limit ({waited}): a faster device, fewer latents or fewer SAEs at "
            "once would help, a faster disk would not."
        )
    if result.shard_wait > share / 2:
        return f"The harvest was the limit ({waited}): this run was waiting for its shards."
    if result.first_wait > share / 2:
        verified = "" if verify == "never" else "--verify never after `actcache verify`, "
        return (
            f"The start was the limit ({waited}, most of it before the first step): {verified}"
            "a smaller --buffer-bytes or a longer run would help."
        )
    if share < _DISK:
        return (
            f"Disk and compute kept pace ({waited}): a faster disk helps by that much at most, "
            "then only a faster device."
        )
    return (
        f"The disk was the limit ({waited}): a faster disk, rows of 8 bits (actcache convert "
        "--dtype int8) or more SAEs in one run would help, a faster device would not."
    )
