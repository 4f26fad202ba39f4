"""What a call of `fit` did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actcache.core.progress import format_bytes
from actcache.errors import FormatError
from actcache.stream.activation_stream import ActivationStream
from actcache.stream.verified_reads import Verify
from saetrain.config.sae_options import SaeOptions
from saetrain.runs.checkpoint import Best, newest_state
from saetrain.runs.record import RunRecord
from saetrain.tracking.jsonl import METRICS, last_line, sae_metrics


@dataclass(frozen=True)
class FitSummary:
    """What a call of `fit` did."""

    run: str
    steps: int
    """Of the whole run."""
    new_steps: int
    """Done by this call."""
    rows: int
    """Trained on in the whole run."""
    rows_per_second: float
    """In this call, for all SAEs together; 0 when nothing was left to do."""
    bytes_per_second: float
    """Of rows on disk, likewise."""
    data_wait: float
    """Share of the time spent waiting for rows."""
    limit: str | None
    """One sentence: what the limit was, and what would help; None when nothing was left to do."""
    dead_after: int
    """Rows without firing after which a latent is dead."""
    saes: dict[str, dict[str, Any]]
    """Last line of metrics.jsonl, by the SAE's name."""
    held_out: dict[str, dict[str, Any]]
    """Last validation, by the SAE's name; none without --val-every."""
    best: dict[str, Best]
    """With --save-best, each SAE's best validation, by name."""
    warnings: tuple[str, ...]
    """What the user should know."""


def summarize_fit(
    root: Path,
    record: RunRecord,
    stream: ActivationStream,
    tracked: Throughput,
    verify: Verify,
    first_step: int,
    steps: int,
    warnings: tuple[str, ...],
) -> FitSummary:
    """What was done, by the files of a run that has come to its end.

    Args:
        root: folder of the run.
        record: what it is.
        stream: what it was fed from.
        tracked: how long it took.
        verify: when shards were compared with their checksums.
        first_step: steps done before.
        steps: steps done now.
        warnings: what the user should know besides.

    Raises:
        FormatError: metrics.jsonl is missing or damaged.
    """
    line = last_line(root / METRICS, key="saes")
    if line is None:  # a finished run that lost it; one that trained just wrote it
        raise FormatError(f"{root / METRICS} is missing or empty", remedy="restore it from a copy")
    return FitSummary(
        run=str(root),
        steps=steps,
        new_steps=steps - first_step,
        rows=steps * record.plan.batch_size,
        rows_per_second=tracked.rows_per_second,
        bytes_per_second=tracked.rows_per_second * stream.row_bytes,
        data_wait=tracked.data_wait,
        limit=_limit(stream, tracked, verify) if steps > first_step else None,
        dead_after=record.dead_after,
        saes=sae_metrics(root / METRICS, line, [entry.name for entry in record.saes]),
        held_out=(last_line(root / METRICS, key="val") or {"val": {}})["val"],
        best=_bests(root, record),
        warnings=(*warnings, *_ended_early(record, steps)),
    )


@dataclass(frozen=True)
class Throughput:
    """How long a call of `fit` took."""

    seconds: float
    """From its first step to its last line."""
    rows_per_second: float
    data_wait: float
    """Share of the time spent waiting for rows."""


def _limit(stream: ActivationStream, tracked: Throughput, verify: Verify) -> str:
    waits = WaitTimes(
        tracked.seconds, stream.seconds_waited, stream.seconds_to_first, stream.seconds_for_shards
    )
    return bottleneck_message(waits, tracked.rows_per_second * stream.row_bytes, verify)


def _ended_early(record: RunRecord, steps: int) -> tuple[str, ...]:
    """A warning if there were fewer rows than the harvest's goal promised."""
    if steps == record.steps:
        return ()
    falls = any(_falls(entry.options) for entry in record.saes)
    rate = "; the learning rate did not reach its end" if falls else ""
    return (
        f"the run ended after {steps:,} of {record.steps:,} planned steps: the text ended before "
        f"the harvest's goal, or filters dropped rows{rate}",
    )


def _falls(options: SaeOptions) -> bool:
    """Whether the learning rate ends lower than its peak."""
    signum = options.optimizer == "signum"
    return (options.lr_schedule or ("constant" if signum else "linear")) != "constant"


def _bests(root: Path, record: RunRecord) -> dict[str, Best]:
    """Each SAE's best validation, as the newest checkpoint names it."""
    state = newest_state(root)
    saes = () if state is None else state.saes
    named = zip(record.saes, saes, strict=False)
    return {entry.name: sae.best for entry, sae in named if sae.best is not None}


_DATA = 0.3  # of the time spent waiting: from here on, data are the limit
_COMPUTE = 0.1  # up to here, compute is


@dataclass(frozen=True)
class WaitTimes:
    """Where the time of a run went, seconds."""

    all: float
    """From start to end."""
    rows: float
    """Waiting for rows, whatever the reason."""
    first: float
    """Of that, before the first batch: files are compared, and memory is filled."""
    shards: float
    """Of that, for shards of a harvest at work; in whole seconds."""


def bottleneck_message(waits: WaitTimes, bytes_per_second: float, verify: str) -> str:
    """One sentence: what the limit was, and what would help.

    Args:
        waits: where the time went.
        bytes_per_second: that were trained on.
        verify: the option of `fit`.
    """
    share = waits.rows / max(waits.all, 1e-9)
    speed = f"{format_bytes(bytes_per_second)}/s"
    waited = f"{share:.0%} of the time went into waiting for rows, at {speed}"
    if share <= _COMPUTE:
        return (
            f"Compute was the limit ({waited}): a faster device, fewer latents or fewer SAEs at "
            "once would help, a faster disk would not."
        )
    if waits.shards > waits.rows / 2:
        return f"The harvest was the limit ({waited}): this run was waiting for its shards."
    if waits.first > waits.rows / 2:
        spared = "" if verify == "never" else "--verify never after `actcache verify`, "
        return (
            f"The start was the limit ({waited}, most of it before the first step): {spared}"
            "a smaller --buffer-bytes or a longer run would help."
        )
    if share < _DATA:
        return (
            f"Disk and compute kept pace ({waited}): a faster disk helps by that much at most, "
            "then only a faster device."
        )
    return (
        f"The disk was the limit ({waited}): a faster disk, rows of 8 bits (actcache convert "
        "--dtype int8) or more SAEs in one run would help, a faster device would not."
    )
