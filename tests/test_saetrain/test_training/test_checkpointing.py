"""A state that is not finite is never saved. D d_in, M num_latents, K k."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actcache.errors import RunError
from saetrain.config.fit_config import FitConfig
from saetrain.distributed.coordinator import Coordinator
from saetrain.distributed.metric_gathering import NullTracker
from saetrain.training.checkpointing import Checkpointer
from saetrain.training.sae_trainer import SaeTrainer
from saetrain.training.step import train_step

D, M, K = 16, 64, 4
STREAM = {"epoch": 0, "step": 1}
BOTH_OPTIMIZERS = pytest.mark.parametrize("optimizer", ["signum", "adam"])


def checkpointer(root: Path, trainer: SaeTrainer) -> Checkpointer:
    options = FitConfig("cache", str(root))
    return Checkpointer(root, [trainer], NullTracker(), Coordinator(), options, saved=0)


@BOTH_OPTIMIZERS
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_nothing_is_saved_after_a_loss_that_was_not_finite(
    batches: Callable[[torch.dtype], Tensor],
    make_trainer: Callable[..., SaeTrainer],
    tmp_path: Path,
    optimizer: str,
    value: float,
) -> None:
    """signum keeps the weights finite, because sign(NaN) is 0."""
    trainer = make_trainer(D, M, K, optimizer=optimizer)
    rows = batches(torch.float32)[0].clone()
    train_step(trainer, rows, 0)
    rows[3, 5] = value
    train_step(trainer, rows, 1)
    with pytest.raises(RunError, match=r"loss of layers\.0 is not finite by step 2"):
        checkpointer(tmp_path, trainer).save(2, STREAM)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_weights_that_are_not_finite_are_not_saved(
    batches: Callable[[torch.dtype], Tensor],
    make_trainer: Callable[..., SaeTrainer],
    tmp_path: Path,
    name: str,
) -> None:
    trainer = make_trainer(D, M, K)
    train_step(trainer, batches(torch.float32)[0], 0)
    with torch.no_grad():
        trainer.sae.get_parameter(name).view(-1)[-1] = math.inf
    with pytest.raises(RunError, match="not finite"):
        checkpointer(tmp_path, trainer).save(1, STREAM)
    assert not list(tmp_path.iterdir())
