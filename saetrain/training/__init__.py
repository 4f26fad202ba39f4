"""One process's training steps: the loop, the step, and what both record.

`loop` is the training loop, `step` one update, `sae_trainer` the state of one SAE in training,
`step_settings` how its steps are made, and `init` where weights begin. `metrics`, `log_records`,
`validation` and `best` measure, `checkpointing` saves, `finite_guard` and `non_finite` handle
losses that are not finite, `ddp` shares a batch among ranks, and `cuda_graphs` replays recorded
steps.
"""

__all__ = [
    "best",
    "checkpointing",
    "cuda_graphs",
    "ddp",
    "finite_guard",
    "init",
    "log_records",
    "loop",
    "metrics",
    "non_finite",
    "sae_trainer",
    "step",
    "step_settings",
    "validation",
]
