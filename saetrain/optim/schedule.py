"""Learning rates: how large by default, and how they change over a run. After sparsify."""

from __future__ import annotations

import math

from saetrain.config import OptimizerName

_BASE = {"signum": 5e-3, "adam": 2e-4}


def default_lr(optimizer: OptimizerName, num_latents: int) -> float:
    """Learning rate that falls with the root of the width: base / sqrt(M / 2^14)."""
    return _BASE[optimizer] / math.sqrt(num_latents / 2**14)


def warmup_then_decay(step: int, warmup: int, steps: int) -> float:
    """Factor of the learning rate in a step: linear up to 1, then linear down to 0.

    Args:
        step: number of the step, from 0.
        warmup: steps to rise for.
        steps: steps of the whole run.
    """
    if step < warmup:
        return step / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))
