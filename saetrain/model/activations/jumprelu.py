"""JumpReLU: a latent keeps its value above its own learnt threshold, and is 0 below.

Rajamanoharan et al., "Jumping ahead: improving reconstruction fidelity with JumpReLU sparse
autoencoders" (2024): z = p H(p - θ), with the penalty λ Σ_m H(p_m - θ_m) on L0. Neither has a
gradient to θ; the paper's straight-through estimate, with a rectangle of width ε as kernel, is

    ∂z/∂θ = -(θ/ε) rect((p - θ)/ε),    ∂H/∂θ = -(1/ε) rect((p - θ)/ε).

The gradient to p is that of z alone, H(p - θ). The parameter is θ, clamped at 0 before each step;
the paper trains log θ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saetrain.model.activations.base import Activation, Encoder, Latents, pre_activations
from saetrain.model.activations.compiled import compiled


class JumpRelu(Activation, nn.Module):
    """The latents above their thresholds.

    Args:
        num_latents: number of latents, M.
        threshold: initial value of all thresholds.
        bandwidth: ε, in the unit of the pre-activations.
        device: device of the thresholds.
        dtype: type of the thresholds.
    """

    counts = True

    def __init__(
        self,
        num_latents: int,
        threshold: float,
        bandwidth: float,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.bandwidth = bandwidth
        full = torch.full((num_latents,), threshold, device=device, dtype=dtype)
        self.threshold = nn.Parameter(full)  # [M]

    def encode(self, x: Tensor, encoder: Encoder) -> Latents:
        """Compute dense latents. [N, M]"""
        pre_acts = pre_activations(x, encoder)
        acts = (compiled(_jump) if self.compiles else _jump)(
            pre_acts, self.threshold, self.bandwidth
        )
        return Latents(acts, None, pre_acts)

    @torch.no_grad()
    def project(self) -> None:
        """Clamp thresholds at 0, since negative pre-activations would exceed a lower one."""
        self.threshold.clamp_(min=0)

    def penalty(self, latents: Latents, norms: Tensor) -> Tensor:
        """Compute L0 of each row, with a gradient to the thresholds only. [N]"""
        del norms
        assert latents.pre_acts is not None
        return (compiled(_count) if self.compiles else _count)(
            latents.pre_acts.detach(), self.threshold, self.bandwidth
        )


def _jump(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Compute activations. [N, M]"""
    return _Jump.apply(pre_acts, threshold, bandwidth)  # type: ignore[no-untyped-call, no-any-return]


def _count(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Count the active latents of each row. [N]"""
    return _Count.apply(pre_acts, threshold, bandwidth)  # type: ignore[no-untyped-call, no-any-return]


def _window(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Compute rect((p - θ)/ε) as bool. [N, M]"""
    return ((pre_acts - threshold) / bandwidth).abs() < 0.5


class _Jump(Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        # Averaged weights (schedule-free) may contain a threshold slightly below 0.
        return torch.relu(pre_acts) * (pre_acts > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_acts: Tensor) -> tuple[Tensor | None, ...]:
        pre_acts, threshold = ctx.saved_tensors
        d_pre = d_acts * ((pre_acts > threshold) & (pre_acts > 0))  # [N, M]
        in_window = (d_acts * _window(pre_acts, threshold, ctx.bandwidth)).sum(dim=0)  # [M]
        return d_pre, -(threshold / ctx.bandwidth) * in_window, None


class _Count(Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return (pre_acts > threshold).sum(dim=1).to(threshold.dtype)  # autocast would round it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_count: Tensor) -> tuple[Tensor | None, ...]:
        pre_acts, threshold = ctx.saved_tensors
        window = _window(pre_acts, threshold, ctx.bandwidth).to(d_count.dtype)  # [N, M]
        return None, -(d_count @ window) / ctx.bandwidth, None
