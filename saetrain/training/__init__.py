"""Training steps of one process.

`loop` is the training loop, `step` one update, `sae_trainer` the state of one SAE in training with
the settings of its steps, `init` fits its first weights to rows, and `run_state` is what `launch`
has built. `metrics` accumulates losses and latent counts, `validation` measures held-out rows,
`checkpointing` saves, `non_finite` reports losses that are not finite, `health` other signs that a
run goes wrong, `ddp` shares each batch among ranks, `penalty_control` brings L0 to --target-l0, and
`cuda_graphs` replays recorded steps.
"""

__all__ = [
    "checkpointing",
    "cuda_graphs",
    "ddp",
    "health",
    "init",
    "loop",
    "metrics",
    "non_finite",
    "penalty_control",
    "run_state",
    "sae_trainer",
    "state_layout",
    "step",
    "validation",
]
