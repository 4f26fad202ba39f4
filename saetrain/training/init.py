"""Initial weights that are fitted to rows: b_dec at their median, and the scale of the encoder.

Letters: N rows, D d_in, E width of the output.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.cache.reader import Cache
from actcache.format.statistics import Statistics
from actcache.stream.order import OrderPlan, Span, batch_rows
from actcache.stream.verified_reads import VerifiedReader, Verify
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeEntry
from saetrain.model.losses import (
    FVU_ONLY,
    LossConfig,
    compute_losses,
    target_stats,
)
from saetrain.model.sae import Sae, rows_of
from saetrain.model.weight_scales import input_scaling
from saetrain.training.sae_trainer import initial_sae

ROWS = 2048
"""Rows of the run's first batches that initialisation reads."""

_ITERATIONS = 100
_CLOSE = 1e-7


@dataclass(eq=False)
class FirstRows:
    """The first rows that a run trains on, read on demand.

    Raises:
        CorruptShardError: a file is missing, or differs from its receipt.
    """

    cache: Cache
    plan: OrderPlan
    """Order of the run's rows; with --follow, of its first segment."""
    verify: Verify
    """When to compare files with their receipts. The stream compares them too, but only after
    run.json has recorded what was found on these rows."""

    def of(self, entry: SaeEntry, device: torch.device) -> Tensor:
        """Return an SAE's rows, scaled as in training. float32 [N, D], a transcoder's [N, D + E]"""
        rows = rows_of(entry, {name: self._read(name) for name in entry.hookpoints}).to(device)
        scaling = input_scaling(entry, device)
        return rows if scaling is None else rows * scaling.rows

    @functools.cached_property
    def _reader(self) -> VerifiedReader:
        return VerifiedReader(self.cache, self.verify)

    @functools.cached_property
    def _spans(self) -> list[Span]:
        steps = min(-(-ROWS // self.plan.batch_size), self.plan.steps_per_epoch)
        batches = [batch_rows(self.plan, 0, step) for step in range(steps)]
        addresses = np.concatenate(batches)[:ROWS].tolist()
        return [Span(shard, row, 1) for shard, row in addresses]

    @functools.cache  # noqa: B019 # the object is short-lived
    def _read(self, hookpoint: str) -> Tensor:
        row_dtype = self.cache.row_dtype
        stored = row_dtype.empty(len(self._spans), self.cache.manifest.width(hookpoint))
        self._reader.load(self._spans, {hookpoint: stored})
        return row_dtype.to_torch(stored).float()


@torch.no_grad()
def init_b_dec_at_median(sae: Sae, entry: SaeEntry, first: FirstRows) -> None:
    """Set b_dec to the geometric median of the target rows."""
    _, predicted = sae.split(first.of(entry, torch.device("cpu")))
    sae.b_dec.copy_(torch.from_numpy(geometric_median(predicted)))


def with_encoder_scale(
    entry: SaeEntry,
    options: FitConfig,
    statistics_of: Callable[[str], Statistics],
    first: FirstRows,
    device: torch.device,
) -> SaeEntry:
    """Return an SAE's entry with the encoder scale that --encoder-scale auto finds.

    Args:
        entry: the entry, with its input scales.
        options: the run's options, with those of this SAE.
        statistics_of: returns the statistics of a hookpoint's training rows.
        first: rows on which it is fitted.
        device: device of the fit.

    Raises:
        RunError: the rows of a hookpoint do not vary.
    """
    targets = target_stats(entry, statistics_of)
    sae = initial_sae(entry, targets, options, device)
    if entry.options.b_dec_init == "geometric-median":
        init_b_dec_at_median(sae, entry, first)
    rows = first.of(entry, device).to(sae.W_enc.dtype)
    loss_config = LossConfig(parts=targets.parts) if targets.parts else FVU_ONLY
    scale = search_encoder_scale(sae, rows, targets.variance, loss_config)
    return dataclasses.replace(entry, encoder_scale=scale)


def geometric_median(rows: Tensor) -> NDArray[np.float64]:
    """Return the point with the smallest sum of distances to rows [N, D]: [D].

    Weiszfeld's iteration, "Sur le point pour lequel la somme des distances de n points donnés est
    minimum" (1937). In NumPy, so that the bits do not depend on the number of threads.
    """
    points = rows.cpu().double().numpy()
    found: NDArray[np.float64] = points.mean(axis=0)
    spread = math.sqrt(np.square(points - found).sum(axis=1).mean())
    for _ in range(_ITERATIONS):
        distances = np.sqrt(np.square(points - found).sum(axis=1))  # [N]
        weights = 1 / np.maximum(distances, 1e-12 * spread + 1e-300)
        after = (points * weights[:, None]).sum(axis=0) / weights.sum()
        moved = math.sqrt(np.square(after - found).sum())
        found = after
        if moved <= _CLOSE * spread:
            break
    return found


@torch.no_grad()
def search_encoder_scale(sae: Sae, rows: Tensor, variance: float, loss_config: LossConfig) -> float:
    """Return the factor of W_enc with which an untrained SAE reconstructs rows best.

    Tries powers of 2 from 1/64 to 64, then finer ones around the best, to 1/64 of an octave.

    Args:
        sae: with its initial weights, which are restored.
        rows: [N, D], in the dtype of the weights.
        variance: of all training rows.
        loss_config: the terms of its loss.
    """
    kept = sae.W_enc.detach().clone()

    @functools.cache
    def error(octaves: float) -> float:
        sae.W_enc.copy_(kept * 2.0**octaves)
        fvu = float(compute_losses(sae, rows, variance, None, loss_config).fvu)
        return fvu if math.isfinite(fvu) else math.inf

    best = 0.0
    for step, n in ((1.0, 6), (1 / 4, 3), (1 / 16, 3), (1 / 64, 3)):
        best = min((best + i * step for i in range(-n, n + 1)), key=error)
    sae.W_enc.copy_(kept)
    return float(2.0**best)
