"""What training minimises. Letters: N tokens, D d_in, M num_latents, K k, A dead latents.

Both losses are divided by the variance of the cache, a constant of the run, never by that of the
batch: so a batch of easy rows does not weigh more than one of hard rows, and losses of different
batches, ranks and runs can be compared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saetrain.kernels import sparse_decode
from saetrain.sae import Sae, SaeOutput

_CHUNK = 4096


class Losses(NamedTuple):
    """Losses of one batch, and what the step needs besides."""

    fvu: Tensor
    """Fraction of variance unexplained: Σ‖x - x̂‖² / (N · variance)."""
    auxk: Tensor
    """AuxK loss in the same unit, 0 without dead latents."""
    output: SaeOutput
    """The forward pass."""


def total(values: Tensor) -> Tensor:
    """Sum of a vector [N] whose bits do not depend on the number of threads.

    A sum over everything is split among threads once it is long enough; sums of at most 4,096
    numbers are not.
    """
    return torch.stack([chunk.sum() for chunk in torch.split(values, _CHUNK)]).sum()


def compute_losses(sae: Sae, x: Tensor, variance: float, dead: Tensor | None) -> Losses:
    """Forward pass and losses of a batch.

    Args:
        sae: the autoencoder.
        x: activations in its type. [N, D]
        variance: mean of ‖x - mean‖² over the cache's training rows.
        dead: which latents are dead, bool [M]; None leaves AuxK out.
    """
    output = sae(x)
    residual = x - output.reconstruction  # [N, D]
    scale = len(x) * variance
    fvu = total(residual.pow(2).sum(dim=1)) / scale
    aux = fvu.new_zeros(())
    if dead is not None:
        indices = dead.nonzero().squeeze(1)  # [A]
        if len(indices):
            aux = auxk_loss(sae, x, residual.detach(), indices) / scale
    return Losses(fvu, aux, output)


def auxk_loss(sae: Sae, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
    """Squared error of the residual as the strongest dead latents predict it.

    Gao et al. (2024), appendix A.2: k_aux = D/2 dead latents reconstruct e = x - x̂ without bias.
    With fewer than k_aux dead latents the loss is scaled down by their number over k_aux. Only the
    dead latents' pre-activations are computed, and the gradient reaches their encoder rows.

    Args:
        sae: the autoencoder.
        x: activations. [N, D]
        residual: x - x̂, detached. [N, D]
        dead: numbers of the dead latents, at least one. [A]
    """
    k_aux = max(1, sae.d_in // 2)
    scale = min(1.0, len(dead) / k_aux)
    W_enc, b_enc = sae.W_enc[dead], sae.b_enc[dead]  # [A, D], [A]
    pre_acts = torch.relu(torch.nn.functional.linear(x - sae.b_dec, W_enc, b_enc))  # [N, A]
    top_acts, top = pre_acts.topk(min(k_aux, len(dead)), dim=1, sorted=False)
    predicted = sparse_decode(top_acts, top, sae.W_dec[dead])  # [N, D]
    return scale * total((predicted - residual).pow(2).sum(dim=1))
