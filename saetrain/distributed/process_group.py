"""The processes of one run, as torchrun starts them: words that they leave for each other.

The words are in torch's key-value store, which whoever started the processes holds; nobody waits
for anybody but in `hear`. A thread of each looks after its neighbour: one that ends without a word
is told by the others, in seconds on its own machine and in half a minute on others. However deep in
a collective a process hangs by then, it ends.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from actcache.core.distributed import World
from actcache.core.json_codec import decode_json, parse_dataclass, to_json
from actcache.errors import ActcacheError, RunError
from saetrain.distributed.signals import RunStopped

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


HEARTBEAT_SECONDS = 1.0
"""Seconds between two signs of life."""
MISSED_HEARTBEATS = 30
"""Without a new sign, a process of another machine is given up."""
EXIT_GRACE = 20
"""Beats in which a process must end once another is known to have failed."""
JOIN_TIMEOUT = timedelta(minutes=10)
"""Until all must have come."""

_PAUSE = 0.005  # seconds between two looks at the store
_meetings = itertools.count()


@dataclass(frozen=True)
class Failure:
    """Why a run ends: the first error of any of its processes."""

    rank: int
    """Whose error it is."""
    code: int
    """Its exit code."""
    what: str
    """Its first line."""


def failure_of(error: BaseException, rank: int) -> Failure:
    """What the others are told of an error."""
    code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
    return Failure(rank, int(code), (str(error) or type(error).__name__).splitlines()[0])


class RemoteRankError(RunError):
    """Another process has failed, and tells why: this one ends with the same code, silently."""

    def __init__(self, failure: Failure) -> None:
        self.failure, self.exit_code = failure, failure.code
        super().__init__(
            f"process {failure.rank} of this run has failed", got=failure.what, remedy="see there"
        )


class LostRankError(RunError):
    """Another process has ended without a word."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        super().__init__(
            f"process {rank} of this run is gone without a word",
            expected="an error that says why",
            got="nothing: it was killed, or its machine has failed",
            remedy="look for a lack of memory (dmesg says); --resume goes on from what is saved",
        )


class StoreGroup:
    """This process among those of its run.

    Args:
        store: shared by them all, and of nobody else.
        rank: this process's number.
        world_size: how many there are.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.stop_requested = False
        """Whether any of them has been asked to stop, by `ask_to_stop`; known within a beat."""
        self.while_waiting: Callable[[], None] = lambda: None
        """Done now and then by who waits for a word."""
        self.on_forced_exit: Callable[[BaseException], None] = lambda _: None
        """Told why, if this process has to be ended although it hangs."""
        self._store, self._beat = store, HEARTBEAT_SECONDS
        self._trouble: ActcacheError | None = None
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._look_after, name="peers", daemon=True)
        self.put(f"name/{rank}", process_token())
        self._names = [
            self._first_word(f"name/{r}", JOIN_TIMEOUT.total_seconds()) for r in range(world_size)
        ]
        self._watch.start()

    def put(self, word: str, value: str) -> None:
        """Leave a word for the others."""
        self._store.set(word, value)

    def get(self, word: str) -> str:
        """A word that is said, or will be.

        Raises:
            PeerFailedError: another process fails meanwhile.
            PeerGoneError: another process ends meanwhile, without a word.
        """
        while not self.has(word):
            self.poll()
        return self._get(word)

    def poll(self) -> None:
        """Wait a moment for others; raises what `hear` raises."""
        self.check()
        self.while_waiting()
        time.sleep(_PAUSE)

    def has(self, *words: str) -> bool:
        """Whether all of them are said by now."""
        return bool(self._store.check(list(words)))

    def pop(self, word: str) -> str:
        """Hear a word that nobody else will ask for again."""
        value = self.get(word)
        self._store.delete_key(word)
        return value

    def check(self) -> None:
        """Raise what `hear` raises, without waiting."""
        if self._trouble is not None:
            raise self._trouble

    def request_stop(self) -> None:
        """Let all know that the run is to stop."""
        self.put("stop", "")

    def check_equal(self, what: str, value: str) -> None:
        """Wait until all have said their value, and refuse other ones than ours.

        Raises:
            RunError: they differ.
        """
        self.put(f"agree/{what}/{self.rank}", value)
        for rank in range(self.world_size):
            other = self.get(f"agree/{what}/{rank}")
            if other != value:
                raise RunError(
                    f"the processes of this run differ in {what}",
                    expected=f"{value}, as on rank {self.rank}",
                    got=f"{other} on rank {rank}",
                    remedy="do all machines see the same folders and library versions?",
                )

    def report_failure(self, error: BaseException) -> BaseException:
        """Tell the others of an error, unless one of them was first.

        Returns:
            What this process should end with: the error itself, if it is to tell it; else a
            `RemoteRankError`.
        """
        if isinstance(error, RemoteRankError):
            return error
        with suppress(RuntimeError):  # the store is gone, with whoever held it
            cause = self._cause(error)
            if isinstance(cause, RemoteRankError):
                return cause
            if self._store.add("failures", 1) > 1:
                return RemoteRankError(self._failure())
            self.put("failed", to_json(failure_of(cause, self.rank)).decode())
            return cause
        return error

    def wait_for_exit(self, rank: int) -> None:
        """Let another process end first, and say why: the launcher ends all once one has."""
        deadline = time.monotonic() + 5 * self._beat
        while not has_exited(self._names[rank]) and time.monotonic() < deadline:
            time.sleep(_PAUSE)

    def shutdown(self) -> None:
        """Wait until all others are ready to leave, too.

        Raises:
            PeerFailedError: another process fails meanwhile.
            PeerGoneError: another process ends meanwhile, without a word.
        """
        self.put(f"done/{self.rank}", "")
        for rank in range(self.world_size):
            self.get(f"done/{rank}")
        self._end_watch()
        self.put(f"left/{self.rank}", "")
        if self.rank == 0:  # it may hold the store
            with suppress(RunError):
                for rank in range(self.world_size):
                    self._first_word(f"left/{rank}", EXIT_GRACE * self._beat)

    def close(self) -> None:
        """End the thread."""
        self._end_watch()

    def _end_watch(self) -> None:
        self._ended.set()
        if self._watch.is_alive():
            self._watch.join()

    def _first_word(self, word: str, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while not self.has(word):
            if time.monotonic() > deadline:
                raise RunError(
                    "not all processes of this run have come",
                    expected=f"{self.world_size} in {seconds:.0f} s",
                    got=f"no word {word} of one of them",
                    remedy="was torchrun started on every machine?",
                )
            time.sleep(_PAUSE)
        return self._get(word)

    def _get(self, word: str) -> str:
        return bytes(self._store.get(word)).decode()

    def _failure(self) -> Failure:
        self._first_word("failed", EXIT_GRACE * self._beat)
        return parse_dataclass(Failure, decode_json(bytes(self._store.get("failed"))), "failure")

    def _cause(self, error: BaseException) -> BaseException:
        """What is behind an error: of a collective, or of torchrun's SIGTERM, perhaps a peer."""
        # A collective breaks as a peer ends; the launcher ends the others once one has failed.
        broken = isinstance(error, RuntimeError) and _is_of_a_collective(error)
        if not broken and not isinstance(error, KeyboardInterrupt):
            return error
        deadline = time.monotonic() + (MISSED_HEARTBEATS + 5) * self._beat
        while True:
            if self._store.check(["failed"]):
                return RemoteRankError(self._failure())
            for rank in range(self.world_size):
                if self._is_gone(rank):
                    return LostRankError(rank)
            if not broken or time.monotonic() > deadline:
                return error
            if isinstance(self._trouble, LostRankError):
                return self._trouble
            time.sleep(_PAUSE)

    def _is_gone(self, rank: int) -> bool:
        return has_exited(self._names[rank]) and not self._store.check([f"done/{rank}"])

    def _look_after(self) -> None:
        """Look after the next rank, and see whether any has failed."""
        neighbour = (self.rank + 1) % self.world_size
        beat, unchanged, last = 0, 0, ""
        while not self._ended.wait(self._beat):
            try:
                beat += 1
                self.put(f"beat/{self.rank}", str(beat))
                self.stop_requested = self.stop_requested or self.has("stop")
                if self._store.check(["failed"]):
                    self._give_up(RemoteRankError(self._failure()))
                    return
                word = f"beat/{neighbour}"
                sign = self._get(word) if self.has(word) else ""
                unchanged, last = (unchanged + 1 if sign == last else 0), sign
                # Counted in beats of our own: a machine that was asleep has not lost anybody.
                silent = unchanged >= MISSED_HEARTBEATS and not self.has(f"done/{neighbour}")
                if silent or self._is_gone(neighbour):
                    self._give_up(LostRankError(neighbour))
                    return
            except RuntimeError:  # the store is gone with the process that holds it
                self._give_up(LostRankError(0))
                return

    def _give_up(self, trouble: ActcacheError) -> None:
        """Let the main thread end, and end the process if it does not: it may hang in C."""
        self._trouble = trouble
        if not self._ended.wait(EXIT_GRACE * self._beat):
            told = self.report_failure(trouble)
            if not isinstance(told, RemoteRankError):
                self.on_forced_exit(told)
                print(f"error: {told}", file=sys.stderr, flush=True)  # noqa: T201
            sys.stdout.flush()
            os._exit(getattr(told, "exit_code", 1))


def _is_of_a_collective(error: BaseException) -> bool:
    words = ("gloo", "nccl", "connection", "socket", "peer", "store", "broken pipe", "timed out")
    return any(word in str(error).lower() for word in words)


@contextmanager
def connect(ranks: World) -> Iterator[tuple[StoreGroup, Store]]:
    """Bring the processes that torchrun started together; with all of them or none it ends.

    Args:
        ranks: which one this is.

    Yields:
        The peers, and a store for collectives.

    Raises:
        PeerFailedError: another process has failed, and tells why.
        PeerGoneError: another process has ended without a word; this one is to tell.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://"))
    store = PrefixStore(f"run {next(_meetings)}", store)  # they may meet again
    store_group = StoreGroup(PrefixStore("peers", store), ranks.rank, ranks.world_size)
    stopped: RunStopped | None = None
    try:
        try:
            yield store_group, PrefixStore("collectives", store)
        except RunStopped as stop:  # so all are, at the same step
            stopped = stop
        store_group.shutdown()
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:
        cause = store_group.report_failure(error)
        if isinstance(cause, RemoteRankError):
            store_group.wait_for_exit(cause.failure.rank)
        if dist.is_initialized() and dist.get_backend() == "gloo":  # NCCL would wait for the others
            dist.destroy_process_group()
        if cause is error:
            raise
        raise cause from error
    finally:
        store_group.close()
    if stopped is not None:
        if ranks.rank > 0:
            store_group.wait_for_exit(0)
        raise stopped


_PROC = Path("/proc")


def process_token() -> str:
    """A name that no other process has, on any machine, now or later."""
    return f"{_machine()} {os.getpid()} {_started(os.getpid())}"


def has_exited(name: str) -> bool:
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
