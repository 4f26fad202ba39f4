"""Schedule-free SignSGD: sparsify's "signum".

Steepest descent in the L∞ norm (Bernstein et al., "signSGD", 2018) inside the schedule-free scheme
(Defazio et al., "The road less scheduled", 2024), through the `schedulefree` package. It keeps two
points: y, where gradients are taken (the live parameters), and z, where sign steps go. The point to
evaluate is their average x = lerp(y, z, 1 - 1/β). It is computed aside: switching the live weights
to x and back does not return the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from schedulefree import ScheduleFreeWrapper
from torch import Tensor

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
    """Schedule-free SignSGD over named parameters; see `saetrain.optim.Optimizer`."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], lr: float) -> None:
        self._parameters = parameters
        base = SignSgd(parameters.values(), lr)
        self._wrapper = ScheduleFreeWrapper(base, momentum=MOMENTUM)
        self._wrapper.train()

    def step(self, step: int) -> None:
        """Update; the step's number plays no part."""
        del step
        self._wrapper.step()
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
