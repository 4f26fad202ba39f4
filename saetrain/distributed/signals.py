"""Signals that ask a run to stop: the first lets it save, a second ends it at once.

SIGTERM is what schedulers send before they take a machine away, and SIGINT is Ctrl-C. Whoever is
stopped so leaves with 128 + the signal's number, 143 and 130: what shells say of a command that a
signal ended, and what `actcache harvest` leaves with.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

REPEAT_WINDOW = 5.0
"""Seconds in which processes of a launcher may hear of a signal again: a scheduler sends it to all
of them, and torchrun passes on what it was sent itself."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class RunStopped(KeyboardInterrupt):
    """A run that was asked to stop, and has saved what it did.

    It is a KeyboardInterrupt, for that is what Ctrl-C raises, and nobody catches it as an error.

    Args:
        signal_: which it was.
        step: steps done, and saved.
    """

    def __init__(self, signal_: signal.Signals, step: int) -> None:
        self.signal, self.step = signal_, step
        self.exit_code = 128 + signal_
        super().__init__(f"{signal_.name}: step {step:,} is saved; --resume goes on from there")


class StopRequested(BaseException):
    """The run stops here, before its next step; what is done is to be saved.

    No error either, so that nobody who waits for rows takes it for one.

    Args:
        signal_: which asked for it.
    """

    def __init__(self, signal_: signal.Signals) -> None:
        self.signal = signal_
        super().__init__(signal_.name)


class StopSignals:
    """Hears signals from `listen` on, until the context is left.

    Before that they do what they did, for there is nothing to save. So they do in threads other
    than the main one, which Python does not let listen.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The signal that asked to stop, if one has."""
        self.repeat_window = 0.0
        """Seconds in which further signals are the first one again."""
        self.announces = True
        """Whether a signal is answered with a line on stderr."""
        self._before: dict[signal.Signals, Any] = {}
        self._until = 0.0

    def install(self) -> None:
        """From now on there is something to save. May be called again."""
        if self._before or self.received is not None:
            return
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if before not in (None, signal.SIG_IGN):  # as under nohup, or `&` in a script
                self._before[number] = before
                signal.signal(number, self._handle)

    def ignore_further(self) -> None:
        """All is saved: who leaves last must not mind that the launcher ends who is still there."""
        self._until = float("inf")

    def __enter__(self) -> StopSignals:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._uninstall()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None:
            if now >= self._until:  # a second one, of either kind, ends the run as without us
                self._uninstall()
                signal.raise_signal(number)
            return
        self.received, self._until = signal.Signals(number), now + self.repeat_window
        if self.announces:
            # Not print: the signal may have come in the middle of one.
            text = f"\nfit: {self.received.name}: saving at the next step; once more ends at once\n"
            with suppress(OSError):  # nobody may be left to read it
                os.write(2, text.encode())

    def _uninstall(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
