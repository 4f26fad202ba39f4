"""What stands between a command and the user: errors as text, codes as promised."""

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

INTERRUPTED = 130  # what shells say of a command stopped by Ctrl-C
TERMINATED = 143  # and of one that SIGTERM ended, as schedulers send it


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception: whatever Ctrl-C would clean up is cleaned up."""

    exit_code = TERMINATED


def report_errors(run: Callable[P, None]) -> Callable[P, None]:
    """Print errors that a user can mend as text, without a traceback, and exit with their code."""

    @functools.wraps(run)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            run(*args, **kwargs)
        except ActcacheError as error:
            print_stderr(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as stop:
            code = getattr(stop, "exit_code", INTERRUPTED)  # of fit's `RunStopped`, too
            what = "terminated" if code == TERMINATED else "interrupted"
            how = str(stop) or "what was published stays; the same command resumes (fit: --resume)"
            print_stderr(f"{what}: {how}")
            raise typer.Exit(code) from None
        except BrokenPipeError:  # `| head` has seen enough: click ends quietly, with code 1
            raise
        except OSError as error:  # a folder without permission, a disk that fails
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
    """Whether memory ran out, on the CPU or a GPU. Torch is not imported to find out."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "not enough memory" in str(error)
    )


def _terminate(_number: int, _frame: object) -> None:
    raise Terminated


def print_stderr(text: str) -> None:
    """Tell the user something beside the command's own output: on stderr."""
    print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    """Print a command's machine-readable result: one strict JSON document on stdout."""
    import json

    print(json.dumps(_strict(value), indent=2, allow_nan=False))


def _strict(value: Any) -> Any:
    """The value with null for what JSON has no number for: NaN and infinities."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
