"""Whether another process of this machine is still there, without a word from it."""

from __future__ import annotations

import os
from pathlib import Path

_PROC = Path("/proc")


def name_of_this_process() -> str:
    """A name that no other process has, on any machine, now or later."""
    return f"{_machine()} {os.getpid()} {_started(os.getpid())}"


def is_gone(name: str) -> bool:
    """Whether the process of that name has ended; of another machine's that is not known."""
    machine, _, process = name.rpartition(" ")[0].rpartition(" ")
    return machine == _machine() and _started(int(process)) != name.rpartition(" ")[2]


def _machine() -> str:
    """Where process numbers mean the same: one boot of a machine, and one container on it."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # in some containers
        boot = os.uname().nodename
    return f"{boot} {(_PROC / 'self/ns/pid').readlink()}"


def _started(process: int) -> str:
    """When a process was started, in ticks; empty if it is not there, or only waited for."""
    try:
        _, _, fields = (_PROC / str(process) / "stat").read_text().rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    state, *rest = fields.split()
    return "" if state in "ZX" else rest[18]  # field 22 of proc(5)
