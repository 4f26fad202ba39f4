"""Gated: one path decides which latents are active, another how strongly.

Rajamanoharan et al., "Improving dictionary learning with gated sparse autoencoders" (2024). With
c = x - b_dec, and the two paths sharing their directions:

    π = W_enc c + b_enc,    z = H(π) ReLU(exp(r_mag) · (W_enc c) + b_mag)

The step has no gradient. L1, λ Σ_m ReLU(π_m) ‖W_dec,m‖, shrinks the deciding path alone, and a
reconstruction from ReLU(π) through a decoder that this loss must not move keeps it to its work.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saetrain.model.activations.base import Activation, Encoder, Latents, pre_activations
from saetrain.model.activations.compiled import compiled


class Gated(Activation):
    """Latents whose gate is above 0. The encoder's b_enc is the gate's bias.

    Args:
        num_latents: latents, M.
        device: where the parameters live.
        dtype: their type.
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
        """Dense: [N, M]; one product serves both paths."""
        pre_acts = pre_activations(x, encoder)  # [N, M]
        acts = (compiled(_pass) if self.compiles else _pass)(
            pre_acts, encoder.b_enc, self.r_mag, self.b_mag
        )
        return Latents(acts, None, pre_acts)

    def penalty(self, latents: Latents, norms: Tensor) -> Tensor:
        """Σ_m ReLU(π_m) ‖W_dec,m‖ of each row. [N]"""
        assert latents.pre_acts is not None
        return torch.relu(latents.pre_acts) @ norms

    def gate(self, latents: Latents) -> Tensor:
        """ReLU(π). [N, M]"""
        assert latents.pre_acts is not None
        return torch.relu(latents.pre_acts)


def _pass(pre_acts: Tensor, b_enc: Tensor, r_mag: Tensor, b_mag: Tensor) -> Tensor:
    """Magnitudes where the gate is open. [N, M]"""
    magnitudes = (pre_acts - b_enc) * r_mag.exp() + b_mag
    return torch.relu(magnitudes) * (pre_acts > 0)
