"""Gated: one path selects the active latents, another computes their magnitudes.

Rajamanoharan et al., "Improving dictionary learning with gated sparse autoencoders" (2024). With
c = x - b_dec, and W_enc shared by both paths:

    π = W_enc c + b_enc,    z = H(π) ReLU(exp(r_mag) · (W_enc c) + b_mag)

The step function H has no gradient. The gate is trained by L1, λ Σ_m ReLU(π_m) ‖W_dec,m‖, and by
the error of a reconstruction from ReLU(π) through a detached decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saetrain.model.activations.base import Activation, Encoder, Latents, pre_activations
from saetrain.model.activations.compiled import compiled


class Gated(Activation, nn.Module):
    """Latents whose gate is above 0. The encoder's b_enc is the gate's bias.

    Args:
        num_latents: number of latents, M.
        device: device of the parameters.
        dtype: type of the parameters.
    """

    def __init__(
        self,
        num_latents: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.r_mag = nn.Parameter(torch.zeros(num_latents, device=device, dtype=dtype))  # [M]
        self.b_mag = nn.Parameter(torch.zeros(num_latents, device=device, dtype=dtype))  # [M]

    def encode(self, x: Tensor, encoder: Encoder) -> Latents:
        """Compute dense latents [N, M] from one matrix product for both paths."""
        pre_acts = pre_activations(x, encoder)  # [N, M]
        acts = (compiled(_gated) if self.compiles else _gated)(
            pre_acts, encoder.b_enc, self.r_mag, self.b_mag
        )
        return Latents(acts, None, pre_acts)

    def penalty(self, latents: Latents, norms: Tensor) -> Tensor:
        """Compute Σ_m ReLU(π_m) ‖W_dec,m‖ of each row. [N]"""
        assert latents.pre_acts is not None
        return torch.relu(latents.pre_acts) @ norms

    def gate(self, latents: Latents) -> Tensor:
        """Compute ReLU(π). [N, M]"""
        assert latents.pre_acts is not None
        return torch.relu(latents.pre_acts)


def _gated(pre_acts: Tensor, b_enc: Tensor, r_mag: Tensor, b_mag: Tensor) -> Tensor:
    """Compute the magnitudes, and 0 where the gate is closed. [N, M]"""
    magnitudes = (pre_acts - b_enc) * r_mag.exp() + b_mag
    return torch.relu(magnitudes) * (pre_acts > 0)
