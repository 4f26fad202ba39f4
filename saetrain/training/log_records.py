"""What metrics.jsonl says of SAEs in training: on the rows of training, and held-out ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from saetrain.model.decoder_norm import fold
from saetrain.training.metrics import decoder_norm_range, decoder_norms
from saetrain.training.non_finite import require_finite_loss
from saetrain.training.sae_trainer import SaeTrainer


def collect_metrics(
    root: Path, trainers: list[SaeTrainer], step: int, rows: int, histogram: bool
) -> dict[str, dict[str, Any]]:
    """Means since the last line, and how things stand after a step, by the SAE's name.

    Args:
        root: folder of the run.
        trainers: the SAEs.
        step: steps done.
        rows: rows trained on.
        histogram: whether that of densities is among them.

    Raises:
        NonFiniteError: a loss was not finite.
    """
    metrics = {}
    for trainer in trainers:
        means = trainer.meter.pop_means()
        require_finite_loss(root, trainer, means["fvu"] + means["auxk"], step)
        dead: dict[str, Any] = {
            "dead_percent": trainer.dead_tracker.dead_percent(rows),
            "dead_after": trainer.dead_tracker.dead_after,
        }
        update = trainer.settings.first_step_of_update(step - 1)
        # No k: a penalty decides.
        now = {"lr": trainer.optimizer.learning_rate(update), "k": trainer.sae.k or None}
        norms = decoder_norm_range(trainer.sae.W_dec) | _norms(trainer)
        metrics[trainer.entry.name] = means | dead | now | norms | trainer.latent_stats.read()
        if histogram:
            metrics[trainer.entry.name] |= trainer.latent_stats.pop_density()
    return metrics


def _norms(trainer: SaeTrainer) -> dict[str, float]:
    """Of a crosscoder, the norms of its decoder's rows as they are saved, at each hookpoint."""
    parts = trainer.loss_config.parts
    if not parts:
        return {}
    weights: dict[str, Tensor] = dict(trainer.sae.named_parameters())
    if trainer.settings.decoder_norm == "fold":
        weights = fold(weights)
    if trainer.scaling is not None:
        weights = trainer.scaling.fold_into(weights)
    return decoder_norms(weights["W_dec"], parts)
