"""Adapter from torch's optimisers to `saetrain.optim.Optimizer`: schedule, named state, flag."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from saetrain.kernels import release_gradient
from saetrain.optim.fused import Parameters
from saetrain.optim.schedule import Schedule


class TorchOptimizer:
    """One or several of torch's optimisers over named parameters; see `saetrain.optim.Optimizer`.

    Args:
        parameters: all parameters, by name.
        lr: peak learning rate of all parameters.
        schedule: share of the peak in each step.
        inner: torch's optimisers, which together update every parameter once.
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
        for parameter in self._parameters.values():  # torch counts no write of fused kernels
            increment_version(parameter)
        self.drop_gradients()

    @torch.no_grad()
    def masked_step(self, step: int, ok: Tensor) -> None:
        """Update where `ok` is true, else leave weights and state unchanged, bit for bit.

        A counter that torch keeps on the CPU still advances: to read `ok`, the host would wait.
        """
        for parameter in self._parameters.values():
            if parameter.grad is not None:  # no NaN reaches any state
                parameter.grad = torch.where(ok, parameter.grad, 0.0)
        tensors = [*self._parameters.values(), *self.state_tensors().values()]
        kept = [(tensor, tensor.clone()) for tensor in tensors if tensor.device == ok.device]
        self.step(step)
        for tensor, before in kept:
            torch.where(ok, tensor, before, out=tensor)

    def drop_gradients(self) -> None:
        """Drop the gradients without an update."""
        for parameter in self._parameters.values():
            release_gradient(parameter)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step `step` (from 0)."""
        return self._lr * self._schedule.factor(step)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the state, by parameter."""
        return {
            f"{name}.{key}": value
            for name, parameter in self._parameters.items()
            for key, value in self._state(parameter).items()
            if isinstance(value, Tensor)
        }

    def state_numbers(self) -> dict[str, float]:
        """Return nothing: the learning rate follows from the step."""
        return {}

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Load the state."""
        del numbers
        for name, value in tensors.items():
            key, _, entry = name.rpartition(".")
            parameter = self._parameters[key]
            # torch counts steps on the CPU, except in its fused kernels.
            device = "cpu" if entry == "step" and not self._counts_on_device else parameter.device
            self._state(parameter)[entry] = value.to(device)

    def weights_to_export(self) -> dict[str, Tensor]:
        """Return the parameters themselves."""
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    _counts_on_device = False

    def _set_lr(self, step: int) -> None:
        for optimizer in self._inner:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(step)

    def _state(self, parameter: torch.nn.Parameter) -> dict[str, object]:
        """Return torch's state of one parameter."""
        for optimizer in self._inner:
            if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                state: dict[str, object] = optimizer.state[parameter]
                return state
        raise AssertionError("a parameter that no optimiser updates")
