"""The all-gather before each step, which is polled so that signals are handled meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from saetrain.distributed import collectives


class Work:
    """An all-gather that is pending for 500 checks."""

    def __init__(self, gathered: list[Any]) -> None:
        self.gathered, self.checks = gathered, 0

    def is_completed(self) -> bool:
        self.checks += 1
        return self.checks > 500

    def wait(self) -> None:
        for rank, tensor in enumerate(self.gathered):
            tensor.fill_(rank + 1)


class SignalRaised(BaseException):
    """Exception that the handler of a signal raises."""


@pytest.fixture(autouse=True)
def _two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather(gathered: list[Any], _value: Any, *, async_op: bool) -> Work:
        assert async_op
        return Work(gathered)

    monkeypatch.setattr(collectives.dist, "all_gather", all_gather)
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda: 2)


def test_an_all_gather_calls_back_while_other_ranks_are_late() -> None:
    calls: list[None] = []
    assert collectives.all_gather_int(1, lambda: calls.append(None)) == [1, 2]
    assert len(calls) > 100
    assert not collectives.abandoned.is_set()


def test_an_all_gather_ends_when_a_signal_raises() -> None:
    def stop() -> None:
        raise SignalRaised

    with pytest.raises(SignalRaised):
        collectives.all_gather_int(1, stop)
    assert collectives.abandoned.is_set()  # so the process does not wait for it at its end
    collectives.abandoned.clear()
