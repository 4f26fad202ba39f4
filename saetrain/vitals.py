"""What is watched besides losses: how often latents fire, how long gradients are.

Kept on the device until it is logged, and part of a checkpoint, like `saetrain.metrics`. Letters: N
tokens, K k, M num_latents, D d_in.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

BINS_PER_DECADE = 4
DECADES = 8
EDGES = [bin_ / BINS_PER_DECADE - DECADES for bin_ in range(BINS_PER_DECADE * DECADES + 1)]
"""Histogram of densities, the shares of rows on which a latent is active: bin b counts latents with
log10 of it in [EDGES[b], EDGES[b + 1]); the first also what is below, the last what is 1."""


class Vitals:
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

    def repeat(self, rows: int) -> None:
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

    def read_density(self) -> dict[str, Any]:
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
    """On how many rows each latent is active, int64 [M], as `Vitals.add_latents` is given them."""
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
