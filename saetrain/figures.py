"""What metrics.jsonl says of SAEs in training: on the rows of training, and held-out ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from saetrain.best import keep_only, save_best
from saetrain.decoder_norm import fold
from saetrain.metrics import decoder_norms
from saetrain.non_finite import require_finite_loss
from saetrain.trainee import Trainee
from saetrain.validation import Validation
from saetrain.vitals import decoder_norm_range


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


def validate(
    root: Path,
    groups: dict[str, list[Trainee]],
    validation: Validation,
    done: int,
    keep_best: bool,
) -> dict[str, dict[str, float]]:
    """Measure every SAE as it would be exported, and write those that were never better.

    Returns:
        Figures by the SAE's name.
    """
    figures = {}
    for group in groups.values():
        rows = validation.on(group[0].entry, group[0].sae.W_enc.device)
        for trainee in group:
            weights, entry = trainee.exported(), trainee.entry
            if trainee.recipe.k_anneal_steps:
                trainee.sae.k = entry.config.k  # while k falls, every step sets its own
            found = validation.measure(trainee.sae, weights, entry, rows)
            require_finite_loss(root, trainee, found["fvu"], done)
            figures[entry.name] = found
            if keep_best and is_better(trainee, found["fvu"], done):
                folder, unit = root / entry.name, trainee.unit_norm()
                trainee.best = save_best(folder, entry, weights, unit, done, found["fvu"])
                keep_only(folder, {done, *trainee.saved_bests})
    return figures


def is_better(trainee: Trainee, fvu: float, done: int) -> bool:
    """Whether an SAE is better than its best so far.

    While k still falls or a penalty still rises, more latents are active than in the end (a dense
    activation's, or BatchTopK's by its threshold): a low FVU of then is bought with L0. So whatever
    comes after is better than that.
    """
    best = trainee.best
    return best is None or best.step < trainee.settled_at <= done or fvu < best.fvu


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
