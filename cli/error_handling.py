"""Error messages and exit codes of the commands, and their output on stdout and stderr."""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, ParamSpec

import typer

from actcache.core.bus_errors import explained_bus_errors
from actcache.core.terminal import OutputClosedError, escape_controls, make_streams_safe
from actcache.core.watchdog import handled_signals
from actcache.errors import NO_THREAD, OUT_OF_MEMORY, ActcacheError, DiskFullError, RunError

P = ParamSpec("P")

INTERRUPTED = 130  # exit code of shells for SIGINT (Ctrl-C): 128 + 2
TERMINATED = 143  # exit code of shells for SIGTERM, which schedulers send: 128 + 15


def report_errors(run: Callable[P, None]) -> Callable[P, None]:
    """Decorate a command: print expected errors without a traceback and exit with their code.

    What the command prints, results and messages alike, is escaped: see `SafeStream`.
    """

    @functools.wraps(run)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        from actcache.core.progress import heartbeat

        name = "".join(sys.argv[1:2])  # actcache harvest ...
        streams = make_streams_safe()
        try:
            with handled_signals(), explained_bus_errors(), heartbeat(name):
                try:
                    run(*args, **kwargs)
                except KeyboardInterrupt as stop:
                    if type(stop) is KeyboardInterrupt:
                        _require_threads()
                    raise
                finally:
                    sys.stdout.flush()
        except OutputClosedError:  # such as `| head`: click exits with code 1 and prints nothing
            raise
        except KeyboardInterrupt as stop:
            code = getattr(stop, "exit_code", INTERRUPTED)  # `RunStopped` of fit has one, too
            reason = "terminated" if code == TERMINATED else "interrupted"
            advice = str(stop) or "published files remain; the same command resumes (fit: --resume)"
            print_stderr(f"{reason}: {advice}")
            raise typer.Exit(code) from None
        except Exception as error:
            known = as_known_error(error)
            if known is None:
                raise
            print_stderr(f"error: {known}")
            raise typer.Exit(known.exit_code) from None
        finally:
            sys.stdout, sys.stderr = streams

    return call


def as_known_error(error: Exception) -> ActcacheError | None:
    """Return the message and exit code of an expected failure; None for a bug of this package."""
    if isinstance(error, ActcacheError):
        return error
    if isinstance(error, OSError) and error.errno != errno.ENOMEM:
        return _of_operating_system(error)
    if _is_out_of_memory(error):
        return ActcacheError(
            "out of memory",
            got=str(error).partition("\n")[0] or type(error).__name__,
            remedy="a smaller --batch-size, fewer or narrower SAEs or hookpoints at once, or a "
            "machine with more memory",
        )
    if isinstance(error, RecursionError):
        return ActcacheError(
            "a value of a file or of an option is nested too deeply", remedy="make it flatter"
        )
    if isinstance(error, UnicodeDecodeError):
        return ActcacheError(
            "a file or an input is not UTF-8 text",
            got=error,
            remedy="it is damaged, or in another encoding",
        )
    if isinstance(error, UnicodeEncodeError) or (
        isinstance(error, ValueError) and "embedded null" in str(error)
    ):
        return ActcacheError(
            "a name of a file or folder has characters that no name can have",
            got=error,
            remedy="see the options, and the names that the files of the cache or run contain",
        )
    if type(error).__name__ in _OF_STORE:
        return RunError(
            "the connection between the processes of this run has ended",
            got=error,
            remedy="see the first error of the other processes and of torchrun; the same command "
            "resumes (fit: --resume)",
        )
    if isinstance(error, RuntimeError) and NO_THREAD in str(error):
        return ActcacheError(
            "the system allows no more threads, or has no memory for another one",
            got=error,
            remedy="raise the limit (ulimit -u and -v, or pids.max of the container), or use a "
            "machine with more memory",
        )
    return None


def _require_threads() -> None:
    """Raise `RuntimeError` if no thread can be started, which OpenBLAS reports by SIGINT."""
    threading.Thread(target=int).start()


_OF_STORE = ("DistError", "DistNetworkError", "DistStoreError", "DistBackendError")
"""Errors of torch's store and collectives, by name: this module does not import torch."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDIES = {
    errno.ENOSPC: "free space and run the same command again: what is published stays valid",
    errno.EDQUOT: "the quota is used up: delete files, and run the same command again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), and run the same command again",
    errno.EROFS: "the file system is read-only: name a folder that can be written to",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EAGAIN: "the system allows no more processes: raise the limit (ulimit -u, or pids.max "
    "of the container), or end other programs",
    errno.ENFILE: "the system has too many open files: end other programs",
    errno.ENOLCK: "use a file system with locks",
    errno.ENAMETOOLONG: "a shorter name",
    errno.ELOOP: "name the folder itself: its links form a circle, or links are not followed here",
} | dict.fromkeys(
    (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.EHOSTDOWN),
    "the disk or network share fails or has gone: check that it is mounted, and run the same "
    "command again",
)


def _of_operating_system(error: OSError) -> ActcacheError:
    """Describe an error of the operating system: its message, the file, a remedy."""
    files = [os.fsdecode(name) for name in (error.filename, error.filename2) if _is_name(name)]
    what = ": ".join([error.strerror or str(error) or type(error).__name__, " -> ".join(files)])
    kind = DiskFullError if error.errno in _FULL else ActcacheError
    return kind(what.rstrip(": "), remedy=_REMEDIES.get(error.errno or 0))


def _is_name(name: object) -> bool:
    return isinstance(name, str | bytes) and len(name) > 0


_OUT_OF_MEMORY = (
    *OUT_OF_MEMORY,
    "storage size calculation overflowed",
    "numel: integer multiplication overflow",
    "overflow when unpacking long",
    "int too large to convert",
    "int too big to convert",
    "array is too big",
    "maximum allowed dimension exceeded",
    "failed to map segment",
    "without exception set",
    "without setting an exception",
)
"""Parts of messages for memory that is not there: of torch, NumPy, C++, CUDA, the dynamic linker,
and Python, which raises `SystemError` for a C function that fails without an exception."""


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether the error means that CPU or GPU memory is exhausted. Imports no torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    kinds = (RuntimeError, OverflowError, ValueError, TypeError, OSError, ImportError, SystemError)
    text = str(error).lower()
    return isinstance(error, kinds) and any(part in text for part in _OUT_OF_MEMORY)


def print_stderr(text: str) -> None:
    """Print a message to stderr, separate from the command's output."""
    print(escape_controls(text), file=sys.stderr)


def only_results_on_stdout() -> contextlib.AbstractContextManager[object]:
    """Print on stderr what libraries, or Python code of a model's repository, print on stdout."""
    return contextlib.redirect_stdout(sys.stderr)


def print_json(value: Any) -> None:
    """Print a command's result to stdout as one strict JSON document."""
    import json

    text = json.dumps(_strict(value), indent=2, allow_nan=False)
    print(text.replace("\x7f", "\\u007f"))  # the only control character that `json` leaves as it is


def _strict(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
