"""`saetrain.optim.schedule`: sparsify's laws."""

from __future__ import annotations

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from saetrain.optim import default_lr
from saetrain.optim.schedule import warmup_then_decay


@pytest.mark.parametrize(
    ("optimizer", "num_latents", "lr"),
    [
        ("signum", 2**14, 5e-3),
        ("signum", 2**16, 2.5e-3),
        ("signum", 4608, 5e-3 / (4608 / 2**14) ** 0.5),
        ("adam", 2**14, 2e-4),
        ("adam", 2**12, 4e-4),
    ],
)
def test_the_default_learning_rate_falls_with_the_root_of_the_width(
    optimizer: str, num_latents: int, lr: float
) -> None:
    assert default_lr(optimizer, num_latents) == pytest.approx(lr, rel=1e-15)  # type: ignore[arg-type]


@pytest.mark.parametrize(("warmup", "steps"), [(0, 7), (3, 10), (10, 10), (20, 10), (1, 1), (0, 1)])
def test_warm_up_and_decay_are_those_of_transformers(warmup: int, steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        assert warmup_then_decay(step, warmup, steps) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-15
        )
        optimizer.step()
        schedule.step()
