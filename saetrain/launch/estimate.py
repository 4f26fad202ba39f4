"""Estimate of a run for `--plan`: its SAEs, and the memory of weights, optimizers and steps.

Letters: N rows of a batch, D d_in, E width of the output, M num_latents, K k, P parameters of an
SAE.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from actcache.core.process import CUDA_BYTES, free_memory, library_memory
from actcache.stream.memory_budget import plan_memory
from saetrain.config.fit_config import DEFAULTS, NEWEST_DEFAULTS, FitConfig, with_precision
from saetrain.config.sae import PENALISED, OptimizerName, SaeConfig, SaeEntry, hookpoints_of
from saetrain.kernels.dense import tokens_at_once
from saetrain.launch.resolve import open_cache, sae_entries, steps_ahead, with_default_lr
from saetrain.training.sae_trainer import lasting_bytes, parameter_shapes, precision_on

_FLOAT = 4  # bytes


@dataclass(frozen=True)
class SaeEstimate:
    """Estimate of one SAE. Sizes in bytes."""

    name: str
    hookpoint: str
    d_in: int
    num_latents: int
    k: int | None
    """None for activations with a sparsity penalty."""
    optimizer: str
    lr: float | None
    """Peak learning rate; None if it depends on a number of steps that is not known yet."""
    seed: int
    parameters: int
    """Number of parameters, P."""
    weights: int
    """Bytes of parameters, with the bfloat16 copies that --autocast keeps."""
    optimizer_state: int
    gradients: int
    """Bytes of gradients during a step."""
    activations: int
    """Peak bytes of everything else during a step: of the batch, or of the update."""


@dataclass(frozen=True)
class RunEstimate:
    """Estimate of a run. Sizes in bytes."""

    saes: tuple[SaeEstimate, ...]
    parameters: int
    weights: int
    optimizer_state: int
    gradients: int
    """Gradients of the SAE with the largest step: SAEs make their steps one after another."""
    activations: int
    """Activations of the same SAE."""
    libraries: int
    """Memory that the libraries take on the device: on the CPU, all that this process has loaded;
    on a GPU, about the context of CUDA."""
    total: int
    """Sum on the device, with the shuffle buffer."""
    rows: int
    """Bytes of the shuffle buffer, which all SAEs share, in the memory of the device."""
    free: int
    """Free memory of the device now, which the libraries have taken their part of."""

    @property
    def fits(self) -> bool:
        """True if the run fits into the free memory of the device."""
        return self.total - self.libraries <= self.free


def estimate_fit(config: FitConfig, device: torch.device) -> RunEstimate:
    """Estimate what a run would train; nothing is written.

    Raises:
        ActcacheError: one of its subclasses, for options that `fit` would refuse.
    """
    cache = open_cache(config)
    entries = sae_entries(config, cache)
    hookpoints = hookpoints_of(entries)
    budget = plan_memory(
        config.buffer_bytes, cache.manifest, hookpoints, config.batch_size, config.pool_rows
    )
    steps = steps_ahead(config, cache, budget.pool_rows)
    if steps is not None:
        entries = with_default_lr(entries, steps, config, config.defaults or NEWEST_DEFAULTS)
    defaults = DEFAULTS[config.defaults or NEWEST_DEFAULTS]
    options = with_precision(config, precision_on(device, config, defaults))
    saes = tuple(estimate_sae(entry, options, device.type) for entry in entries)
    if steps is None:
        saes = tuple(
            dataclasses.replace(sae, lr=entry.options.lr)
            for sae, entry in zip(saes, entries, strict=True)
        )
    row = sum(cache.row_dtype.row_bytes(cache.manifest.width(name)) for name in hookpoints)
    weights, state = sum(s.weights for s in saes), sum(s.optimizer_state for s in saes)
    # Gradients are freed before the next SAE's step, so only the largest step counts.
    gradients, activations = max(
        ((s.gradients, s.activations) for s in saes), key=lambda pair: pair[0] + pair[1]
    )
    rows = min(budget.pool_rows, cache.rows) * row
    libraries = CUDA_BYTES if device.type == "cuda" else library_memory(device)
    return RunEstimate(
        saes=saes,
        parameters=sum(s.parameters for s in saes),
        weights=weights,
        optimizer_state=state,
        gradients=gradients,
        activations=activations,
        libraries=libraries,
        total=libraries + weights + state + gradients + activations + rows,
        rows=rows,
        free=free_memory(device),
    )


def estimate_sae(entry: SaeEntry, options: FitConfig, device: str = "cpu") -> SaeEstimate:
    """Estimate parameters and memory of one SAE.

    Args:
        entry: the SAE.
        options: options of the run.
        device: type of the device.
    """
    sizes, lasting = entry.config, lasting_bytes(entry, options, device)
    return SaeEstimate(
        name=entry.name,
        hookpoint=entry.hookpoint,
        d_in=sizes.d_in,
        num_latents=sizes.num_latents,
        k=None if sizes.activation in PENALISED else sizes.k,
        optimizer=entry.options.optimizer,
        lr=entry.lr,
        seed=entry.seed,
        parameters=sum(map(math.prod, parameter_shapes(sizes))),
        weights=lasting.weights,
        optimizer_state=lasting.optimizer_state,
        gradients=lasting.gradients,
        activations=step_bytes(
            sizes,
            entry.options.optimizer,
            options.micro_batch_size or options.batch_size,
            entry.options.decoder_norm == "fold",
            device,
            options.chunk_latents,
        ),
    )


_DENSE = {"relu": 4, "jumprelu": 7, "gated": 9}
"""Matrices [N, M] of a dense activation, with those that its backward pass keeps."""


def step_bytes(
    sizes: SaeConfig,
    optimizer: OptimizerName,
    rows: int,
    folded: bool = False,
    device: str = "cpu",
    chunk_latents: int | None = None,
) -> int:
    """Bound the bytes of a step besides weights, optimizer state, gradients and AuxK.

    The forward pass holds pre-activations [N, M], or those of the rows that are encoded at once,
    and a quarter of them again for TopK; two inputs [N, D] and two outputs [N, E]; and top
    activations with indices, sorted and unsorted (BatchTopK and Multi-TopK: 4K, and copies;
    BatchTopK may need more). Dense activations hold more matrices [N, M], and each further
    reconstruction its sums. Folded weights and their gradients are four matrices of W_dec's size.
    Normalisation and the update hold two (adam8bit, which unpacks its moments, five) and muon's
    [D, D].

    Args:
        sizes: configuration of the SAE.
        optimizer: name of the optimizer.
        rows: rows of one forward pass, N.
        folded: whether --decoder-norm fold is used.
        device: type of the device.
        chunk_latents: latents whose pre-activations are computed at once, for all rows.
    """
    N, D, E, M, K = rows, sizes.d_in, sizes.width_out, sizes.num_latents, sizes.k
    wide, dense, prefixes = max(D, E), sizes.activation in _DENSE, len(sizes.matryoshka)
    batch = D + E if sizes.transcode else D
    # For several reconstructions: sums over groups, running sums, and the gradients of both.
    sums = prefixes + 1 if prefixes else 2 * sizes.multi_topk
    forward = 4 * N * batch + 2 * sums * N * E
    if dense:
        forward += _DENSE[sizes.activation] * N * M + bool(prefixes) * (N * M + 2 * M * wide)
    elif sizes.activation == "batchtopk":
        forward += N * M + (10 + 2 * prefixes) * N * min(4 * K, M)
    else:
        encoded = tokens_at_once(N, torch.empty(M, 0, device="meta"), device) * M
        if chunk_latents is not None:
            encoded = N * min(chunk_latents, M)
        forward += encoded + encoded // 4
        slots = min(4 * K, M) if sizes.multi_topk else K
        forward += (14 + 2 * prefixes) * N * slots
    forward += 4 * M * wide * folded
    update = (5 if optimizer == "adam8bit" else 2) * M * wide + wide**2 + 16 * M
    return _FLOAT * max(forward, update)
