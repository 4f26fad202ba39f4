"""End of a process, with a sentence, where a mapped file is truncated or its disk fails.

The system then sends SIGBUS to the thread that reads the map, and would send it again at the same
instruction if a handler returned. Python's own handlers run later and never get there. So the
handler is a function that the C library calls at once; it prints the name of the file and ends the
process. What was being written is not published yet, so nothing is lost.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from actcache.core.terminal import escape_controls
from actcache.errors import ActcacheError


class Mapped(Protocol):
    """Files that a library has mapped."""

    def check(self) -> None:
        """Raise an `ActcacheError` if a file has changed."""


MAPPED: weakref.WeakSet[Mapped] = weakref.WeakSet()
"""Files that are named if they have changed."""

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


@contextmanager
def explained_bus_errors() -> Iterator[None]:
    """End the process on SIGBUS with a message that names the file, while the context lasts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    before = set_handler(signal.SIGBUS, ctypes.cast(_end, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(signal.SIGBUS, before)


def _explain_and_end(_number: int) -> None:
    error = ActcacheError(
        "a file that is mapped into memory cannot be read: it was truncated, or its disk fails",
        remedy="restore the model, text or data set that this command reads, and run the same "
        "command again: what is published stays valid",
    )
    for files in list(MAPPED):
        try:
            files.check()
        except ActcacheError as changed:
            error = changed
        except OSError:
            continue
    with suppress(OSError):  # stderr may be closed
        os.write(2, escape_controls(f"\nerror: {error}\n").encode(errors="replace"))
    os._exit(error.exit_code)


_end = _HANDLER(_explain_and_end)  # kept: the C library calls it
