"""Scales that are folded into an SAE's weights before it is saved.

Decoder norms. In training decoder rows may have any norm; the saved ones have norm 1. A row's norm
n moves from the decoder to the encoder: with W_dec / n, n W_enc and n b_enc every ReLU latent is n
times as active, its row n times as short, and the reconstruction the same. The strongest latents
stay the same only if they are selected by activation times norm, so training also runs on the
folded weights, and gradients flow through the fold. (SAELens: `rescale_acts_by_decoder_norm`.) A
threshold per latent (JumpReLU) and a second bias (gated) are multiplied by n; the single threshold
of BatchTopK is learnt from folded latents and stays. A transcoder's decoder starts at zero and is
never folded.

Input scales. In training the rows of each hookpoint are multiplied by one number, so that the root
mean square of their numbers (`rms`, the default of SAELens) or of their norms (`unit`, as in
dictionary_learning) is 1 over all training rows. Saved weights take unscaled rows.

Letters: N tokens, D d_in, E width of the output, M num_latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from saetrain.config.sae import SaeEntry
from saetrain.model.losses import Losses, compute_losses

_OF_LATENTS = ("b_enc", "activation.threshold", "activation.b_mag")
"""Weights in the unit of the pre-activations; `activation.r_mag` has no unit."""
_LOG = "activation.log_threshold"
_WEIGHTS = {"W_enc", "W_dec", "b_dec", "W_skip", "activation.r_mag", _LOG, *_OF_LATENTS}


def fold(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the same autoencoder with decoder rows of norm 1; differentiable.

    Args:
        weights: by name: W_enc [M, D], b_enc [M], W_dec [M, D] and those of the activation.
    """
    W_dec = weights["W_dec"]
    norm = W_dec.norm(dim=1, keepdim=True) + torch.finfo(W_dec.dtype).eps  # [M, 1]
    folded = {
        name: weights[name] * norm.squeeze(1)
        for name in _OF_LATENTS
        if name in weights and weights[name].ndim  # one threshold for all latents stays
    }
    if _LOG in weights:
        folded[_LOG] = weights[_LOG] + norm.squeeze(1).log()
    return {**weights, **folded, "W_enc": weights["W_enc"] * norm, "W_dec": W_dec / norm}


def folded_losses(sae: nn.Module, *arguments: Any) -> Losses:
    """Compute the losses of the folded autoencoder, with gradients to the unfolded weights."""
    weights = {f"sae.{name}": w for name, w in fold(dict(sae.named_parameters())).items()}
    losses: Losses = functional_call(_Losses(sae), weights, arguments)
    return losses


class _Losses(nn.Module):
    """Module of `compute_losses`, as `functional_call` requires."""

    def __init__(self, sae: nn.Module) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, *arguments: Any) -> Losses:
        return compute_losses(self.sae, *arguments)  # type: ignore[arg-type]


@dataclass(frozen=True)
class InputScaling:
    """Scales of one SAE's rows."""

    rows: Tensor
    """Scale of each column of a row as `Sae.split` takes it. [D], for a transcoder [D + E]"""
    read: Tensor
    """Scale of each column of the encoder's input. [D]"""
    predicted: Tensor
    """Scale of each column of the target. [E]"""
    by: float | None
    """The scale of all columns, if the SAE has one hookpoint; else None."""

    def fold_into(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights, by name, of the same function of unscaled rows.

        With one scale s, latents are divided by s and decoder rows keep their norm:
        relu(W_enc (s x - b_dec) + b_enc) / s = relu(W_enc (x - b_dec / s) + b_enc / s). With
        several scales latents do not change, and the columns of W_enc and W_dec are scaled.
        """
        assert weights.keys() <= _WEIGHTS, weights.keys()
        folded = {**weights}
        if self.by is not None:
            for name in (*_OF_LATENTS, "b_dec"):
                if name in weights:
                    folded[name] = weights[name] / self.by
            if _LOG in weights:
                folded[_LOG] = weights[_LOG] - math.log(self.by)
            return folded
        folded["W_enc"] = weights["W_enc"] * self.read
        folded["W_dec"] = weights["W_dec"] / self.predicted
        folded["b_dec"] = weights["b_dec"] / self.predicted
        if "W_skip" in weights:  # [E, D]
            folded["W_skip"] = weights["W_skip"] * self.read / self.predicted.unsqueeze(1)
        return folded


def input_scaling(
    entry: SaeEntry, device: torch.device, dtype: torch.dtype = torch.float32
) -> InputScaling | None:
    """Build the scales of an SAE's rows; None if its rows are not scaled."""
    if not entry.scales:
        return None
    config = entry.config
    widths = config.widths or (config.d_in, config.width_out)[: len(entry.scales)]
    columns = [
        torch.full((width,), scale, device=device, dtype=dtype)
        for width, scale in zip(widths, entry.scales, strict=True)
    ]
    rows = torch.cat(columns)
    predicted = rows[config.d_in :] if config.transcode else rows
    by = entry.scales[0] if len(columns) == 1 else None
    return InputScaling(rows, rows[: config.d_in], predicted, by)
