"""The losses that training minimises.

All losses are divided by the variance of the cache, a constant of the run, never by that of the
batch: so every row has the same weight, and losses of different batches, ranks and runs can be
compared. A crosscoder's loss is the mean over hookpoints of the error divided by the hookpoint's
own variance, so that layers of large norm do not dominate.

- FVU, and AuxK with any activation: Gao et al., "Scaling and evaluating sparse autoencoders"
  (2024).
- Multi-TopK, the same, section 4: FVU(k) + FVU(4k)/8, so that reconstructions with
  more than k latents stay good.
- Matryoshka: Bussmann, Nabeshima, Karvonen and Nanda, "Learning multi-level features with
  Matryoshka sparse autoencoders" (2025): Σ over prefixes of the FVU from their latents alone.
- Penalties on L0 or L1, and the reconstruction of a gate: see `saetrain.model.activations`.
- JumpReLU with a target N of L0: N/2 · (L0/N - 1)² of each row, of which SAELens' "quadratic" loss,
  after Gemma Scope 2, is four times as much. At L0 = 2N its slope is that of the penalty on L0.
  From 3N on it is linear: the L0 of untrained SAEs, often 100 N, would make latents die for good.
- With it, on latents that fire often: Σ p²/0.1 over latents that fire on a share p of the batch. It
  is the second term of Σ p (1 + p/p₀), the quadratic-frequency penalty of Smith, Rajamanoharan et
  al., "Negative results for sparse autoencoders on downstream tasks" (2025).

Letters: N tokens, D d_in, E width of the output, M num_latents, K k, A dead latents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import leaky_relu

from actcache.errors import RunError
from saetrain.config.sae import InputScale, SaeConfig, SaeEntry
from saetrain.kernels import (
    PrefixGroups,
    WeightRows,
    backend_of,
    backends,
    dense_decode,
    dense_encode,
    sparse_decode,
    total,
)
from saetrain.model.activations import Latents, TopK
from saetrain.model.sae import Sae, SaeOutput

if TYPE_CHECKING:
    from actcache.format.statistics import Statistics


@dataclass(frozen=True)
class OutputSlice:
    """The columns of the target that belong to one hookpoint of a crosscoder."""

    name: str
    """Hookpoint."""
    width: int
    """Number of columns."""
    variance: float
    """Mean of ‖x - mean‖² over its training rows."""


class TargetStats(NamedTuple):
    """Statistics of the rows that an SAE is trained on, after their input scale."""

    mean: NDArray[np.float64]
    """Mean target row. [E]"""
    source_mean: NDArray[np.float64]
    """Mean row of the encoder's input. [D]"""
    variance: float
    """Variance of the target: mean of ‖y - mean‖²."""
    unit: float
    """Root of the variance of the input: the unit of the pre-activations."""
    parts: tuple[OutputSlice, ...]
    """Columns of each hookpoint of a crosscoder; empty for other SAEs."""


def target_stats(entry: SaeEntry, statistics_of: Callable[[str], Statistics]) -> TargetStats:
    """Compute the statistics of an SAE's training rows from those of its hookpoints.

    Args:
        entry: the SAE.
        statistics_of: returns the statistics of a hookpoint's training rows.

    Raises:
        RunError: the rows of a hookpoint have no variance.
    """
    names, sources, targets = entry.hookpoints, entry.sources, entry.targets
    means, variances = {}, {}
    for name, scale in zip(names, entry.scales or (1.0,) * len(names), strict=True):
        statistics = statistics_of(name)
        variance = statistics.variance
        if not variance > 0:
            raise RunError(
                f"the training rows of {name} do not vary",
                expected="a variance above 0",
                got=variance,
                remedy="leave this hookpoint out",
            )
        means[name], variances[name] = statistics.mean * scale, variance * scale**2
    parts = tuple([OutputSlice(name, len(means[name]), variances[name]) for name in targets])
    return TargetStats(
        mean=np.concatenate([means[name] for name in targets]),
        source_mean=np.concatenate([means[name] for name in sources]),
        variance=sum(variances[name] for name in targets),
        unit=float(np.sqrt(sum(variances[name] for name in sources))),
        parts=parts if len(parts) > 1 else (),
    )


def with_input_scales(
    entry: SaeEntry, kind: InputScale, statistics_of: Callable[[str], Statistics]
) -> SaeEntry:
    """Return an SAE's entry with the scales of its hookpoints' rows, which run.json records.

    Args:
        entry: the entry without them.
        kind: --input-scale.
        statistics_of: returns the statistics of a hookpoint's training rows.

    Raises:
        RunError: the rows of a hookpoint have no variance.
    """
    if kind == "none":
        return entry
    target_stats(entry, statistics_of)  # refuses rows that do not vary
    scales = [scale_of(kind, statistics_of(name)) for name in entry.hookpoints]
    return dataclasses.replace(entry, scales=tuple(scales))


def scale_of(kind: InputScale, statistics: Statistics) -> float:
    """Compute the scale of a hookpoint's rows from the statistics of its training rows."""
    if kind == "none":
        return 1.0
    width = len(statistics.mean)
    return (float(width) ** 0.5 if kind == "rms" else 1.0) / statistics.rms_norm


@dataclass(frozen=True)
class LossConfig:
    """The losses of one SAE beside FVU and AuxK."""

    multi_topk: bool = False
    """Minimise the error of the reconstruction from 4k latents too."""
    prefixes: tuple[int, ...] = ()
    """Numbers of first latents that must reconstruct alone; without M."""
    sparsity: float = 0.0
    """Weight of the activation's penalty, after its warm-up."""
    warmup: int = 0
    """Steps in which that weight rises from 0."""
    target_l0: float | None = None
    """L0 towards which the penalty is steered; None: it is not."""
    frequency: float = 0.0
    """Weight of the penalty on latents that fire often, as a multiple of that weight."""
    parts: tuple[OutputSlice, ...] = ()
    """Hookpoints of a crosscoder, at least two; empty: the target is one hookpoint."""
    gated: bool = False
    """Minimise the error of the gate's own reconstruction too (gated activation)."""
    auxk_scaled_down: bool = True
    """Multiply AuxK by the number of dead latents over k_aux, where that is less than 1."""
    auxk_slope: float = 0.0
    """Slope below 0 of the ReLU that AuxK gives dead latents."""

    def sparsity_at(self, step: int) -> float:
        """Return the weight of the penalty in a step (from 0)."""
        return self.sparsity * self.risen(step)

    def risen(self, step: int) -> float:
        """Return the share of its weight that the penalty has in a step (from 0)."""
        return min(1.0, (step + 1) / max(1, self.warmup))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the losses, in the order of `Losses.terms`."""
        names = [f"fvu/{part.name}" for part in self.parts]
        names += ["multi_topk_fvu"] * self.multi_topk
        names += [f"fvu_{prefix}" for prefix in self.prefixes]
        names += ["penalty"] * (self.sparsity > 0)
        names += ["gate_fvu"] * self.gated
        return tuple(names)


FVU_ONLY = LossConfig()
"""FVU and AuxK alone."""


def make_loss_config(
    config: SaeConfig,
    warmup: int,
    parts: tuple[OutputSlice, ...] = (),
    *,
    auxk_scaled_down: bool = True,
    auxk_slope: float = 0.0,
    target_l0: float | None = None,
    frequency: float | None = None,
) -> LossConfig:
    """Build the losses of an SAE from its configuration.

    Args:
        config: configuration of the SAE.
        warmup: steps in which a penalty rises.
        parts: hookpoints of a crosscoder.
        auxk_scaled_down: as in `LossConfig`.
        auxk_slope: as in `LossConfig`.
        target_l0: --target-l0.
        frequency: --frequency-penalty.
    """
    quadratic = target_l0 is not None and config.activation == "jumprelu"
    return LossConfig(
        multi_topk=config.multi_topk,
        prefixes=config.matryoshka,
        sparsity=config.sparsity * (_QUADRATIC if quadratic else 1),
        warmup=warmup,
        target_l0=target_l0,
        frequency=frequency or 0.0,
        parts=parts,
        gated=config.activation == "gated",
        auxk_scaled_down=auxk_scaled_down,
        auxk_slope=auxk_slope,
    )


_OFTEN = 0.1  # share of the rows: p₀ of the penalty on latents that fire often
_FAR = 3  # times the target: from there on, the quadratic penalty is linear in L0
_QUADRATIC = 3  # times the weight on L0: the slope at twice the target; found on small runs
_MULTI = 4  # times k latents
DEAD_LIST_FACTOR = 8  # times k_aux dead latents
_MULTI_WEIGHT = 1 / 8


class LossTerm(NamedTuple):
    """A loss beside FVU and AuxK."""

    value: Tensor
    weight: float | Tensor
    """Weight in the minimised sum; the number 0: the loss is only logged."""


class Losses(NamedTuple):
    """Losses of one batch, and its forward pass."""

    fvu: Tensor
    """Fraction of variance unexplained: Σ‖x - x̂‖² / (N · variance)."""
    auxk: Tensor
    """AuxK loss, in the same unit or that of the residual's; 0 without dead latents."""
    output: SaeOutput
    """The forward pass."""
    terms: tuple[LossTerm, ...] = ()
    """Other losses, named by `LossConfig.names`."""

    def total(self, auxk_alpha: float) -> Tensor:
        """Compute the minimised sum."""
        loss = self.fvu + auxk_alpha * self.auxk
        for term in self.terms:
            if isinstance(term.weight, Tensor) or term.weight:
                loss = loss + term.weight * term.value
        return loss


def compute_losses(
    sae: Sae,
    rows: Tensor,
    variance: float,
    dead: Tensor | None,
    loss_config: LossConfig = FVU_ONLY,
    step: int = 0,
    step_tensor: Tensor | None = None,
    share: Tensor | None = None,
    steered: Tensor | None = None,
) -> Losses:
    """Run the forward pass of a batch and compute its losses.

    Args:
        sae: the autoencoder.
        rows: activations in its type, [N, D]; of a transcoder, inputs and outputs [N, D + E].
        variance: mean of ‖y - mean‖² over the cache's training rows of the target.
        dead: mask of dead latents, bool [M]; None: no AuxK.
        loss_config: losses beside FVU and AuxK.
        step: number of the step, from 0, for the warm-up of a penalty.
        step_tensor: the same number as a tensor on the device; see `list_dead`.
        share: of each hookpoint of the target, the share of its variance that the residual holds,
            by which AuxK is divided; None: 1. [hookpoints]
        steered: on the device, the target of a penalty that is quadratic in L0, or the weight of
            another after its warm-up; None: the configured one.
    """
    x, y = sae.split(rows)
    parts = loss_config.parts or (OutputSlice("", sae.d_out, variance),)
    now = step if step_tensor is None else step_tensor
    listed = None if dead is None else list_dead(dead, _k_aux(sae), now)
    indices = None if listed is None else listed.indices
    output, terms, weights = _forward(sae, x, y, parts, loss_config, indices)
    residual = y - output.reconstruction  # [N, E]
    fvus = _fvus(residual, parts)
    fvu = _mean(fvus)
    if loss_config.parts:
        terms = [*(LossTerm(value, 0.0) for value in fvus), *terms]
    aux = fvu.new_zeros(())
    if listed is not None:
        aux = auxk_loss(
            sae,
            x,
            residual.detach(),
            listed,
            parts,
            weights,
            share=share,
            scaled_down=loss_config.auxk_scaled_down,
            slope=loss_config.auxk_slope,
        )
    if loss_config.sparsity:
        target = loss_config.target_l0 if steered is None else steered.to(fvu.dtype)
        penalty = _penalty(sae, output, math.sqrt(variance), parts, target, loss_config)
        weight: float | Tensor = loss_config.sparsity_at(step)
        if steered is not None and not sae.activation.counts:
            weight = steered.to(fvu.dtype) * loss_config.risen(step)
        terms.append(LossTerm(penalty, weight))
    if loss_config.gated:
        terms.append(LossTerm(_gate_fvu(sae, x, y, output, parts), 1.0))
    return Losses(fvu, aux, output, tuple(terms))


class DeadLatents(NamedTuple):
    """Candidates for AuxK: dead latents, filled up with others if the list has a fixed length."""

    indices: Tensor
    """Latents of the list. int64 [A]"""
    number: Tensor | int
    """Total number of dead latents, including those not listed."""
    listed: Tensor | None = None
    """Which latents of the list are dead; None: all. bool [A]"""


def list_dead(dead: Tensor, k_aux: int, step: int | Tensor) -> DeadLatents | None:
    """List the dead latents, from which AuxK selects; None if there are none.

    On the CPU all are listed. On a GPU reading their number would synchronise host and device, so
    the list has a fixed length of 8 k_aux; if more are dead, each step lists the next ones, in
    rotation.

    Args:
        dead: bool. [M]
        k_aux: number of latents that reconstruct a residual.
        step: number of the step, from 0; or int64 on the device, no dimensions.
    """
    if backends.host_can_read(dead):
        indices = dead.nonzero().squeeze(1)
        return DeadLatents(indices, len(indices)) if len(indices) else None
    return list_dead_in(dead, min(len(dead), DEAD_LIST_FACTOR * k_aux), step)


def list_dead_in(dead: Tensor, length: int, step: int | Tensor) -> DeadLatents:
    """List `length` latents, dead ones first, without synchronising with the device."""
    M = len(dead)
    rank = (torch.arange(M, device=dead.device) - step * length) % M
    indices = torch.where(dead, rank, M).topk(length, largest=False).indices  # [A]
    return DeadLatents(indices, dead.sum(), dead[indices])


def auxk_loss(
    sae: Sae,
    x: Tensor,
    residual: Tensor,
    dead: DeadLatents,
    parts: tuple[OutputSlice, ...],
    weights: WeightRows | None = None,
    *,
    share: Tensor | None = None,
    scaled_down: bool = True,
    slope: float = 0.0,
) -> Tensor:
    """Compute the squared error of the residual's reconstruction from dead latents.

    Gao et al. (2024), appendix A.2: k_aux = E/2 dead latents reconstruct e = y - x̂ without bias.
    Their loss is Σ‖ê - e‖² / Σ‖e - mean e‖², which is about 1 at first, however small the residual:
    `share` makes the denominator that of the residual, whose mean b_dec keeps near 0. Only the dead
    latents' pre-activations are computed, and the gradient reaches their encoder rows. Whatever the
    activation of the SAE, dead latents take ReLU and top k_aux. A latent that is below 0 on every
    row has no gradient then, and stays dead; a leaky ReLU, of slope `slope` below 0, revives it.

    Args:
        sae: the autoencoder.
        x: activations. [N, D]
        residual: y - x̂, detached. [N, E]
        dead: the dead latents, A of them listed.
        parts: hookpoints of the target.
        weights: weights of the listed latents, if the forward pass returned them.
        share: variance of the residual over that of the target, of each hookpoint; None: the error
            is divided by the variance of the target. [hookpoints]
        scaled_down: with fewer than k_aux dead latents, multiply by their number over k_aux.
        slope: of the leaky ReLU below 0; 0: ReLU.
    """
    k_aux, indices = _k_aux(sae), dead.indices
    if weights is None:
        weights = WeightRows(sae.W_enc[indices], sae.b_enc[indices], sae.W_dec[indices])
    W_enc, b_enc, W_dec = weights  # [A, D], [A], [A, E]
    ops = backend_of(W_enc)
    pre_acts = dense_encode(x, W_enc, b_enc, sae.subtracted, ops)  # [N, A]
    pre_acts = leaky_relu(pre_acts, slope) if slope else torch.relu(pre_acts)
    if dead.listed is not None:
        pre_acts = torch.where(dead.listed, pre_acts, 0)
    ranked = pre_acts.detach()
    if dead.listed is not None and slope:  # a leaky ReLU falls below the 0 of the others
        ranked = torch.where(dead.listed, ranked, torch.finfo(ranked.dtype).min)
    top = ops.topk(ranked, min(k_aux, len(indices)))[1]  # [N, k_aux]
    top_acts = pre_acts.gather(1, top)
    if len(indices) <= DEAD_LIST_FACTOR * k_aux:  # dense products are faster
        acts = torch.zeros_like(pre_acts).scatter(1, top, top_acts)  # [N, A]
        predicted = dense_decode(acts, W_dec, torch.zeros_like(residual[0]), ops)  # [N, E]
    else:
        predicted = sparse_decode(top_acts, top, W_dec)
    error = _fvus(predicted - residual, parts)
    if share is not None:
        shares = share.to(error[0].dtype).unbind()
        error = [fvu / of_part for fvu, of_part in zip(error, shares, strict=True)]
    if not scaled_down:
        number = dead.number
        if isinstance(number, int):
            return _mean(error)
        # On a device the list may hold no dead latent, which is no loss.
        return _mean([torch.where(number > 0, fvu, 0) for fvu in error])
    if isinstance(dead.number, int):
        return _mean([min(1.0, dead.number / k_aux) * fvu for fvu in error])
    scale = (dead.number / k_aux).clamp(max=1.0)
    return _mean([scale * fvu for fvu in error])


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
    """Run the forward pass, and compute its extra losses and the weights of the latents `rows`.

    Sparse latents are encoded and decoded once for all losses, so that one backward pass computes
    one gradient of each weight. For dense latents no weights are returned.
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
    """Encode and decode every latent once; the prefixes' reconstructions are running sums."""
    if not prefixes:
        return sae(x), []
    top_acts, _, pre_acts = sae.encode(x)
    so_far: Tensor = sae.b_dec if sae.W_skip is None else sae.b_dec + x @ sae.W_skip.T
    terms = []
    widths = [high - low for low, high in pairwise((0, *prefixes, sae.num_latents))]
    # Split once: each slice would have a gradient as large as the whole.
    groups = zip(torch.split(top_acts, widths, dim=1), torch.split(sae.W_dec, widths), strict=True)
    for acts, W_dec in groups:
        so_far = dense_decode(acts, W_dec, so_far)
        terms.append(LossTerm(_mean(_fvus(y - so_far, parts)), 1.0))
    terms.pop()  # the last reconstruction is from all latents: its error is the FVU
    return SaeOutput(so_far, top_acts, None, pre_acts), terms


def _penalty(
    sae: Sae,
    output: SaeOutput,
    unit: float,
    parts: tuple[OutputSlice, ...],
    target: float | Tensor | None,
    loss_config: LossConfig,
) -> Tensor:
    """Average the activation's penalty over rows.

    A latent's weight is the sum over hookpoints of its decoder row's norm (Lindsey et al., 2024).
    """
    columns = torch.split(sae.W_dec, [part.width for part in parts], dim=1)
    norms = sum((W.norm(dim=1) for W in columns), start=torch.zeros_like(sae.b_enc))  # [M]
    latents = Latents(output.top_acts, output.top_indices, output.pre_acts)
    per_row = sae.activation.penalty(latents, norms)  # [N], in autocast's dtype under autocast
    assert per_row is not None
    per_row = per_row.to(norms.dtype)
    if not sae.activation.counts:
        return total(per_row) / len(per_row) / unit
    if target is not None:
        assert loss_config.target_l0 is not None
        l0 = sae.activation.l0(latents)
        most = l0.clamp(max=_FAR * loss_config.target_l0)
        above = most / target - 1
        per_row = above.square() * (target / 2) + above * (l0 - most)
    mean = total(per_row) / len(per_row)
    if frequency := loss_config.frequency:
        shares = sae.activation.firing_shares(latents)  # [M]
        mean = mean + frequency / _OFTEN * total(shares.square())
    return mean


def _gate_fvu(
    sae: Sae, x: Tensor, y: Tensor, output: SaeOutput, parts: tuple[OutputSlice, ...]
) -> Tensor:
    """Compute the FVU of the gate's own reconstruction, through a detached decoder."""
    acts = sae.activation.gate(Latents(output.top_acts, output.top_indices, output.pre_acts))
    assert acts is not None
    predicted = dense_decode(acts, sae.W_dec.detach(), sae.b_dec.detach())  # [N, E]
    if sae.W_skip is not None:
        predicted = predicted + x @ sae.W_skip.detach().T
    return _mean(_fvus(y - predicted, parts))


def _fvus(error: Tensor, parts: tuple[OutputSlice, ...]) -> list[Tensor]:
    """Compute each hookpoint's FVU: its squared error, of [N, E], over N times its variance."""
    columns = torch.split(error, [part.width for part in parts], dim=1) if parts[1:] else (error,)
    fvus = []
    for column, part in zip(columns, parts, strict=True):
        fvus.append(total(column.pow(2).sum(dim=1)) / (len(error) * part.variance))
    return fvus


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean()
