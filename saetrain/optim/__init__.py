"""Optimisers behind the protocol `Optimizer`, and learning-rate schedules.

`adam` and `signum` implement fused updates (base class in `fused`), `muon` and `adam8bit` wrap
optimisers of other packages (base class in `torch_optimizers`), and `schedule` computes learning
rates.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from saetrain.optim.adam import Adam
from saetrain.optim.adam8bit import Adam8bit
from saetrain.optim.fused import AdamConstants, conditional_step
from saetrain.optim.layout import StateLayout
from saetrain.optim.muon import Muon
from saetrain.optim.schedule import Schedule, default_lr, make_schedule, warmup_steps
from saetrain.optim.signum import Signum

__all__ = [
    "Adam",
    "Adam8bit",
    "AdamConstants",
    "Muon",
    "Optimizer",
    "Schedule",
    "Signum",
    "conditional_step",
    "default_lr",
    "make_schedule",
    "warmup_steps",
]


class Optimizer(Protocol):
    """Interface of an optimiser. Its state is keyed by parameter names."""

    @property
    def is_fused(self) -> bool:
        """True if a step projects gradients, keeps rows at norm 1 and returns the gradient's norm.

        If not, the caller does these.
        """

    def step(self, step: int) -> Tensor | None:
        """Update the parameters from their gradients, and drop the gradients."""

    def masked_step(self, step: int, ok: Tensor) -> Tensor | None:
        """Update as `step` does if the flag `ok` (bool, on the parameters' device) is true."""

    def drop_gradients(self) -> None:
        """Drop the gradients without an update."""

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step `step` (from 0)."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the state, by name."""

    def state_numbers(self) -> dict[str, float]:
        """Return all numbers of the state, by name."""

    def state_layout(self) -> StateLayout:
        """Return what a saved state must hold after an update; see `saetrain.optim.layout`."""

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Load the results of `state_tensors` and `state_numbers`, of the layout's shapes."""

    def weights_to_export(self) -> dict[str, Tensor]:
        """Return the weights to evaluate and save, which may differ from the trained ones."""
