"""Which sequences each shard holds: arithmetic over the harvest's goal and its extensions.

A harvest has parts: the first, and one for each extension. Shards and sequences are numbered
through all of them, and shards are full but for the last of each part: it is short where the part's
goal made it so, and stays as it is when a later part goes on. Nothing here reads a file.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice, pairwise
from typing import TypeVar

from actcache.errors import FormatError

T = TypeVar("T")


@dataclass(frozen=True)
class ShardRange:
    """Consecutive shards that were planned at once."""

    first_shard: int
    """Number of its first shard."""
    first_sequence: int
    """Number of its first sequence."""
    goal: int | None
    """Sequences of the whole harvest when this part is done; None: all of the text."""


@dataclass(frozen=True)
class ShardPlan:
    """All parts of a harvest, each going on where the one before reached its goal."""

    size: int
    """Sequences in a full shard."""
    parts: tuple[ShardRange, ...]

    def __post_init__(self) -> None:
        """Check that the parts join; they come from files."""
        first, *rest = self.parts
        assert (first.first_shard, first.first_sequence) == (0, 0)
        for part in self.parts:
            if part.goal is not None and part.goal <= part.first_sequence:
                raise FormatError(
                    "a goal that is no further than the part's first sequence",
                    expected=f"> {part.first_sequence}",
                    got=part.goal,
                )
        for before, part in pairwise([first, *rest]):
            if before.goal is None:
                raise FormatError("a part after all of the text", got=part)
            begin = (before.first_shard + self._full(before, before.goal), before.goal)
            if (part.first_shard, part.first_sequence) != begin:
                raise FormatError(
                    "a part that does not begin where the one before it ends",
                    expected=f"shard {begin[0]}, sequence {begin[1]}",
                    got=f"shard {part.first_shard}, sequence {part.first_sequence}",
                )

    @property
    def goal(self) -> int | None:
        """Sequences in all; None: all of the text."""
        return self.parts[-1].goal

    @property
    def shards(self) -> int | None:
        """Shards in all, if the text has that many; None: that is not known."""
        return None if self.goal is None else self.shards_of(self.goal)

    def shards_of(self, sequences: int) -> int:
        """How many shards hold the first `iter_sequences` sequences."""
        part = self.parts[bisect_right(self.parts, sequences, key=lambda p: p.first_sequence) - 1]
        return part.first_shard + self._full(part, sequences)

    def first_sequence(self, shard: int) -> int:
        """Number of a shard's first sequence."""
        part = self.parts[self.part_of(shard)]
        return part.first_sequence + (shard - part.first_shard) * self.size

    def max_sequences(self, shard: int) -> int:
        """Sequences that a shard holds if the text does not end before; 0 beyond the plan."""
        goal = self.parts[self.part_of(shard)].goal
        if goal is None:
            return self.size
        return max(0, min(self.size, goal - self.first_sequence(shard)))

    def is_in_last_range(self, shard: int) -> bool:
        """Whether the text may have ended in a shard: only in the last part."""
        return self.part_of(shard) == len(self.parts) - 1

    def part_of(self, shard: int) -> int:
        """Which part a shard belongs to, counted from 0."""
        return bisect_right(self.parts, shard, key=lambda p: p.first_shard) - 1

    def extended(self, goal: int | None) -> ShardPlan:
        """This plan with one more part, up to a larger goal."""
        assert self.shards is not None
        assert self.goal is not None
        return ShardPlan(self.size, (*self.parts, ShardRange(self.shards, self.goal, goal)))

    def iter_shards(self, sequences: Iterator[T], part: int = 0) -> Iterator[tuple[int, list[T]]]:
        """(shard, its sequences), up to the goal or the end of the text.

        Args:
            sequences: those from the part's first on; no more are taken than there are planned.
            part: where to begin.
        """
        for shard in count(self.parts[part].first_shard):
            most = self.max_sequences(shard)
            group = list(islice(sequences, most))
            if group:
                yield shard, group
            if not most or len(group) < most:
                return

    def _full(self, part: ShardRange, sequences: int) -> int:
        """How many shards of a part hold the harvest's first `iter_sequences` sequences."""
        return -(-(sequences - part.first_sequence) // self.size)
