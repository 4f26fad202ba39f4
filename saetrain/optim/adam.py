"""Adam with linear warm-up and decay. Kingma and Ba (2014)."""

from __future__ import annotations

import torch
from torch import Tensor

from saetrain.optim.schedule import warmup_then_decay


class Adam:
    """torch's Adam over named parameters; see `saetrain.optim.Optimizer`."""

    def __init__(
        self, parameters: dict[str, torch.nn.Parameter], lr: float, warmup: int, steps: int
    ) -> None:
        self._parameters, self._lr, self._warmup, self._steps = parameters, lr, warmup, steps
        self._adam = torch.optim.Adam(parameters.values(), lr=lr)

    def step(self, step: int) -> None:
        """Update, at the learning rate of step `step` (from 0)."""
        for group in self._adam.param_groups:
            group["lr"] = self._lr * warmup_then_decay(step, self._warmup, self._steps)
        self._adam.step()
        self._adam.zero_grad()

    def state_tensors(self) -> dict[str, Tensor]:
        """First and second moments, and torch's step counter, by parameter."""
        return {
            f"{name}.{key}": value
            for name, parameter in self._parameters.items()
            for key, value in self._adam.state[parameter].items()
        }

    def state_numbers(self) -> dict[str, float]:
        """Nothing: the learning rate follows from the step."""
        return {}

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Put moments and counters back."""
        del numbers
        for name, value in tensors.items():
            parameter, _, key = name.rpartition(".")
            # torch keeps the step counter on the CPU unless it is asked to capture graphs.
            device = "cpu" if key == "step" else self._parameters[parameter].device
            self._adam.state[self._parameters[parameter]][key] = value.to(device)

    def weights_to_export(self) -> dict[str, Tensor]:
        """The parameters themselves."""
        return {name: parameter.detach() for name, parameter in self._parameters.items()}
