"""Where metrics go.

`jsonl` writes and reads metrics.jsonl and timings.jsonl, `wandb_mirror` copies them to Weights &
Biases, and `density_bins` holds the histogram bins that both use.
"""

__all__ = [
    "density_bins",
    "jsonl",
    "wandb_mirror",
]
