"""Adam, after Kingma and Ba (2014), and AdamW, after Loshchilov and Hutter (2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from saetrain.kernels import adam_numbers, adam_update_, normalise_rows_
from saetrain.optim.fused import FusedOptimizer
from saetrain.optim.layout import COUNTER, StateLayout, TensorSpec, spec_of

_UNIT = "unit_rows"


class Adam(FusedOptimizer):
    """Adam over named parameters, or AdamW. On a CPU, bit-identical to torch's.

    Args:
        parameters: by name.
        lr: peak learning rate.
        schedule: share of the peak in each step; None: 1.
        constants: betas and eps.
        weight_decay: decoupled, a share of the weights per step and learning rate; None: none.
        unit: the matrix whose rows keep norm 1; None: none.
    """

    NUMBERS = 5
    UPDATE = staticmethod(adam_update_)

    _refused: Tensor | None = None
    """How many of the counted steps a flag on the device has refused."""

    def masked_step(self, step: int, ok: Tensor) -> Tensor:
        """Update where `ok` is true, else leave weights and state unchanged, bit for bit."""
        if self._refused is None:
            self._refused = torch.zeros((), device=ok.device)
        self._refused += ~ok  # in place: a recorded step reads this address
        return super().masked_step(step, ok)

    def advance(self, step: int) -> tuple[float, ...]:
        """Count a step of all parameters with a gradient; see `saetrain.kernels.adam_numbers`.

        Where the device reads the numbers, which all parameters share, it counts for all of them.
        """
        for name, parameter in self._parameters.items():
            if parameter.grad is not None or self._on_device is not None:
                self._steps[name] = self._steps.get(name, 0) + 1
        steps = set(self._steps.values())
        assert self._on_device is None or len(steps) == 1
        lr, decay = self.learning_rate(step), self._weight_decay
        beta1, beta2, _ = self._constants
        self._host_scalars = {"lr": lr, "weight_decay": decay, **self._constants._asdict()}
        return adam_numbers(lr, decay, beta1, beta2, max({1, *steps}))

    def state_tensors(self) -> dict[str, Tensor]:
        """Return both moments and the number of steps, by parameter; named as torch's."""
        tensors: dict[str, Tensor] = {}
        for name, (mean, square) in self._state.items():
            steps = torch.tensor(float(self._steps[name]))
            steps = steps if self._refused is None else steps - self._refused
            of_one = {"step": steps, "exp_avg": mean, "exp_avg_sq": square}
            tensors |= {f"{name}.{key}": tensor for key, tensor in of_one.items()}
        return tensors

    def state_numbers(self) -> dict[str, float]:
        """Return a mark that the rows of `unit` have norm 1; older checkpoints lack it."""
        return {} if self._unit is None else {_UNIT: 1.0}

    def state_layout(self) -> StateLayout:
        """Return the shapes of both moments and the counter of each parameter."""
        tensors: dict[str, TensorSpec] = {}
        for name, parameter in self._parameters.items():
            moment = spec_of(parameter)
            of_one = {"step": COUNTER, "exp_avg": moment, "exp_avg_sq": moment}
            tensors |= {f"{name}.{key}": spec for key, spec in of_one.items()}
        return StateLayout(tensors, optional_numbers=frozenset({_UNIT}))

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Load the state, after the weights."""
        for name in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
            device = self._parameters[name].device
            mean, square = (tensors[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq"))
            self._state[name] = mean.to(device), square.to(device)
            self._steps[name] = int(tensors[f"{name}.step"])
        self._refused = None
        if self._unit is not None and tensors and _UNIT not in numbers:
            with torch.no_grad():
                normalise_rows_(self._parameters[self._unit])

    def weights_to_export(self) -> dict[str, Tensor]:
        """Return the parameters themselves."""
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    def _initial_state(self, name: str, parameter: torch.nn.Parameter) -> tuple[Tensor, ...]:
        del name
        return torch.zeros_like(parameter), torch.zeros_like(parameter)
