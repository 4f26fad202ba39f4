"""How far processes that share SAEs go ahead of each other."""

from __future__ import annotations

import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

import saetrain.distributed.process_group
from actcache.errors import ConfigError, RunError
from actcache.filesystem.atomic import FileDigest
from saetrain.config.fit_config import FitConfig
from saetrain.distributed.coordinator import (
    Coordinator,
    ModuleParallelCoordinator,
    reports_outcome,
    require_parallel_mode,
)
from saetrain.distributed.partition import MAX_LEAD_BYTES, max_lead_steps
from saetrain.distributed.process_group import Failure, RemoteRankError, StoreGroup
from saetrain.distributed.signals import RunStopped, StopRequested
from saetrain.runs.checkpoint import SaeState, newest_step

APART = 10
STEPS = 60


def test_nobody_is_further_ahead_than_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saetrain.distributed.process_group, "HEARTBEAT_SECONDS", 0.05)
    store, asks, at = HashStore(), [0, 0, 0], [0, 0, 0]
    assert max_lead_steps(1, MAX_LEAD_BYTES // APART) == APART
    widest, turn, errors = [0], threading.Event(), []

    def train(rank: int) -> None:
        try:
            store_group = StoreGroup(store, rank, 3)
            coordinator = ModuleParallelCoordinator(store_group)
            coordinator.init_throttle(0, 1, MAX_LEAD_BYTES // APART)
            for step in range(STEPS):
                if rank == 2 and step == 3:
                    turn.wait(30)  # the others go as far as they may
                asks[rank] = step  # others may hear of it before it returns
                coordinator.throttle(step)
                at[rank] = step
                widest[0] = max(widest[0], max(at) - min(asks))
                if rank == 0 and step == APART:
                    turn.set()
            store_group.shutdown()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert at == [STEPS - 1] * 3
    assert APART - 3 <= widest[0] <= APART


def test_several_processes_must_be_told_what_they_share() -> None:
    config: Any = FitConfig(cache="cache", out="run")
    require_parallel_mode(1, config)
    with pytest.raises(ConfigError, match=r"4 processes(.|\n)*ddp(.|\n)*modules"):
        require_parallel_mode(4, config)


def test_a_process_alone_does_everything() -> None:
    coordinator = Coordinator()
    assert coordinator.is_rank_zero
    assert coordinator.writes_saes
    assert coordinator.assigned_saes([None, None]) == [0, 1]  # type: ignore[list-item]
    coordinator.check_stop_request(7)
    coordinator.stop_signals.received = signal.SIGINT
    with pytest.raises(StopRequested, match="SIGINT"):
        coordinator.check_stop_request(7)


@pytest.mark.parametrize("seed", range(6))
def test_whoever_is_asked_to_stop_all_stop_before_the_same_step(
    seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also while some wait for others: for a checkpoint, or because they are too far ahead."""
    monkeypatch.setattr(saetrain.distributed.process_group, "HEARTBEAT_SECONDS", 0.02)
    state = random.Random(seed)
    store, errors = HashStore(), []
    stopped: dict[int, tuple[int, signal.Signals]] = {}
    slow, asked, at = state.randrange(3), state.randrange(3), state.randrange(1, 30)
    apart, every = state.choice([(3, 1000), (1000, 7), (5, 7), (1000, 1000)])

    def train(rank: int) -> None:
        try:
            store_group = StoreGroup(store, rank, 3)
            coordinator = ModuleParallelCoordinator(store_group)
            coordinator.init_throttle(0, 1, MAX_LEAD_BYTES // max(apart, 8))
            coordinator._max_lead = apart
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
                if rank == asked and step == at:
                    coordinator.stop_signals.received = signal.SIGINT
                if (step + 1) % every == 0:
                    coordinator.finalize_checkpoint(tmp_path, step + 1, {}, {rank: part})
            store_group.shutdown()
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


def test_one_process_alone_says_how_a_run_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped, error = RunStopped(signal.SIGTERM, 7), RunError("of its own")
    other = RemoteRankError(Failure(1, 11, "of another one"))
    assert all(map(reports_outcome, (None, stopped, error)))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        said = [reports_outcome(ending) for ending in (None, stopped, error, other)]
        assert said == [rank == "0", rank == "0", True, False]
