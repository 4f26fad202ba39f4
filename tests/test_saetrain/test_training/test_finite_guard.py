from __future__ import annotations

import math

import torch

from saetrain.training.finite_guard import FiniteGuard


def test_a_guard_remembers_the_first_bad_step_only() -> None:
    guard = FiniteGuard(torch.device("cpu"))
    values = [1.0, math.inf, 2.0, math.nan]
    found = [bool(guard.check(torch.tensor(v), step)) for step, v in enumerate(values)]
    assert found == [True, False, False, False]
    assert guard.first_bad() == 1


def test_the_step_may_lie_on_the_device() -> None:
    guard, step = FiniteGuard(torch.device("cpu")), torch.zeros((), dtype=torch.int64)
    for number, value in enumerate([1.0, 2.0, math.nan, math.nan]):
        step.fill_(number)
        guard.check(torch.tensor(value), step)
    assert guard.first_bad() == 2
