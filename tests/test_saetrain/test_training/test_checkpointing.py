"""What must not be saved. D d_in, M num_latents, K k."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actcache.errors import RunError
from saetrain.distributed.coordinator import Coordinator
from saetrain.training.checkpointing import save
from saetrain.training.sae_trainer import SaeTrainer
from saetrain.training.step import train_step

D, M, K = 16, 64, 4
BOTH_OPTIMIZERS = pytest.mark.parametrize("optimizer", ["signum", "adam"])


@BOTH_OPTIMIZERS
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_nothing_is_saved_after_a_loss_that_was_not_finite(
    batches: Callable[[torch.dtype], Tensor],
    make_trainee: Callable[..., SaeTrainer],
    tmp_path: Path,
    optimizer: str,
    value: float,
) -> None:
    """signum alone would keep the weights finite: the sign of NaN is 0."""
    trainer = make_trainee(D, M, K, optimizer=optimizer)
    rows = batches(torch.float32)[0].clone()
    train_step(trainer, rows, 0, 0.0)
    rows[3, 5] = value
    train_step(trainer, rows, 1, 0.0)
    with pytest.raises(RunError, match=r"loss of layers\.0 is not finite by step 2"):
        save(tmp_path, 2, [trainer], {"epoch": 0, "step": 1}, Coordinator())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_nothing_is_saved_of_weights_that_are_not_finite(
    batches: Callable[[torch.dtype], Tensor],
    make_trainee: Callable[..., SaeTrainer],
    tmp_path: Path,
    name: str,
) -> None:
    trainer = make_trainee(D, M, K)
    train_step(trainer, batches(torch.float32)[0], 0, 0.0)
    with torch.no_grad():
        trainer.sae.get_parameter(name).view(-1)[-1] = math.inf
    with pytest.raises(RunError, match="not finite"):
        save(tmp_path, 1, [trainer], {"epoch": 0, "step": 1}, Coordinator())
    assert not list(tmp_path.iterdir())
