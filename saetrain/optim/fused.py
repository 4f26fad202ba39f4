"""The base of Signum and Adam, whose step makes one pass over each weight and its state.

The pass projects the gradient of a matrix with rows of norm 1, measures it, updates, divides the
rows by their norm, and writes a copy in bfloat16 if one is kept (`saetrain.kernels.update`). As
separate passes, these read and write the matrix again and again. Letters: M rows, D columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from saetrain.kernels import UpdateOptions, backend_of, backends, release_gradient, total
from saetrain.optim.schedule import Schedule

Parameters = dict[str, torch.nn.Parameter]


class AdamConstants(NamedTuple):
    """Constants of Adam; the defaults are torch's."""

    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Number added to the root of the second moment."""


class Maskable(Protocol):
    """The methods of an optimiser that `conditional_step` calls."""

    def step(self, step: int) -> Tensor | None:
        """Update, and drop the gradients."""

    def masked_step(self, step: int, ok: Tensor) -> Tensor | None:
        """Update where `ok` is true, and drop the gradients."""

    def drop_gradients(self) -> None:
        """Drop the gradients without an update."""


def conditional_step(ok: Tensor, optimizer: Maskable, step: int) -> Tensor | None:
    """Make step `step` (from 0) if the flag `ok` (bool, no dimensions) is true.

    If it is false, no bit of weights or state changes. On a CPU the host reads the flag; on a GPU
    that would make it wait, so the update itself is masked by the flag on the device.

    Returns:
        The result of the step, see `saetrain.optim.Optimizer`; None if the host skipped it.
    """
    if not backends.host_can_read(ok):
        return optimizer.masked_step(step, ok)
    if bool(ok):
        return optimizer.step(step)
    optimizer.drop_gradients()
    return None


class FusedOptimizer:
    """Named parameters, their state, and the update of each; see `saetrain.optim.Optimizer`.

    Args:
        parameters: by name.
        lr: peak learning rate.
        schedule: share of the peak in each step; None: 1.
        constants: of Adam: betas and eps.
        weight_decay: decoupled, a share of the weights per step and learning rate; None: none.
        unit: the matrix whose rows keep norm 1; None: none.
    """

    is_fused = True
    NUMBERS: ClassVar[int]
    """How many numbers `advance` returns."""
    UPDATE: ClassVar[Callable[..., None]]
    """The update of one parameter: `saetrain.kernels.signum_update_` or `adam_update_`."""

    def __init__(
        self,
        parameters: Parameters,
        lr: float,
        schedule: Schedule | None = None,
        *,
        constants: AdamConstants | None = None,
        weight_decay: float | None = None,
        unit: str | None = None,
    ) -> None:
        self._parameters, self._unit = parameters, unit
        self._constants = constants or AdamConstants()
        self._lr, self._schedule, self._weight_decay = lr, schedule, weight_decay or 0.0
        self._state: dict[str, tuple[Tensor, ...]] = {}
        """State tensors of each parameter that has been updated, in the order of `UPDATE`."""
        self._steps: dict[str, int] = {}
        """Adam: updates of each parameter."""
        self._norms: Tensor | None = None
        """Signum: last divisors of the rows of `unit`. [M]"""
        self._on_device: Tensor | None = None
        self._host_scalars: dict[str, Any] = {}
        """Scalar options of the updates of the last step that `advance` counted."""

    def bind_step_scalars(self, numbers: Tensor) -> None:
        """Make all later steps read the numbers that change from step to step on the device.

        Before each `step` or `masked_step`, the caller then calls `advance` and writes its result
        there. So a step that is recorded as a CUDA graph contains none of these numbers.

        Args:
            numbers: float32, the `numbers` of `UpdateOptions`. [NUMBERS or more]
        """
        self._on_device = numbers[: self.NUMBERS]

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step `step` (from 0)."""
        return self._lr if self._schedule is None else self._lr * self._schedule.factor(step)

    def advance(self, step: int) -> tuple[float, ...]:
        """Count step `step` (from 0) on the host, and return its numbers. [NUMBERS]"""
        raise NotImplementedError

    def masked_step(self, step: int, ok: Tensor) -> Tensor:
        """Update where `ok` is true, else leave weights and state unchanged, bit for bit.

        Host-side step counters still advance; a refused step always ends the run, so this is
        harmless.
        """
        return self.step(step, ok)

    def drop_gradients(self) -> None:
        """Drop the gradients without an update."""
        for parameter in self._parameters.values():
            release_gradient(parameter)

    @torch.no_grad()
    def step(self, step: int, ok: Tensor | None = None) -> Tensor:
        """Update, and return the norm of the projected gradient."""
        ops, numbers = backend_of(next(iter(self._parameters.values()))), self._on_device
        if numbers is None:
            self.advance(step)
        else:  # the caller has counted the step of every parameter
            assert all(p.grad is not None for p in self._parameters.values())
        squares = []
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if name not in self._state:
                self._state[name] = self._initial_state(name, parameter)
            unit, of_rows = name == self._unit, None
            if parameter.ndim == 2:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                of_rows = torch.empty(len(parameter), dtype=wide, device=parameter.device)  # [M]
                squares.append(of_rows)
            else:
                squares.append(parameter.grad.double().square().flatten())
            options = UpdateOptions(
                **self._host_scalars,
                unit=unit,
                step=self._steps.get(name, 1),
                norms=self._norms if unit else None,
                squares=of_rows,
                ok=ok,
                numbers=numbers,
            )
            self.UPDATE(parameter, *self._state[name], parameter.grad, options, ops)
        self.drop_gradients()
        return total(torch.cat(squares).double()).sqrt()

    def _initial_state(self, name: str, parameter: torch.nn.Parameter) -> tuple[Tensor, ...]:
        """Create the state of a parameter before its first update."""
        raise NotImplementedError
