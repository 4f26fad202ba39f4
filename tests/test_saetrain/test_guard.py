from __future__ import annotations

import math

import torch

from saetrain.guard import Guard


def test_a_guard_remembers_the_first_bad_step_only() -> None:
    guard = Guard(torch.device("cpu"))
    values = [1.0, math.inf, 2.0, math.nan]
    found = [bool(guard.check(torch.tensor(v), step)) for step, v in enumerate(values)]
    assert found == [True, False, False, False]
    assert guard.first_bad() == 1
