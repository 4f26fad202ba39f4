"""torch's optimisers behind our protocol: a schedule, a state by name, an update under a flag."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from saetrain.kernels import release_gradient
from saetrain.optim.conditional import zero_gradients_unless
from saetrain.optim.fused import Parameters
from saetrain.optim.schedule import Schedule


class TorchOptimizer:
    """One or several of torch's optimisers over named parameters; see `saetrain.optim.Optimizer`.

    Args:
        parameters: all of them, by name.
        lr: peak learning rate of all of them.
        schedule: its share in each step.
        inner: which together update every parameter once.
    """

    is_fused = False

    def __init__(
        self,
        parameters: Parameters,
        lr: float,
        schedule: Schedule,
        inner: Sequence[torch.optim.Optimizer],
    ) -> None:
        self._parameters, self._lr, self._schedule = parameters, lr, schedule
        self._inner = inner

    def step(self, step: int) -> None:
        """Update, at the learning rate of step `step` (from 0)."""
        self._set_lr(step)
        for optimizer in self._inner:
            optimizer.step()
        for parameter in self._parameters.values():  # fused and foreign kernels are not counted
            increment_version(parameter)
        self.drop_gradients()

    @torch.no_grad()
    def masked_step(self, step: int, ok: Tensor) -> None:
        """Update where `ok` is true, else leave weights and state as they are, bit for bit.

        A counter that torch keeps on the CPU counts on: looking at `ok` there would be a wait.
        """
        zero_gradients_unless(ok, self._parameters.values())
        tensors = [*self._parameters.values(), *self.state_tensors().values()]
        kept = [(tensor, tensor.clone()) for tensor in tensors if tensor.device == ok.device]
        self.step(step)
        for tensor, before in kept:
            torch.where(ok, tensor, before, out=tensor)

    def drop_gradients(self) -> None:
        """Forget them without an update."""
        for parameter in self._parameters.values():
            release_gradient(parameter)

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0)."""
        return self._lr * self._schedule.factor(step)

    def state_tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, by parameter."""
        return {
            f"{name}.{key}": value
            for name, parameter in self._parameters.items()
            for key, value in self._state(parameter).items()
            if isinstance(value, Tensor)
        }

    def state_numbers(self) -> dict[str, float]:
        """Nothing: the learning rate follows from the step."""
        return {}

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Put the state back."""
        del numbers
        for name, value in tensors.items():
            key, _, entry = name.rpartition(".")
            parameter = self._parameters[key]
            # torch counts steps on the CPU, but for its fused kernels.
            device = "cpu" if entry == "step" and not self._counts_on_device else parameter.device
            self._state(parameter)[entry] = value.to(device)

    def weights_to_export(self) -> dict[str, Tensor]:
        """The parameters themselves."""
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    _counts_on_device = False

    def _set_lr(self, step: int) -> None:
        for optimizer in self._inner:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(step)

    def _state(self, parameter: torch.nn.Parameter) -> dict[str, object]:
        """The part of the state that is of one parameter."""
        for optimizer in self._inner:
            if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                state: dict[str, object] = optimizer.state[parameter]
                return state
        raise AssertionError("a parameter that nobody updates")
