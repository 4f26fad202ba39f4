"""Schedule-free SignSGD: sparsify's "signum".

Steepest descent in the L∞ norm (Bernstein et al., "signSGD", 2018) inside the schedule-free scheme
(Defazio et al., "The road less scheduled", 2024), through the `schedulefree` package. It keeps two
points: y, where gradients are taken (the live parameters), and z, where sign steps go. The point to
evaluate is their average x = lerp(y, z, 1 - 1/β). It is computed aside: switching the live weights
to x and back does not return the same bits.

It needs no schedule: averaging does what a decay is for. Given one, sign steps are scaled by it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from schedulefree import ScheduleFreeWrapper
from torch import Tensor

from saetrain.optim.mask import zero_gradients_unless
from saetrain.optim.schedule import Schedule

MOMENTUM = 0.95

_NUMBERS = ("k", "lr_max", "weight_sum")


class SignSgd(torch.optim.Optimizer):
    """p ← p - lr · sign(gradient)."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


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
        base = SignSgd(parameters.values(), lr)
        self._wrapper = ScheduleFreeWrapper(base, momentum=MOMENTUM)
        self._wrapper.train()

    def step(self, step: int) -> None:
        """Update; the step's number (from 0) plays no part without a schedule."""
        if self._schedule is not None:
            (group,) = self._wrapper.param_groups
            group["lr"] = self.learning_rate(step)
        self._wrapper.step()
        self._wrapper.zero_grad()

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0)."""
        if self._schedule is None:
            return self._lr
        # A warm-up counts from 1: the average's weights are squares of the largest rate so far, and
        # must not all be 0.
        warming = step < self._schedule.warmup
        return self._lr * self._schedule.factor(step + 1 if warming else step)

    @torch.no_grad()
    def masked_step(self, step: int, ok: Tensor) -> None:
        """Update where `ok` is true, else leave y and z as they are, bit for bit.

        A sign step of +0 leaves z alone; y comes back from the average with other bits, so it is
        kept. The numbers of the average count on: after such a step, the run ends.
        """
        zero_gradients_unless(ok, self._parameters.values())
        kept = [(y, y.clone()) for y in self._parameters.values()]
        self.step(step)
        for y, before in kept:
            torch.where(ok, y, before, out=y)

    def drop_gradients(self) -> None:
        """Forget them without an update."""
        self._wrapper.zero_grad()

    def state_tensors(self) -> dict[str, Tensor]:
        """The points z, by parameter."""
        return {
            name: self._wrapper.state[parameter]["z"]
            for name, parameter in self._parameters.items()
            if "z" in self._wrapper.state[parameter]
        }

    def state_numbers(self) -> dict[str, float]:
        """What the average is weighted with."""
        (group,) = self._wrapper.param_groups
        return {name: float(group[name]) for name in _NUMBERS if name in group}

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Put z and the weights of the average back."""
        (group,) = self._wrapper.param_groups
        for name, z in tensors.items():
            parameter = self._parameters[name]
            self._wrapper.state[parameter]["z"] = z.to(parameter.device)
        group.update(numbers)

    def weights_to_export(self) -> dict[str, Tensor]:
        """The averages x; before the first step, the parameters."""
        exported = {}
        for name, parameter in self._parameters.items():
            z = self._wrapper.state[parameter].get("z", parameter)
            exported[name] = torch.lerp(parameter.detach(), z.detach(), 1 - 1 / MOMENTUM)
        return exported
