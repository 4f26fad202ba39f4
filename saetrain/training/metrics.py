"""What is measured along the way, kept on the device until it is logged."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saetrain.kernels.sums import total
from saetrain.model.losses import Losses, OutputSlice
from saetrain.tracking.density_bins import EDGES


class MeanMeter:
    """Means over the steps since the last line of metrics.jsonl.

    Nothing here waits for the device before `read`. The sums are part of a checkpoint, so that a
    resumed run logs the same line that an uninterrupted one would have.
    """

    NAMES = ("fvu", "auxk", "l0")

    def __init__(self, device: torch.device, terms: tuple[str, ...] = ()) -> None:
        self.names = (*self.NAMES, *terms)
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.steps = 0

    def add(self, losses: Losses) -> None:
        """Count one step."""
        self.count(self.values(losses))

    @torch.no_grad()
    def values(self, losses: Losses) -> Tensor:
        """What is measured of one step; means over its rows. [NAMES]"""
        active = (losses.output.top_acts > 0).sum(dim=1).double()  # [N]
        l0 = total(active) / len(active)
        terms = [term.value.double() for term in losses.terms]
        return torch.stack([losses.fvu.double(), losses.auxk.double(), l0, *terms])

    def count(self, values: Tensor) -> None:
        """Count one step, of which this was measured."""
        self.sums += values
        self.steps += 1

    def count_replayed(self) -> None:
        """Count, on the host alone, a step that the device counted by itself."""
        self.steps += 1

    def pop_means(self) -> dict[str, float]:
        """The means, and start over."""
        means = (self.sums / max(self.steps, 1)).tolist()
        self.sums.zero_()
        self.steps = 0
        return dict(zip(self.names, means, strict=True))


class DeadLatentTracker:
    """For each latent, how many rows ago it last fired."""

    def __init__(self, num_latents: int, dead_after: int, device: torch.device) -> None:
        self.rows_since = torch.zeros(num_latents, dtype=torch.int64, device=device)  # [M]
        self.dead_after = dead_after

    @torch.no_grad()
    def add(self, encoded: tuple[Tensor, Tensor | None]) -> None:
        """Count one batch: (top_acts [N, K], top_indices [N, K]), or (acts [N, M], None)."""
        top_acts, top_indices = encoded
        self.count(fired(top_acts, top_indices, len(self.rows_since)), len(top_acts))

    def count(self, fired: Tensor, rows: int) -> None:
        """Count so many rows, in which these latents fired: bool [M]."""
        self.rows_since += rows
        self.rows_since.masked_fill_(fired, 0)

    def dead(self) -> Tensor:
        """Which latents have not fired for `dead_after` rows. bool [M]"""
        return self.rows_since >= self.dead_after

    def may_be_dead(self, rows: int) -> bool:
        """Whether a latent can be dead by now, after `rows` rows. No device is asked."""
        return rows >= self.dead_after

    def dead_percent(self, rows: int) -> float | None:
        """Share of dead latents, percent; None if `rows` trained on are too few to know."""
        if rows < self.dead_after:
            return None
        return 100.0 * float(self.dead().double().mean())


@torch.no_grad()
def decoder_norms(W_dec: Tensor, parts: tuple[OutputSlice, ...]) -> dict[str, float]:
    """Mean norm of a crosscoder's decoder rows [M, E] at each hookpoint, by its log name."""
    prefix_groups = torch.split(W_dec, [part.width for part in parts], dim=1)
    means = [total(piece.norm(dim=1).double()) / len(piece) for piece in prefix_groups]
    return {f"norm/{p.name}": float(mean) for p, mean in zip(parts, means, strict=True)}


def fired(top_acts: Tensor, top_indices: Tensor | None, num_latents: int) -> Tensor:
    """Which latents are active in any row. bool [M]

    Without indices, the activations are those of all latents, [N, M]. With them,
    a maximum, not an assignment: where an index repeats, the order of writing does not matter.
    """
    if top_indices is None:
        return (top_acts > 0).any(dim=0)
    hits = torch.zeros(num_latents, dtype=torch.int32, device=top_acts.device)
    active = (top_acts > 0).int().flatten()
    return hits.scatter_reduce_(0, top_indices.flatten(), active, "amax").bool()


class LatentStats:
    """What is watched of one SAE since it was last read.

    Args:
        num_latents: M.
        device: where the SAE is.
    """

    def __init__(self, num_latents: int, device: torch.device) -> None:
        self._active = torch.zeros(num_latents, dtype=torch.int64, device=device)  # [M]
        self._rows = 0
        self._norms = torch.zeros((), dtype=torch.float64, device=device)
        self._updates = 0

    @torch.no_grad()
    def add_latents(self, top_acts: Tensor, top_indices: Tensor | None) -> None:
        """Count one batch: activations [N, K] and their latents [N, K]; or of all, [N, M]."""
        self.count(active_rows(top_acts, top_indices, len(self._active)), len(top_acts))

    def count(self, active: Tensor, rows: int) -> None:
        """Count so many rows, on so many of which each latent is active: int64 [M]."""
        self._active += active
        self._rows += rows

    @torch.no_grad()
    def add_gradient(self, norm: Tensor) -> None:
        """Count one update, whose gradient has this norm; on the device, no dimensions."""
        self._norms += norm
        self._updates += 1

    def count_replayed(self, rows: int) -> None:
        """Count, on the host alone, a batch and an update that the device counted by itself."""
        self._rows += rows
        self._updates += 1

    def read(self) -> dict[str, Any]:
        """The mean norm of the gradient, and start over with it; None if there was no update."""
        mean = float(self._norms) / max(self._updates, 1)
        known = self._updates > 0 and math.isfinite(mean)  # it overflows before the losses do
        self._norms.zero_()
        self._updates = 0
        return {"grad_norm": mean if known else None}

    def pop_density(self) -> dict[str, Any]:
        """The histogram of densities over the rows since the last one, and start over with it."""
        density = self._active.cpu().numpy() / max(self._rows, 1)
        fires = density[density > 0]
        # Compared as densities, not as their logarithms: those differ from machine to machine.
        edges = [0.0, *(10.0**edge for edge in EDGES[1:-1]), 1.0]
        counts = np.histogram(fires, edges)[0].tolist()
        found = {"rows": self._rows, "never": len(density) - len(fires), "counts": counts}
        self._active.zero_()
        self._rows = 0
        return {"log10_density": found}

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Tensors and numbers for a checkpoint."""
        numbers = {"rows": self._rows, "updates": self._updates}
        return {"active": self._active, "norms": self._norms}, {**numbers}

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Put back what `state` gave."""
        self._active.copy_(tensors["active"])
        self._norms.copy_(tensors["norms"])
        self._rows, self._updates = int(numbers["rows"]), int(numbers["updates"])


@torch.no_grad()
def active_rows(top_acts: Tensor, top_indices: Tensor | None, num_latents: int) -> Tensor:
    """On how many rows each latent is active, int64 [M]."""
    active = top_acts > 0
    if top_indices is None:
        return active.sum(dim=0)
    counts = torch.zeros(num_latents, dtype=torch.int64, device=top_acts.device)
    # Whole numbers: the order of adding does not matter.
    return counts.scatter_add_(0, top_indices.flatten(), active.long().flatten())


@torch.no_grad()
def decoder_norm_range(W_dec: Tensor) -> dict[str, float]:
    """The least and the largest norm of a decoder's rows [M, D]."""
    norms = W_dec.norm(dim=1)  # [M]
    return {"decoder_norm_min": float(norms.min()), "decoder_norm_max": float(norms.max())}
