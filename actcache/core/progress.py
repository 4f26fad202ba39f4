"""Progress bars, drawn on a terminal only, and sizes formatted for people."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from actcache.core.terminal import escape_controls

MINUTE = 60.0
"""Seconds between two lines about one wait."""


class _Bar(tqdm):  # type: ignore[misc]
    """A bar without the thread that would redraw it between two updates."""

    monitor_interval = 0


class Progress:
    """A tqdm bar with amount, rate, time left, and bytes per second if bytes are reported.

    Args:
        what: label of the bar.
        total: number of units; None if unknown.
        unit: name of a unit.
        initial: units done before.
        show: draw the bar; by default if stderr is a terminal.
    """

    def __init__(
        self, what: str, total: int | None, unit: str, *, initial: int = 0, show: bool | None = None
    ) -> None:
        show = sys.stderr is not None and sys.stderr.isatty() if show is None else show
        self._what = what
        self._bytes = 0
        self._began = time.monotonic()
        self._next_line = 0.0  # when a wait is printed again
        self._bar: Any = _Bar(
            desc=what,
            total=total,
            initial=initial,
            unit=f" {unit}",
            unit_scale=True,
            disable=not show,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def advance(self, units: int, written: int = 0, **notes: object) -> None:
        """Add units done and bytes written; show `notes` at the end of the bar."""
        self._bytes += written
        if self._bytes:
            rate = self._bytes / max(time.monotonic() - self._began, 1e-9)
            notes["disk"] = f"{format_bytes(rate)}/s"
        if notes:
            self._bar.set_postfix(notes, refresh=False)
        self._bar.update(units)

    def wait(self, what: str, *, begins: bool) -> None:
        """Show a wait at the end of the bar; without one, print it at its begin and each minute."""
        if not self._bar.disable:
            self._bar.set_postfix_str(escape_controls(what))
        elif begins or time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + MINUTE
            self.print_line(f"{self._what}: {what}")

    def print_line(self, text: str) -> None:
        """Print a line on stderr, above the bar if there is one."""
        if sys.stderr is not None:
            tqdm.write(escape_controls(text), file=sys.stderr)

    def close(self) -> None:
        """Leave the finished bar on the screen."""
        self._bar.close()


def format_bytes(size: float) -> str:
    """Format a size with three digits and a decimal unit, such as '235 MB'."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"
