"""Adam, after Kingma and Ba (2014), and AdamW, after Loshchilov and Hutter (2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saetrain.kernels import adam_numbers, adam_update_, normalise_rows_
from saetrain.optim.fused import FusedOptimizer, Parameters
from saetrain.optim.schedule import Schedule

BETAS = (0.9, 0.999)
EPS = 1e-8
_UNIT = "unit_rows"


class Adam(FusedOptimizer):
    """Adam over named parameters; with `weight_decay`, AdamW. On a CPU, the bits of torch's.

    Args:
        parameters: by name.
        lr: peak learning rate.
        warmup: steps of warm-up, unless `schedule` says it.
        steps: steps of the whole run, likewise; then the rate falls linearly to 0.
        schedule: share of the peak in each step.
        weight_decay: decoupled, a share of the weights per step and learning rate; None: Adam.
        unit: the matrix whose rows have norm 1, and keep it; None: none.
    """

    NUMBERS = 5

    def __init__(
        self,
        parameters: Parameters,
        lr: float,
        warmup: int = 0,
        steps: int = 0,
        *,
        schedule: Schedule | None = None,
        weight_decay: float | None = None,
        unit: str | None = None,
    ) -> None:
        super().__init__(parameters, unit)
        assert schedule is not None or steps > 0
        self._lr, self._weight_decay = lr, weight_decay or 0.0
        self._schedule = schedule or Schedule("linear", warmup, steps)
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._steps: dict[str, int] = {}
        self._refused: Tensor | None = None
        """Steps of these that a flag on the device has forbidden."""

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0)."""
        return self._lr * self._schedule.factor(step)

    def masked_step(self, step: int, ok: Tensor) -> Tensor:
        """Update where `ok` is true, else leave weights and state as they are, bit for bit."""
        if self._refused is None:
            self._refused = torch.zeros((), device=ok.device)
        self._refused += ~ok  # in place: a recorded step must find it again
        return super().masked_step(step, ok)

    def advance(self, step: int) -> tuple[float, ...]:
        """Count a step of all parameters with a gradient; see `saetrain.kernels.adam_numbers`.

        Of all parameters, where the device reads numbers: these are the same for all of them.
        """
        for name, parameter in self._parameters.items():
            if parameter.grad is not None or self._on_device is not None:
                self._steps[name] = self._steps.get(name, 0) + 1
        steps = set(self._steps.values())
        assert self._on_device is None or len(steps) == 1
        lr, decay, (beta1, beta2) = self.learning_rate(step), self._weight_decay, BETAS
        self._host_scalars = {
            "lr": lr,
            "weight_decay": decay,
            "beta1": beta1,
            "beta2": beta2,
            "eps": EPS,
        }
        return adam_numbers(lr, decay, beta1, beta2, max({1, *steps}))

    def state_tensors(self) -> dict[str, Tensor]:
        """Both moments and the number of steps, by parameter; named as torch's."""
        tensors: dict[str, Tensor] = {}
        for name, (mean, square) in self._moments.items():
            steps = torch.tensor(float(self._steps[name]))
            steps = steps if self._refused is None else steps - self._refused
            of_one = {"step": steps, "exp_avg": mean, "exp_avg_sq": square}
            tensors |= {f"{name}.{key}": tensor for key, tensor in of_one.items()}
        return tensors

    def state_numbers(self) -> dict[str, float]:
        """Whether the rows that keep norm 1 have it: in older checkpoints, only after them."""
        return {} if self._unit is None else {_UNIT: 1.0}

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Put the state back, after the weights."""
        for name in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
            device = self._parameters[name].device
            mean, square = (tensors[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq"))
            self._moments[name] = mean.to(device), square.to(device)
            self._steps[name] = int(tensors[f"{name}.step"])
        self._refused = None
        if self._unit is not None and tensors and _UNIT not in numbers:
            with torch.no_grad():
                normalise_rows_(self._parameters[self._unit])

    def weights_to_export(self) -> dict[str, Tensor]:
        """The parameters themselves."""
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    def _update(
        self, name: str, parameter: torch.nn.Parameter, gradient: Tensor, options: dict[str, Any]
    ) -> None:
        if name not in self._moments:
            self._moments[name] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        moments = self._moments[name]
        adam_update_(parameter, *moments, gradient, step=self._steps[name], **options)
