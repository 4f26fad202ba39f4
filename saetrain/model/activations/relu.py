"""ReLU with an L1 penalty: the "standard" SAE.

Bricken et al., "Towards monosemanticity" (2023). The penalty is weighted by the norms of the
decoder's rows, so that scaling activations down and rows up does not reduce it: Conerly et al.,
"Update on how we train SAEs" (2024), λ Σ_m z_m ‖W_dec,m‖.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saetrain.model.activations.base import Activation, Encoder, Latents, pre_activations


class Relu(Activation):
    """The latents above 0."""

    def encode(self, x: Tensor, encoder: Encoder) -> Latents:
        """Compute dense latents. [N, M]"""
        return Latents(torch.relu(pre_activations(x, encoder)), None)

    def penalty(self, latents: Latents, norms: Tensor) -> Tensor:
        """Compute Σ_m z_m ‖W_dec,m‖ of each row. [N]"""
        return latents.top_acts @ norms
