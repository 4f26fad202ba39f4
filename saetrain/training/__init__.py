"""Training steps of one process.

`loop` is the training loop, `step` one update, `sae_trainer` the state of one SAE in training with
the settings of its steps, and `init` the starting values of its weights. `run_state` holds what
`launch` has built, and `row_stream` opens the rows. `metrics` accumulates losses and latent counts,
`validation` measures held-out rows, `checkpointing` saves, `non_finite`
reports losses that are not finite, `ddp` shares each batch among ranks, and `cuda_graphs` replays
recorded steps.
"""

__all__ = [
    "checkpointing",
    "cuda_graphs",
    "ddp",
    "init",
    "loop",
    "metrics",
    "non_finite",
    "row_stream",
    "run_state",
    "sae_trainer",
    "step",
    "validation",
]
