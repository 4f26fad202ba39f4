"""ReLU with an L1 penalty: the "standard" SAE.

Bricken et al., "Towards monosemanticity" (2023); the penalty with the decoder's norms, so that
short activations and long rows gain nothing, after Conerly et al., "Update on how we train SAEs"
(2024): λ Σ_m z_m ‖W_dec,m‖.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saetrain.model.activations.base import Activation, Encoder, Latents, pre_activations


class Relu(Activation):
    """All latents above 0."""

    def encode(self, x: Tensor, encoder: Encoder) -> Latents:
        """Dense: [N, M]."""
        return Latents(torch.relu(pre_activations(x, encoder)), None)

    def penalty(self, latents: Latents, norms: Tensor) -> Tensor:
        """Σ_m z_m ‖W_dec,m‖ of each row. [N]"""
        return latents.top_acts @ norms
