"""Signals that stop a run: the first one requests a checkpoint, a second one ends it at once.

Schedulers send SIGTERM before they take a machine away, and Ctrl-C sends SIGINT. A stopped run
exits with 128 + the signal's number, 143 and 130, as shells report a command that a signal ended;
`actcache harvest` does the same.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from actcache.core.watchdog import mark_handled

REPEAT_WINDOW = 5.0
"""Seconds in which a signal may reach a process under torchrun twice: a scheduler signals all
processes, and torchrun forwards its own signal to them."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class RunStopped(KeyboardInterrupt):
    """A signal has stopped the run, and its steps are saved.

    Subclasses KeyboardInterrupt, which Ctrl-C raises and `except Exception` does not catch.

    Args:
        signal_: the signal.
        step: steps done, and saved.
    """

    def __init__(self, signal_: signal.Signals, step: int) -> None:
        self.signal, self.step = signal_, step
        self.exit_code = 128 + signal_
        super().__init__(f"{signal_.name}: step {step:,} is saved; --resume continues from it")


class StopRequested(BaseException):
    """The run is to stop before its next step, and to save the steps done.

    Subclasses BaseException so that `except Exception` handlers around reads do not swallow it.

    Args:
        signal_: the signal that requests it.
    """

    def __init__(self, signal_: signal.Signals) -> None:
        self.signal = signal_
        super().__init__(signal_.name)


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of an exception: its `exit_code`, else 130 for Ctrl-C, else 1."""
    return int(getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1))


class StopSignals:
    """Handlers of SIGTERM and SIGINT, from `install` until the context is left.

    Before that the signals keep their effect: there is nothing to save. Outside the main thread,
    where Python forbids handlers, they always do.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal, if one has been received."""
        self.repeat_window = 0.0
        """Seconds after the first signal in which further ones count as the same."""
        self.announces = True
        """Whether the handler prints a line to stderr."""
        self._previous: dict[signal.Signals, Any] = {}
        self._ignored_until = 0.0

    def install(self) -> None:
        """Install the handlers, unless they are installed or a signal has been received."""
        if self._previous or self.received is not None:
            return
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            previous = signal.getsignal(number)
            if previous not in (None, signal.SIG_IGN):  # as under nohup, or `&` in a script
                self._previous[number] = previous
                signal.signal(number, self._handle)

    def ignore_further(self) -> None:
        """Ignore all signals from now on: torchrun sends SIGTERM to the ranks that end last."""
        self._ignored_until = float("inf")

    def __enter__(self) -> StopSignals:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._uninstall()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        mark_handled()
        now = time.monotonic()
        if self.received is not None:
            if now >= self._ignored_until:  # a second signal has the effect it had before `install`
                self._uninstall()
                signal.raise_signal(number)
            return
        self.received, self._ignored_until = signal.Signals(number), now + self.repeat_window
        if self.announces:
            # os.write, not print: the signal may have interrupted a print.
            name = self.received.name
            text = f"\nfit: {name}: saving at the next step; a second signal ends it at once\n"
            with suppress(OSError):  # stderr may be closed
                os.write(2, text.encode())

    def _uninstall(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}
