"""Messages between ranks, the recorded failure, and detection of lost ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

import saetrain.distributed.process_group
from actcache.core.process import World
from actcache.errors import ConfigError, CorruptShardError, RunError
from saetrain.distributed.process_group import Failure, LostRankError, RemoteRankError, StoreGroup

SECONDS = 60


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[StoreGroup]]]:
    """Connect ranks that are threads of this process."""
    monkeypatch.setattr(saetrain.distributed.process_group, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(saetrain.distributed.process_group, "MISSED_HEARTBEATS", 15)
    monkeypatch.setattr(
        saetrain.distributed.process_group, "EXIT_GRACE", 10_000
    )  # os._exit would end this process
    made: list[StoreGroup] = []

    def make(world_size: int) -> list[StoreGroup]:
        store = HashStore()
        groups = in_threads(
            [
                lambda rank=rank: StoreGroup(store, World(rank, world_size))
                for rank in range(world_size)
            ]
        )
        made.extend(groups)
        return groups

    yield make
    for group in made:
        group.close()


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """Run calls in threads, and return the result or exception of each."""
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


def test_get_leaves_a_key_and_pop_deletes_it(connect: Callable[[int], list[StoreGroup]]) -> None:
    groups = connect(3)
    results = in_threads(
        [
            lambda: groups[0].get("key"),
            lambda: groups[1].get("key"),
            lambda: groups[2].put("key", "value"),
        ]
    )
    assert results == ["value", "value", None]
    assert groups[1].pop("key") == "value"
    assert not groups[0].has("key")


def test_a_barrier_waits_for_every_rank(connect: Callable[[int], list[StoreGroup]]) -> None:
    groups, reached = connect(3), [0, 0, 0]

    def pass_barriers(rank: int) -> None:
        for number in range(5):
            reached[rank] = number
            groups[rank].barrier()
            assert min(reached) >= number
            groups[rank].barrier()

    calls = [lambda rank=rank: pass_barriers(rank) for rank in range(3)]
    assert in_threads(calls) == [None] * 3


def test_the_first_error_is_recorded_and_ends_all_ranks_with_its_code(
    connect: Callable[[int], list[StoreGroup]],
) -> None:
    groups = connect(3)
    error = CorruptShardError("shard 7 has changed", remedy="more")
    assert groups[1].report_failure(error) is error
    late = groups[2].report_failure(ConfigError("a later error"))
    assert isinstance(late, RemoteRankError)
    assert late.exit_code == CorruptShardError.exit_code
    assert late.failure == Failure(1, CorruptShardError.exit_code, "shard 7 has changed")
    with pytest.raises(RemoteRankError, match="process 1 of this run has failed"):
        groups[0].get("a key that is never set")


@pytest.mark.parametrize(
    "error", [RuntimeError("gloo: Connection closed by peer"), KeyboardInterrupt()]
)
def test_a_broken_collective_and_a_signal_of_torchrun_are_not_the_cause(
    error: BaseException, connect: Callable[[int], list[StoreGroup]]
) -> None:
    groups = connect(2)
    groups[1].report_failure(ConfigError("the cause"))
    found = groups[0].report_failure(error)
    assert isinstance(found, RemoteRankError)
    assert found.failure.what == "the cause"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("gloo: Connection closed by peer"), LostRankError),
        (RuntimeError("Broken pipe"), LostRankError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ConfigError("an option"), ConfigError),
    ],
)
def test_a_connection_that_breaks_after_the_store_is_gone_is_a_lost_process(
    error: BaseException,
    kind: type[BaseException],
    connect: Callable[[int], list[StoreGroup]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(*_: object) -> bool:
        raise RuntimeError("sendBytes failed: Broken pipe")

    group = connect(2)[0]
    for method in ("has", "put"):
        monkeypatch.setattr(group, method, gone)
    monkeypatch.setattr(group, "_store", SimpleNamespace(add=gone))
    assert isinstance(group.report_failure(error), kind)


def test_a_process_group_that_cannot_be_destroyed_ends_the_process(
    connect: Callable[[int], list[StoreGroup]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collective is pending whose other rank has stopped."""
    ended = threading.Event()
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: ended.wait(SECONDS))
    forced: list[BaseException] = []
    group = connect(2)[0]
    monkeypatch.setattr(group, "force_exit", forced.append)
    stop = KeyboardInterrupt()
    group.destroy_collectives(stop)
    ended.set()
    assert forced == [stop]


def test_an_interrupt_with_all_other_ranks_alive_is_the_failure(
    connect: Callable[[int], list[StoreGroup]],
) -> None:
    groups = connect(2)
    stop = KeyboardInterrupt()
    assert groups[0].report_failure(stop) is stop
    with pytest.raises(RemoteRankError) as failed:
        groups[1].get("a key that is never set")
    assert failed.value.exit_code == 130


def test_a_killed_process_of_this_machine_is_detected_by_its_token(
    connect: Callable[[int], list[StoreGroup]],
    monkeypatch: pytest.MonkeyPatch,
    fork_server: Any,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(saetrain.distributed.process_group, "MISSED_HEARTBEATS", 10**9)
    groups = connect(2)
    script = tmp_path / "token.py"
    script.write_text(
        "from saetrain.distributed.process_group import process_token as n; print(n())"
    )
    groups[0]._tokens[1] = fork_server.start(script).communicate()[0].strip()
    with pytest.raises(LostRankError, match="process 1 of this run has ended"):
        groups[0].get("a key that is never set")


def test_a_rank_without_heartbeats_is_lost(
    connect: Callable[[int], list[StoreGroup]],
) -> None:
    groups = connect(3)
    groups[1].close()
    with pytest.raises(LostRankError) as lost:  # rank 0 watches rank 1, and records the failure
        groups[0].get("a key that is never set")
    assert lost.value.rank == 1
    assert "process 1 of this run does not answer" in str(lost.value)
    reported = groups[0].report_failure(lost.value)
    assert reported is lost.value
    with pytest.raises(RemoteRankError, match="process 0"):
        groups[2].get("a key that is never set")


def test_after_a_signal_a_suspended_rank_is_lost_sooner(
    connect: Callable[[int], list[StoreGroup]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a run ends before torchrun kills it, where a stopped rank cannot save."""
    monkeypatch.setattr(saetrain.distributed.process_group, "MISSED_HEARTBEATS", 10**9)
    suspended = [False]
    module = saetrain.distributed.process_group
    monkeypatch.setattr(module, "is_suspended", lambda _: suspended[0])
    groups = connect(2)
    groups[1].close()
    groups[0].request_stop()
    time.sleep(0.5)
    groups[0].check()  # it may be busy with saving
    suspended[0] = True
    with pytest.raises(LostRankError, match="process 1 of this run does not answer"):
        groups[0].barrier()


def test_a_rank_that_has_shut_down_is_not_lost(connect: Callable[[int], list[StoreGroup]]) -> None:
    groups = connect(3)
    assert in_threads([p.shutdown for p in groups]) == [None] * 3
    for p in groups:
        p.check()


HANG = """
import threading
from torch.distributed import HashStore
from actcache.core.process import World
from saetrain.distributed import process_group
from saetrain.distributed.process_group import StoreGroup

process_group.HEARTBEAT_SECONDS, process_group.EXIT_GRACE = 0.02, 5
store = HashStore()
first = []
thread = threading.Thread(target=lambda: first.append(StoreGroup(store, World(1, 2))))
thread.start()
group = StoreGroup(store, World(0, 2))
thread.join()
first[0].close()
group.on_forced_exit = lambda error: print("forced exit:", error.exit_code)
process_group.MISSED_HEARTBEATS = 3
threading.Lock().acquire()
lock = threading.Lock()
lock.acquire()
lock.acquire()  # for ever
"""


def test_a_rank_that_hangs_after_another_is_lost_is_ended_with_the_error(
    fork_server: Any, tmp_path: Path
) -> None:
    script = tmp_path / "hang.py"
    script.write_text(HANG)
    done = fork_server.start(script)
    done.communicate(SECONDS)
    assert done.returncode == RunError.exit_code, done.stderr
    assert "error: process 1 of this run does not answer" in done.stderr
    assert "forced exit: 11" in done.stdout
