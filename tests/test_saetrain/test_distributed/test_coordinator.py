"""Largest lead of a rank, stop requests, and the rank that reports the outcome."""

from __future__ import annotations

import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

import saetrain.distributed.coordinator
import saetrain.distributed.process_group
from actcache.core.process import World
from actcache.errors import ConfigError, RunError
from actcache.filesystem.atomic import FileDigest
from saetrain.config.fit_config import FitConfig
from saetrain.distributed.coordinator import (
    Coordinator,
    ModuleParallelCoordinator,
    reports_outcome,
    require_parallel_mode,
)
from saetrain.distributed.process_group import Failure, RemoteRankError, StoreGroup
from saetrain.distributed.signals import RunStopped, StopRequested
from saetrain.runs.checkpoint import SaeState, newest_step

MAX_LEAD = 10
STEPS = 60


def test_no_rank_leads_by_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saetrain.distributed.process_group, "HEARTBEAT_SECONDS", 0.05)
    store, next_steps, at = HashStore(), [0, 0, 0], [0, 0, 0]
    largest, resume, errors = [0], threading.Event(), []

    def train(rank: int) -> None:
        try:
            group = StoreGroup(store, World(rank, 3))
            coordinator = ModuleParallelCoordinator(group)
            coordinator.start_throttle(0, MAX_LEAD)
            for step in range(STEPS):
                if rank == 2 and step == 3:
                    resume.wait(30)  # the others lead as far as allowed
                next_steps[rank] = step  # another rank may read it before `throttle` returns
                coordinator.throttle(step)
                at[rank] = step
                largest[0] = max(largest[0], max(at) - min(next_steps))
                if rank == 0 and step == MAX_LEAD:
                    resume.set()
            group.shutdown()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert at == [STEPS - 1] * 3
    assert MAX_LEAD - 3 <= largest[0] <= MAX_LEAD


def test_several_processes_without_parallel_are_refused() -> None:
    config: Any = FitConfig(cache="cache", out="run")
    require_parallel_mode(1, config)
    with pytest.raises(ConfigError, match=r"4 processes(.|\n)*ddp(.|\n)*modules"):
        require_parallel_mode(4, config)


def test_a_single_process_trains_and_writes_all_saes() -> None:
    coordinator = Coordinator()
    assert coordinator.is_rank_zero
    assert coordinator.writes_saes
    assert coordinator.assigned_saes([None, None]) == [0, 1]  # type: ignore[list-item]
    coordinator.check_stop_request(7)
    coordinator.stop_signals.received = signal.SIGINT
    with pytest.raises(StopRequested, match="SIGINT"):
        coordinator.check_stop_request(7)


@pytest.mark.parametrize("seed", range(6))
def test_a_signal_to_one_rank_stops_all_ranks_before_the_same_step(
    seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also while ranks wait for a checkpoint, or because they lead by the limit."""
    monkeypatch.setattr(saetrain.distributed.process_group, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(saetrain.distributed.process_group, "MISSED_AFTER_SIGNAL", 10_000)
    state = random.Random(seed)
    store, errors = HashStore(), []
    stopped: dict[int, tuple[int, signal.Signals]] = {}
    slow, signalled, at = state.randrange(3), state.randrange(3), state.randrange(1, 30)
    max_lead, every = state.choice([(3, 1000), (1000, 7), (5, 7), (1000, 1000)])

    def train(rank: int) -> None:
        try:
            group = StoreGroup(store, World(rank, 3))
            coordinator = ModuleParallelCoordinator(group)
            coordinator.start_throttle(0, max_lead)
            part = SaeState(FileDigest(0, ""), {}, FileDigest(0, ""))
            for step in range(10**6):
                coordinator.throttle(step)
                try:
                    coordinator.check_stop_request(step)
                except StopRequested as stop:
                    stopped[rank] = step, stop.signal
                    coordinator.finalize_checkpoint(tmp_path, step, {}, {rank: part})
                    break
                time.sleep(0.01 if rank == slow else 0.001)
                if rank == signalled and step == at:
                    coordinator.stop_signals.received = signal.SIGINT
                if (step + 1) % every == 0:
                    coordinator.finalize_checkpoint(tmp_path, step + 1, {}, {rank: part})
            group.shutdown()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not errors
    assert len(stopped) == 3
    ((step, number),) = set(stopped.values())
    assert number is signal.SIGINT
    assert step > at
    assert newest_step(tmp_path) == step


def test_a_rank_whose_rows_do_not_come_does_not_hold_up_a_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(saetrain.distributed.coordinator, "STOP_SECONDS", 0.1)
    coordinator = ModuleParallelCoordinator(StoreGroup(HashStore(), World(0, 1)))
    coordinator.start_throttle(0, 10)
    coordinator.group.put("stop/0", "7 15")
    coordinator._stop_step_sent = True
    coordinator.stop_signals.received = signal.SIGTERM
    coordinator.check_stop_request(3, waits=True)
    time.sleep(0.2)
    coordinator.check_stop_request(4)  # rows came: the next wait begins anew
    coordinator.check_stop_request(4, waits=True)
    time.sleep(0.2)
    with pytest.raises(RunError, match=r"(?s)rank 0 .*rows of step 5, to save step 7"):
        coordinator.check_stop_request(4, waits=True)
    with pytest.raises(StopRequested):
        coordinator.check_stop_request(7, waits=True)
    coordinator.group.close()


def test_values_of_one_class_are_broadcast_in_turn_and_answers_gathered_by_rank() -> None:
    store, received, errors = HashStore(), [], []

    def work(rank: int) -> None:
        try:
            group = StoreGroup(store, World(rank, 3))
            coordinator = ModuleParallelCoordinator(group)
            for number in range(4):
                if rank == 0:
                    coordinator.broadcast(World(number, 9))
                    assert coordinator.gather("zero") == [
                        "zero",
                        f"1 has {number}",
                        f"2 has {number}",
                    ]
                else:
                    received.append(coordinator.receive(World).rank)
                    assert coordinator.gather(f"{rank} has {number}") == []
            group.shutdown()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert sorted(received) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_one_rank_reports_the_outcome_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped, error = RunStopped(signal.SIGTERM, 7), RunError("an error of this rank")
    other = RemoteRankError(Failure(1, 11, "an error of rank 1"))
    assert all(map(reports_outcome, (None, stopped, error)))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        reports = [reports_outcome(outcome) for outcome in (None, stopped, error, other)]
        assert reports == [rank == "0", rank == "0", True, False]
