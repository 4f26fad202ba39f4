"""The gradient of a batch: in parts, in bfloat16, of a length that is bounded.

Letters: N tokens, D d_in, M num_latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from actcache.errors import ConfigError
from saetrain.decoder_norm import folded_losses
from saetrain.losses import Losses, compute_losses, total
from saetrain.recipe import Recipe
from saetrain.sae import Sae, SaeOutput


def add_gradient(
    sae: Sae, x: Tensor, variance: float, dead: Tensor | None, auxk_alpha: float, recipe: Recipe
) -> Losses:
    """Add a batch's gradient to the weights', and return its losses.

    A loss is a mean over rows, so that of a batch is the mean of its parts', weighted by their
    rows, and so is its gradient.

    Args:
        sae: the autoencoder.
        x: activations in its type. [N, D]
        variance: what the losses divide by.
        dead: which latents are dead, bool [M]; None leaves AuxK out.
        auxk_alpha: weight of AuxK.
        recipe: says the parts, the precision and the batches of an update.
    """
    objective = folded_losses if recipe.decoder_norm == "fold" else compute_losses
    parts = torch.split(x, recipe.micro_batch_size or len(x))
    losses = []
    for part in parts:
        with _precision(recipe, x.device):
            of_part = objective(sae, part, variance, dead)
        share = len(part) / len(x)
        loss = of_part.fvu + auxk_alpha * of_part.auxk
        torch.autograd.backward(loss * (share / recipe.grad_acc_steps))
        losses.append(_without_graph(of_part))
    if len(losses) == 1:
        return losses[0]
    return _mean(losses, [len(part) / len(x) for part in parts])


def clip_gradient(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale the gradient of all parameters together to norm `largest`, if it is longer.

    Returns:
        Its norm before, on the device: not finite where the gradient is not.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([_square(g) for g in gradients]).sum().sqrt()
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
    for gradient in gradients:
        gradient.mul_(scale)
    return norm


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


def _square(gradient: Tensor) -> Tensor:
    """Squared norm; its bits do not depend on the number of threads."""
    rows = gradient if gradient.ndim > 1 else gradient.unsqueeze(1)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return total(torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square())


def _precision(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if recipe.autocast else nullcontext()


def _without_graph(losses: Losses) -> Losses:
    output = SaeOutput(*(tensor.detach() for tensor in losses.output))
    return losses._replace(fvu=losses.fvu.detach(), auxk=losses.auxk.detach(), output=output)


def _mean(parts: Sequence[Losses], shares: Sequence[float]) -> Losses:
    """The losses of a batch from those of its parts."""
    fvu = torch.stack([part.fvu * share for part, share in zip(parts, shares, strict=True)]).sum()
    auxk = torch.stack([part.auxk * share for part, share in zip(parts, shares, strict=True)]).sum()
    outputs = zip(*(part.output for part in parts), strict=True)
    return Losses(fvu, auxk, SaeOutput(*(torch.cat(tensors) for tensors in outputs)))
