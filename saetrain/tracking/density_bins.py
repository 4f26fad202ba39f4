"""Bins of the histogram of latent densities, shared by metrics.jsonl and W&B."""

from __future__ import annotations

BINS_PER_DECADE = 4
DECADES = 8
EDGES = [bin_ / BINS_PER_DECADE - DECADES for bin_ in range(BINS_PER_DECADE * DECADES + 1)]
"""Histogram of densities, the shares of rows on which a latent is active: bin b counts latents with
log10 of it in [EDGES[b], EDGES[b + 1]); the first also what is below, the last what is 1."""
