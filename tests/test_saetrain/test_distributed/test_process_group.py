"""What processes say to each other, and how they learn of each other's end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.distributed import HashStore

import saetrain.distributed.process_group
from actcache.errors import ConfigError, CorruptShardError, RunError
from saetrain.distributed.process_group import Failure, PeerFailedError, PeerGoneError, Peers

SECONDS = 60


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[Peers]]]:
    """Processes of one run, as threads of this one: their names say that they are different."""
    monkeypatch.setattr(saetrain.distributed.process_group, "BEAT", 0.02)
    monkeypatch.setattr(saetrain.distributed.process_group, "BEATS", 15)
    monkeypatch.setattr(
        saetrain.distributed.process_group, "GRACE", 10_000
    )  # nobody may end this process
    made: list[Peers] = []

    def make(world_size: int) -> list[Peers]:
        store = HashStore()
        together = in_threads(
            [lambda rank=rank: Peers(store, rank, world_size) for rank in range(world_size)]
        )
        made.extend(together)
        return together

    yield make
    for peers in made:
        peers.close()


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """What each call gives, or raises, all of them at once."""
    results: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            results[number] = calls[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    return results


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_word_is_heard_by_all_and_taken_by_one(meet: Callable[[int], list[Peers]]) -> None:
    peers = meet(3)
    heard = in_threads(
        [
            lambda: peers[0].hear("word"),
            lambda: peers[1].hear("word"),
            lambda: peers[2].say("word", "of two"),
        ]
    )
    assert heard == ["of two", "of two", None]
    assert peers[1].take("word") == "of two"
    assert not peers[0].is_said("word")


def test_those_who_differ_are_told_in_what(meet: Callable[[int], list[Peers]]) -> None:
    peers = meet(2)
    assert in_threads([lambda p=p: p.agree("steps", "4") for p in peers]) == [None, None]
    zero, one = in_threads(
        [lambda: peers[0].agree("places", "4"), lambda: peers[1].agree("places", "5")]
    )
    assert isinstance(zero, RunError)
    assert "differ in places" in str(zero)
    assert "5 on rank 1" in str(zero)
    assert isinstance(one, RunError)


def test_the_first_error_is_told_once_and_ends_all_with_its_code(
    meet: Callable[[int], list[Peers]],
) -> None:
    peers = meet(3)
    error = CorruptShardError("shard 7 has changed\nmore")
    assert peers[1].fail(error) is error
    late = peers[2].fail(ConfigError("of its own"))
    assert isinstance(late, PeerFailedError)
    assert late.exit_code == CorruptShardError.exit_code
    assert late.failure == Failure(1, CorruptShardError.exit_code, "shard 7 has changed")
    with pytest.raises(PeerFailedError, match="process 1 of this run has failed"):
        peers[0].hear("a word that nobody says")


@pytest.mark.parametrize(
    "error", [RuntimeError("gloo: Connection closed by peer"), KeyboardInterrupt()]
)
def test_a_collective_that_breaks_and_a_launcher_that_ends_all_are_not_the_cause(
    error: BaseException, meet: Callable[[int], list[Peers]]
) -> None:
    peers = meet(2)
    peers[1].fail(ConfigError("the cause"))
    found = peers[0].fail(error)
    assert isinstance(found, PeerFailedError)
    assert found.failure.what == "the cause"


def test_an_interruption_of_a_process_whose_peers_are_well_is_its_own(
    meet: Callable[[int], list[Peers]],
) -> None:
    peers = meet(2)
    stop = KeyboardInterrupt()
    assert peers[0].fail(stop) is stop
    with pytest.raises(PeerFailedError) as failed:
        peers[1].hear("a word that nobody says")
    assert failed.value.exit_code == 130


def test_a_killed_process_of_this_machine_is_missed_at_once(
    meet: Callable[[int], list[Peers]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saetrain.distributed.process_group, "BEATS", 10**9)
    peers = meet(2)
    tell = "from saetrain.distributed.process_group import name_of_this_process as n; print(n())"
    gone = subprocess.run([sys.executable, "-c", tell], capture_output=True, text=True, check=True)
    peers[0]._names[1] = gone.stdout.strip()
    with pytest.raises(PeerGoneError, match="process 1 of this run is gone"):
        peers[0].hear("a word that nobody says")


def test_a_process_of_another_machine_is_given_up_when_it_gives_no_sign(
    meet: Callable[[int], list[Peers]],
) -> None:
    peers = meet(3)
    peers[1].close()
    with pytest.raises(PeerGoneError) as gone:  # 0 looks after 1, and 2 hears of it
        peers[0].hear("a word that nobody says")
    assert gone.value.rank == 1
    told = peers[0].fail(gone.value)
    assert told is gone.value
    with pytest.raises(PeerFailedError, match="process 0"):
        peers[2].hear("a word that nobody says")


def test_who_has_left_is_not_missed(meet: Callable[[int], list[Peers]]) -> None:
    peers = meet(3)
    assert in_threads([p.leave for p in peers]) == [None] * 3
    for p in peers:
        p.check()


HANG = """
import sys, threading, time
import saetrain.distributed.process_group
from torch.distributed import HashStore
from saetrain.distributed.process_group import Peers

saetrain.distributed.process_group.BEAT, saetrain.distributed.process_group.GRACE = 0.02, 5
store = HashStore()
first = []
thread = threading.Thread(target=lambda: first.append(Peers(store, 1, 2)))
thread.start()
peers = Peers(store, 0, 2)
thread.join()
first[0].close()
peers.last_words = lambda error: print("last words:", error.exit_code)
saetrain.distributed.process_group.BEATS = 3
threading.Lock().acquire()
lock = threading.Lock()
lock.acquire()
lock.acquire()  # for ever
"""


def test_a_process_that_hangs_while_another_is_gone_is_ended_with_the_error() -> None:
    command = [sys.executable, "-c", HANG]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == RunError.exit_code, done.stderr
    assert "error: process 1 of this run is gone without a word" in done.stderr
    assert "last words: 11" in done.stdout
