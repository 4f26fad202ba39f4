"""Gathering of the ranks' metrics on rank 0, into one metrics.jsonl, for `--parallel modules`.

Every rank logs at the same steps, so the n-th line of one rank belongs to the n-th of all others.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from actcache.core.progress import Progress
from actcache.filesystem.atomic import FileDigest
from saetrain.distributed.process_group import StoreGroup
from saetrain.tracking.jsonl import JsonlTracker

Metrics = Mapping[str, Mapping[str, Any]]
"""By the SAE's name, values by the metric's name."""
TrackerArgs = tuple[Path, int, int, int, int]
"""Arguments of `JsonlTracker`."""


class NullTracker(JsonlTracker):
    """Tracker that discards everything: of a rank whose metrics rank 0 writes."""

    def __init__(self) -> None:
        self.bar: Progress = _NullProgress("fit", None, "rows", show=False)

    def log(self, step: int, metrics: Metrics, waited: float) -> None:
        """Discard a line."""

    def log_held_out(self, step: int, figures: Metrics, rows: int) -> None:
        """Discard a line on held-out rows."""

    seconds = rows_per_second = 0.0  # nothing is measured

    def sync(self) -> None:
        """Return at once: no line is pending."""

    def metrics_digest(self) -> FileDigest:
        """Return the digest of no line."""
        return FileDigest(0, xxhash.xxh3_128().hexdigest())

    def end(self) -> None:
        """Return at once: nothing is open."""

    def close(self) -> None:
        """Return at once: nothing is open."""


class WorkerTracker(NullTracker):
    """Tracker that sends the metrics of this rank's SAEs to rank 0.

    Args:
        group: the processes of the run.
    """

    def __init__(self, group: StoreGroup) -> None:
        super().__init__()
        self._group, self._line = group, 0

    def log(self, step: int, metrics: Metrics, waited: float) -> None:
        """Send the metrics of a line."""
        del step, waited
        self._send(metrics)

    def log_held_out(self, step: int, figures: Metrics, rows: int) -> None:
        """Send the metrics of a line on held-out rows."""
        del step, rows
        self._send(figures)

    def _send(self, metrics: Metrics) -> None:
        self._group.put(f"line/{self._line}/{self._group.rank}", json.dumps(metrics))
        self._line += 1


class GatheringTracker(JsonlTracker):
    """Tracker of rank 0: writes each line once all ranks have sent their part of it.

    Args:
        args: arguments of `JsonlTracker`.
        group: the processes of the run.
        names: names of all SAEs, in the run's order.
    """

    def __init__(self, args: TrackerArgs, group: StoreGroup, names: Sequence[str]) -> None:
        super().__init__(*args)
        self._group, self._names = group, names
        self._pending: deque[tuple[Metrics, Callable[[Metrics], None]]] = deque()
        self._line = 0

    def log(self, step: int, metrics: Metrics, waited: float) -> None:
        """Queue a line of both files, and write all lines that are complete."""
        write = super().log
        self._add(metrics, lambda whole: write(step, whole, waited))

    def log_held_out(self, step: int, figures: Metrics, rows: int) -> None:
        """Queue a line on held-out rows, and write all lines that are complete."""
        write = super().log_held_out
        self._add(figures, lambda whole: write(step, whole, rows))

    def sync(self) -> None:
        """Wait for the ranks' parts of all queued lines, write them, and fsync."""
        while self._pending:
            self._write_first()
        super().sync()

    def _add(self, own: Metrics, write: Callable[[Metrics], None]) -> None:
        self._pending.append((own, write))
        while self._pending and self._group.has(*self._keys()):
            self._write_first()

    def _write_first(self) -> None:
        """Write the first queued line; wait for ranks that have not sent their part."""
        own, write = self._pending[0]
        gathered = dict(own)
        for key in self._keys():
            gathered |= json.loads(self._group.pop(key))
        self._pending.popleft()
        self._line += 1
        write({name: gathered[name] for name in self._names})

    def _keys(self) -> list[str]:
        return [f"line/{self._line}/{rank}" for rank in range(1, self._group.world_size)]


class _NullProgress(Progress):
    """Progress bar that prints nothing."""

    def print_line(self, text: str) -> None:
        """Discard a line."""
