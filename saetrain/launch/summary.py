"""Summary of a call of `fit`, with a sentence on the bottleneck."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actcache.core.progress import format_bytes
from actcache.errors import FormatError
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeOptions
from saetrain.runs.checkpoint import Best, newest_state
from saetrain.runs.record import RunRecord
from saetrain.tracking.jsonl import METRICS, last_line, sae_metrics
from saetrain.training.run_state import RunState, TrainResult


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
    """Last validation, by the SAE's name; empty without --val-every."""
    best: dict[str, Best]
    """With --save-best, each SAE's best validation, by name."""
    warnings: tuple[str, ...]
    """Warnings for the user."""


def summarize_fit(root: Path, config: FitConfig, run: RunState, result: TrainResult) -> FitSummary:
    """Summarize a finished run from its files and the result of this call.

    Raises:
        FormatError: metrics.jsonl is missing or damaged.
    """
    record, metrics = run.record, root / METRICS
    line = last_line(metrics, key="saes")
    if line is None:  # lost after the run had finished: training always writes it
        raise FormatError(f"{metrics} is missing or empty", remedy="restore it from a copy")
    steps, limit = result.steps, bottleneck_message(result, config.verify)
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
        held_out=(last_line(metrics, key="val") or {"val": {}})["val"],
        best=_bests(root, record),
        warnings=(*run.warnings, *run.restore_warnings, *_ended_early(record, steps)),
    )


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
