"""Schedule-free SignSGD: sparsify's "signum".

Steepest descent in the L∞ norm (Bernstein et al., "signSGD", 2018) inside the schedule-free scheme
(Defazio et al., "The road less scheduled", 2024), on the CPU with the bits of the `schedulefree`
package. It keeps two points: y, where gradients are taken (the live parameters), and z, where sign
steps go. The point to evaluate is their average x = lerp(y, z, 1 - 1/β). It is computed aside:
switching the live weights to x and back does not return the same bits.

It needs no schedule: averaging does what a decay is for. Given one, sign steps are scaled by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saetrain.kernels import drop_gradient, signum_update_
from saetrain.optim.schedule import Schedule

MOMENTUM = 0.95


class Signum:
    """Schedule-free SignSGD over named parameters; see `saetrain.optim.Optimizer`.

    Args:
        parameters: by name.
        lr: learning rate, the peak where there is a schedule.
        schedule: its share in each step; None: 1.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        lr: float,
        schedule: Schedule | None = None,
    ) -> None:
        self._parameters, self._lr, self._schedule = parameters, lr, schedule
        self._z: dict[str, Tensor] = {}
        self._numbers: dict[str, float] = {}

    def step(self, step: int) -> None:
        """Update; the step's number (from 0) plays no part without a schedule."""
        self._step(step, None)

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0)."""
        if self._schedule is None:
            return self._lr
        # A warm-up counts from 1: the average's weights are squares of the largest rate so far, and
        # must not all be 0.
        warming = step < self._schedule.warmup
        return self._lr * self._schedule.factor(step + 1 if warming else step)

    def masked_step(self, step: int, ok: Tensor) -> None:
        """Update where `ok` is true, else leave y and z as they are, bit for bit.

        The numbers of the average count on: after such a step, the run ends.
        """
        self._step(step, ok)

    def drop_gradients(self) -> None:
        """Forget them without an update."""
        for parameter in self._parameters.values():
            drop_gradient(parameter)

    def state_tensors(self) -> dict[str, Tensor]:
        """The points z, by parameter."""
        return {name: self._z[name] for name in self._parameters if name in self._z}

    def state_numbers(self) -> dict[str, float]:
        """What the average is weighted with."""
        return dict(self._numbers)

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Put z and the weights of the average back."""
        for name, z in tensors.items():
            self._z[name] = z.to(self._parameters[name].device)
        self._numbers |= numbers

    def weights_to_export(self) -> dict[str, Tensor]:
        """The averages x; before the first step, the parameters."""
        exported = {}
        for name, parameter in self._parameters.items():
            z = self._z.get(name, parameter)
            exported[name] = torch.lerp(parameter.detach(), z.detach(), 1 - 1 / MOMENTUM)
        return exported

    @torch.no_grad()
    def _step(self, step: int, ok: Tensor | None) -> None:
        lr, mix = self.learning_rate(step), self._count(self.learning_rate(step))
        for name, y in self._parameters.items():
            if y.grad is None:
                continue
            if name not in self._z:
                self._z[name] = y.detach().clone()
            signum_update_(
                y, self._z[name], y.grad, lr=lr, mix=mix, momentum=MOMENTUM, unit=False, ok=ok
            )
        self.drop_gradients()

    def _count(self, lr: float) -> float:
        """Count a step at this rate, and return its share of the average.

        Steps are weighted by the square of the largest rate so far.
        """
        largest = max(lr, self._numbers.get("lr_max", 0))
        weight = largest**2
        total = self._numbers.get("weight_sum", 0.0) + weight
        steps = self._numbers.get("k", 0.0) + 1
        self._numbers = {"k": steps, "lr_max": largest, "weight_sum": total}
        return weight / total
