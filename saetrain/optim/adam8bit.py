"""Adam with moments in 8 bits, through bitsandbytes.

Dettmers et al., "8-bit optimizers via block-wise quantization" (2021).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actcache.errors import ConfigError
from saetrain.optim.fused import AdamConstants, Parameters
from saetrain.optim.layout import StateLayout, spec_of
from saetrain.optim.schedule import Schedule
from saetrain.optim.torch_optimizers import TorchOptimizer

_TABLES = ("qmap1", "qmap2")
"""Constants that bitsandbytes keeps in its state; they are not saved."""


class Adam8bit(TorchOptimizer):
    """bitsandbytes' Adam8bit over named parameters; those below 4,096 numbers stay in float32.

    Args:
        parameters: by name.
        lr: peak learning rate.
        schedule: share of the peak in each step.
        constants: betas and eps.

    Raises:
        ConfigError: bitsandbytes is not installed, or cannot make a step on this device.
    """

    def __init__(
        self,
        parameters: Parameters,
        lr: float,
        schedule: Schedule,
        constants: AdamConstants | None = None,
    ) -> None:
        self._adam = _make(list(parameters.values()), lr, constants or AdamConstants())
        _try_out(next(iter(parameters.values())))
        super().__init__(parameters, lr, schedule, [self._adam])

    def state_tensors(self) -> dict[str, Tensor]:
        """Return moments and the scales of their blocks, by parameter."""
        tensors = super().state_tensors()
        return {n: t for n, t in tensors.items() if n.rpartition(".")[2] not in _TABLES}

    def state_numbers(self) -> dict[str, float]:
        """Return the number of steps of each parameter."""
        states = {name: self._state(parameter) for name, parameter in self._parameters.items()}
        return {f"{name}.step": float(s["step"]) for name, s in states.items() if s}  # type: ignore[arg-type]

    def state_layout(self) -> StateLayout:
        """Return the shapes that bitsandbytes gives to the state of these parameters.

        Call it before the state is loaded: it resets the state.
        """
        for index, parameter in enumerate(self._parameters.values()):
            self._init_state(index, parameter)
        tensors = {name: spec_of(tensor) for name, tensor in self.state_tensors().items()}
        return StateLayout(tensors, frozenset(f"{name}.step" for name in self._parameters))

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Load moments, scales and counters."""
        for index, (name, parameter) in enumerate(self._parameters.items()):
            if f"{name}.step" in numbers:
                self._init_state(index, parameter)  # the tables
                self._state(parameter)["step"] = int(numbers[f"{name}.step"])
        super().load_state(tensors, {})

    def _init_state(self, index: int, parameter: torch.nn.Parameter) -> None:
        (group,) = self._adam.param_groups
        self._adam.init_state(group, parameter, 0, index)


def _make(parameters: list[torch.nn.Parameter], lr: float, constants: AdamConstants) -> Any:
    try:
        import bitsandbytes.optim
    except Exception as error:  # a missing shared library raises errors of any type
        raise ConfigError(
            "--optimizer adam8bit needs bitsandbytes",
            got=f"{type(error).__name__}: {error}",
            remedy='pip install "actcache[quantized]", or --optimizer adam',
        ) from error
    make: Any = bitsandbytes.optim.Adam8bit  # type: ignore[attr-defined]
    beta1, beta2, eps = constants
    return make(parameters, lr=lr, betas=(beta1, beta2), eps=eps)


def _try_out(like: torch.nn.Parameter) -> None:
    """Make one step of a small matrix on the weights' device, so that an error comes at once.

    Raises:
        ConfigError: the step fails, or does not move the weights.
    """
    trial = torch.nn.Parameter(torch.zeros(64, 64, device=like.device, dtype=like.dtype))
    trial.grad = torch.ones_like(trial)
    try:
        _make([trial], 1.0, AdamConstants()).step()
        moved = bool((trial < 0).all())
    except Exception as error:
        raise _cannot(like, f"{type(error).__name__}: {error}") from error
    if not moved:
        raise _cannot(like, "a step that does not move the weights")


def _cannot(like: torch.nn.Parameter, got: str) -> ConfigError:
    return ConfigError(
        f"--optimizer adam8bit cannot run on {like.device} with weights in {like.dtype}",
        got=got,
        remedy="--optimizer adam, or another --device",
    )
