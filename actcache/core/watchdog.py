"""End of a process that receives a signal while its main thread waits in native code.

Python runs the handler of a signal in the main thread, between two of its own instructions. A main
thread that waits within torch, a driver or a hanging file system does not get there. A thread reads
each signal from the file that `signal.set_wakeup_fd` names, where it is written at once, and ends
the process if no handler has run within a few seconds.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

GRACE_SECONDS = 5.0
"""Seconds after a signal in which a handler must run."""

_LOOK = 0.2  # seconds between two looks at an unhandled signal
_SLACK = 1.0  # seconds by which this module's thread may lag behind a handler
_ENDS = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}

_last_handled = float("-inf")


class Terminated(KeyboardInterrupt):
    """Exception raised on SIGTERM, so that it runs the same clean-up as Ctrl-C."""

    exit_code = 128 + signal.SIGTERM


def mark_handled() -> None:
    """Record that a handler runs: the main thread is not stuck. Every handler calls this."""
    global _last_handled
    _last_handled = time.monotonic()


def end_at_once(number: int, _frame: FrameType | None) -> None:
    """Handle a signal by the exception that ends the command."""
    mark_handled()
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def handled_signals() -> Iterator[None]:
    """Handle SIGTERM and Ctrl-C by `end_at_once`, and end a process whose main thread is stuck.

    A process that was started to ignore one of them, as under nohup, still does. Outside the main
    thread, where Python forbids handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True)
    before = {n: signal.getsignal(n) for n in _ENDS}
    before = {n: handler for n, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    thread.start()
    try:
        for number in before:
            signal.signal(number, end_at_once)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        writer.close()  # ends the thread
        thread.join()
        reader.close()


def _watch(reader: socket.socket) -> None:
    """Read signals, and end the process if one is not handled in time."""
    first: tuple[float, signal.Signals] | None = None
    is_patient = False
    while True:
        reader.settimeout(None if first is None else _LOOK)
        with suppress(TimeoutError):
            data = reader.recv(64)
            if not data:
                return
            for number in set(data) & _ENDS.keys():
                if first is None:
                    # Another handler saves a checkpoint first: a second signal ends its patience.
                    is_patient = signal.getsignal(number) is not end_at_once
                    first = time.monotonic(), signal.Signals(number)
                elif time.monotonic() > first[0] + GRACE_SECONDS:
                    is_patient = False
        if first is not None and _last_handled >= first[0] - _SLACK:
            first = None
        if first is not None and not is_patient and time.monotonic() > first[0] + GRACE_SECONDS:
            _end(first[1])


def _end(number: signal.Signals) -> None:
    text = (
        f"\n{_ENDS[number]}: the process was waiting in native code, and did not react within "
        f"{GRACE_SECONDS:.0f} s; published files remain; the same command resumes (fit: --resume)\n"
    )
    with suppress(OSError):  # stderr may be closed
        os.write(2, text.encode())
    os._exit(128 + number)
