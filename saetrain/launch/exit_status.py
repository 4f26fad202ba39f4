"""`exit.json`: how the last call of `fit` in a run ended. Launchers swallow exit codes, files not.

It lies flat in the run, as all that is no SAE: sparsify takes every folder there for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from actcache.core.json_codec import to_json
from actcache.errors import ActcacheError
from actcache.filesystem.atomic import write_atomic
from saetrain.distributed.signals import RunStopped
from saetrain.runs.checkpoint import newest_step
from saetrain.runs.record import RUN

EXIT = "exit.json"


@dataclass(frozen=True)
class ExitStatus:
    """Contents of `exit.json`."""

    code: int
    """The exit code: 0 finished, 143 SIGTERM, 130 Ctrl-C (both saved: requeue with --resume), those
    of `actcache.errors`, 1 anything else."""
    reason: str
    """finished, SIGTERM, SIGINT, or an error's kind and its first line."""
    step: int
    """Of the newest checkpoint; 0 if there is none."""


@contextmanager
def recorded_exit_status(
    root: Path, is_ours: Callable[[BaseException | None], bool]
) -> Iterator[None]:
    """Write `exit.json` when what is within ends, however it does.

    Args:
        root: folder of the run.
        is_ours: whether it is this process's to tell, by then, that the run has ended with an
            error, or (None) without one.
    """
    try:
        yield
    except BaseException as error:
        if is_ours(error):
            write_exit_status(root, error)
        raise
    if is_ours(None):
        write_exit_status(root, None)


def stopped_before_start(root: Path, error: BaseException | None) -> bool:
    """Whether a signal has ended a run before it had begun: while its first rows were waited for.

    Nothing else is to be in its folder then: it might be another's.
    """
    if not isinstance(error, KeyboardInterrupt):
        return False
    try:
        return all(path.name == EXIT for path in root.iterdir())
    except FileNotFoundError:
        return True
    except OSError:  # --out is a file
        return False


def write_exit_status(root: Path, error: BaseException | None) -> None:
    """Write `exit.json`, if there is a run, or would be but for a signal."""
    begun = (root / RUN).exists()
    if begun or stopped_before_start(root, error):
        code, reason = (0, "finished") if error is None else (_code(error), _reason(error))
        with suppress(ActcacheError, OSError):  # how it ended is the news, not this
            step = newest_step(root) if begun else None
            write_atomic(root / EXIT, [to_json(ExitStatus(code, reason, step or 0))])


def clear_exit_status(root: Path) -> None:
    """Remove what an earlier call left: whoever is killed from now on must not look finished."""
    (root / EXIT).unlink(missing_ok=True)


def _code(error: BaseException) -> int:
    code = getattr(error, "exit_code", None)  # of ours, and of signals
    if isinstance(code, int):
        return code
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _reason(error: BaseException) -> str:
    if isinstance(error, RunStopped):
        return error.signal.name
    if isinstance(error, KeyboardInterrupt):
        return "SIGTERM" if _code(error) == 143 else "SIGINT"
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
