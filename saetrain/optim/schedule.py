"""Learning rates: the default, and how they change over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import LrSchedule, OptimizerName

_SIGNUM, _ADAM, _MUON = 5e-3, 2e-4, 2e-3
_LONG = 2**17
_ADAM_MOST = 0.24  # over sqrt(D): a step moves a row of norm 1 by a quarter of itself at most
_ADAM_MOST_OF_ROWS = 0.18  # the same, where the rate follows the rows of an update
_MUON_MOST, _MUON_SHORT = 1.6e-2, 137  # the rate of runs of so many updates, or fewer
_BATCH = 2048  # rows of an update, at which the other constants were measured
_BATCH_POWER = 1 / 4
_WARMUP_MOST = 1000


def default_lr(
    optimizer: OptimizerName,
    num_latents: int,
    d_in: int,
    updates: int | None = None,
    *,
    rows: int | None = None,
) -> float:
    """Return the default learning rate, the peak of a schedule; sparsify's in a long run.

    signum: 5e-3 / sqrt(M / 2^14), whatever the run's length: being schedule-free, it averages.
    Adam's kinds: 2e-4 / sqrt(M / 2^14) from 2^17 updates on, and in a shorter run
    sqrt(2^17 / updates) times that: the root leads from the best rates of short runs
    (benchmarks/README.md) to sparsify's rate for long ones. At most 0.18 / sqrt(D), which is 7.5e-3
    at the width where that was tried: no step should be as long as rows are. muon: 2e-3 in a long
    run, and in a shorter one 1.6e-2 · sqrt(137 / updates), at most 1.6e-2; its updates are scaled
    by the shape of the matrix already.

    Gradients of fewer rows are noisier: with fewer than 2,048 rows an update, the rates of Adam's
    kinds and muon are (rows / 2,048)^(1/4) times those. The root of Malladi, Lyu, Panigrahi and
    Arora, "On the SDEs and scaling rules for adaptive gradient algorithms" (2022), (1/2), gave
    rates that were too low at 512 and 704 rows.

    Args:
        optimizer: name of the optimiser.
        num_latents: width of the SAE, M.
        d_in: width of the rows, D.
        updates: updates of the whole run; None: a long one.
        rows: rows of an update. None: the defaults of version 1, whose rates do not follow it, and
            that of muon not the length of the run either; Adam's are at most 0.24 / sqrt(D).
    """
    narrow = math.sqrt(num_latents / 2**14)
    if optimizer == "signum":
        return _SIGNUM / narrow
    noisy = 1.0 if rows is None else min(1.0, (rows / _BATCH) ** _BATCH_POWER)
    if optimizer == "muon":
        if rows is None or updates is None:
            return _MUON * noisy
        short = min(_MUON_MOST, _MUON_MOST * math.sqrt(_MUON_SHORT / updates))
        return max(_MUON, short) * noisy
    missing = 1.0 if updates is None else max(1.0, _LONG / updates)
    most = _ADAM_MOST if rows is None else _ADAM_MOST_OF_ROWS
    return min(most / math.sqrt(d_in), _ADAM / narrow * math.sqrt(missing)) * noisy


def warmup_steps(option: int | None, steps: int) -> int:
    """Return the steps of warm-up: the option, else a twentieth of the run, at most 1000."""
    return min(_WARMUP_MOST, steps // 20) if option is None else option


def warmup_then_decay(step: int, warmup: int, steps: int) -> float:
    """Return the factor of the learning rate in a step: linear up to 1, then linear down to 0.

    Args:
        step: number of the step, from 0.
        warmup: steps to rise for.
        steps: steps of the whole run.
    """
    if step < warmup:
        return step / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a run, as a share of its peak."""

    shape: LrSchedule
    """Shape after the warm-up."""
    warmup: int
    """Steps of linear warm-up, from 0."""
    steps: int
    """Steps of the whole run."""
    decay: int | None = None
    """Steps of the decay at the end, stable-then-decay only; None: a fifth of the run."""
    end: float = 0.0
    """Factor at the end of the decay, one step after the run's last."""

    def factor(self, step: int) -> float:
        """Return the share of the peak in a step, from 0."""
        if step < self.warmup:
            return step / self.warmup
        if self.shape == "constant":
            return 1.0
        if self.shape == "stable-then-decay":
            decay = max(1, self.steps // 5) if self.decay is None else self.decay
            begin = max(self.warmup, self.steps - decay)
            left = 1.0 if step < begin else warmup_then_decay(step, begin, self.steps)
        else:
            left = warmup_then_decay(step, self.warmup, self.steps)
        if self.shape == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return self.end + (1 - self.end) * left


def make_schedule(options: FitConfig, steps: int) -> Schedule | None:
    """Build the schedule of a run's options; None: the optimiser's own.

    Args:
        options: options of the run.
        steps: steps of the whole run.
    """
    shape = options.lr_schedule
    if shape is None:
        if options.optimizer == "signum":
            return None
        shape = "linear"
    warmup = warmup_steps(options.lr_warmup_steps, steps)
    return Schedule(shape, warmup, steps, options.lr_decay_steps, options.lr_end)
