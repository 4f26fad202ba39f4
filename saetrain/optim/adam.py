"""Adam, after Kingma and Ba (2014), and AdamW, after Loshchilov and Hutter (2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saetrain.optim.schedule import Schedule
from saetrain.optim.scheduled import Parameters, Scheduled


class Adam(Scheduled):
    """torch's Adam over named parameters; with `weight_decay`, its AdamW.

    It is torch's fused kernel: one pass over the weights, which also does nothing at all where a
    flag on the device says so.

    Args:
        parameters: by name.
        lr: peak learning rate.
        warmup: steps of warm-up, unless `schedule` says it.
        steps: steps of the whole run, likewise; then the rate falls linearly to 0.
        schedule: share of the peak in each step.
        weight_decay: decoupled, a share of the weights per step and learning rate; None: Adam.
        fused: None: on CUDA and on the CPU.
    """

    def __init__(
        self,
        parameters: Parameters,
        lr: float,
        warmup: int = 0,
        steps: int = 0,
        *,
        schedule: Schedule | None = None,
        weight_decay: float | None = None,
        fused: bool | None = None,
    ) -> None:
        self._fused = fused_serves(parameters) if fused is None else fused
        self._counts_on_device = self._fused
        assert schedule is not None or steps > 0
        schedule = schedule or Schedule("linear", warmup, steps)
        super().__init__(
            parameters, lr, schedule, [torch_adam(parameters, lr, weight_decay, self._fused)]
        )

    @torch.no_grad()
    def masked_step(self, step: int, ok: Tensor) -> None:
        """Update where `ok` is true, else leave weights and state as they are, bit for bit."""
        if not self._fused:
            super().masked_step(step, ok)
            return
        adam: Any = self._inner[0]
        self._set_lr(step)
        # The interface that torch's fused optimisers have for gradient scalers.
        adam.found_inf = (~ok).float()
        adam.grad_scale = None
        adam.step()
        self.drop_gradients()
        del adam.found_inf, adam.grad_scale


def fused_serves(parameters: Parameters) -> bool:
    """Whether torch's fused kernels serve them."""
    return {p.device.type for p in parameters.values()} in ({"cpu"}, {"cuda"})


def torch_adam(
    parameters: Parameters, lr: float, weight_decay: float | None, fused: bool
) -> torch.optim.Optimizer:
    """Make torch's Adam, or its AdamW where there is weight decay."""
    if weight_decay is None:
        return torch.optim.Adam(parameters.values(), lr=lr, fused=fused or None)
    return torch.optim.AdamW(
        parameters.values(), lr=lr, weight_decay=weight_decay, fused=fused or None
    )
