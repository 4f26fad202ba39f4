"""The two console scripts.

A signal ends them with a sentence and the exit code of shells from their first statement on, also
while the commands are imported and built. So only the standard library is imported here at first.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from typer import Typer

_ENDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_when = "before the start"


def actcache() -> None:
    """Run the console script `actcache`."""
    end_on_signals()
    from .programs import actcache_app

    _run(actcache_app)


def saetrain() -> None:
    """Run the console script `saetrain`."""
    end_on_signals()
    from .programs import saetrain_app

    _run(saetrain_app)


def end_on_signals() -> None:
    """End this process at once on a signal, until `handled_signals` replaces the handlers.

    A signal that was ignored at the start, as under nohup, stays ignored.
    """
    for number in _ENDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    with suppress(OSError):  # stderr may be closed
        os.write(2, f"{_ENDS[signal.Signals(number)]} {_when}\n".encode())
    os._exit(128 + number)


def _run(build: Callable[[], Typer]) -> None:
    """Run a program whose output, usage errors and tracebacks included, is escaped."""
    global _when
    import logging

    from actcache.core.terminal import make_streams_safe, reserve_standard_files

    reserve_standard_files()
    # torch prints the stack of every lost connection as a warning; the error message is enough.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.raiseExceptions = False  # no stack on stderr where a library cannot write its log
    make_streams_safe()
    try:
        build()()
    finally:
        _when = "after the end"
