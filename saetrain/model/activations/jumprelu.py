"""JumpReLU: a latent keeps its value above its own learnt threshold, and is 0 below.

Rajamanoharan et al., "Jumping ahead: improving reconstruction fidelity with JumpReLU sparse
autoencoders" (2024): z = p H(p - θ), with the penalty λ Σ_m H(p_m - θ_m) on L0. Neither has a
gradient to θ; the paper's straight-through estimate, with a rectangle of width ε as kernel, is

    ∂z/∂θ = -(θ/ε) rect((p - θ)/ε),    ∂H/∂θ = -(1/ε) rect((p - θ)/ε).

The gradient to p is that of z alone, H(p - θ); with --target-l0 also ∂H/∂p = -∂H/∂θ, as in
Anthropic's update of January 2025: thresholds alone cannot raise L0 above the number of positive
pre-activations. The parameter is log θ, as in the paper, so that a
step changes θ by a share of itself, whatever the unit of the rows; its gradient is θ times that to
θ. In runs with the defaults of version 1 it is θ itself, clamped at 0 before each step, as in
saved SAEs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saetrain.model.activations.base import Activation, Encoder, Latents, pre_activations
from saetrain.model.activations.compiled import by_rows, compiled


class JumpRelu(Activation, nn.Module):
    """The latents above their thresholds.

    Args:
        num_latents: number of latents, M.
        threshold: initial value of all thresholds.
        bandwidth: ε, in the unit of the pre-activations.
        log_threshold: take log θ as the parameter, not θ; of θ = 0, that of ε/1000.
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
        log_threshold: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.bandwidth = bandwidth
        full = torch.full((num_latents,), threshold, device=device, dtype=dtype)  # [M]
        if log_threshold:
            self.log_threshold = nn.Parameter(full.clamp(min=_LEAST * bandwidth).log())
        else:
            self.threshold = nn.Parameter(full)

    @property
    def has_log_threshold(self) -> bool:
        """Whether the parameter is log θ."""
        return "log_threshold" in self._parameters

    def thresholds(self) -> Tensor:
        """Return θ. [M]"""
        return self.log_threshold.exp() if self.has_log_threshold else self.threshold

    def from_saved(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the threshold among the saved weights of an SAE to this parameter.

        The logarithm of thresholds of 0 or below is taken of a thousandth of the bandwidth.
        """
        if not self.has_log_threshold:
            return {**weights}
        others = {name: weight for name, weight in weights.items() if name != _THRESHOLD}
        least = _LEAST * self.bandwidth
        return others | {_LOG_THRESHOLD: weights[_THRESHOLD].clamp(min=least).log()}

    def encode(self, x: Tensor, encoder: Encoder) -> Latents:
        """Compute dense latents. [N, M]"""
        pre_acts = pre_activations(x, encoder)
        acts = (compiled(_jump) if self.compiles else _jump)(
            pre_acts, self.thresholds(), self.bandwidth
        )
        return Latents(acts, None, pre_acts)

    @torch.no_grad()
    def project(self) -> None:
        """Clamp thresholds at 0, since negative pre-activations would exceed a lower one."""
        if not self.has_log_threshold:
            self.threshold.clamp_(min=0)

    def penalty(self, latents: Latents, norms: Tensor) -> Tensor:
        """Compute L0 of each row, with a gradient to the thresholds only. [N]"""
        del norms
        assert latents.pre_acts is not None
        return (compiled(_count) if self.compiles else _count)(
            latents.pre_acts.detach(), self.thresholds(), self.bandwidth
        )

    def l0(self, latents: Latents) -> Tensor:
        """Compute L0 of each row, with a gradient to thresholds and pre-activations. [N]"""
        assert latents.pre_acts is not None
        return (compiled(_count) if self.compiles else _count)(
            latents.pre_acts, self.thresholds(), self.bandwidth
        )

    def firing_shares(self, latents: Latents) -> Tensor:
        """Compute the share of the rows on which each latent fires; gradient as `l0`. [M]"""
        assert latents.pre_acts is not None
        return _FiringShares.apply(latents.pre_acts, self.thresholds(), self.bandwidth)  # type: ignore[no-untyped-call, no-any-return]


_THRESHOLD, _LOG_THRESHOLD = "activation.threshold", "activation.log_threshold"
_LEAST = 1e-3


def to_saved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a logarithm of thresholds among the weights of an SAE to thresholds, as saved."""
    saved = {**weights}
    if (log_threshold := saved.pop(_LOG_THRESHOLD, None)) is not None:
        saved[_THRESHOLD] = log_threshold.exp()
    return saved


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
        (acts,) = by_rows(lambda p: (torch.relu(p) * (p > threshold),), pre_acts)
        return acts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_acts: Tensor) -> tuple[Tensor | None, ...]:
        pre_acts, threshold = ctx.saved_tensors

        def gradients(d: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
            above = (p > threshold) & (p > 0)
            return d * above, d * _window(p, threshold, ctx.bandwidth)

        d_pre, in_window = by_rows(gradients, d_acts, pre_acts)  # [N, M]
        return d_pre, -(threshold / ctx.bandwidth) * in_window.sum(dim=0), None


class _Count(Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        (counts,) = by_rows(lambda p: ((p > threshold).sum(dim=1),), pre_acts)
        return counts.to(threshold.dtype)  # autocast would round it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_count: Tensor) -> tuple[Tensor | None, ...]:
        pre_acts, threshold = ctx.saved_tensors

        def window_of(p: Tensor) -> tuple[Tensor]:
            return (_window(p, threshold, ctx.bandwidth).to(d_count.dtype),)

        (window,) = by_rows(window_of, pre_acts)  # [N, M]
        d_pre = None
        if ctx.needs_input_grad[0]:
            d_pre = (d_count / ctx.bandwidth).unsqueeze(1) * window
        return d_pre, -(d_count @ window) / ctx.bandwidth, None


class _FiringShares(Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return (pre_acts > threshold).sum(dim=0).to(threshold.dtype) / len(pre_acts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_shares: Tensor) -> tuple[Tensor | None, ...]:
        pre_acts, threshold = ctx.saved_tensors
        window = _window(pre_acts, threshold, ctx.bandwidth).to(d_shares.dtype)  # [N, M]
        d_each = d_shares / (ctx.bandwidth * len(pre_acts))
        return window * d_each, -d_each * window.sum(dim=0), None
