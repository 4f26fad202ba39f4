"""What processes that share SAEs tell of their steps, put together in the run's one metrics.jsonl.

Every process logs at the same steps, so that its n-th line belongs to everybody else's n-th.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actcache.core.progress import Progress
from saetrain.distributed.process_group import StoreGroup
from saetrain.tracking.jsonl import JsonlTracker, MetricsSink

Figures = Mapping[str, Mapping[str, Any]]


class NullTracker(JsonlTracker):
    """Of a process that tells nothing; its leader does."""

    def __init__(self) -> None:
        self.bar: Progress = _NullProgress("fit", None, "rows", show=False)

    def log(self, step: int, metrics: Figures, waited: float) -> None:
        """Nothing."""

    def log_held_out(self, step: int, figures: Figures, rows: int) -> None:
        """Nothing."""

    @property
    def seconds(self) -> float:
        """Not measured."""
        return 0.0

    def sync(self) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

    def close(self) -> tuple[float, float]:
        """Nothing measured."""
        return 0.0, 0.0


class WorkerTracker(NullTracker):
    """Of a process that tells its leader.

    Args:
        store_group: the processes of the run.
    """

    def __init__(self, store_group: StoreGroup) -> None:
        super().__init__()
        self._peers, self._line = store_group, 0

    def log(self, step: int, metrics: Figures, waited: float) -> None:
        """Tell what was measured of these SAEs."""
        del step, waited
        self._tell(metrics)

    def log_held_out(self, step: int, figures: Figures, rows: int) -> None:
        """Tell what held-out rows say of these SAEs."""
        del step, rows
        self._tell(figures)

    def _tell(self, figures: Figures) -> None:
        self._peers.put(f"line/{self._line}/{self._peers.rank}", json.dumps(figures))
        self._line += 1


class GatheringTracker(JsonlTracker):
    """Of the leader: writes each line once all have told their part of it.

    Args:
        tracker: writes them.
        store_group: the processes of the run.
        names: of all SAEs, in the run's order.
    """

    def __init__(
        self, tracker: JsonlTracker, store_group: StoreGroup, names: Sequence[str]
    ) -> None:
        self._tracker, self._peers, self._names = tracker, store_group, names
        self.bar = tracker.bar
        self._waiting: deque[tuple[Figures, Callable[[Figures], None]]] = deque()
        self._line = 0

    def log(self, step: int, metrics: Figures, waited: float) -> None:
        """Write a line of both files, now or later."""
        self._add(metrics, lambda whole: self._tracker.log(step, whole, waited))

    def log_held_out(self, step: int, figures: Figures, rows: int) -> None:
        """Write a line on held-out rows, now or later."""
        self._add(figures, lambda whole: self._tracker.log_held_out(step, whole, rows))

    @property
    def seconds(self) -> float:
        """From the start to the last line."""
        return self._tracker.seconds

    def sync(self) -> None:
        """Wait for all lines to be told, and make them durable."""
        while self._waiting:
            self._write_first()
        self._tracker.sync()

    @property
    def mirror(self) -> MetricsSink | None:
        """Of the tracker."""
        return self._tracker.mirror

    @mirror.setter
    def mirror(self, mirror: MetricsSink | None) -> None:
        self._tracker.mirror = mirror

    def end(self) -> None:
        """The run has come to its end, and all has been told."""
        self._tracker.end()

    def close(self) -> tuple[float, float]:
        """Close all, as the tracker does."""
        return self._tracker.close()

    def _add(self, ours: Figures, write: Callable[[Figures], None]) -> None:
        self._waiting.append((ours, write))
        while self._waiting and self._peers.has(*self._words()):
            self._write_first()

    def _write_first(self) -> None:
        """Write the first of the lines that wait; waits for whoever has not told its part."""
        ours, write = self._waiting[0]
        told = dict(ours)
        for word in self._words():
            told |= json.loads(self._peers.pop(word))
        self._waiting.popleft()
        self._line += 1
        write({name: told[name] for name in self._names})

    def _words(self) -> list[str]:
        return [f"line/{self._line}/{rank}" for rank in range(1, self._peers.world_size)]


class _NullProgress(Progress):
    """Neither drawn, nor heard."""

    def say(self, text: str) -> None:
        """Nothing."""
