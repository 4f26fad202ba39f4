"""Exchange of small messages between the processes of a run, and detection of lost processes.

Messages are keys of torch's key-value store, which torchrun holds; only `get` and its callers wait.
A thread of each process sends a heartbeat and watches the next rank. It detects a killed process
within seconds on its own machine, and after 30 missed heartbeats on another. A main thread that
then hangs in a collective is ended with `os._exit`.

torchrun, too, ends the other processes after a kill, but by SIGTERM, which is also how a scheduler
requests a checkpoint. The check of /proc distinguishes the two before torchrun's SIGKILL.
"""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actcache.core.json_codec import decode_json, parse_dataclass, to_json
from actcache.core.process import World
from actcache.core.rendezvous import WaitNotice, gather, open_store
from actcache.core.watchdog import is_signalled
from actcache.errors import ActcacheError, RunError
from saetrain.distributed.signals import RunStopped, exit_code_of

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


HEARTBEAT_SECONDS = 1.0
"""Seconds between two heartbeats."""
MISSED_HEARTBEATS = 30
"""Heartbeats of its own after which a rank declares an unchanged neighbour lost."""
EXIT_GRACE = 20
"""Heartbeats in which the main thread must end once another process has failed."""
MISSED_AFTER_SIGNAL = EXIT_GRACE_AFTER_SIGNAL = 10
"""The same two numbers once a signal has requested a stop: torchrun kills after 30 s. The
first holds for a neighbour on this machine that is suspended; others may be busy with saving."""
JOIN_SECONDS = 600.0
"""Seconds in which all processes must have started."""

_POLL_SECONDS = 0.005  # between two reads of the store
_connections = itertools.count()


@dataclass(frozen=True)
class Failure:
    """The first error of any rank: the reason why the run ends."""

    rank: int
    """Rank that raised the error."""
    code: int
    """Exit code of the error."""
    what: str
    """First line of the error."""


class RemoteRankError(RunError):
    """Another rank has failed. This one ends with the same code, and prints nothing."""

    def __init__(self, failure: Failure) -> None:
        self.failure, self.exit_code = failure, failure.code
        super().__init__(
            f"process {failure.rank} of this run has failed",
            got=failure.what,
            remedy="see the error of that process",
        )


class LostRankError(RunError):
    """Another rank has ended without recording an error, or does not answer."""

    def __init__(self, rank: int, silent: float | None = None) -> None:
        self.rank = rank
        if silent is not None:
            super().__init__(
                f"process {rank} of this run does not answer: it was stopped, or its machine hangs",
                expected=f"a heartbeat every {HEARTBEAT_SECONDS:.0f} s",
                got=f"none for {silent:.0f} s",
                remedy="continue it or kill it; --resume continues from the newest checkpoint",
            )
            return
        super().__init__(
            f"process {rank} of this run has ended without an error message",
            expected="an error that gives the reason",
            got="nothing: it was killed, or its machine has failed",
            remedy="look for a lack of memory (dmesg shows it); --resume continues from the newest "
            "checkpoint",
        )


class StoreGroup:
    """The processes of a run, connected by a key-value store.

    Args:
        store: shared by all ranks of the run, with no other users.
        world: rank of this process, and how many there are.
    """

    def __init__(self, store: Store, world: World) -> None:
        self.rank, self.world_size = world.rank, world.world_size
        self.stop_requested = False
        """Whether any rank has called `request_stop`; updated at each heartbeat."""
        self.while_waiting: Callable[[], None] = lambda: None
        """Called at each poll while this rank waits for a key."""
        self.on_forced_exit: Callable[[BaseException], None] = lambda _: None
        """Called with the error before `os._exit` ends a main thread that hangs."""
        self._store, self._interval = store, HEARTBEAT_SECONDS
        self._work = f"fit on rank {self.rank}"
        self._error: ActcacheError | None = None
        self._barriers = 0
        self._ended = threading.Event()
        self._heartbeat = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self.put(f"token/{self.rank}", process_token())
        self._tokens = gather(store, "token", range(self.world_size), self._work, JOIN_SECONDS)
        self._heartbeat.start()

    def put(self, key: str, value: str) -> None:
        """Set a key of the store."""
        self._store.set(key, value)

    def get(self, key: str) -> str:
        """Wait until a key is set, and return its value.

        Its last part is the rank that sets it; without one, rank 0 does. A long wait is reported.

        Raises:
            RemoteRankError: another rank has failed meanwhile.
            LostRankError: another rank has ended meanwhile, without an error.
        """
        notice = WaitNotice(self._work)
        while not self.has(key):
            self.poll()
            rank = key.rpartition("/")[2]
            setter = rank if rank.isdecimal() else "0"
            notice.update(f"rank {setter} ({key})")
        return self._get(key)

    def notice(self) -> WaitNotice:
        """Return a report of a wait that begins now."""
        return WaitNotice(self._work)

    def poll(self) -> None:
        """Sleep until the next read of the store; raises the errors of `get`."""
        self.check()
        self.while_waiting()
        time.sleep(_POLL_SECONDS)

    def has(self, *keys: str) -> bool:
        """Return whether all keys are set."""
        return bool(self._store.check(list(keys)))

    def pop(self, key: str) -> str:
        """Wait until a key is set, delete it, and return its value."""
        value = self.get(key)
        self._store.delete_key(key)
        return value

    def check(self) -> None:
        """Raise the errors of `get` without waiting."""
        if self._error is not None:
            raise self._error

    def request_stop(self) -> None:
        """Set the key that makes `stop_requested` true on every rank."""
        self.put("stop", "")

    def barrier(self) -> None:
        """Wait until every rank has reached the same barrier; raises the errors of `get`."""
        self._barriers += 1
        self.put(f"barrier {self._barriers}/{self.rank}", "")
        for rank in range(self.world_size):
            self.get(f"barrier {self._barriers}/{rank}")

    def report_failure(self, error: BaseException) -> BaseException:
        """Record an error as the run's failure, unless another rank has recorded one.

        Returns:
            The error to end this process with: the recorded cause, if this rank recorded it; else a
            `RemoteRankError`.
        """
        if isinstance(error, RemoteRankError):
            return error
        with suppress(RuntimeError):  # the store has ended with the process that held it
            cause = self._cause(error)
            if isinstance(cause, RemoteRankError):
                return cause
            if self._store.add("failures", 1) > 1:
                return RemoteRankError(self._failure())
            first_line = (str(cause) or type(cause).__name__).splitlines()[0]
            failure = Failure(self.rank, exit_code_of(cause), first_line)
            self.put("failed", to_json(failure).decode())
            return cause
        return LostRankError(0) if _is_broken(error) else error

    def wait_for_exit(self, rank: int) -> None:
        """Wait, at most 5 heartbeats, until another process has ended.

        torchrun ends all processes after the first one: the one with the error must be first.
        """
        deadline = time.monotonic() + 5 * self._interval
        while not has_exited(self._tokens[rank]) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def shutdown(self) -> None:
        """Wait until all ranks have called this; raises the errors of `get`."""
        self.put(f"done/{self.rank}", "")
        for rank in range(self.world_size):
            self.get(f"done/{rank}")
        self.close()
        self.put(f"left/{self.rank}", "")
        if self.rank == 0:  # it may hold the store
            with suppress(RunError):
                for rank in range(self.world_size):
                    self._get_within(f"left/{rank}", EXIT_GRACE * self._interval)

    def close(self) -> None:
        """End the heartbeat thread."""
        self._ended.set()
        if self._heartbeat.is_alive():
            self._heartbeat.join()

    def _get_within(self, key: str, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while not self.has(key):
            if time.monotonic() > deadline:
                raise RunError(
                    "a process of this run does not answer",
                    expected=f"{key} within {seconds:.0f} s",
                    remedy="see the errors of the other processes",
                )
            time.sleep(_POLL_SECONDS)
        return self._get(key)

    def _get(self, key: str) -> str:
        return bytes(self._store.get(key)).decode()

    def _failure(self) -> Failure:
        recorded = self._get_within("failed", EXIT_GRACE * self._interval)
        return parse_dataclass(Failure, decode_json(recorded.encode()), "failure")

    def _cause(self, error: BaseException) -> BaseException:
        """Return the failure of another rank that caused an error, once known, or the error itself.

        A collective breaks when another rank ends, and torchrun sends SIGTERM once one has failed.
        """
        broken = _is_broken(error)
        if not broken and not isinstance(error, KeyboardInterrupt):
            return error
        deadline = time.monotonic() + (MISSED_HEARTBEATS + 5) * self._interval
        while True:
            if self.has("failed"):
                return RemoteRankError(self._failure())
            for rank in range(self.world_size):
                if self._is_lost(rank):
                    return LostRankError(rank)
            if not broken or time.monotonic() > deadline:
                return error
            if isinstance(self._error, LostRankError):
                return self._error
            time.sleep(_POLL_SECONDS)

    def _is_lost(self, rank: int) -> bool:
        return has_exited(self._tokens[rank]) and not self.has(f"done/{rank}")

    def _watch(self) -> None:
        """Send heartbeats; abort once the next rank is lost or a rank has recorded a failure."""
        neighbour = (self.rank + 1) % self.world_size
        beat, unchanged, last = 0, 0, ""
        while not self._ended.wait(self._interval):
            try:
                beat += 1
                self.put(f"beat/{self.rank}", str(beat))
                self.stop_requested = self.stop_requested or self.has("stop")
                if self.has("failed"):
                    self._abort(RemoteRankError(self._failure()))
                    return
                key = f"beat/{neighbour}"
                current = self._get(key) if self.has(key) else ""
                unchanged, last = (unchanged + 1 if current == last else 0), current
                # Counted in heartbeats of this rank: a suspended machine counts none
                suspended = self._stops() and is_suspended(self._tokens[neighbour])
                most = MISSED_AFTER_SIGNAL if suspended else MISSED_HEARTBEATS
                if self._is_lost(neighbour):
                    self._abort(LostRankError(neighbour))
                    return
                if unchanged >= most and not self.has(f"done/{neighbour}"):
                    self._abort(LostRankError(neighbour, unchanged * self._interval))
                    return
            except RuntimeError:  # the store has ended with the process that held it
                self._abort(LostRankError(0))
                return

    def _abort(self, error: ActcacheError) -> None:
        """Raise an error in the main thread; if it hangs, end the process after `EXIT_GRACE`."""
        self._error = error
        grace = EXIT_GRACE_AFTER_SIGNAL if self._stops() else EXIT_GRACE
        if not self._ended.wait(grace * self._interval):
            self.force_exit(self.report_failure(error))

    def _stops(self) -> bool:
        """Return whether a signal has requested a stop, even if this main thread hangs."""
        return self.stop_requested or is_signalled()

    def force_exit(self, cause: BaseException) -> None:
        """End this process, whose main thread hangs, with an error and its exit code."""
        if not isinstance(cause, RemoteRankError):
            self.on_forced_exit(cause)
            text = str(cause) or "ended by a signal; --resume continues from the newest checkpoint"
            print(f"error: {text}", file=sys.stderr, flush=True)  # noqa: T201
        sys.stdout.flush()
        os._exit(exit_code_of(cause))

    def destroy_collectives(self, cause: BaseException) -> None:
        """Destroy torch's process group; end this process if a pending collective prevents it."""
        import torch.distributed as dist

        from saetrain.distributed.collectives import abandoned

        ending = threading.Thread(target=dist.destroy_process_group, daemon=True)
        ending.start()
        ending.join(5 * self._interval)
        if ending.is_alive():  # a suspended rank neither sends nor closes its connection
            self.force_exit(cause)
        if abandoned.is_set():  # torch would wait for the other ranks once more when Python ends
            atexit.register(_exit_at_once, exit_code_of(cause))


def _exit_at_once(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _is_broken(error: BaseException) -> bool:
    """Return whether a collective, or the store, has lost its connection to another process."""
    words = ("gloo", "nccl", "connection", "socket", "peer", "store", "broken pipe", "timed out")
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in words)


@contextmanager
def connect(world: World) -> Iterator[tuple[StoreGroup, Store]]:
    """Connect the processes that torchrun started, for a run that all of them end together.

    Args:
        world: rank of this process, and how many there are.

    Yields:
        The group, and a store for collectives.

    Raises:
        RemoteRankError: another rank has failed, and has recorded why.
        LostRankError: another rank has ended without an error; this rank reports it.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    store = open_store(world.rank, world.world_size, f"fit on rank {world.rank}", JOIN_SECONDS)
    store = PrefixStore(f"run {next(_connections)}", store)  # one process may do several runs
    group = StoreGroup(PrefixStore("group", store), world)
    stopped: RunStopped | None = None
    try:
        try:
            yield group, PrefixStore("collectives", store)
        except RunStopped as stop:  # on all ranks, at the same step
            stopped = stop
        group.shutdown()
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:
        cause = group.report_failure(error)
        if isinstance(cause, RemoteRankError):
            group.wait_for_exit(cause.failure.rank)
        if dist.is_initialized() and dist.get_backend() == "gloo":  # NCCL would wait for all ranks
            group.destroy_collectives(cause)
        if cause is error:
            raise
        raise cause from error
    finally:
        group.close()
    if stopped is not None:
        if world.rank > 0:
            group.wait_for_exit(0)
        raise stopped


_PROC = Path("/proc")


def process_token() -> str:
    """Return a token of this process that is unique over machines and time."""
    return f"{_machine()} {os.getpid()} {_start_time(os.getpid())}"


def has_exited(token: str) -> bool:
    """Return whether the process that a token names has ended; False on another machine."""
    machine, pid, start_time = token.rsplit(" ", 2)
    return machine == _machine() and _start_time(int(pid)) != start_time


def is_suspended(token: str) -> bool:
    """Return whether the process of a token is suspended (SIGSTOP, a debugger) on this machine."""
    machine, pid, _ = token.rsplit(" ", 2)
    return machine == _machine() and _state(int(pid))[:1] in (["T"], ["t"])


def _machine() -> str:
    """Identify the boot of a machine and the container: process ids are unique within both."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # in some containers
        boot = os.uname().nodename
    return f"{boot} {(_PROC / 'self/ns/pid').readlink()}"


def _start_time(pid: int) -> str:
    """Return the start time of a process, in clock ticks; '' if it has ended or is a zombie."""
    state = _state(pid)
    return "" if not state or state[0] in "ZX" else state[19]  # field 22 of proc(5)


def _state(pid: int) -> list[str]:
    """Return the fields of proc(5) from the third on, a process's state; none if it has ended."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
