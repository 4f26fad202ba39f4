"""What training minimises.

All losses are divided by the variance of the cache, a constant of the run, never by that of the
batch: so a batch of easy rows does not weigh more than one of hard rows, and losses of different
batches, ranks and runs can be compared. Of a crosscoder, each hookpoint's error is divided by its
own variance and their mean is the loss, so that late layers do not drown early ones.

- FVU, and AuxK with any activation: Gao et al., "Scaling and evaluating sparse autoencoders"
  (2024).
- Multi-TopK, the same, section 4: FVU(k) + FVU(4k)/8, so that more latents than k do no harm.
- Matryoshka: Bussmann, Nabeshima, Karvonen and Nanda, "Learning multi-level features with
  Matryoshka sparse autoencoders" (2025): Σ over prefixes of the FVU from their latents alone.
- Penalties on L0 or L1, and the gate's own reconstruction: see `saetrain.model.activations`.

Letters: N tokens, D d_in, E width of the output, M num_latents, K k, A dead latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from saetrain.config.sae import SaeConfig
from saetrain.kernels import (
    PrefixGroups,
    WeightRows,
    dense_decode,
    dense_encode,
    sparse_decode,
    topk,
)
from saetrain.kernels import backends as paths
from saetrain.kernels.sums import total
from saetrain.model.activations import Latents, TopK
from saetrain.model.sae import Sae, SaeOutput


@dataclass(frozen=True)
class OutputSlice:
    """A hookpoint of a crosscoder: its own columns of what is predicted."""

    name: str
    """Hookpoint."""
    width: int
    """Its columns."""
    variance: float
    """Mean of ‖x - mean‖² over its training rows."""


@dataclass(frozen=True)
class LossConfig:
    """Additions to the FVU of one SAE."""

    multi_topk: bool = False
    """Train on the reconstruction from 4k latents too."""
    prefixes: tuple[int, ...] = ()
    """Numbers of first latents that must reconstruct alone; without M."""
    sparsity: float = 0.0
    """Weight of the activation's penalty, after its warm-up."""
    warmup: int = 0
    """Steps in which that weight rises from 0."""
    parts: tuple[OutputSlice, ...] = ()
    """Of a crosscoder, at least two; none: what is predicted is one hookpoint's."""
    gated: bool = False
    """Whether the activation has a gate that must reconstruct by itself."""

    def sparsity_at(self, step: int) -> float:
        """Weight of the penalty in a step (from 0)."""
        return self.sparsity * min(1.0, (step + 1) / max(1, self.warmup))

    @property
    def names(self) -> tuple[str, ...]:
        """What the losses are called, in the order of `Losses.terms`."""
        names = [f"fvu/{part.name}" for part in self.parts]
        names += ["multi_topk_fvu"] * self.multi_topk
        names += [f"fvu_{prefix}" for prefix in self.prefixes]
        names += ["penalty"] * (self.sparsity > 0)
        names += ["gate_fvu"] * self.gated
        return tuple(names)


FVU_ONLY = LossConfig()
"""The FVU, and AuxK."""


def make_loss_config(
    config: SaeConfig, warmup: int, parts: tuple[OutputSlice, ...] = ()
) -> LossConfig:
    """What an SAE of this kind is trained on.

    Args:
        config: its kind.
        warmup: steps in which a penalty rises.
        parts: hookpoints of a crosscoder.
    """
    return LossConfig(
        multi_topk=config.multi_topk,
        prefixes=config.matryoshka,
        sparsity=config.sparsity,
        warmup=warmup,
        parts=parts,
        gated=config.activation == "gated",
    )


_MULTI = 4  # times k latents
DEAD_LIST_FACTOR = 8  # times k_aux dead latents
_MULTI_WEIGHT = 1 / 8


class LossTerm(NamedTuple):
    """A loss beside FVU and AuxK."""

    value: Tensor
    weight: float
    """In what is minimised; 0: it is only logged."""


class Losses(NamedTuple):
    """Losses of one batch, and what the step needs besides."""

    fvu: Tensor
    """Fraction of variance unexplained: Σ‖x - x̂‖² / (N · variance)."""
    auxk: Tensor
    """AuxK loss in the same unit, 0 without dead latents."""
    output: SaeOutput
    """The forward pass."""
    terms: tuple[LossTerm, ...] = ()
    """Others, as `LossConfig.names` calls them."""

    def total(self, auxk_alpha: float) -> Tensor:
        """What is minimised."""
        loss = self.fvu + auxk_alpha * self.auxk
        for term in self.terms:
            if term.weight:
                loss = loss + term.weight * term.value
        return loss


def compute_losses(
    sae: Sae,
    rows: Tensor,
    variance: float,
    dead: Tensor | None,
    loss_config: LossConfig = FVU_ONLY,
    step: int = 0,
    turn: Tensor | None = None,
) -> Losses:
    """Forward pass and losses of a batch.

    Args:
        sae: the autoencoder.
        rows: activations in its type, [N, D]; of a transcoder, inputs and outputs [N, D + E].
        variance: mean of ‖y - mean‖² over the cache's training rows of what is predicted.
        dead: which latents are dead, bool [M]; None leaves AuxK out.
        loss_config: what is trained on besides.
        step: its number, from 0, for the warm-up of a penalty.
        turn: the same where the device reads it; see `list_dead`.
    """
    x, y = sae.split(rows)
    parts = loss_config.parts or (OutputSlice("", sae.d_out, variance),)
    now = step if turn is None else turn
    listed = None if dead is None else list_dead(dead, _k_aux(sae), now)
    indices = None if listed is None else listed.indices
    output, terms, weights = _forward(sae, x, y, parts, loss_config, indices)
    residual = y - output.reconstruction  # [N, E]
    by_part = _fvus(residual, parts)
    fvu = _mean(by_part)
    if loss_config.parts:
        terms = [*(LossTerm(value, 0.0) for value in by_part), *terms]
    aux = fvu.new_zeros(())
    if listed is not None:
        aux = auxk_loss(sae, x, residual.detach(), listed, parts, weights)
    if loss_config.sparsity:
        penalty = _penalty(sae, output, math.sqrt(variance), parts)
        terms.append(LossTerm(penalty, loss_config.sparsity_at(step)))
    if loss_config.gated:
        terms.append(LossTerm(_gate_fvu(sae, x, y, output, parts), 1.0))
    return Losses(fvu, aux, output, tuple(terms))


class DeadLatents(NamedTuple):
    """Dead latents in a list, which may be longer than they are many."""

    indices: Tensor
    """int64 [A]"""
    number: Tensor | int
    """All dead latents, in the list or not."""
    listed: Tensor | None = None
    """Which of the list are dead; None: all. bool [A]"""


def list_dead(dead: Tensor, k_aux: int, step: int | Tensor) -> DeadLatents | None:
    """The dead latents, for AuxK to choose among; None: there is none.

    On the CPU they are all listed. On a device that would make the host wait until they are
    counted; there the list has room for 8 k_aux, and where more are dead, each step lists those
    that follow on the last step's, so that every one gets its turn.

    Args:
        dead: bool. [M]
        k_aux: latents that reconstruct a residual.
        step: its number, from 0; or int64 on the device, no dimensions.
    """
    if paths.host_can_read(dead):
        indices = dead.nonzero().squeeze(1)
        return DeadLatents(indices, len(indices)) if len(indices) else None
    return list_dead_in(dead, min(len(dead), DEAD_LIST_FACTOR * k_aux), step)


def list_dead_in(dead: Tensor, room: int, step: int | Tensor) -> DeadLatents:
    """A list of fixed length: dead latents first. Nothing here waits for the device."""
    M = len(dead)
    turn = (torch.arange(M, device=dead.device) - step * room) % M
    indices = torch.where(dead, turn, M).topk(room, largest=False).indices  # [A]
    return DeadLatents(indices, dead.sum(), dead[indices])


def auxk_loss(
    sae: Sae,
    x: Tensor,
    residual: Tensor,
    dead: DeadLatents,
    parts: tuple[OutputSlice, ...],
    weights: WeightRows | None = None,
) -> Tensor:
    """Fraction of the variance in the residual after the strongest dead latents predicted it.

    Gao et al. (2024), appendix A.2: k_aux = E/2 dead latents reconstruct e = y - x̂ without bias.
    With fewer than k_aux dead latents the loss is scaled down by their number over k_aux. Only the
    dead latents' pre-activations are computed, and the gradient reaches their encoder rows.
    Whatever the activation, dead latents go through ReLU and top k_aux here.

    Args:
        sae: the autoencoder.
        x: activations. [N, D]
        residual: y - x̂, detached. [N, E]
        dead: the dead latents, A of them listed.
        parts: of what is predicted.
        weights: of the latents in that list, where the forward pass gave them.
    """
    k_aux, indices = _k_aux(sae), dead.indices
    if weights is None:
        weights = WeightRows(sae.W_enc[indices], sae.b_enc[indices], sae.W_dec[indices])
    W_enc, b_enc, W_dec = weights  # [A, D], [A], [A, E]
    pre_acts = torch.relu(dense_encode(x, W_enc, b_enc, sae.subtracted))  # [N, A]
    if dead.listed is not None:
        pre_acts = torch.where(dead.listed, pre_acts, 0)
    top = topk(pre_acts.detach(), min(k_aux, len(indices)))[1]  # [N, k_aux]
    top_acts = pre_acts.gather(1, top)
    if len(indices) <= DEAD_LIST_FACTOR * k_aux:  # so many of them that products take less time
        acts = torch.zeros_like(pre_acts).scatter(1, top, top_acts)  # [N, A]
        predicted = dense_decode(acts, W_dec, torch.zeros_like(residual[0]))  # [N, E]
    else:
        predicted = sparse_decode(top_acts, top, W_dec)
    error = _fvus(predicted - residual, parts)
    if isinstance(dead.number, int):
        return _mean([min(1.0, dead.number / k_aux) * of_part for of_part in error])
    scale = (dead.number / k_aux).clamp(max=1.0)
    return _mean([scale * of_part for of_part in error])


def _k_aux(sae: Sae) -> int:
    return max(1, sae.d_out // 2)


def _forward(
    sae: Sae,
    x: Tensor,
    y: Tensor,
    parts: tuple[OutputSlice, ...],
    loss_config: LossConfig,
    rows: Tensor | None,
) -> tuple[SaeOutput, list[LossTerm], WeightRows | None]:
    """The forward pass, the losses that need more of it than its result, and weights of `rows`.

    Sparse latents are encoded and decoded once, whatever is trained on: there is one backward pass,
    which forms one gradient of each weight. Dense ones leave the rows to others.
    """
    selector = sae.activation.selector()
    if selector is None:
        output, terms = _dense_matryoshka(sae, x, y, parts, loss_config.prefixes)
        return output, terms, None
    prefix_groups = None
    if loss_config.multi_topk:
        assert isinstance(sae.activation, TopK)
        selector = sae.activation.selector_of(min(_MULTI * sae.k, sae.num_latents))
        prefix_groups = PrefixGroups("rank", (sae.k,))
    elif loss_config.prefixes:
        prefix_groups = PrefixGroups("latent", loss_config.prefixes)
    outs, acts, indices, weights = sae.autoencode(x, selector, prefix_groups, rows)
    if loss_config.multi_topk:
        output = SaeOutput(outs[0], acts[:, : sae.k], indices[:, : sae.k])
        return output, [LossTerm(_mean(_fvus(y - outs[1], parts)), _MULTI_WEIGHT)], weights
    terms = [LossTerm(_mean(_fvus(y - out, parts)), 1.0) for out in outs[:-1]]
    return SaeOutput(outs[-1], acts, indices), terms, weights


def _dense_matryoshka(
    sae: Sae, x: Tensor, y: Tensor, parts: tuple[OutputSlice, ...], prefixes: tuple[int, ...]
) -> tuple[SaeOutput, list[LossTerm]]:
    """Every latent is encoded once, and decoded once: prefixes are running sums of their pieces."""
    if not prefixes:
        return sae(x), []
    top_acts, _, pre_acts = sae.encode(x)
    so_far: Tensor = sae.b_dec if sae.W_skip is None else sae.b_dec + x @ sae.W_skip.T
    terms = []
    widths = [high - low for low, high in pairwise((0, *prefixes, sae.num_latents))]
    # Split once: each slice would have a gradient as large as the whole.
    prefix_groups = zip(
        torch.split(top_acts, widths, dim=1), torch.split(sae.W_dec, widths), strict=True
    )
    for acts, W_dec in prefix_groups:
        so_far = dense_decode(acts, W_dec, so_far)
        terms.append(LossTerm(_mean(_fvus(y - so_far, parts)), 1.0))
    terms.pop()  # of all latents, which is the FVU
    return SaeOutput(so_far, top_acts, None, pre_acts), terms


def _penalty(sae: Sae, output: SaeOutput, unit: float, parts: tuple[OutputSlice, ...]) -> Tensor:
    """Mean over rows of what the activation makes latents sparse with.

    A crosscoder's latent has the sum of its rows' norms at each hookpoint (Lindsey et al., 2024).
    """
    prefix_groups = torch.split(sae.W_dec, [part.width for part in parts], dim=1)
    norms = sum(
        (piece.norm(dim=1) for piece in prefix_groups), start=torch.zeros_like(sae.b_enc)
    )  # [M]
    latents = Latents(output.top_acts, output.top_indices, output.pre_acts)
    of_rows = sae.activation.penalty(latents, norms)  # [N], of autocast's type under it
    assert of_rows is not None
    mean = total(of_rows.to(norms.dtype)) / len(of_rows)
    return mean if sae.activation.counts else mean / unit


def _gate_fvu(
    sae: Sae, x: Tensor, y: Tensor, output: SaeOutput, parts: tuple[OutputSlice, ...]
) -> Tensor:
    """What the gate alone leaves unexplained, through a decoder that does not feel it."""
    acts = sae.activation.gate(Latents(output.top_acts, output.top_indices, output.pre_acts))
    assert acts is not None
    predicted = dense_decode(acts, sae.W_dec.detach(), sae.b_dec.detach())  # [N, E]
    if sae.W_skip is not None:
        predicted = predicted + x @ sae.W_skip.detach().T
    return _mean(_fvus(y - predicted, parts))


def _fvus(error: Tensor, parts: tuple[OutputSlice, ...]) -> list[Tensor]:
    """Squared error [N, E] of each part over the variance of as many rows."""
    prefix_groups = (
        torch.split(error, [part.width for part in parts], dim=1) if parts[1:] else (error,)
    )
    return [
        total(piece.pow(2).sum(dim=1)) / (len(error) * part.variance)
        for piece, part in zip(prefix_groups, parts, strict=True)
    ]


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean()
