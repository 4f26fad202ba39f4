"""Resolution of options and a cache into a run record: SAEs, order of rows, steps, changes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from actcache.cache.reader import Cache
from actcache.errors import ConfigError, HookpointError
from actcache.format.hookpoint_names import find_in_cache
from actcache.format.manifest import INPUT
from actcache.format.statistics import Statistics
from actcache.stream.massive_rows import MassiveRows, massive_rows
from actcache.stream.memory_budget import plan_memory
from actcache.stream.order import OrderPlan, make_plan, split_shards
from actcache.stream.segments import Segmentation, default_shards_each, goal_rows
from saetrain.config.fit_config import DEFAULTS, NEWEST_DEFAULTS, Defaults, FitConfig, with_defaults
from saetrain.config.grid import require_overrides_used, saes_at
from saetrain.config.sae import PENALISED, SaeConfig, SaeEntry, SaeOptions, hookpoints_of
from saetrain.launch.finetune import PretrainedSaes
from saetrain.model.losses import with_input_scales
from saetrain.optim import default_lr
from saetrain.runs.checkpoint import newest_step, require_own_files
from saetrain.runs.overrides import apply_overrides, with_history_entry
from saetrain.runs.record import (
    FORMAT_VERSION,
    RunRecord,
    absolute_cache,
    changed_options,
    check_same_cache,
    check_same_run,
    contradiction,
    read_run,
    receipts_digest,
    with_massive_rows,
    write_run,
)
from saetrain.runs.segments import first_segment, require_batch
from saetrain.training.init import FirstRows, with_encoder_scale
from saetrain.training.sae_trainer import precision_on

ConfigsOf = Callable[[Sequence[SaeEntry]], list[SaeConfig]]
_DEAD_AFTER = 10_000_000
_LEAST_STEPS = 4  # without an activation, before a latent is dead


def open_cache(config: FitConfig) -> Cache:
    """Open the cache of a run's options."""
    block_cache, size = config.block_cache, config.block_cache_bytes
    return Cache.open(config.cache, block_cache=block_cache, block_cache_bytes=size)


def resolve_run(
    config: FitConfig, cache: Cache, device: torch.device, batch_parts: int
) -> RunRecord:
    """Resolve the record of a new run. With --follow, wait for its first segment.

    Args:
        config: the options.
        cache: the rows.
        device: where the encoder scale is searched.
        batch_parts: processes that share each batch.

    Raises:
        ActcacheError: one of its subclasses: the options cannot be carried out with this cache.
    """
    origins = None if config.finetune is None else PretrainedSaes(config.finetune)
    entries = sae_entries(config, cache, None if origins is None else origins.configs)
    names, rows = hookpoints_of(entries), config.pool_rows
    pool_rows = plan_memory(
        config.buffer_bytes, cache.manifest, names, config.batch_size, rows
    ).pool_rows
    make_order = _order_in_segments if config.follow else _order
    order = make_order(config, cache, pool_rows, names)
    steps = planned_steps(config, order.epoch_steps)
    epoch_steps = steps if order.epoch_steps is None else order.epoch_steps
    training = [shard for shard, _ in order.plan.shards]
    first, massive = FirstRows(cache, order.plan, config.verify), order.massive

    @functools.cache
    def statistics_of(name: str) -> Statistics:
        if massive is not None:
            return massive.training.statistics[name]
        return cache.statistics(name, training)

    version = config.defaults or NEWEST_DEFAULTS
    _require_weights_dtype(config, version)
    _require_thresholds(entries, version)

    def with_scales(entry: SaeEntry) -> SaeEntry:
        options = with_defaults(config.of(entry.options), version)
        assert options.input_scale is not None
        entry = with_input_scales(entry, options.input_scale, statistics_of)
        if options.encoder_scale == "auto":
            return with_encoder_scale(entry, options, statistics_of, first, device)
        return dataclasses.replace(entry, encoder_scale=float(options.encoder_scale))

    entries = tuple(map(with_scales, with_default_lr(entries, steps, config, version)))
    return RunRecord(
        format_version=FORMAT_VERSION,
        cache=absolute_cache(config.cache),
        cache_id=cache.manifest.cache_id,
        receipts_digest=receipts_digest(cache, training, order.held_out),
        held_out=tuple(order.held_out),
        plan=order.plan,
        steps=steps,
        dead_after=config.dead_after
        or default_dead_after(DEFAULTS[version], config.batch_size, steps, epoch_steps),
        saes=entries,
        options=run_options(config),
        versions=library_versions(),
        segment_shards=order.segment_shards,
        extensions=len(cache.manifest.extensions) if config.follow else None,
        pool_rows=pool_rows,
        wandb_id=_new_wandb_id(config),
        origins=() if origins is None else origins.sources(entries),
        batch_parts=batch_parts,
        norm_limits={} if massive is None else massive.limits,
        left_out_digest="" if massive is None else massive.digest,
        massive=massive,
        precision=precision_on(device, config, DEFAULTS[version]),
    )


def _require_weights_dtype(config: FitConfig, version: int) -> None:
    """Raise `ConfigError` for new weights in bfloat16, whose small updates are rounded away."""
    if version > 1 and config.weights_dtype != "float32":
        raise ConfigError(
            "--weights-dtype bfloat16 has been removed: updates below 1/256 of a weight, and the "
            "second moment, were rounded away",
            expected="float32",
            got=config.weights_dtype,
            remedy="--precision bfloat16, which computes products in bfloat16 and keeps weights in "
            "float32",
        )


def _require_thresholds(entries: Sequence[SaeEntry], version: int) -> None:
    """Raise `ConfigError` for a threshold whose logarithm would be infinite."""
    if DEFAULTS[version].log_threshold and any(e.options.threshold == 0 for e in entries):
        raise ConfigError(
            "--threshold 0 has no logarithm, which jumprelu learns",
            expected="> 0",
            got=0.0,
            remedy="a small threshold, such as 1e-4",
        )


def default_dead_after(defaults: Defaults, batch_size: int, steps: int, epoch_steps: int) -> int:
    """Return the rows after which a latent without an activation is dead, without --dead-after.

    Args:
        defaults: those of the run.
        batch_size: rows of a step.
        steps: steps of the whole run.
        epoch_steps: steps of an epoch.
    """
    if defaults.dead_after_part is None:
        return min(_DEAD_AFTER, min(steps, epoch_steps) * batch_size)
    run = steps * batch_size
    return min(_DEAD_AFTER, run, max(_LEAST_STEPS * batch_size, run // defaults.dead_after_part))


@dataclass(frozen=True)
class _Order:
    """Order of a run's rows, and length of an epoch."""

    plan: OrderPlan
    held_out: list[int]
    epoch_steps: int | None
    """None with --follow, if the harvest has no goal."""
    segment_shards: int | None
    massive: MassiveRows | None = None
    """Rows that --max-norm-ratio leaves out."""


def _order(
    config: FitConfig, cache: Cache, pool_rows: int, hookpoints: Sequence[str] = ()
) -> _Order:
    """Order all shards that are there now, as one segment.

    Rows that --max-norm-ratio leaves out at the hookpoints are left out.
    """
    cache.require_shards()
    shards, seed = cache.shards, config.order_seed
    training, held_out = split_shards(shards, config.val_fraction, seed)
    rows = [(shard, cache.receipts[shard].rows) for shard in training]
    massive = left_out = None
    ratio = config.max_norm_ratio
    if ratio is None:
        ratio = DEFAULTS[config.defaults or NEWEST_DEFAULTS].max_norm_ratio
    if ratio:
        massive = massive_rows(cache, hookpoints, training, held_out, ratio, config.verify)
        left_out = None if massive is None else massive.training.left_out
    block_rows = cache.manifest.block_rows
    plan = make_plan(rows, block_rows, config.batch_size, seed, pool_rows, left_out)
    return _Order(plan, held_out, plan.steps_per_epoch, None, massive)


def _order_in_segments(
    config: FitConfig, cache: Cache, pool_rows: int, hookpoints: Sequence[str]
) -> _Order:
    """Order the rows of a harvest in segments; wait for the first one."""
    del hookpoints
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
    # The completion marker of a harvest that ran out of text must not change the steps.
    sealed = None if cache.end is None else cache.end.sequences
    goals = [goal for goal in (manifest.plan.goal, sealed) if goal is not None]
    if goals:
        rows = goal_rows(manifest, max(goals))
        epoch_steps = segmentation.steps(rows)
        promised = {shard: rows[shard] for shard in promised if shard in rows}
    planned_steps(config, epoch_steps)  # refuses now, not after hours of waiting
    require_batch(segmentation, promised)
    plan = first_segment(cache, segmentation)
    held_out = [s for s in segmentation.shards(0, cache.shards[-1]) if segmentation.is_held_out(s)]
    return _Order(plan, held_out, epoch_steps, segmentation.shards_each)


def planned_steps(config: FitConfig, epoch_steps: int | None) -> int:
    """Return the steps of the whole run; with --follow and no --max-tokens, their maximum."""
    if config.max_tokens is None:
        if epoch_steps is None:
            raise ConfigError(
                "the number of steps with --follow is unknown: the harvest of "
                f"{config.cache} has no goal",
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
    """Round steps down to whole updates of --grad-acc-steps.

    Raises:
        ConfigError: an option in steps is longer than the run.
    """
    whole = steps // config.grad_acc_steps * config.grad_acc_steps
    saes = config.saes or (config,)
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


def resume_record(
    config: FitConfig, cache: Cache, root: Path, batch_parts: int, device: torch.device
) -> tuple[RunRecord, tuple[str, ...], tuple[str, ...]]:
    """Read the record of a run to resume, and check it against the options and the cache.

    Args:
        config: the options of this call.
        cache: the rows.
        root: folder of the run.
        batch_parts: processes that share each batch now.
        device: device of the run now.

    Returns:
        The record with the options of this call, what has changed since it was written, warnings.

    Raises:
        RunError: options differ that must not, without --force-config.
        CacheMismatchError: the cache has changed.
    """
    config = run_options(config)
    record = read_run(root)
    require_own_files(root, [sae.name for sae in record.saes])
    record = with_massive_rows(record, cache)
    check_same_cache(record, cache)
    _require_resolved(record, cache)
    options = changed_options(record, config)
    record = dataclasses.replace(record, wandb_id=record.wandb_id or _new_wandb_id(config))
    updated = dataclasses.replace(record, options=config)
    if options and config.force_config:
        if config.follow:
            steps = whole_updates(config, record.steps)
        else:
            steps = planned_steps(config, record.plan.steps_per_epoch)
        entries = sae_entries(config, cache, functools.partial(_resumed_configs, record))
        saes = with_default_lr(entries, steps, config, record.defaults_version)
        done = newest_step(root) or 0
        updated = apply_overrides(record, config, options, saes, steps, done)
        if options.keys() & {"precision", "autocast"}:
            precision = precision_on(device, config, record.defaults)
            updated = dataclasses.replace(updated, precision=precision)
    else:
        check_same_run(record, updated)
    now = library_versions()
    last = record.history[-1].versions if record.history else record.versions
    libraries = [
        f"{name}: {then} then, {now.get(name)} now"
        for name, then in last.items()
        if now.get(name) != then
    ]
    warnings = tuple(
        f"{name} is {now.get(name)} now; this run was started with {then}"
        for name, then in record.versions.items()
        if now.get(name) != then
    )
    shares = []
    if batch_parts != record.batch_parts:
        shares = [f"processes that share each batch: {record.batch_parts} then, {batch_parts} now"]
        warnings += (f"{shares[0]}: the batches are the same, but sums round differently",)
    updated = dataclasses.replace(updated, batch_parts=batch_parts)
    return updated, (*options.values(), *libraries, *shares), warnings


def _require_resolved(record: RunRecord, cache: Cache) -> None:
    """Raise `FormatError` if the steps or SAEs of a record are not those of its options."""
    options = record.options
    if record.segment_shards is None:
        steps = planned_steps(options, record.plan.steps_per_epoch)
        if record.steps != steps:
            raise contradiction("steps", steps, record.steps)
    entries = sae_entries(options, cache, functools.partial(_resumed_configs, record))
    for recorded, entry in itertools.zip_longest(record.saes, entries):
        expected, found = (
            None
            if sae is None
            # What was computed at the run's start is not computed again.
            else dataclasses.replace(
                sae, lr=sae.lr if sae.options.lr is not None else 0.0, scales=(), encoder_scale=1.0
            )
            for sae in (entry, recorded)
        )
        if found != expected:
            raise contradiction("saes", expected, found)


def _resumed_configs(record: RunRecord, entries: Sequence[SaeEntry]) -> list[SaeConfig]:
    """Return the recorded configurations with the sparsity of new options, without the weights."""
    return [
        sae.config
        if entry.options.sparsity is None
        else dataclasses.replace(sae.config, sparsity=entry.options.sparsity)
        for sae, entry in zip(record.saes, entries, strict=False)
    ]


def write_option_changes(
    root: Path, record: RunRecord, first_step: int, changes: tuple[str, ...]
) -> None:
    """Write the changes since the last call into run.json.

    Options that affect no result keep their first value. The path of the cache is the current one:
    `saetrain eval` opens it.

    Args:
        root: folder of the run.
        record: the record of this call.
        first_step: steps done before this call.
        changes: what has changed, for the history.
    """
    old = read_run(root)
    new = dataclasses.replace(
        old, cache=absolute_cache(record.options.cache), wandb_id=record.wandb_id
    )
    if first_step < record.steps:
        if changed_options(old, record.options):
            new = dataclasses.replace(record, cache=new.cache)
        new = dataclasses.replace(new, batch_parts=record.batch_parts)
        new = with_history_entry(new, first_step, changes, library_versions())
    if new != old:
        write_run(root, new)


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that a run's bits depend on."""
    return {name: version(name) for name in ("actcache", "torch")}


def run_options(config: FitConfig) -> FitConfig:
    """Return the options that run.json records: without --parallel, which is of one call."""
    return config if config.parallel is None else dataclasses.replace(config, parallel=None)


def sae_entries(
    config: FitConfig, cache: Cache, configs_of: ConfigsOf | None = None
) -> tuple[SaeEntry, ...]:
    """List the SAEs of a run, by hookpoint; `with_default_lr` completes the learning rates.

    Args:
        config: the options.
        cache: the rows.
        configs_of: with --finetune, maps entries without weights to the configurations of the
            pretrained SAEs; None: read from the files.
    """
    hookpoints = assign_hookpoints(config, cache)
    if config.hookpoints:
        require_overrides_used(config, [roles.name for roles in hookpoints])
    entries = []
    for roles in hookpoints:
        varied = config.saes or config.hookpoints
        saes = saes_at(config, roles.name) if varied else {"": config.sae}
        for setting, options in saes.items():
            entries.append(_entry(config, roles, cache, setting, options))
    if config.finetune is not None:
        configs_of = configs_of or PretrainedSaes(config.finetune).configs
        found = zip(entries, configs_of(entries), strict=False)  # a resume may have more
        entries = [dataclasses.replace(entry, config=sizes) for entry, sizes in found]
    return tuple(entries)


CROSSCODER = "crosscoder"
"""Name of a crosscoder, which has several hookpoints, and of its folder."""


class HookpointRoles(NamedTuple):
    """Input and target hookpoints of one SAE."""

    name: str
    """Name of the SAE in its run."""
    reads: tuple[str, ...]
    """Hookpoints it reads; empty: the hookpoint `name`."""
    predicts: tuple[str, ...]
    """Hookpoints it predicts; empty: those it reads."""


def assign_hookpoints(config: FitConfig, cache: Cache) -> list[HookpointRoles]:
    """List the SAEs of a run with their hookpoints, in the cache's order.

    Raises:
        HookpointError: the cache does not hold the hookpoints that the options select.
    """
    if config.transcode:
        return [
            HookpointRoles(name, (name + INPUT,), (name,)) for name in _with_input(config, cache)
        ]
    names = _choose(config, cache, cache.hookpoints)
    if not config.crosscode:
        return [HookpointRoles(name, (), ()) for name in names]
    if len(names) < 2:
        raise HookpointError(
            "--crosscode takes several hookpoints",
            expected=f"at least two of {' | '.join(cache.hookpoints)}",
            got=names[0],
        )
    return [HookpointRoles(CROSSCODER, tuple(names), ())]


def _with_input(config: FitConfig, cache: Cache) -> list[str]:
    """List the selected hookpoints whose module's input is in the cache too."""
    outputs = [name for name in cache.hookpoints if not name.endswith(INPUT)]
    pairs = [name for name in outputs if name + INPUT in cache.hookpoints]
    for name in config.hookpoint:
        if name in outputs and name not in pairs:
            raise _no_input(cache, name)
    if not pairs:
        raise _no_input(cache, outputs[0] if outputs else "NAME")
    return _choose(config, cache, pairs)


def _no_input(cache: Cache, name: str) -> HookpointError:
    return HookpointError(
        f"{cache.root} holds no input of {name} to transcode from",
        expected=name + INPUT,
        got=" | ".join(cache.hookpoints),
        remedy=f"harvest with --hookpoint {name} --hookpoint {name}{INPUT}",
    )


def _choose(config: FitConfig, cache: Cache, names: Sequence[str]) -> list[str]:
    """List the hookpoints that match the patterns or are meant by them, in the cache's order."""
    chosen: set[str] = set()
    for pattern in config.hookpoint or ("*",):
        found = [name for name in names if fnmatchcase(name, pattern)]
        found = found or find_in_cache(pattern, names, cache.manifest.architecture)
        if not found:
            raise HookpointError(
                f"{cache.root} holds no hookpoint that matches {pattern!r}",
                expected=" | ".join(names),
                got=pattern,
            )
        chosen.update(found)
    return [name for name in names if name in chosen]


def with_default_lr(
    entries: Sequence[SaeEntry], steps: int | None, config: FitConfig, version: int
) -> tuple[SaeEntry, ...]:
    """Fill in learning rates where no --lr is given.

    Args:
        entries: the SAEs.
        steps: steps of the whole run, if known.
        config: options of the run.
        version: version of its defaults.
    """
    updates, rows = steps, None
    if DEFAULTS[version].lr_by_rows:
        batches = config.grad_acc_steps
        updates, rows = None if steps is None else steps // batches, config.batch_size * batches

    def fill_in(entry: SaeEntry) -> SaeEntry:
        sizes, optimizer = entry.config, entry.options.optimizer
        lr = default_lr(optimizer, sizes.num_latents, sizes.d_in, updates, rows=rows)
        return dataclasses.replace(entry, lr=lr)

    return tuple([entry if entry.options.lr is not None else fill_in(entry) for entry in entries])


def steps_ahead(config: FitConfig, cache: Cache, pool_rows: int) -> int | None:
    """Return the steps of a new run; None with --follow, where they depend on the harvest."""
    if config.max_tokens is not None:
        return planned_steps(config, None)
    return (
        None
        if config.follow
        else planned_steps(config, _order(config, cache, pool_rows).epoch_steps)
    )


def _entry(
    config: FitConfig, roles: HookpointRoles, cache: Cache, setting: str, options: SaeOptions
) -> SaeEntry:
    """Resolve the configuration of one SAE; `with_default_lr` fills in lr 0."""
    width = cache.manifest.width
    inputs = roles.reads or (roles.name,)
    widths = tuple(map(width, inputs))
    num_latents = options.num_latents or max(widths) * options.expansion_factor
    d_out = sum(map(width, roles.predicts))
    sparsity = options.sparsity
    if sparsity is None:
        sparsity = PENALISED.get(options.activation, 0.0)
    if options.target_l0 is not None and options.target_l0 > num_latents:
        raise ConfigError(
            "--target-l0 is larger than the number of latents",
            expected=f"<= {num_latents}",
            got=options.target_l0,
        )
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
    lr = 0.0 if options.lr is None else options.lr
    return SaeEntry(
        roles.name, sizes, lr, options.seed, setting, options, roles.reads, roles.predicts
    )


def _new_wandb_id(options: FitConfig) -> str | None:
    """Return a new run id for W&B, or None without --wandb."""
    if options.wandb == "disabled":
        return None
    letters = string.ascii_lowercase + string.digits
    return "".join(secrets.choice(letters) for _ in range(8))
