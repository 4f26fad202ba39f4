"""Progress: a bar on a terminal, lines without one; and sizes formatted for people.

Without a terminal, as in the log of a batch job, work of more than `QUIET` seconds prints a line at
each tenth, not more often than every `QUIET` seconds, and at least one a minute, such as

    harvest: 1.2M of 12M tok (10%), 34.1k tok/s, 5 min left

The time is read when progress is reported. A command also runs a heartbeat, which prints a
line in each minute without one: while a model is downloaded, or a single item takes long.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from actcache.core.terminal import escape_controls

MINUTE = 60.0
"""Seconds between two lines, at most."""
QUIET = 10.0
"""Seconds between two lines, at least; and before the first one."""

_open = weakref.WeakValueDictionary[int, "Progress"]()  # work that prints lines, in its order
_numbers = itertools.count()
_last_line = -MINUTE  # when the last line about any work was printed


class _Bar(tqdm):  # type: ignore[misc]
    """A bar without the thread that would redraw it between two updates."""

    monitor_interval = 0


class Progress:
    """A tqdm bar with amount, rate, time left, and bytes per second; without a terminal, lines.

    Args:
        what: label of the bar.
        total: number of units; None if unknown.
        unit: name of a unit; B: bytes.
        initial: units done before.
        show: draw the bar; by default if stderr is a terminal. False: print no lines either.
    """

    def __init__(
        self, what: str, total: int | None, unit: str, *, initial: int = 0, show: bool | None = None
    ) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = self._initial = initial
        self._number, self._bytes = next(_numbers), 0
        self._notes: dict[str, object] = {}
        self._waits_for = ""
        self._began = time.monotonic()
        self._next_line, self._next_tenth = self._began + QUIET, 0.0
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar: Any = _Bar(
            desc=what,
            total=total,
            initial=initial,
            unit=f" {unit}",
            unit_scale=True,
            disable=not (on_terminal if show is None else show),
            file=sys.stderr,
            dynamic_ncols=True,
        )
        is_first = os.environ.get("RANK", "0") == "0"  # of torchrun
        self._prints = show is None and not on_terminal and is_first
        if self._prints:
            _open[self._number] = self

    def advance(self, units: int, written: int = 0, **notes: object) -> None:
        """Add units done and bytes written; show `notes` at the end of the bar, or of lines."""
        self._done, self._waits_for = self._done + units, ""
        self._bytes += written
        self._notes |= notes
        if not self._bar.disable:
            if self._bytes:
                rate = self._bytes / max(time.monotonic() - self._began, 1e-9)
                notes["disk"] = f"{format_bytes(rate)}/s"
            if notes:
                self._bar.set_postfix(notes, refresh=False)
            self._bar.update(units)
        elif self._prints and (now := time.monotonic()) >= self._next_line:
            self._print_if_due(now)

    def _print_if_due(self, now: float) -> None:
        """Print a line at the next tenth, or a minute after the last line of any work."""
        if now < _last_line + QUIET:
            return
        tenth = self._done >= self._next_tenth * (self._total or 1)
        if tenth or now >= max(self._began, _last_line) + MINUTE:
            self._print_state(self.describe(now))
            done = 10 * self._done // self._total if self._total else math.inf
            self._next_line, self._next_tenth = now + QUIET, (done + 1) / 10

    def describe(self, now: float) -> str:
        """Return what is done, of how much, at what rate, and the time left; or what it waits for.

        Args:
            now: the time.
        """
        if self._waits_for:
            return f"{self._what}: {self._waits_for}"
        is_bytes = self._unit == "B"
        unit = "" if is_bytes else f" {self._unit}"
        size = format_bytes if is_bytes else format_count
        seconds = now - self._began
        rate = (self._done - self._initial) / max(seconds, 1e-9)
        text = f"{self._what}: {size(self._done)}"
        if self._total:
            text += f" of {size(self._total)}{unit} ({self._done / self._total:.0%})"
        else:
            text += unit
        if rate > 0:
            text += f", {size(rate)}{unit}/s"
            if self._total:
                left = max(0, self._total - self._done) / rate
                text += f", {format_duration(left)} left"
        elif seconds >= 1:
            text += f", nothing yet after {format_duration(seconds)}"
        return ", ".join([text, *(f"{name} {note}" for name, note in list(self._notes.items()))])

    def wait(self, what: str, *, begins: bool) -> None:
        """Show a wait at the end of the bar; without one, print it at its start and each minute."""
        self._waits_for = what
        if not self._bar.disable:
            self._bar.set_postfix_str(escape_controls(what))
        elif begins or time.monotonic() >= _last_line + MINUTE:
            self._print_state(f"{self._what}: {what}")

    def _print_state(self, text: str) -> None:
        """Print a line on the state of the work; the heartbeat then prints none for a minute."""
        global _last_line
        _last_line = time.monotonic()
        self.print_line(text)

    def print_line(self, text: str) -> None:
        """Print a line on stderr, above the bar if there is one."""
        if sys.stderr is not None:
            tqdm.write(escape_controls(text), file=sys.stderr)

    def close(self) -> None:
        """Close the bar, which stays on the screen."""
        _open.pop(self._number, None)
        self._bar.close()


@contextmanager
def heartbeat(what: str) -> Iterator[None]:
    """Print a line on stderr in each minute in which no `Progress` prints one.

    It shows the state of the innermost work or, before and after all work, how long the command has
    run. Nothing is printed on a terminal, or by ranks other than 0.

    Args:
        what: name of the command.
    """
    stream, ends, began = sys.stderr, threading.Event(), time.monotonic()

    def beat() -> None:
        while not ends.wait(max(0.0, max(began, _last_line) + MINUTE - time.monotonic())):
            print_heartbeat(what, began, stream)

    if stream is None or stream.isatty() or os.environ.get("RANK", "0") != "0":  # of torchrun
        yield
        return
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join(timeout=1)  # its line may wait for the reader of a pipe


def print_heartbeat(what: str, began: float, stream: TextIO) -> None:
    """Print the state of the innermost work, unless a line was printed in the last minute."""
    global _last_line
    now = time.monotonic()
    if now < max(began, _last_line) + MINUTE:
        return
    _last_line = now
    work = [work for found in _open.valuerefs() if (work := found()) is not None][-1:]  # a copy
    text = work[0].describe(now) if work else f"{what}: at work for {format_duration(now - began)}"
    print(escape_controls(text), file=stream, flush=True)


def format_count(number: float) -> str:
    """Format a number with up to three digits and a decimal factor, such as '1.2M'."""
    for factor in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5:
            return f"{number:.3g}{factor}"
        number /= 1000
    return f"{number:.3g}P"


def format_duration(seconds: float) -> str:
    """Format a time in its largest unit, such as '5 min'."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            number = seconds / size
            return f"{f'{number:.1f}'.removesuffix('.0') if number < 10 else round(number)} {unit}"
    return f"{seconds:.0f} s"


def format_bytes(size: float) -> str:
    """Format a size with three digits and a decimal unit, such as '235 MB'."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"
