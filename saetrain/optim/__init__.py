"""Optimisers behind one small protocol: step, state as tensors and numbers, weights to export."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from saetrain.config import OptimizerName
from saetrain.optim.adam import Adam
from saetrain.optim.schedule import default_lr
from saetrain.optim.signum import Signum

__all__ = ["Optimizer", "default_lr", "make_optimizer"]


class Optimizer(Protocol):
    """What the trainer asks of an optimiser. Parameters go by name throughout."""

    def step(self, step: int) -> None:
        """Update the parameters from their gradients, and drop these."""

    def state_tensors(self) -> dict[str, Tensor]:
        """All tensors of the state, by name."""

    def state_numbers(self) -> dict[str, float]:
        """All numbers of the state, by name."""

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Put back what `state_tensors` and `state_numbers` gave."""

    def weights_to_export(self) -> dict[str, Tensor]:
        """The weights to evaluate and publish, which may differ from the ones being trained."""


def make_optimizer(
    name: OptimizerName, module: nn.Module, lr: float, warmup: int, steps: int
) -> Optimizer:
    """An optimiser over all parameters of a module.

    Args:
        name: which.
        module: whose parameters.
        lr: peak learning rate.
        warmup: steps of warm-up (adam).
        steps: steps of the whole run (adam).
    """
    parameters = dict(module.named_parameters())
    if name == "signum":
        return Signum(parameters, lr)
    return Adam(parameters, lr, warmup, steps)
