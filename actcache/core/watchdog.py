"""End of a process that receives a signal while it waits in native code or for its threads.

Python runs the handler of a signal in the main thread, between two of its own instructions. A main
thread that waits within torch, a driver or a hanging file system does not get there. A thread reads
each signal from the file that `signal.set_wakeup_fd` names, where it is written at once, and ends
the process if no handler has run within a few seconds.

A handler that ends the command by an exception is not enough: pools of threads wait for their
threads when they are left, and Python waits for them once more when it exits. A thread that waits
for a store or a disk may take minutes. So the same thread ends the process if the command, and the
threads that it has started, have not ended a few seconds after that handler. What was being written
is not published yet, so nothing is lost.
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

from actcache.core.terminal import escape_controls
from actcache.errors import quote_name
from actcache.filesystem.slow_reads import READING, report_slow_reads

GRACE_SECONDS = 5.0
"""Seconds after a signal in which a handler must run."""
CLEAN_UP_SECONDS = 5.0
"""Seconds in which a command, and the threads it has started, must end after `end_at_once`."""

READ_SECONDS = 10.0
"""Seconds after a signal in which a read of the main thread must end, even if the signal's handler
saves a checkpoint: it cannot before."""

_LOOK = 0.2  # seconds between two checks for an unhandled signal and slow reads
_SLACK = 1.0  # seconds by which this module's thread may lag behind a handler
_ENDS = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}

_last_handled = float("-inf")
_ending: tuple[float, signal.Signals] | None = None  # when `end_at_once` ran first
_signalled: signal.Signals | None = None
_abandons = False


class Terminated(KeyboardInterrupt):
    """Exception raised on SIGTERM, so that it runs the same clean-up as Ctrl-C."""

    exit_code = 128 + signal.SIGTERM


def is_signalled() -> bool:
    """Return whether this command has received a signal, even if no handler has run yet."""
    return _signalled is not None


def end_after_command() -> None:
    """Limit the wait for threads at the end of a command that a signal ends: they may hang."""
    global _abandons
    _abandons = True


def mark_handled() -> None:
    """Record that a handler runs: the main thread is not stuck. Every handler calls this."""
    global _last_handled
    _last_handled = time.monotonic()


def end_at_once(number: int, _frame: FrameType | None) -> None:
    """Handle a signal by the exception that ends the command."""
    global _ending
    mark_handled()
    _ending = _ending or (_last_handled, signal.Signals(number))
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def handled_signals() -> Iterator[None]:
    """Handle SIGTERM and Ctrl-C by `end_at_once`, and exit if the process does not end in time.

    A signal that was ignored at the start, as under nohup, stays ignored. Outside the main
    thread, where Python forbids handlers, nothing changes.
    """
    global _ending, _signalled, _abandons
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _ending, _signalled, _abandons = None, None, False
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    others = frozenset(threading.enumerate())
    thread = threading.Thread(target=_watch, args=(reader, others), name="signals", daemon=True)
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
        if _abandons and _signalled is not None:
            _ending = _ending or (time.monotonic(), _signalled)
        writer.close()  # ends the thread
        if _ending is None:
            thread.join()


def _watch(reader: socket.socket, others: frozenset[threading.Thread]) -> None:
    """Read signals; end the process if one is not handled, or the command not ended, in time."""
    with reader:
        _watch_command(reader)
    # The command has ended with a message. Python waits for its threads before it exits, for those
    # of pools even if they are daemons.
    while _ending is not None and (
        _abandons or any(not t.daemon for t in set(threading.enumerate()) - others)
    ):
        if time.monotonic() > _ending[0] + CLEAN_UP_SECONDS:
            os._exit(128 + _ending[1])
        time.sleep(_LOOK)


def _watch_command(reader: socket.socket) -> None:
    global _signalled
    first: tuple[float, signal.Signals] | None = None
    is_saving, signalled = False, 0.0
    main = threading.main_thread().ident or 0
    while True:
        reader.settimeout(_LOOK)
        report_slow_reads()
        with suppress(TimeoutError):
            data = reader.recv(64)
            if not data:
                return
            for number in set(data) & _ENDS.keys():
                if _signalled is None:
                    _signalled, signalled = signal.Signals(number), time.monotonic()
                if first is None:
                    # Another handler saves a checkpoint first; a second signal limits that.
                    is_saving = signal.getsignal(number) is not end_at_once
                    first = time.monotonic(), signal.Signals(number)
                elif time.monotonic() > first[0] + GRACE_SECONDS:
                    is_saving = False
        if _signalled is not None and (read := READING.get(main)) is not None:
            began, path = max(read[0], signalled), escape_controls(quote_name(str(read[1])))
            if time.monotonic() > began + READ_SECONDS:
                _end(_signalled, f"was waiting to read {path}, and did not end", READ_SECONDS)
        if first is not None and _last_handled >= first[0] - _SLACK:
            first = None
        if first is not None and not is_saving and time.monotonic() > first[0] + GRACE_SECONDS:
            _end(first[1], "was waiting in native code, and did not react", GRACE_SECONDS)
        if _ending is not None and time.monotonic() > _ending[0] + CLEAN_UP_SECONDS:
            _end(_ending[1], "was waiting for a disk or store, and did not end", CLEAN_UP_SECONDS)


def _end(number: signal.Signals, why: str, seconds: float) -> None:
    text = (
        f"\n{_ENDS[number]}: the process {why} within {seconds:.0f} s; published files remain; "
        "the same command resumes (fit: --resume)\n"
    )
    with suppress(OSError):  # stderr may be closed
        os.write(2, text.encode(errors="replace"))
    os._exit(128 + number)
