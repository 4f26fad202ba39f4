"""Control of a sparsity penalty, so that L0 comes to --target-l0, N.

A proportional-integral controller by the error e = log(L0 / N), averaged over about five steps and
clipped to ±1. After each step from the warm-up's end on, the integral grows by 12/steps · e.

- relu, gated: the weight of the penalty is its default times exp(integral + 2 e). L0 follows it
  late, after tens of steps. The proportional part damps the oscillation that the integral alone
  would have with such a lag, and the integral's rate is of the run's length, as learning rates are.
- jumprelu: the target of the quadratic penalty is N exp(-integral - e), and its weight is fixed.
  The integral moves five times as fast where |e| < 0.2, and where it goes back towards 0: so what
  it has wound up while L0 was far off is unwound (anti-windup). And it moves ever slower towards
  the end, as L0 responds ever later.
  With the target N itself, L0 is right only at a weight at which the penalty outweighs the FVU and
  makes the L0 of all rows equal; with a small weight and a lower target, rows may differ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saetrain.model.losses import LossConfig

_INTEGRAL = 12.0  # over the steps of the run
_BOUNDS = -2.0, 4.0  # of the integral of a quadratic penalty
_NEAR = 0.2  # error up to which such an integral moves by the first factor, as it does back to 0
_CLOSE, _FAR = 5.0, 1.0
_DECAY = 0.8  # of the error's average


class PenaltyController:
    """Controller of one SAE's penalty, as a function of the L0 of the steps before.

    Args:
        loss_config: holds target, initial weight and warm-up.
        steps: steps of the run.
        device: where the state is kept: steps do not wait for it.
        quadratic: the penalty is quadratic in L0.
    """

    def __init__(
        self, loss_config: LossConfig, steps: int, device: torch.device, *, quadratic: bool
    ) -> None:
        assert loss_config.target_l0 is not None
        self._target, self._warmup = loss_config.target_l0, loss_config.warmup
        self._start, self._quadratic = loss_config.sparsity, quadratic
        self._steps = max(1, steps)
        self.state = torch.zeros(3, dtype=torch.float64, device=device)
        """The integral, the average error, and the number of steps. float64 [3]"""
        self.name = "target" if quadratic else "sparsity"
        """Name of the value among the metrics."""

    def value(self) -> Tensor:
        """Return the target or the weight of the next step. float64, no dimensions"""
        integral, error = self.state[0], self.state[1]
        if self._quadratic:
            return self._target * (-(integral + error)).exp()
        return self._start * (integral + 2 * error).exp()

    @torch.no_grad()
    def count(self, l0: Tensor) -> None:
        """Take the L0 of one step, over the whole batch: float64, no dimensions."""
        integral, error, steps = self.state.unbind()  # in place: a recorded step reads this address
        error.lerp_((l0.clamp(min=math.exp(-20)) / self._target).log().clamp(-1, 1), 1 - _DECAY)
        step = _INTEGRAL / self._steps * error * (steps >= self._warmup)
        if self._quadratic:
            left = (1 - steps / self._steps).clamp(min=0)
            fast = (error.abs() < _NEAR) | (error * integral < 0)
            step *= left * torch.where(fast, _CLOSE, _FAR)
        integral += step
        if self._quadratic:
            integral.clamp_(*_BOUNDS)
        steps += 1
