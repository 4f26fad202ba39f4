"""Schedule-free SignSGD: sparsify's "signum".

Steepest descent in the L∞ norm (Bernstein et al., "signSGD", 2018) inside the schedule-free scheme
(Defazio et al., "The road less scheduled", 2024), on the CPU with the bits of the `schedulefree`
package. It keeps two points: y, where gradients are taken (the live parameters), and z, where sign
steps go. The point to evaluate is their average x = lerp(y, z, 1 - 1/β). It is computed in new
tensors: switching the live weights to x and back does not restore the same bits.

A matrix whose rows keep norm 1 is divided by their norms as soon as it is updated. The average is
computed from y before that, norms * y: computed from y of norm 1, it costs 1% of FVU.

It needs no schedule: averaging replaces the decay. With a schedule, sign steps are scaled by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saetrain.kernels import normalise_rows_, signum_update_
from saetrain.optim.fused import FusedOptimizer, Parameters
from saetrain.optim.layout import StateLayout, TensorSpec, spec_of
from saetrain.optim.schedule import Schedule

MOMENTUM = 0.95
_NORMS = ".norms"


class Signum(FusedOptimizer):
    """Schedule-free SignSGD over named parameters; see `saetrain.optim.Optimizer`."""

    NUMBERS = 2
    UPDATE = staticmethod(signum_update_)

    def __init__(
        self,
        parameters: Parameters,
        lr: float,
        schedule: Schedule | None = None,
        *,
        unit: str | None = None,
    ) -> None:
        super().__init__(parameters, lr, schedule, unit=unit)
        self._numbers: dict[str, float] = {}

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step `step` (from 0)."""
        if self._schedule is None:
            return self._lr
        # A warm-up counts from 1: the average's weights are squares of the largest rate so far, and
        # must not all be 0.
        warming = step < self._schedule.warmup
        return self._lr * self._schedule.factor(step + 1 if warming else step)

    def advance(self, step: int) -> tuple[float, ...]:
        """Count a step, and return its learning rate and its share of the average."""
        lr = self.learning_rate(step)
        mix = self._count(lr)
        self._host_scalars = {"lr": lr, "mix": mix, "momentum": MOMENTUM}
        return lr, mix

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the points z, by parameter, and the norms."""
        tensors = {name: self._state[name][0] for name in self._parameters if name in self._state}
        return tensors if self._norms is None else tensors | {f"{self._unit}{_NORMS}": self._norms}

    def state_numbers(self) -> dict[str, float]:
        """Return the numbers that weight the average."""
        return dict(self._numbers)

    def state_layout(self) -> StateLayout:
        """Return the shapes of the points z; the norms of a matrix depend on its `unit`."""
        named = self._parameters.items()
        norms = {
            f"{name}{_NORMS}": TensorSpec((len(p),), torch.promote_types(p.dtype, torch.float32))
            for name, p in named
            if p.ndim == 2
        }
        numbers = frozenset({"k", "lr_max", "weight_sum"})
        return StateLayout({name: spec_of(p) for name, p in named}, numbers, norms)

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Load z, the norms and the weights of the average, after the parameters.

        Rows of `unit` that were saved without norms are divided by their norms now: the run was
        started by an earlier version, or is resumed with another `unit`. Rows of another matrix
        with saved norms are multiplied by them.
        """
        divided = False
        for name, tensor in tensors.items():
            parameter = self._parameters[name.removesuffix(_NORMS)]
            if name in self._parameters:
                self._state[name] = (tensor.to(parameter.device),)
            elif name == f"{self._unit}{_NORMS}":
                self._norms, divided = tensor.to(parameter.device), True
            else:
                parameter.mul_(tensor.to(parameter.device).unsqueeze(1))
        if self._unit is not None and self._state and not divided:
            self._norms = self._ones()
            normalise_rows_(self._parameters[self._unit], self._norms)
        self._numbers |= numbers

    @torch.no_grad()
    def weights_to_export(self) -> dict[str, Tensor]:
        """Return the averages x; before the first step, the parameters."""
        exported = {}
        for name, parameter in self._parameters.items():
            y, (z,) = parameter.detach(), self._state.get(name, (parameter,))
            if name == self._unit and self._norms is not None:
                y = (y * self._norms.unsqueeze(1)).to(y.dtype)
            exported[name] = torch.lerp(y, z.detach(), 1 - 1 / MOMENTUM)
        return exported

    def _initial_state(self, name: str, parameter: torch.nn.Parameter) -> tuple[Tensor, ...]:
        if name == self._unit and self._norms is None:
            self._norms = self._ones()
        return (parameter.detach().clone(),)

    def _ones(self) -> Tensor:
        """Create the norms of rows that have not been divided. [M]"""
        assert self._unit is not None
        W = self._parameters[self._unit]
        wide = torch.promote_types(W.dtype, torch.float32)
        return torch.ones(len(W), dtype=wide, device=W.device)

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
