"""Waits for other processes: they end on a signal and at a deadline, and print their cause."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

import actcache.core.rendezvous
from actcache.core.process import World
from actcache.core.rendezvous import gather, open_store, ranks
from actcache.errors import ConfigError, RunError


class SignalRaised(BaseException):
    """Raised by the signal handler of a test."""


@pytest.fixture(autouse=True)
def _address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


@pytest.fixture
def _alarm() -> Iterator[None]:
    """Send a signal in half a second, whose handler raises `SignalRaised`."""

    def stop(*_: object) -> None:
        raise SignalRaised

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("_alarm")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_wait_for_ranks_that_do_not_start_ends_on_a_signal(rank: int) -> None:
    with pytest.raises(SignalRaised):
        World(rank, 2).check_equal_then_run_on_rank_zero(b"x", lambda: None)


@pytest.mark.usefixtures("_alarm")
def test_a_wait_for_the_work_of_rank_zero_ends_on_a_signal() -> None:
    store = HashStore()
    with pytest.raises(SignalRaised):
        gather(store, "acted", [0], "harvest")


def test_a_wait_ends_at_its_deadline_with_the_ranks_that_are_missing() -> None:
    store = HashStore()
    store.set("digest/1", "")
    with pytest.raises(RunError, match=r"(?s)ranks 0, 2 did not join.*got: +1 of them"):
        gather(store, "digest", range(3), "harvest", seconds=0.1)
    with pytest.raises(RunError, match=r"nothing answers at 127\.0\.0\.1"):
        open_store(1, 2, "harvest", seconds=0.1)


@pytest.mark.parametrize(
    ("wait", "whom"),
    [
        (lambda: gather(HashStore(), "digest", range(2), "harvest", 0.1), "ranks 0, 1"),
        (lambda: open_store(1, 2, "harvest", 0.1), "rank 0 at 127.0.0.1"),
    ],
)
def test_a_long_wait_is_reported_repeatedly_with_what_is_missing(
    wait: Callable[[], object],
    whom: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(actcache.core.rendezvous, "FIRST_NOTICE", 0.0)
    monkeypatch.setattr(actcache.core.rendezvous, "NEXT_NOTICE", 0.02)
    with pytest.raises(RunError):
        wait()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    assert all(line.startswith(f"harvest: waiting for {whom}") for line in lines)


@pytest.mark.parametrize("port", ["", "x", "0", "65536", "-1", "1e3", "٣", "9" * 30])
def test_an_address_that_no_launcher_sets_is_refused(
    port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ConfigError, match="where the processes meet"):
        open_store(0, 2, "harvest")


def test_a_port_that_another_program_holds_is_an_error_with_the_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(RunError, match=r"cannot meet at 127\.0\.0\.1"):
            open_store(0, 2, "harvest")


def test_many_ranks_are_counted() -> None:
    assert ranks([3]) == "rank 3"
    assert ranks(range(10)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
