"""What a run is: its SAEs, the order of their rows and its steps, from options and a cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch

from actcache.cache.reader import Cache
from actcache.errors import ConfigError
from actcache.stream.memory_budget import PREFETCH_BATCHES, MemoryBudget, plan_memory
from actcache.stream.order import OrderPlan, make_plan, split_shards
from actcache.stream.segments import Segmentation, default_shards_each, goal_rows
from saetrain.config.fit_config import FitConfig
from saetrain.config.grid import require_overrides_used, saes_at
from saetrain.config.sae import PENALISED, SaeConfig
from saetrain.config.sae_options import SaeOptions
from saetrain.distributed.coordinator import Coordinator
from saetrain.launch.finetune import PretrainedSaes
from saetrain.model.hookpoint_io import HookpointRoles, assign_hookpoints, hookpoints_of
from saetrain.optim import default_lr
from saetrain.runs.record import (
    FORMAT_VERSION,
    RunRecord,
    SaeEntry,
    absolute_cache,
    receipts_digest,
)
from saetrain.runs.segments import first_segment, require_batch
from saetrain.tracking.wandb_mirror import new_id
from saetrain.training.init import FirstRows, with_initial_scales

Kinds = Callable[[Sequence[SaeEntry]], list[SaeConfig]]
_DEAD_AFTER = 10_000_000


def resolve_run(
    config: FitConfig, cache: Cache, device: torch.device, coordinator: Coordinator
) -> RunRecord:
    """All that a new run is. With --follow, waits until its first segment is there."""
    origins = None if config.finetune is None else PretrainedSaes(config.finetune)
    entries = sae_entries(config, cache, None if origins is None else origins.kinds)
    pool_rows = budget_of(config, cache, hookpoints_of(entries)).pool_rows
    decide = _order_in_segments if config.follow else _order
    order = decide(config, cache, pool_rows)
    steps = planned_steps(config, order.epoch_steps)
    epoch_steps = steps if order.epoch_steps is None else order.epoch_steps
    training = [shard for shard, _ in order.plan.shards]
    first = FirstRows(cache, order.plan)
    statistics_of = functools.cache(lambda name: cache.statistics(name, training))
    entries = tuple(
        with_initial_scales(entry, config.of(entry.options), statistics_of, first, device)
        for entry in with_default_lr(entries, steps)
    )
    return RunRecord(
        format_version=FORMAT_VERSION,
        cache=absolute_cache(config.cache),
        cache_id=cache.manifest.cache_id,
        receipts_digest=receipts_digest(cache, training, order.held_out),
        held_out=tuple(order.held_out),
        plan=order.plan,
        steps=steps,
        dead_after=config.dead_after
        or min(_DEAD_AFTER, min(steps, epoch_steps) * order.plan.batch_size),
        saes=entries,
        options=run_options(config),
        versions=library_versions(),
        segment_shards=order.segment_shards,
        extensions=len(cache.manifest.extensions) if config.follow else None,
        pool_rows=pool_rows,
        wandb_id=new_id(config),
        origins=() if origins is None else origins.sources(entries),
        batch_parts=coordinator.world_size if coordinator.is_data_parallel else 1,
    )


@dataclass(frozen=True)
class _Order:
    """What a run trains on, and how long an epoch is."""

    plan: OrderPlan
    held_out: list[int]
    epoch_steps: int | None
    """None if that cannot be known."""
    segment_shards: int | None


def _order(config: FitConfig, cache: Cache, pool_rows: int) -> _Order:
    """All shards that are there now, as one."""
    cache.require_shards()
    seed = config.order_seed
    training, held_out = split_shards(cache.shards, config.val_fraction, seed)
    shards = [(shard, cache.receipts[shard].rows) for shard in training]
    plan = make_plan(shards, cache.manifest.block_rows, config.batch_size, seed, pool_rows)
    return _Order(plan, held_out, plan.steps_per_epoch, None)


def _order_in_segments(config: FitConfig, cache: Cache, pool_rows: int) -> _Order:
    """Segments; waits until the first one is there."""
    manifest = cache.manifest
    segmentation = Segmentation(
        shards_each=config.segment_shards
        or default_shards_each(manifest, config.batch_size, pool_rows),
        block_rows=manifest.block_rows,
        batch_size=config.batch_size,
        seed=config.order_seed,
        pool_rows=pool_rows,
        val_fraction=config.val_fraction,
    )
    epoch_steps = None
    promised = dict.fromkeys(segmentation.shards(0), manifest.shard_rows)
    # A harvest of less text than its goal has a seal that says so, and must not change the steps.
    sealed = None if cache.end is None else cache.end.sequences
    goals = [goal for goal in (manifest.plan.goal, sealed) if goal is not None]
    if goals:
        rows = goal_rows(manifest, max(goals))
        epoch_steps = segmentation.steps(rows)
        promised = {shard: rows[shard] for shard in promised if shard in rows}
    planned_steps(config, epoch_steps)  # what cannot be is refused now, not after hours of waiting
    require_batch(segmentation, promised)
    plan = first_segment(cache, segmentation)
    held_out = [s for s in segmentation.shards(0, cache.shards[-1]) if segmentation.is_held_out(s)]
    return _Order(plan, held_out, epoch_steps, segmentation.shards_each)


def planned_steps(config: FitConfig, epoch_steps: int | None) -> int:
    """Steps of the whole run; with --follow, unless --max-tokens says it, the most it can have."""
    if config.max_tokens is None:
        if epoch_steps is None:
            raise ConfigError(
                f"how many steps --follow will make cannot be known: the harvest of {config.cache} "
                "has no goal",
                remedy="--max-tokens N",
            )
        return whole_updates(config, config.epochs * epoch_steps)
    steps = config.max_tokens // config.batch_size
    if steps == 0:
        raise ConfigError(
            "--max-tokens is less than one batch",
            expected=f">= --batch-size {config.batch_size}",
            got=config.max_tokens,
        )
    return whole_updates(config, steps)


def whole_updates(config: FitConfig, steps: int) -> int:
    """So many steps, without the last ones if they do not fill an update.

    Raises:
        ConfigError: an option counts more steps than the run has.
    """
    whole = steps // config.grad_acc_steps * config.grad_acc_steps
    saes = config.saes or (config.sae,)
    for name, value in (
        ("--grad-acc-steps", config.grad_acc_steps),
        ("--lr-decay-steps", max(sae.lr_decay_steps or 0 for sae in saes)),
        ("--k-anneal-steps", max(sae.k_anneal_steps for sae in saes)),
    ):
        if value > (steps if name == "--grad-acc-steps" else whole):
            raise ConfigError(
                f"{name} is longer than the run", expected=f"<= {whole or steps}", got=value
            )
    return whole


def budget_of(config: FitConfig, cache: Cache, hookpoints: list[str]) -> MemoryBudget:
    """How many rows are mixed in memory, and how many batches wait."""
    if config.pool_rows is not None:
        return MemoryBudget(config.pool_rows, PREFETCH_BATCHES)
    return plan_memory(config.buffer_bytes, cache.manifest, hookpoints, config.batch_size)


def library_versions() -> dict[str, str]:
    """Libraries that decide a run's bits."""
    return {name: version(name) for name in ("actcache", "torch")}


def run_options(config: FitConfig) -> FitConfig:
    """Without what is of this start, not of the run."""
    return dataclasses.replace(config, parallel=None)


def sae_entries(
    config: FitConfig, cache: Cache, kinds: Kinds | None = None
) -> tuple[SaeEntry, ...]:
    """The SAEs that a run trains, hookpoint after hookpoint; `with_default_lr` knows its length.

    Args:
        config: the options.
        cache: its cache.
        kinds: with --finetune, what they are, from what they would be; None: what is found.
    """
    wirings = assign_hookpoints(config, cache)
    require_overrides_used(config, [roles.name for roles in wirings])
    entries = tuple(
        _entry(config, roles, cache, setting, options)
        for roles in wirings
        for setting, options in saes_at(config, roles.name).items()
    )
    if config.finetune is None:
        return entries
    kinds = kinds or PretrainedSaes(config.finetune).kinds
    return tuple(map(_with_kind, entries, kinds(entries)))


def with_default_lr(entries: Sequence[SaeEntry], steps: int) -> tuple[SaeEntry, ...]:
    """The same SAEs with the learning rates of a run of so many steps, where none are asked for."""
    return tuple(
        dataclasses.replace(entry, lr=_default_lr(entry.config, entry.options, steps))
        if entry.options.lr is None
        else entry
        for entry in entries
    )


def steps_ahead(config: FitConfig, cache: Cache, pool_rows: int) -> int | None:
    """Steps that a run would have; None with --follow, where the harvest's goal says it later."""
    if config.max_tokens is not None:
        return planned_steps(config, None)
    return (
        None
        if config.follow
        else planned_steps(config, _order(config, cache, pool_rows).epoch_steps)
    )


def _default_lr(sizes: SaeConfig, options: SaeOptions, steps: int | None = None) -> float:
    return default_lr(options.optimizer, sizes.num_latents, sizes.d_in, steps)


def _with_kind(entry: SaeEntry, kind: SaeConfig) -> SaeEntry:
    lr = entry.options.lr
    if lr is None:
        lr = _default_lr(kind, entry.options)
    return dataclasses.replace(entry, config=kind, lr=lr)


def _entry(
    config: FitConfig, roles: HookpointRoles, cache: Cache, setting: str, options: SaeOptions
) -> SaeEntry:
    """One SAE's kind, sizes and learning rate."""
    width = cache.manifest.width
    reads = roles.reads or (roles.name,)
    widths = tuple(width(name) for name in reads)
    num_latents = options.num_latents or max(widths) * options.expansion_factor
    d_out = sum(map(width, roles.predicts))
    sparsity = options.sparsity
    if sparsity is None:
        sparsity = PENALISED.get(options.activation, 0.0)
    sizes = SaeConfig(
        sum(widths),
        num_latents,
        options.k,
        activation=options.activation,
        multi_topk=options.multi_topk,
        matryoshka=options.matryoshka,
        transcode=config.transcode,
        skip_connection=config.skip_connection,
        d_out=d_out if d_out and d_out != sum(widths) else None,
        widths=widths if config.crosscode else (),
        sparsity=sparsity,
        threshold=SaeConfig.threshold if options.threshold is None else options.threshold,
        bandwidth=SaeConfig.bandwidth if options.bandwidth is None else options.bandwidth,
    )
    lr = options.lr if options.lr is not None else _default_lr(sizes, options)
    return SaeEntry(
        roles.name, sizes, lr, options.seed, setting, options, roles.reads, roles.predicts
    )
