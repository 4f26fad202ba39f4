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
from saetrain.distributed.process_group import Failure, LostRankError, RemoteRankError, StoreGroup

SECONDS = 60


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[StoreGroup]]]:
    """Processes of one run, as threads of this one: their names say that they are different."""
    monkeypatch.setattr(saetrain.distributed.process_group, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(saetrain.distributed.process_group, "MISSED_HEARTBEATS", 15)
    monkeypatch.setattr(
        saetrain.distributed.process_group, "EXIT_GRACE", 10_000
    )  # nobody may end this process
    made: list[StoreGroup] = []

    def make(world_size: int) -> list[StoreGroup]:
        store = HashStore()
        together = in_threads(
            [lambda rank=rank: StoreGroup(store, rank, world_size) for rank in range(world_size)]
        )
        made.extend(together)
        return together

    yield make
    for store_group in made:
        store_group.close()


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


def test_a_word_is_heard_by_all_and_taken_by_one(meet: Callable[[int], list[StoreGroup]]) -> None:
    store_group = meet(3)
    heard = in_threads(
        [
            lambda: store_group[0].get("word"),
            lambda: store_group[1].get("word"),
            lambda: store_group[2].put("word", "of two"),
        ]
    )
    assert heard == ["of two", "of two", None]
    assert store_group[1].pop("word") == "of two"
    assert not store_group[0].has("word")


def test_those_who_differ_are_told_in_what(meet: Callable[[int], list[StoreGroup]]) -> None:
    store_group = meet(2)
    assert in_threads([lambda p=p: p.check_equal("steps", "4") for p in store_group]) == [
        None,
        None,
    ]
    zero, one = in_threads(
        [
            lambda: store_group[0].check_equal("places", "4"),
            lambda: store_group[1].check_equal("places", "5"),
        ]
    )
    assert isinstance(zero, RunError)
    assert "differ in places" in str(zero)
    assert "5 on rank 1" in str(zero)
    assert isinstance(one, RunError)


def test_the_first_error_is_told_once_and_ends_all_with_its_code(
    meet: Callable[[int], list[StoreGroup]],
) -> None:
    store_group = meet(3)
    error = CorruptShardError("shard 7 has changed\nmore")
    assert store_group[1].report_failure(error) is error
    late = store_group[2].report_failure(ConfigError("of its own"))
    assert isinstance(late, RemoteRankError)
    assert late.exit_code == CorruptShardError.exit_code
    assert late.failure == Failure(1, CorruptShardError.exit_code, "shard 7 has changed")
    with pytest.raises(RemoteRankError, match="process 1 of this run has failed"):
        store_group[0].get("a word that nobody says")


@pytest.mark.parametrize(
    "error", [RuntimeError("gloo: Connection closed by peer"), KeyboardInterrupt()]
)
def test_a_collective_that_breaks_and_a_launcher_that_ends_all_are_not_the_cause(
    error: BaseException, meet: Callable[[int], list[StoreGroup]]
) -> None:
    store_group = meet(2)
    store_group[1].report_failure(ConfigError("the cause"))
    found = store_group[0].report_failure(error)
    assert isinstance(found, RemoteRankError)
    assert found.failure.what == "the cause"


def test_an_interruption_of_a_process_whose_peers_are_well_is_its_own(
    meet: Callable[[int], list[StoreGroup]],
) -> None:
    store_group = meet(2)
    stop = KeyboardInterrupt()
    assert store_group[0].report_failure(stop) is stop
    with pytest.raises(RemoteRankError) as failed:
        store_group[1].get("a word that nobody says")
    assert failed.value.exit_code == 130


def test_a_killed_process_of_this_machine_is_missed_at_once(
    meet: Callable[[int], list[StoreGroup]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saetrain.distributed.process_group, "MISSED_HEARTBEATS", 10**9)
    store_group = meet(2)
    tell = "from saetrain.distributed.process_group import process_token as n; print(n())"
    gone = subprocess.run([sys.executable, "-c", tell], capture_output=True, text=True, check=True)
    store_group[0]._names[1] = gone.stdout.strip()
    with pytest.raises(LostRankError, match="process 1 of this run is gone"):
        store_group[0].get("a word that nobody says")


def test_a_process_of_another_machine_is_given_up_when_it_gives_no_sign(
    meet: Callable[[int], list[StoreGroup]],
) -> None:
    store_group = meet(3)
    store_group[1].close()
    with pytest.raises(LostRankError) as gone:  # 0 looks after 1, and 2 hears of it
        store_group[0].get("a word that nobody says")
    assert gone.value.rank == 1
    told = store_group[0].report_failure(gone.value)
    assert told is gone.value
    with pytest.raises(RemoteRankError, match="process 0"):
        store_group[2].get("a word that nobody says")


def test_who_has_left_is_not_missed(meet: Callable[[int], list[StoreGroup]]) -> None:
    store_group = meet(3)
    assert in_threads([p.shutdown for p in store_group]) == [None] * 3
    for p in store_group:
        p.check()


HANG = """
import sys, threading, time
import saetrain.distributed.process_group
from torch.distributed import HashStore
from saetrain.distributed.process_group import StoreGroup

saetrain.distributed.process_group.BEAT, saetrain.distributed.process_group.GRACE = 0.02, 5
store = HashStore()
first = []
thread = threading.Thread(target=lambda: first.append(StoreGroup(store, 1, 2)))
thread.start()
peers = StoreGroup(store, 0, 2)
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
