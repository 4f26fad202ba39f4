"""How rows are read off a disk: none of it can touch their order."""

from __future__ import annotations

from dataclasses import dataclass

from actcache.progress import format_bytes

WHOLE = 1 << 62
"""Bytes of a read that is not cut."""


@dataclass(frozen=True)
class Reading:
    """What `tuning` chooses among."""

    threads: int = 2
    """That read."""
    piece: int = 256 << 10
    """Bytes that one call asks for, at most: while it copies them, the disk goes on."""
    ahead: bool = False
    """Whether the system hears of a window as soon as it is known to be needed."""

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        pieces = "whole blocks" if self.piece == WHOLE else f"{format_bytes(self.piece)} at a time"
        return f"{threads}, {pieces}" + (", announced ahead" if self.ahead else "")


DEFAULT = Reading()
