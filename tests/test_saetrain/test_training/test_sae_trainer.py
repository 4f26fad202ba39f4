"""Checkpoint state and finite guard of an SAE in training. N rows, D d_in, M num_latents, K k."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saetrain.training.sae_trainer import FiniteGuard, SaeTrainer
from saetrain.training.step import train_step

N, D, M, K = 64, 16, 64, 4
CPU = torch.device("cpu")
BOTH_OPTIMIZERS = pytest.mark.parametrize("optimizer", ["signum", "adam"])


@BOTH_OPTIMIZERS
def test_training_continues_bit_for_bit_from_loaded_state(
    batches: Callable[[torch.dtype], Tensor],
    make_trainer: Callable[..., SaeTrainer],
    optimizer: str,
) -> None:
    ours, resumed = (
        make_trainer(
            D, M, K, optimizer=optimizer, dead_after=2 * N, auxk_alpha=1.0, auxk_by_residual=True
        )
        for _ in range(2)
    )
    rows = batches(torch.float32)
    for trainer in (ours, resumed):
        with torch.no_grad():
            trainer.sae.b_enc[M // 2 :] = -5.0
    for step in range(7):
        train_step(ours, rows[step], step)
    assert ours.meter.sums[1] > 0  # AuxK
    tensors, numbers = ours.state()
    resumed.load_state({name: t.detach().clone() for name, t in tensors.items()}, dict(numbers))
    for step in range(7, 14):
        train_step(ours, rows[step], step)
        train_step(resumed, rows[step], step)
    (expected, numbers), (got, numbers_again) = ours.state(), resumed.state()
    assert numbers == numbers_again
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_the_guard_keeps_the_first_step_that_was_not_finite() -> None:
    guard = FiniteGuard(CPU)
    values = [1.0, math.inf, 2.0, math.nan]
    found = [bool(guard.check(torch.tensor(v), step)) for step, v in enumerate(values)]
    assert found == [True, False, False, False]
    assert guard.first_bad() == 1


def test_the_guard_takes_the_step_number_from_device_memory() -> None:
    guard, step = FiniteGuard(CPU), torch.zeros((), dtype=torch.int64)
    for number, value in enumerate([1.0, 2.0, math.nan, math.nan]):
        step.fill_(number)
        guard.check(torch.tensor(value), step)
    assert guard.first_bad() == 2
