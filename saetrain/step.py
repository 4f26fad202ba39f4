"""One step: a batch for every SAE, and an update where it is due."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from saetrain.gradient import add_gradient, clip_gradient, gradient_norm
from saetrain.inputs import rows_of
from saetrain.optim import step_if
from saetrain.trainee import Trainee

if TYPE_CHECKING:
    from actcache.stream import Batch


def train_batch(groups: dict[str, list[Trainee]], batch: Batch, step: int) -> None:
    """One update of every SAE. Rows go to the device once for each hookpoint."""
    for group in groups.values():
        train_group(group, rows_of(group[0].entry, batch.activations), step)


def train_group(group: list[Trainee], rows: Tensor, step: int) -> None:
    """One update of every SAE that is fed with these rows, in any type, on any device."""
    weights = group[0].sae.W_enc
    # In their own type, which is smaller; there into that of the weights.
    x = rows.to(weights.device, non_blocking=True).to(weights.dtype)
    for trainee in group:
        train_step(trainee, x, step, trainee.entry.options.auxk_alpha)


def train_step(trainee: Trainee, rows: Tensor, step: int, auxk_alpha: float) -> None:
    """One batch for one SAE, its rows in any type, on any device; and an update, if it is due.

    Nothing here makes the host wait for the device.
    """
    sae, recipe, shared, clock = trainee.sae, trainee.recipe, trainee.shared, trainee.clock
    if (k := recipe.k(step)) is not None:
        sae.k = k
    if recipe.begins_update(step):
        # Later on, an optimiser of one pass leaves its rows so.
        if recipe.decoder_norm == "unit" and (step == 0 or not trainee.optimizer.one_pass):
            sae.normalise_decoder()
        sae.activation.project()
    x = rows.to(device=sae.W_enc.device, dtype=sae.W_enc.dtype, non_blocking=True)
    if trainee.scaling is not None:
        x = x * trainee.scaling.rows
    dead = trainee.firing.dead() if trainee.learns_from_dead(step, len(rows), auxk_alpha) else None
    losses = add_gradient(
        sae, x, trainee.variance, dead, trainee.objective, step, auxk_alpha, recipe, shared, clock
    )
    loss = losses.total(auxk_alpha)
    now = step if clock is None else clock
    finite = trainee.guard.check(loss if shared is None else shared.mean(loss), now)
    if recipe.ends_update(step):
        _update(trainee, step, finite)
    if shared is not None:
        shared.count(losses, trainee.firing, trainee.vitals, trainee.meter)
        return
    sae.activation.observe(losses.output.top_acts, anew=recipe.changes_k(step))
    trainee.firing.add((losses.output.top_acts, losses.output.top_indices))
    trainee.vitals.add_latents(losses.output.top_acts, losses.output.top_indices)
    trainee.meter.add(losses)


def _update(trainee: Trainee, step: int, finite: Tensor) -> None:
    """Change the weights by their gradient, unless `finite` says that it must not reach them."""
    recipe, optimizer = trainee.recipe, trainee.optimizer
    begun = recipe.first_step_of_update(step)
    if optimizer.one_pass and recipe.grad_clip is None:
        norm = step_if(finite, optimizer, begun)
    else:
        norm = _measure(trainee)
        if recipe.grad_clip is not None:
            finite = trainee.guard.check(norm, step if trainee.clock is None else trainee.clock)
        step_if(finite, optimizer, begun)
    if norm is not None:
        trainee.vitals.add_gradient(norm)


def _measure(trainee: Trainee) -> Tensor:
    """Project the gradient, and bound it if that is asked for; its norm before."""
    sae, recipe = trainee.sae, trainee.recipe
    if recipe.decoder_norm == "unit":
        sae.remove_parallel_gradient()
    if recipe.grad_clip is not None:
        return clip_gradient(sae.parameters(), recipe.grad_clip)
    return gradient_norm(p.grad for p in sae.parameters() if p.grad is not None)
