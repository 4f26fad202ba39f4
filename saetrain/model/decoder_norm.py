"""Decoder rows that are free in training and of norm 1 in what is saved.

A row's norm n can move from the decoder to the encoder: with W_dec / n, n W_enc and n b_enc every
ReLU latent is n times as active, its row n times as short, and the reconstruction the same. A
choice of the strongest latents is the same only if it goes by those activations times norm, so
training, too, sees the folded weights, and gradients flow through the fold. (SAELens does so with
`rescale_acts_by_decoder_norm`.) A latent's own threshold (JumpReLU) and second bias (gated) are n
times as large; one threshold for all latents (BatchTopK) is learnt from folded ones, and stays.
A transcoder's decoder begins at zero, where there is nothing to fold. Letters: D d_in,
M num_latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from saetrain.config.sae import DecoderNorm
from saetrain.model.losses import Losses, compute_losses
from saetrain.model.sae import Sae


def fold(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same autoencoder with decoder rows of norm 1; differentiable.

    Args:
        weights: by name, of them W_enc [M, D], b_enc [M], W_dec [M, D]; and an activation's.
    """
    W_dec = weights["W_dec"]
    norm = W_dec.norm(dim=1, keepdim=True) + torch.finfo(W_dec.dtype).eps  # [M, 1]
    folded = {
        name: weights[name] * norm.squeeze(1)
        for name in _OF_LATENTS
        if name in weights and weights[name].ndim
    }
    return {**weights, **folded, "W_enc": weights["W_enc"] * norm, "W_dec": W_dec / norm}


def unit_rows(sae: Sae, decoder_norm: DecoderNorm) -> str | None:
    """The parameter whose rows have norm 1 in training, if there is one; never a transcoder's."""
    return "W_dec" if decoder_norm == "unit" and not sae.transcode else None


def folded_losses(sae: nn.Module, *arguments: Any) -> Losses:
    """`compute_losses` of the folded autoencoder; its gradients are those of the free weights."""
    weights = {f"sae.{name}": w for name, w in fold(dict(sae.named_parameters())).items()}
    losses: Losses = functional_call(_Objective(sae), weights, arguments)
    return losses


_OF_LATENTS = ("b_enc", "activation.threshold", "activation.b_mag")
"""In the unit of the latents' pre-activations; those that are [M] grow with the norm."""


class _Objective(nn.Module):
    """The losses as a module, which is what `functional_call` takes."""

    def __init__(self, sae: nn.Module) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, *arguments: Any) -> Losses:
        return compute_losses(self.sae, *arguments)  # type: ignore[arg-type]
