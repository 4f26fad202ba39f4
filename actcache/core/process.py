"""This process: rank and world size under torchrun, torch device, peak memory, library warnings."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from actcache.core.rendezvous import gather, open_store
from actcache.core.terminal import escape_controls
from actcache.errors import CacheMismatchError, ConfigError, RunError

T = TypeVar("T")

_agreements = itertools.count()  # one process may do several harvests
_held: list[object] = []  # store of rank 0, which other ranks may connect to for the next exchange
_LEAVING = 30.0  # seconds in which the other ranks read the outcome, before rank 0 continues


@dataclass(frozen=True)
class World:
    """Rank of this process, and the number of processes."""

    rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> World:
        """Read the variables that torchrun sets; without WORLD_SIZE, return rank 0 of 1.

        Raises:
            ConfigError: some of the variables are missing, or the rank is out of range.
        """
        found = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
        if found["WORLD_SIZE"] is None:
            return cls(0, 1)
        rank, world_size = (int(n) if n and n.isdecimal() else -1 for n in found.values())
        alone = world_size == 1
        if not 0 <= rank < world_size or not (alone or "MASTER_ADDR" in os.environ):
            raise ConfigError(
                "the environment variables do not give the rank of this process",
                expected="RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them",
                got=found,
                remedy="unset WORLD_SIZE to use one process, or start through torchrun",
            )
        return cls(rank, world_size)

    def broadcast(self, value: str) -> str:
        """Return the value of rank 0 on every rank.

        Raises:
            RunError: rank 0 does not join within `JOIN_SECONDS`.
        """
        if self.world_size == 1:
            return value
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        work = f"harvest on rank {self.rank}"
        store = open_store(self.rank, self.world_size, work)
        keys = PrefixStore(f"broadcast {next(_agreements)}", store)
        if self.rank == 0:
            keys.set("value/0", value)
            _held[:] = [store]
        return gather(keys, "value", [0], work)[0]

    def check_equal_then_run_on_rank_zero(self, value: bytes, act: Callable[[], T]) -> T | None:
        """Require equal bytes on every rank, then run a function on rank 0, then return on all.

        Args:
            value: compared by its digest, through the store of torchrun or of rank 0.
            act: run on rank 0 only, while the other ranks wait for its outcome.

        Returns:
            On rank 0, the result of `act`.

        Raises:
            CacheMismatchError: the bytes differ, and `act` was not run; or it failed on rank 0.
            RunError: a rank does not join within `JOIN_SECONDS`.
            Exception: on rank 0, the exception of `act`.
        """
        if self.world_size == 1:
            return act()
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        every = range(self.world_size)
        work = f"harvest on rank {self.rank}"
        store = open_store(self.rank, self.world_size, work)
        keys = PrefixStore(f"agreement {next(_agreements)}", store)
        digest = hashlib.blake2b(value, digest_size=16).hexdigest()
        keys.set(f"digest/{self.rank}", digest)
        digests = gather(keys, "digest", every, work)
        try:
            if digests != [digest] * self.world_size:
                raise CacheMismatchError(
                    "the processes of this harvest would make different caches",
                    expected="equal models, texts and options on every rank",
                    got=f"rank {self.rank} has {digest}, others have {set(digests) - {digest}}",
                    remedy="do all nodes see the same files and library versions?",
                )
            result = None
            if self.rank == 0:
                try:
                    result = act()
                except BaseException:
                    keys.set("acted/0", "failed")
                    raise
                keys.set("acted/0", "")
            elif gather(keys, "acted", [0], work) != [""]:
                raise CacheMismatchError(
                    f"rank 0 refused this harvest, so rank {self.rank} ends too",
                    remedy="the error of rank 0 gives the reason",
                )
            return result
        finally:
            keys.set(f"left/{self.rank}", "")
            if self.rank == 0:  # it may hold the store
                with suppress(RunError):
                    gather(keys, "left", every, work, _LEAVING)


_LIBRARIES = {
    "accelerate",
    "actcache",
    "bitsandbytes",
    "datasets",
    "fsspec",
    "gguf",
    "huggingface_hub",
    "peft",
    "tokenizers",
    "torch",
    "transformers",
    "transformers_modules",  # code of a model's repository
}
"""Loggers whose warnings concern the model and the text."""

_NOISE = {
    "Sending unauthenticated requests": "it concerns the speed of a download alone",
}
"""Parts of messages that are dropped, each with the reason."""

_MOST_WARNINGS, _LONGEST_WARNING = 100, 2000
_COLOURS = re.compile("\x1b\\[[0-9;]*m")
_PACKAGE = re.compile(r".*/site-packages/([^/.]+)")


class CapturedWarnings:
    """Warnings of libraries, logged or given to `warnings.warn`; each once, as one line."""

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}
        self._more = 0

    @property
    def lines(self) -> tuple[str, ...]:
        """The warnings, in order."""
        if self._more:
            return (*self._lines, f"{self._more} more warnings of libraries are not shown")
        return tuple(self._lines)

    def add(self, source: str, text: str) -> None:
        """Record a warning of a logger or package, unless it is known or noise."""
        line = " ".join(_COLOURS.sub("", text).split())[:_LONGEST_WARNING]
        if line and not any(part in line for part in _NOISE):
            package = source.partition(".")[0]
            line = line if package == "actcache" else f"{package}: {line}"
            if len(self._lines) < _MOST_WARNINGS or line in self._lines:
                self._lines[line] = None
            else:
                self._more += 1


@contextmanager
def captured_warnings() -> Iterator[CapturedWarnings]:
    """Collect what libraries warn of, instead of printing it amid other output or hiding it.

    If an exception ends the block, the warnings are printed to stderr.
    Whatever Python's own filters ignore, such as `DeprecationWarning`, stays ignored.
    """
    captured = CapturedWarnings()
    original = logging.Logger.callHandlers

    def handle(logger: logging.Logger, record: logging.LogRecord) -> None:
        # Libraries attach handlers when they are imported, which may happen meanwhile.
        if record.levelno < logging.WARNING or logger.name.partition(".")[0] not in _LIBRARIES:
            original(logger, record)
            return
        with suppress(TypeError, ValueError):  # a message that does not fit its arguments
            captured.add(logger.name, record.getMessage())

    def show(message: object, _kind: object, filename: str, *_: object) -> None:
        found = _PACKAGE.match(filename)
        captured.add(found[1] if found else Path(filename).stem, str(message))

    loggers = map(logging.getLogger, _LIBRARIES)
    silenced = {found: found.level for found in loggers if found.level > logging.WARNING}
    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        for logger in silenced:  # by another library
            logger.setLevel(logging.WARNING)
        logging.Logger.callHandlers = handle  # type: ignore[method-assign,assignment]
        try:
            yield captured
        except BaseException:
            for line in captured.lines if sys.stderr is not None else ():
                with suppress(OSError, ValueError):  # stderr is closed: the error is raised
                    print(f"warning: {escape_controls(line)}", file=sys.stderr)  # noqa: T201
            raise
        finally:
            logging.Logger.callHandlers = original  # type: ignore[method-assign]
            for logger, level in silenced.items():
                logger.setLevel(level)


def use_device(name: str) -> torch.device:
    """Choose the device that --device names, and make it the current CUDA device of this thread.

    torch and Triton use the current device wherever no tensor names one. It is GPU 0 in every
    process that does not set it. Raises `ConfigError` as `choose_device` does.
    """
    device = choose_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def choose_device(name: str) -> torch.device:
    """Return the torch device that --device names, with the index of a GPU.

    `auto` is the GPU of LOCAL_RANK, `cuda` the current one.

    Raises:
        ConfigError: the device is unusable.
    """
    expected = "cpu, cuda, cuda:N or auto"
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
        if device.type == "mps":
            raise ConfigError(
                "--device mps is not supported: it has no float64 numbers, in which sums are taken",
                expected=expected,
                got=name,
            )
        torch.ones(1, device=device).item()  # fails on meta, which computes nothing
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            "--device cannot be used", expected=expected, got=f"{name} ({error})"
        ) from error
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def peak_memory() -> int:
    """Return the peak resident memory of this process, bytes.

    Read from /proc, since `getrusage` of a forked process starts at its parent's peak.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux reports VmHWM for every process")


def resident_memory() -> int:
    """Return the resident memory of this process now, bytes."""
    return _fields(Path("/proc/self/status"))["VmRSS"]


CUDA_BYTES = 600_000_000
"""Device memory that CUDA, cuBLAS and compiled kernels take before the first tensor, about: 400 to
700 MB by GPU and driver. No process can distinguish it from memory of others."""


def library_memory(device: torch.device, loaded: int = 0) -> int:
    """Return the bytes that Python and the libraries take in this process, as far as imported.

    Args:
        device: on a GPU, its CUDA context counts too.
        loaded: bytes of weights that the process holds already, which are no library's.
    """
    context = CUDA_BYTES if device.type == "cuda" else 0
    return max(0, resident_memory() - loaded) + context


def free_memory(device: torch.device) -> int:
    """Return the bytes of a device that are free: of a GPU, or of main memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of main memory that this process can still use, swap included.

    The machine, the process's control groups and its own limit (`ulimit -v`) each set a bound.

    Args:
        root: where /proc and /sys are found.
    """
    free = _fields(root / "proc/meminfo")
    bounds = [free.get("MemAvailable", free.get("MemFree", 1 << 62)) + free.get("SwapFree", 0)]
    bounds += _room_of_groups(root)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        bounds.append(limit - _fields(root / "proc/self/status").get("VmSize", 0))
    return max(0, min(bounds))


def _room_of_groups(root: Path) -> list[int]:
    """Return the unused memory of every control group of this process that has a limit."""
    found = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            base = root / "sys/fs/cgroup" / controllers
            limit, used = ("memory.max", "memory.current")
            if controllers:  # version 1
                limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            group = base / name.lstrip("/")
            for folder in (group, *group.parents):
                if base != folder and base not in folder.parents:
                    break
                with suppress(OSError, ValueError):  # no limit ("max"), or a group not shown here
                    reclaimable = _fields(folder / "memory.stat").get("inactive_file", 0) // 1024
                    bytes_used = int((folder / used).read_text()) - reclaimable
                    found.append(int((folder / limit).read_text()) - bytes_used)
    return found


def _fields(path: Path) -> dict[str, int]:
    """Read lines of a name and a number of kB; return bytes by name."""
    lines = path.read_text().splitlines() if path.exists() else []
    split = [line.replace(":", " ").split() for line in lines]
    return {line[0]: int(line[1]) * 1024 for line in split if len(line) > 1 and line[1].isdecimal()}


def require_whole_machine() -> None:
    """Raise `ConfigError` if --device-map is combined with several processes on this machine."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    if processes != "1":
        raise ConfigError(
            "--device-map auto uses every GPU of the machine",
            expected="one process per machine",
            got=f"{processes} processes",
            remedy="torchrun --nproc_per_node 1, or start without torchrun",
        )
