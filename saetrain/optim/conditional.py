"""An update that happens if a flag is true, and else changes nothing, by not one bit.

On a CPU the flag is simply looked at. On a GPU that would make the host wait for the device in
every step; there the optimisers update under the flag, where it lies (`masked_step`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from saetrain.kernels import backends as paths


class Maskable(Protocol):
    """What is asked of an optimiser here."""

    def step(self, step: int) -> Tensor | None:
        """Update, and drop the gradients."""

    def masked_step(self, step: int, ok: Tensor) -> Tensor | None:
        """Update where `ok` is true, and drop the gradients."""

    def drop_gradients(self) -> None:
        """Drop them without an update."""


def conditional_step(ok: Tensor, optimizer: Maskable, step: int) -> Tensor | None:
    """Make step `step` (from 0) if the flag `ok` (bool, no dimensions) is true.

    Returns:
        What the step gives, see `saetrain.optim.Optimizer`; None if the host knows of none.
    """
    if not paths.host_can_read(ok):
        return optimizer.masked_step(step, ok)
    if bool(ok):
        return optimizer.step(step)
    optimizer.drop_gradients()
    return None


def zero_gradients_unless(ok: Tensor, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Put +0 for every gradient where `ok` is false, so that no NaN comes into any state."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = torch.where(ok, parameter.grad, 0.0)
