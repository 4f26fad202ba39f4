"""State of a run on its way from the options to its end: what is trained, from where, and how far.

`launch` fills it in, `train` works on it, and the summary reads its result.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from actcache.cache.reader import Cache
from saetrain.runs.record import RunRecord
from saetrain.runs.segments import SegmentTracker
from saetrain.training.health import Watch
from saetrain.training.sae_trainer import SaeTrainer
from saetrain.training.validation import Validation


@dataclass
class RunState:
    """A run between its start and its training: its record, and the objects built for it."""

    record: RunRecord
    cache: Cache
    """The cache, cut off after the last extension that the run uses."""
    device: torch.device
    """Device of this process."""
    resumed: bool = False
    """Whether the run was started by an earlier call."""
    changes: tuple[str, ...] = ()
    """On rank 0, what has changed since the run was last started."""
    warnings: tuple[str, ...] = ()
    """On rank 0, warnings of the start."""
    replaces: bool = False
    """Whether a run that made no step is removed from the folder before this one is recorded."""

    step: int = 0
    """Steps done before this call."""
    stream_state: dict[str, int] = field(default_factory=dict)
    """State of the stream in the restored checkpoint; empty at step 0."""
    restore_warnings: tuple[str, ...] = ()
    """On rank 0, a warning if a newer checkpoint is damaged."""
    trainers: list[SaeTrainer] = field(default_factory=list)
    """The SAEs that this process trains."""
    segment_tracker: SegmentTracker | None = None
    """With --follow, the segments of the harvest."""
    validation: Validation | None = None
    """Held-out rows, if this process validates."""
    watch: Watch | None = None
    """On rank 0, from the first step of this call on, the signs that the run goes wrong."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a call of `train`."""

    steps: int
    """Steps of the whole run."""
    rows_per_second: float
    """Rows per second of this call."""
    bytes_per_second: float
    """Bytes per second of rows on disk, likewise."""
    data_wait: float
    """Share of the time spent waiting for rows, for any reason."""
    first_wait: float
    """Share before the first batch: verification, and filling the buffer."""
    shard_wait: float
    """Share spent on shards that a harvest had not written yet."""
