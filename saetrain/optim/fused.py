"""What Signum and Adam share: all of a step in one pass over each weight and its state.

The pass takes from the gradient of one matrix what is parallel to its rows of norm 1, measures it,
updates, divides the rows by their norm, and writes a copy in bfloat16 if one is kept
(`saetrain.kernels.bf16_copy`). Apart, these read and write the matrix again and again. Letters:
M rows, D columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saetrain.kernels import release_gradient
from saetrain.kernels.sums import total

Parameters = dict[str, torch.nn.Parameter]


class FusedOptimizer:
    """Named parameters, and what is done to each of them; see `saetrain.optim.Optimizer`.

    Args:
        parameters: by name.
        unit: the matrix whose rows have norm 1, and keep it; None: none.
    """

    is_fused = True
    NUMBERS: int
    """As many as `count` gives."""

    def __init__(self, parameters: Parameters, unit: str | None) -> None:
        self._parameters, self._unit = parameters, unit
        self._on_device: Tensor | None = None
        self._host_scalars: dict[str, Any] = {}
        """Options of the updates of the step that was counted last."""

    def bind_step_scalars(self, numbers: Tensor) -> None:
        """Let all steps from now on read there, on the device, what changes from step to step.

        Whoever calls `step` or `masked_step` then calls `count` before, and writes there what it
        gives. A step that is recorded as a CUDA graph holds no number of its own.

        Args:
            numbers: float32; what kernels call so, and room behind it. [NUMBERS or more]
        """
        self._on_device = numbers[: self.NUMBERS]

    def advance(self, step: int) -> tuple[float, ...]:
        """Count step `step` (from 0) on the host; its numbers that change. [NUMBERS]"""
        raise NotImplementedError

    def step(self, step: int) -> Tensor:
        """Update, and return the norm of the gradient, projected as it is used."""
        return self._step(step, None)

    def masked_step(self, step: int, ok: Tensor) -> Tensor:
        """Update where `ok` is true, else leave weights and state as they are, bit for bit.

        What the host counts counts on: after such a step, the run ends.
        """
        return self._step(step, ok)

    def drop_gradients(self) -> None:
        """Forget them without an update."""
        for parameter in self._parameters.values():
            release_gradient(parameter)

    @torch.no_grad()
    def _step(self, step: int, ok: Tensor | None) -> Tensor:
        numbers = self._on_device
        if numbers is None:
            self.advance(step)
        else:  # counted already, of all of them
            assert all(p.grad is not None for p in self._parameters.values())
        now = self._host_scalars | {"numbers": numbers}
        squares = []
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if parameter.ndim == 2:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                rows = torch.empty(len(parameter), dtype=wide, device=parameter.device)  # [M]
                options = {"unit": name == self._unit, "squares": rows, "ok": ok}
            else:
                rows = parameter.grad.double().square().flatten()
                options = {"unit": False, "ok": ok}
            self._update(name, parameter, parameter.grad, now | options)
            squares.append(rows.double())
        self.drop_gradients()
        return total(torch.cat(squares)).sqrt()

    def _update(
        self, name: str, parameter: torch.nn.Parameter, gradient: Tensor, options: dict[str, Any]
    ) -> None:
        """Update one parameter and its state."""
        raise NotImplementedError
