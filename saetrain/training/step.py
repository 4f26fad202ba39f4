"""One training step: a batch for every SAE, and an update where it is due."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from actcache.errors import ConfigError
from saetrain.kernels import backends, keep_bf16_copy, total
from saetrain.kernels.dense import has_bfloat16_products
from saetrain.model.activations import TopK
from saetrain.model.activations.compiled import missing_compiler
from saetrain.model.losses import Losses, LossTerm, compute_losses
from saetrain.model.sae import Sae, SaeOutput, rows_of
from saetrain.model.weight_scales import folded_losses
from saetrain.optim import conditional_step
from saetrain.training.sae_trainer import SaeTrainer, StepSettings

if TYPE_CHECKING:
    from actcache.stream.activation_stream import Batch


def train_batch(groups: dict[str, list[SaeTrainer]], batch: Batch, step: int) -> None:
    """Make one step of every SAE. Rows are copied to the device once for each hookpoint."""
    for group in groups.values():
        train_on_rows(group, rows_of(group[0].entry, batch.activations), step)


def train_on_rows(group: list[SaeTrainer], rows: Tensor, step: int) -> None:
    """Make one step of every SAE that reads these rows, of any type and on any device."""
    weights = group[0].sae.W_enc
    # Copied in their own type, which is smaller, and cast on the device.
    x = rows.to(weights.device, non_blocking=True).to(weights.dtype)
    for trainer in group:
        train_step(trainer, x, step)


def train_step(trainer: SaeTrainer, rows: Tensor, step: int) -> None:
    """Train one SAE on one batch of any type, on any device, and update it if that is due.

    Nothing here makes the host wait for the device.
    """
    sae, settings = trainer.sae, trainer.settings
    k, k_changes = settings.k(step), settings.changes_k(step)
    first_step, ends = settings.first_step_of_update(step), settings.ends_update(step)
    if k is not None:
        sae.k = k
    if step == first_step:
        # After the first step, a fused optimiser keeps the rows at norm 1 itself.
        if settings.decoder_norm == "unit" and (step == 0 or not trainer.optimizer.is_fused):
            sae.normalise_decoder()
        sae.activation.project()
    x = rows.to(device=sae.W_enc.device, dtype=sae.W_enc.dtype, non_blocking=True)
    if trainer.scaling is not None:
        x = x * trainer.scaling.rows
    if trainer.device_step is None:  # else the recorder has done it before the step
        trainer.advance_dead_bound(len(x))
    losses = accumulate_gradient(trainer, x, step)
    loss = losses.total(settings.auxk_alpha)
    now = step if trainer.device_step is None else trainer.device_step
    trainer.guard.check(loss if trainer.ddp is None else trainer.ddp.all_mean(loss), now)
    finite = trainer.guard.check_gradient(largest_square(sae.parameters()), now)
    if ends:
        _update(trainer, first_step, now, finite)
    if trainer.ddp is not None:
        trainer.ddp.count(losses, trainer.dead_tracker, trainer.latent_stats, trainer.meter)
        return
    top_acts, top_indices = losses.output.top_acts, losses.output.top_indices
    sae.activation.observe(top_acts, k_changed=k_changes)
    trainer.dead_tracker.add((top_acts, top_indices))
    trainer.latent_stats.add_latents(top_acts, top_indices)
    trainer.meter.add(losses)


def _update(trainer: SaeTrainer, first_step: int, now: int | Tensor, finite: Tensor) -> None:
    """Update the weights from their gradient where the flag `finite` is true.

    Args:
        trainer: the SAE.
        first_step: first step of the update, whose learning rate it takes.
        now: number of this step; with --cuda-graphs, where the device reads it.
        finite: bool, on the device, no dimensions.
    """
    settings, optimizer, sae = trainer.settings, trainer.optimizer, trainer.sae
    norm = None
    if not optimizer.is_fused or settings.grad_clip is not None:
        if settings.decoder_norm == "unit":
            sae.remove_parallel_gradient()
        if settings.grad_clip is None:
            norm = gradient_norm(p.grad for p in sae.parameters() if p.grad is not None)
        else:
            norm = clip_gradient(sae.parameters(), settings.grad_clip)
            finite = trainer.guard.check_gradient(norm, now)
    of_fused = conditional_step(finite, optimizer, first_step)
    norm = of_fused if norm is None else norm
    if norm is not None:
        trainer.latent_stats.add_gradient(norm)


def accumulate_gradient(trainer: SaeTrainer, x: Tensor, step: int) -> Losses:
    """Add the gradient of a batch to that of the weights, and return the losses.

    A loss is a mean over rows, so that of a batch is the mean of those of its parts, weighted by
    their rows, and so is its gradient. (BatchTopK selects from a whole batch; `FitConfig` refuses
    it in parts.) With --parallel ddp the gradient is that of the rows of all processes, and the
    losses are those of this one.

    Args:
        trainer: the SAE and how its steps are made.
        x: scaled rows in the type of the weights, [N, D]; of a transcoder, inputs and outputs
            [N, D + E].
        step: number of the step, from 0.

    Returns:
        The losses, without their graph. Of dense activations [N, M], `output` keeps only whether
        they are above 0: all of them would take the memory that parts of a batch save.
    """
    sae, settings, ddp = trainer.sae, trainer.settings, trainer.ddp
    dead = trainer.dead_tracker.dead() if trainer.uses_auxk(step, len(x)) else None
    if isinstance(sae.activation, TopK):
        sae.activation.chunk_latents = settings.chunk_latents
    sae.activation.compiles = settings.compile
    refresh_bf16_copies(sae, settings)
    losses_of = folded_losses if settings.decoder_norm == "fold" else compute_losses
    if ddp is not None:
        losses_of = partial(ddp.forward, losses_of)
    residual = trainer.meter.residual
    of_residual = None if dead is None or residual is None else residual.share()
    controller = trainer.meter.controller
    given = (
        trainer.variance,
        dead,
        trainer.loss_config,
        step,
        trainer.device_step,
        of_residual,
        None if controller is None else controller.value(),
    )
    parts = torch.split(x, settings.micro_batch_size or len(x))
    losses = []
    for number, part in enumerate(parts, 1):
        # Processes exchange gradients once a batch, with its last part.
        with nullcontext() if ddp is None or number == len(parts) else ddp.no_sync():
            autocast = partial(torch.autocast, x.device.type, torch.bfloat16)
            with autocast() if settings.autocast else nullcontext():
                of_part = losses_of(sae, part, *given)
            weight = len(part) / len(x) / settings.grad_acc_steps
            torch.autograd.backward(of_part.total(settings.auxk_alpha) * weight)
        losses.append(_without_graph(of_part))
    if len(losses) == 1:
        return losses[0]
    return _mean(losses, [len(part) / len(x) for part in parts])


def refresh_bf16_copies(sae: Sae, settings: StepSettings) -> None:
    """Make or update the bfloat16 copies of weights, if autocast uses them and they are outdated.

    The encoder's is multiplied by; rows of the decoder's are gathered where kernels mix types.
    """
    # Dense activations leave the cast to autocast, and folded weights are no parameters.
    if settings.autocast and settings.decoder_norm != "fold" and sae.activation.k:
        keep_bf16_copy(sae.W_enc)
        if backends.select_backend(sae.W_dec) == "triton":
            keep_bf16_copy(sae.W_dec)


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
    """Compute the norm of the gradient of all parameters together, on the device."""
    return torch.stack([_square(g) for g in gradients]).sum().sqrt()


@torch.no_grad()
def largest_square(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Compute the square of the gradient's largest number, on the device; NaN if one is NaN.

    It is infinite too where only the square overflows, which Adam's second moment would keep.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if backends.host_can_read(gradients[0]):  # several times faster than a norm
        bounds = [torch.stack(torch.aminmax(gradient)).abs().amax() for gradient in gradients]
    else:  # two launches for all of them
        bounds = list(torch._foreach_norm(gradients, torch.inf))
    largest = torch.stack(bounds).amax()
    return largest.to(torch.promote_types(largest.dtype, torch.float32)).square()


def require_bfloat16_products(device: torch.device) -> None:
    """Raise `ConfigError` if a CPU would only emulate bfloat16, which is slower than float32."""
    if device.type == "cpu" and not has_bfloat16_products():
        raise ConfigError(
            "--precision bfloat16 (or --autocast) needs a device with products in bfloat16",
            expected="a GPU, or a CPU with AVX512-BF16 or AMX",
            got="a CPU without them",
            remedy="leave it out; a run that began with it also needs --resume --force-config "
            "--precision float32",
        )


def require_compiler(device: torch.device) -> None:
    """Raise `ConfigError` if torch.compile lacks a compiler for a device."""
    if (missing := missing_compiler(device)) is not None:
        raise ConfigError(
            "--compile needs what torch.compile makes programs with",
            expected=missing,
            got="none",
            remedy="install it, or leave --compile out",
        )


def _square(gradient: Tensor) -> Tensor:
    """Compute the squared norm; its bits do not depend on the number of threads."""
    rows = gradient if gradient.ndim > 1 else gradient.unsqueeze(1)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return total(torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square())


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
    """Average the losses of the parts of a batch."""

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
        LossTerm(mean(term.value for term in same), same[0].weight)
        for same in zip(*(part.terms for part in parts), strict=True)
    )
    return Losses(
        mean(part.fvu for part in parts), mean(part.auxk for part in parts), output, tuple(terms)
    )
