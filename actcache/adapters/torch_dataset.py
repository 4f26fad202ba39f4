"""A feed for torch's `DataLoader`, with or without worker processes.

Each worker reads only its own lanes, so that no row is read twice. Letters: B rows of a global
batch, L lanes, b = B/L, R ranks, W workers of each, D d_in.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from actcache.adapters.feed import Feed
from actcache.adapters.iterators import to_float32
from actcache.errors import ConfigError, RunError
from actcache.stream.order import lanes_of_rank

Rows = torch.Tensor | dict[str, torch.Tensor]
"""Rows of one hookpoint, or of several by name. Each float32 [n, D]"""


class CacheDataset(IterableDataset[Rows]):
    """Complete batches for `DataLoader(dataset, batch_size=None, num_workers=W)`.

    Without workers each item is a batch of this rank, B/R rows. With W workers each item has
    B/(R·W) rows, and W consecutive items have the rows of one batch; `join_parts` restores their
    order. `CacheDataLoader` does all of that.

    A new iteration starts at the state of `load_state_dict`. Workers prefetch, so the dataset
    cannot count the batches that the `DataLoader` returned: count them, and call `state_after`.

    Args:
        feed: the rows; iteration ends after its `epochs`.
        rank: rank of this process.
        world_size: number of processes that share each global batch, R.

    Raises:
        ConfigError: the lanes cannot be divided among the ranks; from iteration, among the workers.
    """

    def __init__(self, feed: Feed, rank: int = 0, world_size: int = 1) -> None:
        self.feed, self.rank, self.world_size = feed, rank, world_size
        self._epoch = self._step = 0
        lanes_of_rank(feed.plan.lanes, rank, world_size)  # raised here instead of in a worker

    def __iter__(self) -> Iterator[Rows]:
        """Yield this worker's shares of the batches, or complete batches without workers."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        self.require_workers(workers)
        stream = self.feed.stream(
            epoch=self._epoch,
            step=self._step,
            # Lanes l with l mod R·W = rank + R·worker: every W-th lane of this rank.
            rank=self.rank + self.world_size * worker,
            world_size=self.world_size * workers,
        )
        with stream:
            for batch in stream:
                rows = to_float32(batch, "cpu")
                yield rows[self.feed.hookpoints[0]] if len(rows) == 1 else rows

    def require_workers(self, workers: int) -> None:
        """Raise `ConfigError` unless the rank's lanes can be divided among the workers."""
        lanes = self.feed.plan.lanes // self.world_size
        if workers and lanes % workers:
            allowed = [n for n in range(1, lanes + 1) if lanes % n == 0]
            raise ConfigError(
                f"{lanes} lanes cannot be divided among {workers} workers",
                expected=f"num_workers 0, {', '.join(map(str, allowed))}",
                got=workers,
                remedy="use one of these; lanes are the batch size's largest divisor up to 64",
            )

    def state_after(self, batches: int) -> dict[str, int]:
        """Return the state after `batches` global batches from this dataset's first one."""
        steps = self.feed.plan.steps_per_epoch
        epoch, step = divmod(self._epoch * steps + self._step + batches, steps)
        return {"epoch": epoch, "step": step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a state of the same feed. Call it before the workers start."""
        self._epoch, self._step = state["epoch"], state["step"]


class CacheDataLoader:
    """Batches of this rank, B/R rows each, read by worker processes; the same for any number.

    The workers run from the first batch until `close`, the end of the feed, or until the loader is
    garbage-collected.

    Args:
        dataset: the rows.
        num_workers: number of worker processes, W; 0: none.
        pin_memory: whether rows are copied to pinned memory, for faster copies to a GPU.

    Raises:
        ConfigError: the lanes cannot be divided among the workers.
    """

    def __init__(
        self, dataset: CacheDataset, num_workers: int = 0, *, pin_memory: bool = False
    ) -> None:
        dataset.require_workers(num_workers)
        self.dataset = dataset
        self._loader: DataLoader[Rows] = DataLoader(
            dataset, batch_size=None, num_workers=num_workers, pin_memory=pin_memory
        )
        self._workers = max(1, num_workers)
        self._parts: Iterator[Rows] | None = None
        self._taken = 0
        self._closed = False

    def __iter__(self) -> CacheDataLoader:
        return self

    def __next__(self) -> Rows:
        """Return the next batch; an error of a worker is raised here."""
        if self._closed:
            raise RunError("the batches are closed", remedy="make new ones from their state")
        if self._parts is None:
            self._parts = iter(self._loader)
        parts = [next(self._parts) for _ in range(self._workers)]
        self._taken += 1
        return join_parts(parts, self.dataset.feed.plan.rows_per_lane_and_batch)

    def close(self) -> None:
        """Stop the workers. Taking another batch is an error afterwards."""
        self._parts, self._closed = None, True

    def state_dict(self) -> dict[str, int]:
        """Return the position of the next batch; valid for any number of workers and ranks."""
        return self.dataset.state_after(self._taken)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a state of the same feed. Only allowed before the first batch."""
        if self._taken:
            raise RunError("the batches have begun", remedy="load the state into new ones")
        self.dataset.load_state_dict(state)


def join_parts(parts: list[Rows], rows_per_lane: int) -> Rows:
    """Join the workers' shares of a batch in the row order of a single process.

    Args:
        parts: shares in the order of the workers. W of [n/W, D]
        rows_per_lane: rows of a lane in a batch, b: the plan's `rows_per_lane_and_batch`.

    Returns:
        The rows, lane after lane. [n, D]
    """
    first = parts[0]
    if isinstance(first, dict):
        return {
            name: _join([part[name] for part in parts if isinstance(part, dict)], rows_per_lane)
            for name in first
        }
    return _join([part for part in parts if isinstance(part, torch.Tensor)], rows_per_lane)


def _join(parts: list[torch.Tensor], b: int) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    lanes = [part.reshape(-1, b, part.shape[1]) for part in parts]  # W of [lanes of a worker, b, D]
    # Worker w has the lanes w, w + W, ...: take the first of each, then the second of each.
    return torch.stack(lanes, dim=1).flatten(0, 2)
