"""Reports of local files whose reading or writing takes long, on a disk or share that hangs.

A thread that may wait for a disk writes file and time into `READING` or `WRITING` before each call
of the operating system, and removes the entry afterwards. It makes no call of ours for it, since
rows are read in thousands of pieces. Another thread calls `report_slow_reads` now and then.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from actcache.errors import quote_name

FIRST_NOTICE, NEXT_NOTICE = 10.0, 60.0
"""Seconds after which a read is reported, and between further reports."""

READING: dict[int, tuple[float, Path]] = {}
"""Beginning, by `time.monotonic`, and file of each thread's read, by `threading.get_ident`."""
WRITING: dict[int, tuple[float, Path]] = {}
"""The same of each thread's write."""

_next_report = 0.0


def _forget() -> None:
    READING.clear()
    WRITING.clear()


os.register_at_fork(after_in_child=_forget)  # which has no such threads


def report_slow_reads() -> None:
    """Print the file that a thread has waited for longest, if a report is due."""
    global _next_report
    now = time.monotonic()
    waits = [*READING.values(), *WRITING.values()]
    slow = [(began, path) for began, path in waits if now - began >= FIRST_NOTICE]
    if not slow:
        _next_report = 0.0
    if not slow or now < _next_report or sys.stderr is None:
        return
    _next_report = now + NEXT_NOTICE
    began, path = min(slow)
    others = len({path for _, path in slow}) - 1
    more = f" and {others} more" if others else ""
    text = f"waiting for the disk: {quote_name(str(path))}{more} since {now - began:.0f} s"
    print(text, file=sys.stderr, flush=True)  # noqa: T201
