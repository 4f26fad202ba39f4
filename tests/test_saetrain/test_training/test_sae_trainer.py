"""Checkpoint state of an SAE in training. N rows, D d_in, M num_latents, K k."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saetrain.training.sae_trainer import SaeTrainer
from saetrain.training.step import train_step

N, D, M, K = 64, 16, 64, 4
BOTH_OPTIMIZERS = pytest.mark.parametrize("optimizer", ["signum", "adam"])


@BOTH_OPTIMIZERS
def test_training_continues_bit_for_bit_from_loaded_state(
    batches: Callable[[torch.dtype], Tensor],
    make_trainee: Callable[..., SaeTrainer],
    optimizer: str,
) -> None:
    ours, resumed = (make_trainee(D, M, K, optimizer=optimizer, dead_after=3 * N) for _ in range(2))
    rows = batches(torch.float32)
    for step in range(7):
        train_step(ours, rows[step], step, 1.0)
    tensors, numbers = ours.state()
    resumed.load_state({name: t.detach().clone() for name, t in tensors.items()}, dict(numbers))
    for step in range(7, 14):
        train_step(ours, rows[step], step, 1.0)
        train_step(resumed, rows[step], step, 1.0)
    (expected, numbers), (got, numbers_again) = ours.state(), resumed.state()
    assert numbers == numbers_again
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
