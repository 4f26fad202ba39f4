"""Estimate of a run for `--plan`: its SAEs, and the memory of weights, optimizers and steps.

Letters: N rows of a batch, D d_in, E width of the output, M num_latents, K k, P parameters of an
SAE.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from actcache.core.process import CUDA_BYTES, available_memory, library_memory
from actcache.core.progress import format_bytes
from actcache.errors import ConfigError
from actcache.stream.memory_budget import plan_memory
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import PENALISED, OptimizerName, SaeConfig, SaeEntry, hookpoints_of
from saetrain.kernels.dense import tokens_at_once
from saetrain.launch.resolve import open_cache, sae_entries, steps_ahead, with_default_lr

FLOAT = 4  # bytes


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
    """Bytes of parameters, with the encoder's bfloat16 copy if --autocast keeps one."""
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
        entries = with_default_lr(entries, steps)
    saes = tuple(estimate_sae(entry, config, device.type) for entry in entries)
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
        free=_free(device),
    )


def estimate_sae(entry: SaeEntry, options: FitConfig, device: str = "cpu") -> SaeEstimate:
    """Estimate parameters and memory of one SAE.

    Args:
        entry: the SAE.
        options: options of the run.
        device: type of the device.
    """
    sizes, lasting = entry.config, lasting_bytes(entry, options)
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


class LastingBytes(NamedTuple):
    """Bytes of one SAE that do not depend on the rows of a step."""

    weights: int
    """Parameters, with the encoder's bfloat16 copy if --autocast keeps one."""
    optimizer_state: int
    gradients: int


def lasting_bytes(entry: SaeEntry, options: FitConfig) -> LastingBytes:
    """Compute the bytes of weights, optimizer state and gradients of one SAE."""
    shapes, item = parameter_shapes(entry.config), getattr(torch, options.weights_dtype).itemsize
    parameters = sum(map(math.prod, shapes)) * item
    state = sum([state_bytes(entry.options.optimizer, shape, item) for shape in shapes])
    return LastingBytes(
        weights=parameters + bf16_copy_bytes(entry, options),
        optimizer_state=state + norm_bytes(entry, item),
        gradients=parameters,
    )


def parameter_shapes(sizes: SaeConfig) -> list[tuple[int, ...]]:
    """Return the shapes of an SAE's parameters, which `Sae` and its activation create."""
    D, M = sizes.d_in, sizes.num_latents
    E = D if sizes.d_out is None else sizes.d_out
    shapes: list[tuple[int, ...]] = [(M, D), (M,), (M, E), (E,)]  # W_enc, b_enc, W_dec, b_dec
    shapes += [(E, D)] * sizes.skip_connection
    return shapes + [(M,)] * _OF_LATENTS.get(sizes.activation, 0)


_OF_LATENTS = {"jumprelu": 1, "gated": 2}
"""Parameters of an activation that has some, each with one number for each latent."""


def state_bytes(optimizer: OptimizerName, shape: tuple[int, ...], item: int) -> int:
    """Return the bytes of the optimizer state of one parameter, without step counters.

    Args:
        optimizer: name of the optimizer.
        shape: shape of the parameter.
        item: bytes of one element.
    """
    numbers = math.prod(shape)
    if optimizer == "signum":  # z
        return numbers * item
    if optimizer == "muon" and len(shape) == 2:  # momentum
        return numbers * item
    if optimizer == "adam8bit":  # two moments; in float32 where the parameter is small
        scales = -(-numbers // 256) * FLOAT
        return 2 * (numbers * FLOAT if numbers < 4096 else numbers + scales)
    return 2 * numbers * item  # two moments


def norm_bytes(entry: SaeEntry, item: int) -> int:
    """Return the bytes of the row norms that signum keeps with --decoder-norm unit."""
    unit = entry.options.decoder_norm == "unit" and not entry.config.transcode
    kept = unit and entry.options.optimizer == "signum"
    return entry.config.num_latents * max(item, FLOAT) * kept


def bf16_copy_bytes(entry: SaeEntry, options: FitConfig) -> int:
    """Return the bytes of the encoder's bfloat16 copy that a step keeps with --autocast."""
    dense, folded = entry.config.activation in _DENSE, entry.options.decoder_norm == "fold"
    kept = options.autocast and options.weights_dtype == "float32" and not dense and not folded
    return 2 * entry.config.num_latents * entry.config.d_in * kept


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
    return FLOAT * max(forward, update)


def require_memory(entries: Sequence[SaeEntry], options: FitConfig, device: torch.device) -> None:
    """Refuse SAEs whose weights, optimizer state and gradients cannot fit, before they are built.

    Raises:
        ConfigError: they need more memory than the device, or the machine, has.
    """
    needed = most = 0
    for entry in entries:
        lasting = lasting_bytes(entry, options)
        needed += lasting.weights + lasting.optimizer_state
        most = max(most, lasting.gradients)
    needed += most
    free = _free(device)
    if needed > free:
        names = ", ".join(entry.name for entry in entries[:3])
        names += ", ..." * (len(entries) > 3)
        raise ConfigError(
            f"out of memory: {len(entries)} SAEs do not fit ({names})",
            expected=f"<= {format_bytes(free)}, which are free on {device}",
            got=f"{format_bytes(needed)} of weights, optimizer state and gradients",
            remedy="fewer latents or SAEs, --weights-dtype bfloat16, or --parallel modules over "
            "more devices",
        )


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()
