"""What metrics.jsonl says of SAEs in training: on the rows of training, and held-out ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from saetrain.model.decoder_norm import fold
from saetrain.training.metrics import decoder_norm_range, decoder_norms
from saetrain.training.non_finite import require_finite_loss
from saetrain.training.sae_trainer import Trainee


def read_figures(
    root: Path, trainees: list[Trainee], step: int, rows: int, histogram: bool
) -> dict[str, dict[str, Any]]:
    """Means since the last line, and how things stand after a step, by the SAE's name.

    Args:
        root: folder of the run.
        trainees: the SAEs.
        step: steps done.
        rows: rows trained on.
        histogram: whether that of densities is among them.

    Raises:
        NonFiniteError: a loss was not finite.
    """
    metrics = {}
    for trainee in trainees:
        means = trainee.meter.read()
        require_finite_loss(root, trainee, means["fvu"] + means["auxk"], step)
        dead: dict[str, Any] = {
            "dead_percent": trainee.firing.dead_percent(rows),
            "dead_after": trainee.firing.dead_after,
        }
        update = trainee.recipe.first_step_of_update(step - 1)
        # No k: a penalty decides.
        now = {"lr": trainee.optimizer.learning_rate(update), "k": trainee.sae.k or None}
        norms = decoder_norm_range(trainee.sae.W_dec) | _norms(trainee)
        metrics[trainee.entry.name] = means | dead | now | norms | trainee.vitals.read()
        if histogram:
            metrics[trainee.entry.name] |= trainee.vitals.read_density()
    return metrics


def _norms(trainee: Trainee) -> dict[str, float]:
    """Of a crosscoder, the norms of its decoder's rows as they are saved, at each hookpoint."""
    parts = trainee.objective.parts
    if not parts:
        return {}
    weights: dict[str, Tensor] = dict(trainee.sae.named_parameters())
    if trainee.recipe.decoder_norm == "fold":
        weights = fold(weights)
    if trainee.scaling is not None:
        weights = trainee.scaling.raw(weights)
    return decoder_norms(weights["W_dec"], parts)
