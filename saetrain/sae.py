"""The sparse autoencoder: encode, decode, and what keeps its decoder rows at unit norm.

TopK SAE of Gao et al., "Scaling and evaluating sparse autoencoders" (2024), section 2.3:

    z = TopK(ReLU(W_enc (x - b_dec) + b_enc)),    x̂ = W_decᵀ z + b_dec

Imports torch and `saetrain.kernels` only. Letters: N tokens, D d_in, M num_latents, K k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from saetrain.kernels import Encoded, sparse_decode, sparse_encode


class SaeOutput(NamedTuple):
    """What a forward pass gives."""

    reconstruction: Tensor
    """x̂. [N, D]"""
    top_acts: Tensor
    """Activations of the chosen latents, not negative. [N, K]"""
    top_indices: Tensor
    """Their numbers, int64. [N, K]"""


class Sae(nn.Module):
    """A TopK sparse autoencoder.

    Weights begin as in sparsify: encoder rows uniform in ±1/sqrt(D), decoder rows the same at unit
    norm, biases zero; set `b_dec` to the data's mean before training.

    Args:
        d_in: width of the activations, D.
        num_latents: latents, M.
        k: latents that may be active at once, K.
        seed: seed of the initial weights, drawn on the CPU whatever the device.
        device: where the weights live.
        dtype: their type.
    """

    def __init__(
        self,
        d_in: int,
        num_latents: int,
        k: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.d_in, self.num_latents, self.k = d_in, num_latents, k
        W = torch.empty(num_latents, d_in, dtype=dtype)
        bound = d_in**-0.5
        W.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        self.W_enc = nn.Parameter(W.to(device))  # [M, D]
        self.b_enc = nn.Parameter(torch.zeros(num_latents, device=device, dtype=dtype))  # [M]
        self.W_dec = nn.Parameter(W.clone().to(device))  # [M, D]
        self.b_dec = nn.Parameter(torch.zeros(d_in, device=device, dtype=dtype))  # [D]
        self.normalise_decoder()

    def encode(self, x: Tensor) -> Encoded:
        """The K strongest latents of each row of x [N, D]."""
        return sparse_encode(x, self.W_enc, self.b_enc, self.b_dec, self.k)

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """Reconstruction [N, D] from latents [N, K]."""
        return sparse_decode(top_acts, top_indices, self.W_dec, self.b_dec)

    def forward(self, x: Tensor) -> SaeOutput:
        """Encode and decode x [N, D], in the weights' type."""
        top_acts, top_indices = self.encode(x)
        return SaeOutput(self.decode(top_acts, top_indices), top_acts, top_indices)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Give every decoder row unit Euclidean norm."""
        eps = torch.finfo(self.W_dec.dtype).eps
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True) + eps)

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Take from W_dec's gradient what would only change the norm of its rows.

        With unit rows w and gradient g: g - (g·w) w. Bricken et al., "Towards monosemanticity"
        (2023), appendix on training.
        """
        assert self.W_dec.grad is not None
        parallel = (self.W_dec.grad * self.W_dec).sum(dim=1, keepdim=True)  # [M, 1]
        self.W_dec.grad -= parallel * self.W_dec
