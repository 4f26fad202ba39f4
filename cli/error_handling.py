"""Error messages and exit codes of the commands, and their output on stdout and stderr."""

from __future__ import annotations

import functools
import math
import signal
import sys
from collections.abc import Callable
from typing import Any, ParamSpec

import typer

from actcache.errors import ActcacheError

P = ParamSpec("P")

INTERRUPTED = 130  # exit code of shells for SIGINT (Ctrl-C): 128 + 2
TERMINATED = 143  # exit code of shells for SIGTERM, which schedulers send: 128 + 15


class Terminated(KeyboardInterrupt):
    """Exception raised on SIGTERM, so that it runs the same clean-up as Ctrl-C."""

    exit_code = TERMINATED


def report_errors(run: Callable[P, None]) -> Callable[P, None]:
    """Decorate a command: print expected errors without a traceback and exit with their code."""

    @functools.wraps(run)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            run(*args, **kwargs)
        except ActcacheError as error:
            print_stderr(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as stop:
            code = getattr(stop, "exit_code", INTERRUPTED)  # `RunStopped` of fit has one, too
            reason = "terminated" if code == TERMINATED else "interrupted"
            advice = str(stop) or "published files remain; the same command resumes (fit: --resume)"
            print_stderr(f"{reason}: {advice}")
            raise typer.Exit(code) from None
        except BrokenPipeError:  # a closed pipe, such as `| head`: click exits silently with code 1
            raise
        except OSError as error:  # for example a folder without permission or a failing disk
            print_stderr(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "))
            raise typer.Exit(1) from None
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            print_stderr(
                f"error: out of memory\n  got:      {error}\n  remedy:   a smaller --batch-size"
            )
            raise typer.Exit(1) from None
        finally:
            signal.signal(signal.SIGTERM, before)

    return call


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether the error means that CPU or GPU memory is exhausted. Imports no torch."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "not enough memory" in str(error)
    )


def _terminate(_number: int, _frame: object) -> None:
    raise Terminated


def print_stderr(text: str) -> None:
    """Print a message to stderr, separate from the command's output."""
    print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    """Print a command's result to stdout as one strict JSON document."""
    import json

    print(json.dumps(_strict(value), indent=2, allow_nan=False))


def _strict(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
