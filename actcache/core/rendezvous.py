"""Rendezvous of processes through torch's key-value store, in waits that end on a signal.

Python runs signal handlers between its own instructions only, and torch waits in native code for up
to half an hour. So every wait here is a loop of short calls. It prints what it waits for after ten
seconds and then each minute, and ends with an error that names the processes that are missing.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from actcache.core.terminal import escape_controls
from actcache.errors import ConfigError, RunError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

FIRST_NOTICE, NEXT_NOTICE = 10.0, 60.0
"""Seconds after which a wait is reported, and between further reports."""
JOIN_SECONDS = 1800.0
"""Seconds in which all processes must have joined: one may still download the model."""

_PAUSE = 0.02  # seconds between two reads of the store
_CONNECT = 2.0  # seconds of one attempt to connect


class WaitNotice:
    """Reports of one wait on stderr.

    Args:
        work: what waits, for the beginning of the line.
    """

    def __init__(self, work: str) -> None:
        self._work, self._began, self._next = work, time.monotonic(), FIRST_NOTICE

    @property
    def seconds(self) -> float:
        """Duration of the wait so far."""
        return time.monotonic() - self._began

    def update(self, whom: str | Callable[[], str]) -> None:
        """Print what this process waits for, if a report is due."""
        seconds = self.seconds
        if seconds < self._next or sys.stderr is None:
            return
        self._next = seconds + NEXT_NOTICE
        named = whom if isinstance(whom, str) else whom()
        text = f"{self._work}: waiting for {named} since {seconds:.0f} s"
        print(escape_controls(text), file=sys.stderr, flush=True)  # noqa: T201


def open_store(rank: int, world_size: int, work: str, seconds: float = JOIN_SECONDS) -> Store:
    """Connect to the store that torchrun holds, or else rank 0, which then does not wait.

    Args:
        rank: rank of this process.
        world_size: number of processes.
        work: what needs the store, for messages.
        seconds: time in which the store must answer.

    Raises:
        ConfigError: MASTER_ADDR and MASTER_PORT are not set, or not valid.
        RunError: nothing answers at that address, or another program does.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = _address()
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not is_master:
        _wait_until_open(host, port, WaitNotice(work), seconds)
    try:
        return TCPStore(
            host,
            port,
            world_size=world_size,
            is_master=is_master,
            timeout=timedelta(seconds=60),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise RunError(
            f"the processes cannot meet at {host}:{port}",
            got=str(error).partition("\n")[0],
            remedy="a free port in MASTER_PORT, or start through torchrun",
        ) from error


def _address() -> tuple[str, int]:
    """Return the address of the store from the variables that torchrun sets."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not (host and port.isascii() and port.isdecimal() and 0 < int(port[:9]) < 2**16):
        raise ConfigError(
            "the environment variables do not say where the processes meet",
            expected="MASTER_ADDR, and MASTER_PORT from 1 to 65535, as torchrun sets them",
            got=f"MASTER_ADDR={host!r}, MASTER_PORT={port!r}",
            remedy="unset WORLD_SIZE to use one process, or start through torchrun",
        )
    return host, int(port)


def _wait_until_open(host: str, port: int, notice: WaitNotice, seconds: float) -> None:
    """Wait until a port accepts connections."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=_CONNECT):
                return
        except OSError as error:
            if notice.seconds > seconds:
                raise RunError(
                    f"nothing answers at {host}:{port}, where the processes meet",
                    expected=f"rank 0 or torchrun, within {seconds:.0f} s",
                    got=str(error),
                    remedy="was every process started, with the same MASTER_ADDR and MASTER_PORT?",
                ) from error
        notice.update(f"rank 0 at {host}:{port}")
        time.sleep(_PAUSE)


def gather(
    store: Store, name: str, of: Sequence[int], work: str, seconds: float = JOIN_SECONDS
) -> list[str]:
    """Wait until ranks have set their key, and return the values in the order of the ranks.

    Args:
        store: the store.
        name: the keys are NAME/RANK.
        of: the ranks.
        work: what waits, for messages.
        seconds: time in which all must have set it.

    Raises:
        RunError: some have not; their ranks are named.
    """
    notice, missing = WaitNotice(work), list(of)
    while missing := [rank for rank in missing if not store.check([f"{name}/{rank}"])]:
        if notice.seconds > seconds:
            raise RunError(
                f"{ranks(missing)} did not join: not all processes have started, or some ended",
                expected=f"{len(of)} processes within {seconds:.0f} s",
                got=f"{len(of) - len(missing)} of them",
                remedy="see the first error of the missing ones; was torchrun started on every "
                "machine?",
            )
        notice.update(ranks(missing))
        time.sleep(_PAUSE)
    return [bytes(store.get(f"{name}/{rank}")).decode() for rank in of]


def ranks(numbers: Sequence[int]) -> str:
    """Name ranks: the first few, and how many more."""
    shown = ", ".join(map(str, numbers[:8]))
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}{more}"
