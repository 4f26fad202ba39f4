"""One step: a batch for every SAE, and an update where it is due."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from actcache.errors import ConfigError
from saetrain.kernels import keep_bf16_copy
from saetrain.kernels.sums import total
from saetrain.model.activations import TopK
from saetrain.model.activations.compiled import missing_compiler
from saetrain.model.decoder_norm import folded_losses
from saetrain.model.hookpoint_io import rows_of
from saetrain.model.losses import LossConfig, Losses, LossTerm, compute_losses
from saetrain.model.sae import Sae, SaeOutput
from saetrain.optim import conditional_step
from saetrain.training.sae_trainer import SaeTrainer
from saetrain.training.step_settings import StepSettings

if TYPE_CHECKING:
    from actcache.stream.activation_stream import Batch
    from saetrain.training.ddp import DdpStep


def train_batch(groups: dict[str, list[SaeTrainer]], batch: Batch, step: int) -> None:
    """One update of every SAE. Rows go to the device once for each hookpoint."""
    for group in groups.values():
        train_on_rows(group, rows_of(group[0].entry, batch.activations), step)


def train_on_rows(group: list[SaeTrainer], rows: Tensor, step: int) -> None:
    """One update of every SAE that is fed with these rows, in any type, on any device."""
    weights = group[0].sae.W_enc
    # In their own type, which is smaller; there into that of the weights.
    x = rows.to(weights.device, non_blocking=True).to(weights.dtype)
    for trainer in group:
        train_step(trainer, x, step, trainer.entry.options.auxk_alpha)


def train_step(trainer: SaeTrainer, rows: Tensor, step: int, auxk_alpha: float) -> None:
    """One batch for one SAE, its rows in any type, on any device; and an update, if it is due.

    Nothing here makes the host wait for the device.
    """
    sae, settings, shared, clock = trainer.sae, trainer.settings, trainer.ddp, trainer.device_step
    if (k := settings.k(step)) is not None:
        sae.k = k
    if settings.begins_update(step):
        # Later on, an optimiser of one pass leaves its rows so.
        if settings.decoder_norm == "unit" and (step == 0 or not trainer.optimizer.is_fused):
            sae.normalise_decoder()
        sae.activation.project()
    x = rows.to(device=sae.W_enc.device, dtype=sae.W_enc.dtype, non_blocking=True)
    if trainer.scaling is not None:
        x = x * trainer.scaling.rows
    dead = trainer.dead_tracker.dead() if trainer.uses_auxk(step, len(rows), auxk_alpha) else None
    losses = accumulate_gradient(
        sae,
        x,
        trainer.variance,
        dead,
        trainer.loss_config,
        step,
        auxk_alpha,
        settings,
        shared,
        clock,
    )
    loss = losses.total(auxk_alpha)
    now = step if clock is None else clock
    finite = trainer.guard.check(loss if shared is None else shared.all_mean(loss), now)
    if settings.ends_update(step):
        _update(trainer, step, finite)
    if shared is not None:
        shared.count(losses, trainer.dead_tracker, trainer.latent_stats, trainer.meter)
        return
    sae.activation.observe(losses.output.top_acts, anew=settings.changes_k(step))
    trainer.dead_tracker.add((losses.output.top_acts, losses.output.top_indices))
    trainer.latent_stats.add_latents(losses.output.top_acts, losses.output.top_indices)
    trainer.meter.add(losses)


def _update(trainer: SaeTrainer, step: int, finite: Tensor) -> None:
    """Change the weights by their gradient, unless `finite` says that it must not reach them."""
    settings, optimizer = trainer.settings, trainer.optimizer
    begun = settings.first_step_of_update(step)
    if optimizer.is_fused and settings.grad_clip is None:
        norm = conditional_step(finite, optimizer, begun)
    else:
        norm = _measure(trainer)
        if settings.grad_clip is not None:
            finite = trainer.guard.check(
                norm, step if trainer.device_step is None else trainer.device_step
            )
        conditional_step(finite, optimizer, begun)
    if norm is not None:
        trainer.latent_stats.add_gradient(norm)


def _measure(trainer: SaeTrainer) -> Tensor:
    """Project the gradient, and bound it if that is asked for; its norm before."""
    sae, settings = trainer.sae, trainer.settings
    if settings.decoder_norm == "unit":
        sae.remove_parallel_gradient()
    if settings.grad_clip is not None:
        return clip_gradient(sae.parameters(), settings.grad_clip)
    return gradient_norm(p.grad for p in sae.parameters() if p.grad is not None)


def accumulate_gradient(
    sae: Sae,
    x: Tensor,
    variance: float,
    dead: Tensor | None,
    loss_config: LossConfig,
    step: int,
    auxk_alpha: float,
    settings: StepSettings,
    shared: DdpStep | None = None,
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
        loss_config: what is trained on besides.
        step: its number, from 0.
        auxk_alpha: weight of AuxK.
        settings: says the parts, the precision and the batches of an update.
        shared: with --parallel ddp, what makes the gradient that of all processes' rows; the losses
            stay those of these.
        turn: the step's number where the device reads it; None: the device is told `step`.

    Returns:
        The losses, without their graph. Of dense activations [N, M], `output` keeps only whether
        they are above 0: all of them would take the memory that parts of a batch spare.
    """
    if isinstance(sae.activation, TopK):
        sae.activation.chunk_latents = settings.chunk_latents
    sae.activation.compiles = settings.compile
    refresh_bf16_copies(sae, settings)
    losses_of = folded_losses if settings.decoder_norm == "fold" else compute_losses
    if shared is not None:
        losses_of = partial(shared.forward, losses_of)
    parts = torch.split(x, settings.micro_batch_size or len(x))
    losses = []
    for number, part in enumerate(parts, 1):
        # Processes exchange gradients once a batch, with its last part.
        with nullcontext() if shared is None or number == len(parts) else shared.no_sync():
            with _precision(settings, x.device):
                of_part = losses_of(sae, part, variance, dead, loss_config, step, turn)
            share = len(part) / len(x)
            loss = of_part.total(auxk_alpha)
            torch.autograd.backward(loss * (share / settings.grad_acc_steps))
        losses.append(_without_graph(of_part))
    if len(losses) == 1:
        return losses[0]
    return _mean(losses, [len(part) / len(x) for part in parts])


def refresh_bf16_copies(sae: Sae, settings: StepSettings) -> None:
    """Where products in bfloat16 take a copy of a weight, make it right; it nearly always is."""
    # Dense activations leave the cast to autocast, and folded weights are made anew.
    if settings.autocast and settings.decoder_norm != "fold" and sae.activation.k:
        keep_bf16_copy(sae.W_enc)


def clip_gradient(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale the gradient of all parameters together to norm `topk_selector`, if it is longer.

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


def _precision(settings: StepSettings, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if settings.autocast else nullcontext()


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
        LossTerm(mean(term.value for term in same), same[0].weight)
        for same in zip(*(part.terms for part in parts), strict=True)
    )
    return Losses(
        mean(part.fvu for part in parts), mean(part.auxk for part in parts), output, tuple(terms)
    )
