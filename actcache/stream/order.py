"""The order of training rows: a pure function of (plan, epoch, step).

Nothing here reads a file or keeps state. An epoch works like this:

1. The plan's blocks (runs of `block_rows` rows of one shard) are permuted and concatenated. Rows
   that the plan leaves out are missing from their blocks, which keep their numbers.
2. That line of R rows is cut into L equal lanes; fewer than L rows are left over.
3. In each lane, consecutive windows of rows are permuted within themselves. Lane l's first window
   is (l + 1)/L of a window long, so that windows do not all turn over at the same step.
4. Global batch t takes rows [t·b, (t + 1)·b) of every lane, b = B/L, lane after lane.
5. Rank r of W reads the lanes with l mod W = r: the global batch is the same for every W.

The position of a row on the line is its virtual row. `batch_rows` is the slow reference for the
whole rule; `ActivationStream` must agree with it row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from actcache.core import rng
from actcache.core.json_codec import NOT_SERIALIZED
from actcache.errors import ConfigError, EmptyCacheError, FormatError

POOL_ROWS = 2**19
"""Default number of rows held in memory over all lanes."""

MAX_LANES = 64

Rows = NDArray[np.int64]
RowsLeftOut = Mapping[int, Rows]
"""Rows that are left out, by shard: numbers within the shard, ascending."""


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one shard."""

    shard: int
    start: int
    rows: int


@dataclass(frozen=True)
class OrderPlan:
    """Settings that determine the order, besides epoch and step; recorded in run.json."""

    shards: tuple[tuple[int, ...], ...]
    """(shard, rows) for every training shard."""
    block_rows: int
    """Rows of a block."""
    batch_size: int
    """Rows of a global batch, B."""
    lanes: int
    """Lanes, L: a divisor of B."""
    window: int
    """Rows of a lane's window."""
    seed: int
    """Seed of all permutations."""
    left_out: RowsLeftOut = field(
        default_factory=dict, metadata=NOT_SERIALIZED, compare=False, repr=False
    )
    """Rows of these shards that no batch has. run.json records the rule that they follow from."""

    def __post_init__(self) -> None:
        """Check ranges, since a plan may come from a file."""
        low = min(self.block_rows, self.batch_size, self.lanes, self.window)
        if low < 1 or not 0 <= self.seed < 2**32 or self.batch_size % self.lanes:
            raise FormatError("a plan with numbers out of range", got=self)
        pairs = all(len(pair) == 2 and min(pair) >= 0 for pair in self.shards)
        if not pairs or not self.batch_size <= self.rows:
            raise FormatError("a plan with fewer rows than one batch", got=self)

    @cached_property
    def rows(self) -> int:
        """Rows of the training shards without those left out, R."""
        return kept_rows(self.shards, self.left_out)

    @property
    def lane_rows(self) -> int:
        """Rows of a lane."""
        return self.rows // self.lanes

    @property
    def rows_per_lane_and_batch(self) -> int:
        """Rows that a batch takes from each lane, b."""
        return self.batch_size // self.lanes

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return self.lane_rows // self.rows_per_lane_and_batch


def make_plan(
    shards: Sequence[tuple[int, int]],
    block_rows: int,
    batch_size: int,
    seed: int,
    pool_rows: int = POOL_ROWS,
    left_out: RowsLeftOut | None = None,
) -> OrderPlan:
    """Choose lanes and window from the batch size and the rows to hold in memory.

    Args:
        shards: (shard, rows) for every training shard.
        block_rows: rows of a block, from the manifest.
        batch_size: rows of a global batch.
        seed: seed of all permutations.
        pool_rows: rows to hold in memory.
        left_out: rows of these shards that no batch has.

    Raises:
        ConfigError: the batch is larger than the rows.
    """
    left_out = left_out or {}
    rows = kept_rows(shards, left_out)
    if batch_size > rows:
        raise ConfigError(
            "the batch is larger than the rows to train on",
            expected=f"--batch-size <= {rows:,}",
            got=f"{batch_size:,}",
            remedy="take a smaller batch or harvest more tokens",
        )
    if batch_size < 1:
        raise ConfigError("--batch-size is too small", expected=">= 1", got=batch_size)
    lanes = default_lanes(batch_size)
    window = max(1, min(pool_rows // lanes, rows // lanes))
    pairs = tuple((s, n) for s, n in shards)
    return OrderPlan(pairs, block_rows, batch_size, lanes, window, seed, left_out)


def kept_rows(shards: Sequence[tuple[int, ...]], left_out: RowsLeftOut) -> int:
    """Count the rows of shards, pairs (shard, rows), without those left out."""
    return sum(rows - len(left_out.get(shard, ())) for shard, rows in shards)


def default_lanes(batch_size: int) -> int:
    """Return the lanes of a plan, L: the largest divisor of B up to 64."""
    return max(n for n in range(1, MAX_LANES + 1) if batch_size % n == 0)


def held_out_rule(val_fraction: float, seed: int) -> tuple[int, int] | None:
    """Return (modulus, residue) of held-out shards: s ≡ h mod round(1/f), h 0 or 1 by seed.

    Return None if no shard is held out.

    Raises:
        ConfigError: the fraction is not in [0, 0.5].
    """
    if val_fraction and not 1e-6 <= val_fraction <= 0.5:
        raise ConfigError(
            "--val-fraction is out of range", expected="0 (none), or 1e-6 to 0.5", got=val_fraction
        )
    if val_fraction == 0:
        return None
    return max(2, round(1 / val_fraction)), int(rng.stream("held-out", seed).randint(2))


def split_shards(
    shards: Sequence[int], val_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Split shards into those to train on and those held out by `held_out_rule`.

    At least one shard is held out of two or more, and the split of existing shards does not change
    when the cache grows.

    Raises:
        ConfigError: the fraction is not in [0, 0.5].
        EmptyCacheError: there are too few shards to split.
    """
    rule = held_out_rule(val_fraction, seed)
    if rule is None:
        return list(shards), []
    if len(shards) < 2:
        raise EmptyCacheError(
            "a cache of one shard cannot be split: whole shards are held out",
            expected="2 shards or more",
            got=len(shards),
            remedy="harvest more, or with a smaller --shard-size; or fit with --val-fraction 0",
        )
    modulus, residue = rule
    held_out = [s for s in shards if s % modulus == residue] or [shards[residue]]
    training = [s for s in shards if s not in set(held_out)]
    if not training:  # possible while a harvest is unfinished
        raise EmptyCacheError(
            "all published shards would be held out",
            expected="a shard to train on",
            got=f"shards {', '.join(map(str, shards))}",
            remedy="finish the harvest, or fit with a smaller --val-fraction",
        )
    return training, held_out


def kept_spans(
    shard: int, first: int, start: int, rows: int, left_out: RowsLeftOut
) -> Iterator[Span]:
    """Yield the spans of consecutive kept rows of a shard.

    Args:
        shard: number of the shard.
        first: row of the shard from which kept rows are counted.
        start: number of the first kept row.
        rows: number of kept rows.
        left_out: rows that are left out.
    """
    holes = left_out.get(shard)
    if holes is None:
        if rows:
            yield Span(shard, first + start, rows)
        return
    holes = holes[holes.searchsorted(first) :]
    before = holes - first - np.arange(len(holes))  # kept rows before each hole, from `first` on
    while rows:
        passed = int(before.searchsorted(start, side="right"))
        take = min(rows, int(before[passed]) - start) if passed < len(before) else rows
        yield Span(shard, first + start + passed, take)
        start, rows = start + take, rows - take


class Epoch:
    """The permuted line of blocks of one epoch (step 1 of the rule), and its windows."""

    def __init__(self, plan: OrderPlan, epoch: int) -> None:
        self.plan, self.epoch = plan, epoch
        # Blocks are numbered shard after shard. Only a block's number and its end on the line are
        # kept, 16 bytes: a large cache has tens of millions.
        shards = np.array([pair for pair in plan.shards if pair[1]], dtype=np.int64)  # [S, 2]
        self._shards, rows = shards[:, 0], shards[:, 1]
        whole, rest = np.divmod(rows - 1, plan.block_rows)  # full blocks before a shard's last one
        last = (whole + 1).cumsum() - 1
        sizes = np.full(last[-1] + 1, plan.block_rows, dtype=np.int64)  # [blocks]
        sizes[last] = rest + 1
        self._first = last - whole  # each shard's first block [S]
        for shard, first in zip(self._shards, self._first, strict=True):
            if (holes := plan.left_out.get(int(shard))) is not None:
                blocks, count = np.unique(holes // plan.block_rows, return_counts=True)
                sizes[first + blocks] -= count
        self._blocks: Rows = rng.stream("blocks", plan.seed, epoch).permutation(len(sizes))
        self._ends: Rows = sizes[self._blocks]
        np.cumsum(self._ends, out=self._ends)

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """Yield the spans that hold virtual rows [start, stop), in order."""
        index = int(self._ends.searchsorted(start, side="right"))
        begin = int(self._ends[index - 1]) if index else 0
        while start < stop:
            block, end = int(self._blocks[index]), int(self._ends[index])
            shard = int(self._first.searchsorted(block, side="right")) - 1
            row = (block - int(self._first[shard])) * self.plan.block_rows
            take = min(end, stop) - start
            yield from kept_spans(
                int(self._shards[shard]), row, start - begin, take, self.plan.left_out
            )
            start, begin, index = start + take, end, index + 1

    def window(self, lane: int, number: int) -> tuple[int, int]:
        """Return the rows [start, stop) of a lane that form one of its windows."""
        plan = self.plan
        first = max(1, plan.window * (lane + 1) // plan.lanes)
        start = 0 if number == 0 else first + (number - 1) * plan.window
        return min(start, plan.lane_rows), min(first + number * plan.window, plan.lane_rows)

    def window_at(self, lane: int, row: int) -> int:
        """Return the number of the window that holds a row of a lane."""
        first = max(1, self.plan.window * (lane + 1) // self.plan.lanes)
        return 0 if row < first else 1 + (row - first) // self.plan.window

    def permutation(self, lane: int, number: int) -> Rows:
        """Return the permutation in which the rows of a window are read. [rows of the window]"""
        start, stop = self.window(lane, number)
        return rng.permutation(stop - start, "window", self.plan.seed, self.epoch, lane, number)


class SequentialEpoch(Epoch):
    """An epoch of a plan whose windows are single rows, read in longer windows.

    A window of one row leaves the order of its lane unchanged. So do longer windows whose rows are
    not permuted, and they need fewer read calls.

    Args:
        plan: a plan with windows of one row.
        epoch: number of the epoch.
        window: rows of the windows to read.
    """

    def __init__(self, plan: OrderPlan, epoch: int, window: int) -> None:
        super().__init__(replace(plan, window=window), epoch)

    def permutation(self, lane: int, number: int) -> Rows:
        """Return the identity permutation of a window."""
        start, stop = self.window(lane, number)
        return np.arange(stop - start)


def lanes_of_rank(lanes: int, rank: int, world_size: int) -> list[int]:
    """Return the lanes that one rank reads.

    Raises:
        ConfigError: the lanes cannot be divided evenly.
    """
    if lanes % world_size:
        divisors = [n for n in range(1, lanes + 1) if lanes % n == 0]
        raise ConfigError(
            f"{lanes} lanes cannot be divided among {world_size} processes",
            expected=f"{', '.join(map(str, divisors))} processes",
            remedy="use another number of processes or another --batch-size",
        )
    return list(range(rank, lanes, world_size))


def batch_rows(plan: OrderPlan, epoch: int, step: int) -> Rows:
    """Compute the addresses of a global batch by the rule. [B, 2] of (shard, row in shard)."""
    line = Epoch(plan, epoch)
    addresses = []
    b = plan.rows_per_lane_and_batch
    for lane in range(plan.lanes):
        for row in range(step * b, (step + 1) * b):
            number = line.window_at(lane, row)
            start, _ = line.window(lane, number)
            row_in_window = int(line.permutation(lane, number)[row - start])
            virtual = lane * plan.lane_rows + start + row_in_window
            (span,) = line.spans(virtual, virtual + 1)
            addresses.append((span.shard, span.start))
    return np.array(addresses, dtype=np.int64)
