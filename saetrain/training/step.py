"""One step: a batch for every SAE, and an update where it is due."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from actcache.errors import ConfigError
from saetrain.kernels import keep_shadow
from saetrain.kernels.sums import total
from saetrain.model.activations import TopK
from saetrain.model.activations.compiled import missing_compiler
from saetrain.model.decoder_norm import folded_losses
from saetrain.model.hookpoint_io import rows_of
from saetrain.model.losses import Losses, Objective, Term, compute_losses
from saetrain.model.sae import Sae, SaeOutput
from saetrain.optim import step_if
from saetrain.training.sae_trainer import Trainee
from saetrain.training.step_settings import Recipe

if TYPE_CHECKING:
    from actcache.stream.activation_stream import Batch
    from saetrain.training.ddp import SharedBatches


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


def add_gradient(
    sae: Sae,
    x: Tensor,
    variance: float,
    dead: Tensor | None,
    objective: Objective,
    step: int,
    auxk_alpha: float,
    recipe: Recipe,
    shared: SharedBatches | None = None,
    turn: Tensor | None = None,
) -> Losses:
    """Add a batch's gradient to the weights', and return its losses.

    A loss is a mean over rows, so that of a batch is the mean of its parts', weighted by their
    rows, and so is its gradient. (BatchTopK chooses among a whole batch; `FitConfig` refuses it in
    parts.)

    Args:
        sae: the autoencoder.
        x: activations in its type, [N, D]; of a transcoder, inputs and outputs [N, D + E].
        variance: what the losses divide by.
        dead: which latents are dead, bool [M]; None leaves AuxK out.
        objective: what is trained on besides.
        step: its number, from 0.
        auxk_alpha: weight of AuxK.
        recipe: says the parts, the precision and the batches of an update.
        shared: with --parallel ddp, what makes the gradient that of all processes' rows; the losses
            stay those of these.
        turn: the step's number where the device reads it; None: the device is told `step`.

    Returns:
        The losses, without their graph. Of dense activations [N, M], `output` keeps only whether
        they are above 0: all of them would take the memory that parts of a batch spare.
    """
    if isinstance(sae.activation, TopK):
        sae.activation.chunk_latents = recipe.chunk_latents
    sae.activation.compiles = recipe.compile
    keep_copies(sae, recipe)
    losses_of = folded_losses if recipe.decoder_norm == "fold" else compute_losses
    if shared is not None:
        losses_of = partial(shared.losses, losses_of)
    parts = torch.split(x, recipe.micro_batch_size or len(x))
    losses = []
    for number, part in enumerate(parts, 1):
        # Processes exchange gradients once a batch, with its last part.
        with nullcontext() if shared is None or number == len(parts) else shared.apart():
            with _precision(recipe, x.device):
                of_part = losses_of(sae, part, variance, dead, objective, step, turn)
            share = len(part) / len(x)
            loss = of_part.total(auxk_alpha)
            torch.autograd.backward(loss * (share / recipe.grad_acc_steps))
        losses.append(_without_graph(of_part))
    if len(losses) == 1:
        return losses[0]
    return _mean(losses, [len(part) / len(x) for part in parts])


def keep_copies(sae: Sae, recipe: Recipe) -> None:
    """Where products in bfloat16 take a copy of a weight, make it right; it nearly always is."""
    # Dense activations leave the cast to autocast, and folded weights are made anew.
    if recipe.autocast and recipe.decoder_norm != "fold" and sae.activation.k:
        keep_shadow(sae.W_enc)


def clip_gradient(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale the gradient of all parameters together to norm `largest`, if it is longer.

    Returns:
        Its norm before, on the device: not finite where the gradient is not.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = gradient_norm(gradients)
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
    for gradient in gradients:
        gradient.mul_(scale)
    return norm


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Norm of the gradient of all parameters together, on the device."""
    return torch.stack([_square(g) for g in gradients]).sum().sqrt()


def require_bfloat16_products(device: torch.device) -> None:
    """Raise `ConfigError` if a CPU would only imitate bfloat16, which is slower than float32."""
    if device.type != "cpu":
        return
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        raise ConfigError(
            "--autocast needs a device with products in bfloat16",
            expected="a GPU, or a CPU with AVX512-BF16 or AMX",
            got="a CPU without them",
            remedy="leave --autocast out",
        )


def require_compiler(device: torch.device) -> None:
    """Raise `ConfigError` if torch.compile lacks what it needs on a device."""
    if (missing := missing_compiler(device)) is not None:
        raise ConfigError(
            "--compile needs what torch.compile makes programs with",
            expected=missing,
            got="none",
            remedy="install it, or leave --compile out",
        )


def _square(gradient: Tensor) -> Tensor:
    """Squared norm; its bits do not depend on the number of threads."""
    rows = gradient if gradient.ndim > 1 else gradient.unsqueeze(1)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return total(torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square())


def _precision(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if recipe.autocast else nullcontext()


def _without_graph(losses: Losses) -> Losses:
    reconstruction, acts, indices, _ = losses.output
    acts = acts > 0 if indices is None else acts.detach()
    return Losses(
        losses.fvu.detach(),
        losses.auxk.detach(),
        SaeOutput(reconstruction.detach(), acts, indices),
        tuple(term._replace(value=term.value.detach()) for term in losses.terms),
    )


def _mean(parts: Sequence[Losses], shares: Sequence[float]) -> Losses:
    """The losses of a batch from those of its parts."""

    def mean(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([v * share for v, share in zip(values, shares, strict=True)]).sum()

    outputs = [part.output for part in parts]
    indices = [output.top_indices for output in outputs if output.top_indices is not None]
    output = SaeOutput(
        torch.cat([output.reconstruction for output in outputs]),
        torch.cat([output.top_acts for output in outputs]),
        torch.cat(indices) if indices else None,
    )
    terms = (
        Term(mean(term.value for term in same), same[0].weight)
        for same in zip(*(part.terms for part in parts), strict=True)
    )
    return Losses(
        mean(part.fvu for part in parts), mean(part.auxk for part in parts), output, tuple(terms)
    )
