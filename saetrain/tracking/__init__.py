"""Metrics of a run, and the histogram bins in which they count latents.

`jsonl` writes and reads metrics.jsonl and timings.jsonl; `wandb_mirror` copies them to Weights &
Biases.
"""

__all__ = ["BINS_PER_DECADE", "DECADES", "EDGES", "jsonl", "wandb_mirror"]

BINS_PER_DECADE = 4
DECADES = 8
EDGES = [bin_ / BINS_PER_DECADE - DECADES for bin_ in range(BINS_PER_DECADE * DECADES + 1)]
"""Edges of the histogram of latent densities (a density is the share of rows on which a latent is
active). Bin b counts latents with log10(density) in [EDGES[b], EDGES[b + 1]). The first bin also
holds smaller densities, the last bin also density 1."""
