"""The gradient of a batch: in parts, in bfloat16, of a length that is bounded.

Letters: N tokens, D d_in, M num_latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from actcache.errors import ConfigError
from saetrain.activations import TopK
from saetrain.activations.compiled import missing_compiler
from saetrain.decoder_norm import folded_losses
from saetrain.kernels import keep_shadow
from saetrain.losses import Losses, Term, compute_losses
from saetrain.objective import Objective
from saetrain.recipe import Recipe
from saetrain.sae import Sae, SaeOutput
from saetrain.sums import total

if TYPE_CHECKING:
    from saetrain.shared_batches import SharedBatches


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
