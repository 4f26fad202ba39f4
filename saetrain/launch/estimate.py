"""What a run will train, and the memory that takes, before anything is trained.

Letters: N rows of a batch, D d_in, E width of the output, M num_latents, K k, P parameters of an
SAE.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass

import torch

from actcache.cache.reader import Cache
from actcache.stream.memory_budget import MemoryBudget
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import PENALISED, SaeConfig
from saetrain.config.sae_options import OptimizerName, SaeEntry
from saetrain.kernels.encode import tokens_at_once
from saetrain.launch.resolve import budget_of, sae_entries, steps_ahead, with_default_lr
from saetrain.model.factory import build_sae
from saetrain.model.hookpoint_io import hookpoints_of

FLOAT = 4  # bytes


@dataclass(frozen=True)
class SaeEstimate:
    """One SAE. Sizes in bytes."""

    name: str
    hookpoint: str
    d_in: int
    num_latents: int
    k: int | None
    """None where a penalty makes latents sparse."""
    optimizer: str
    lr: float | None
    """Peak; None: it follows from steps that are not known yet."""
    seed: int
    parameters: int
    """P."""
    weights: int
    """With the encoder's copy in bfloat16, where one is kept."""
    optimizer_state: int
    gradients: int
    """While it makes its step."""
    activations: int
    """While it makes its step: the most that is held besides, of a batch or by the update."""


@dataclass(frozen=True)
class RunEstimate:
    """The SAEs of a run. Sizes in bytes."""

    saes: tuple[SaeEstimate, ...]
    parameters: int
    weights: int
    optimizer_state: int
    gradients: int
    """One SAE makes its step at a time: the largest."""
    activations: int
    """Likewise."""
    total: int
    """On the device, without what torch itself takes; on a GPU, with the rows."""
    rows: int
    """Rows that are mixed in memory, on a GPU in its own: once, however many SAEs."""
    free: int
    """Memory that the device has free now."""


def estimate_fit(config: FitConfig, device: torch.device) -> RunEstimate:
    """List what a run would train; nothing is written.

    Raises:
        ActcacheError: one of its kinds, for options that `fit` would refuse.
    """
    cache = Cache.open(
        config.cache,
        block_cache=config.block_cache,
        block_cache_bytes=config.block_cache_bytes,
    )
    entries = sae_entries(config, cache)
    hookpoints = hookpoints_of(entries)
    budget: MemoryBudget = budget_of(config, cache, hookpoints)
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
    # Of the one that takes most: gradients are dropped before the next SAE's turn.
    gradients, activations = max(
        ((s.gradients, s.activations) for s in saes), key=lambda pair: pair[0] + pair[1]
    )
    rows = min(budget.pool_rows, cache.rows) * row
    mixed_there = rows if device.type == "cuda" else 0
    return RunEstimate(
        saes=saes,
        parameters=sum(s.parameters for s in saes),
        weights=weights,
        optimizer_state=state,
        gradients=gradients,
        activations=activations,
        total=weights + state + gradients + activations + mixed_there,
        rows=rows,
        free=_free(device),
    )


def estimate_sae(entry: SaeEntry, options: FitConfig, device: str = "cpu") -> SaeEstimate:
    """Parameters and memory of one SAE.

    Args:
        entry: which.
        options: of the run.
        device: the kind of it.
    """
    sizes, shapes = entry.config, parameter_shapes(entry.config)
    P = sum(map(math.prod, shapes))
    item = getattr(torch, options.weights_dtype).itemsize
    return SaeEstimate(
        name=entry.name,
        hookpoint=entry.hookpoint,
        d_in=sizes.d_in,
        num_latents=sizes.num_latents,
        k=None if sizes.activation in PENALISED else sizes.k,
        optimizer=entry.options.optimizer,
        lr=entry.lr,
        seed=entry.seed,
        parameters=P,
        weights=P * item + shadow_bytes(entry, options),
        optimizer_state=sum(state_bytes(entry.options.optimizer, s, item) for s in shapes)
        + norm_bytes(entry, item),
        gradients=P * item,
        activations=step_bytes(
            sizes,
            entry.options.optimizer,
            options.micro_batch_size or options.batch_size,
            entry.options.decoder_norm == "fold",
            device,
            options.chunk_latents,
        ),
    )


def parameter_shapes(sizes: SaeConfig) -> list[tuple[int, ...]]:
    """Shapes of an SAE's parameters, of which none is made."""
    with torch.device("meta"):
        sae = build_sae(sizes, device="meta")
    return [tuple(parameter.shape) for parameter in sae.parameters()]


def state_bytes(optimizer: OptimizerName, shape: tuple[int, ...], item: int) -> int:
    """What an optimiser keeps of one parameter; counters apart.

    Args:
        optimizer: which.
        shape: of the parameter.
        item: bytes of one of its numbers.
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
    """What signum keeps of rows of norm 1: what they were divided by."""
    unit = entry.options.decoder_norm == "unit" and not entry.config.transcode
    kept = unit and entry.options.optimizer == "signum"
    return entry.config.num_latents * max(item, FLOAT) * kept


def shadow_bytes(entry: SaeEntry, options: FitConfig) -> int:
    """The encoder in bfloat16, as a step keeps it for `--autocast`."""
    dense, folded = entry.config.activation in _DENSE, entry.options.decoder_norm == "fold"
    kept = options.autocast and options.weights_dtype == "float32" and not dense and not folded
    return 2 * entry.config.num_latents * entry.config.d_in * kept


_DENSE = {"relu": 4, "jumprelu": 7, "gated": 9}
"""Matrices [N, M] that an activation without indices needs, with what its gradient is made of."""


def step_bytes(
    sizes: SaeConfig,
    optimizer: OptimizerName,
    rows: int,
    folded: bool = False,
    device: str = "cpu",
    chunk_latents: int | None = None,
) -> int:
    """The most that a step holds besides weights, optimiser state and gradients; AuxK apart.

    A bound from what the step does: the forward pass holds pre-activations, of all rows [N, M], or
    of as many as are encoded at once, and the quarter of them that TopK looks through again; two
    matrices as large as what is read [N, D] and two as what is predicted [N, E]; and top
    activations with their indices, sorted and unsorted (of BatchTopK and Multi-TopK 4K, and copies;
    BatchTopK may look farther); dense activations hold more matrices [N, M]. Several
    reconstructions hold sums of their own. Folded weights and their gradients are four matrices as
    large as W_dec. Normalising and the update hold two (adam8bit, where it unpacks its moments,
    five) and muon's [D, D].

    Args:
        sizes: of the SAE.
        optimizer: of the SAE.
        rows: in a forward pass at once, N.
        folded: whether training sees folded weights.
        device: the kind of it.
        chunk_latents: whose pre-activations are formed at once, of all rows.
    """
    N, D, E, M, K = rows, sizes.d_in, sizes.width_out, sizes.num_latents, sizes.k
    wide, dense, prefixes = max(D, E), sizes.activation in _DENSE, len(sizes.matryoshka)
    batch = D + E if sizes.transcode else D
    # Of several reconstructions: sums over pieces, running sums, and the gradients of either.
    sums = prefixes + 1 if prefixes else 2 * sizes.multi_topk
    forward = 4 * N * batch + 2 * sums * N * E
    if dense:
        forward += _DENSE[sizes.activation] * N * M + bool(prefixes) * (N * M + 2 * M * wide)
    elif sizes.activation == "batchtopk":
        forward += N * M + (10 + 2 * prefixes) * N * min(4 * K, M)
    else:
        at_once = tokens_at_once(N, torch.empty(M, 0, device="meta"), device) * M
        if chunk_latents is not None:
            at_once = N * min(chunk_latents, M)
        forward += at_once + at_once // 4
        slots = min(4 * K, M) if sizes.multi_topk else K
        forward += (14 + 2 * prefixes) * N * slots
    forward += 4 * M * wide * folded
    update = (5 if optimizer == "adam8bit" else 2) * M * wide + wide**2 + 16 * M
    return FLOAT * max(forward, update)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
