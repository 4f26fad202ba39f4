"""The SAEs of a run with all that trains them, as they are before the first step."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from actcache.reader import Cache
from saetrain.crew import Crew
from saetrain.finetune import begin_with
from saetrain.follow import Follower
from saetrain.gradient import require_bfloat16_products, require_compiler
from saetrain.initial import FirstRows, initial_sae, start_at_median
from saetrain.inputs import hookpoints_of, targets_of
from saetrain.metrics import Firing, Meter
from saetrain.objective import objective_of
from saetrain.optim import make_optimizer, make_schedule, warmup_steps
from saetrain.recipe import make_recipe
from saetrain.recorder import require_cuda_graphs
from saetrain.restoring import Restored, restore
from saetrain.run import RunRecord
from saetrain.shared_batches import SharedBatches
from saetrain.trainee import Trainee
from saetrain.validation import Validation


@dataclass(frozen=True)
class Built:
    """All that a run needs in order to go, or to go on."""

    trainees: list[Trainee]
    """What this process trains."""
    follower: Follower | None
    """Its side of following a harvest."""
    validation: Validation | None
    """Held-out rows, if this process validates."""
    restored: Restored
    """Where it goes on from."""


def build_run(
    root: Path, record: RunRecord, cache: Cache, device: torch.device, crew: Crew, begun: bool
) -> Built:
    """Build a run as it begins; one that was begun before, as its newest checkpoint left it.

    Raises:
        ActcacheError: one of its kinds: it cannot be built.
    """
    crew.begin(device)
    numbers = crew.saes(record.saes)
    trainees = build(record, cache, device, numbers, crew.shares_batches)
    follower = None if record.segment_shards is None else Follower(root, record, cache, crew.leads)
    restored = restore(root, record, trainees, follower, crew) if begun else Restored()
    if restored.step == 0:
        first = FirstRows(cache, record.plan)
        for trainee in trainees:
            start_at_median(trainee.sae, trainee.entry, first)
            if record.origins:
                origin = record.origins[trainee.number]
                begin_with(trainee.sae, trainee.entry, origin, record.options)
    validates = crew.saves and restored.step < record.steps
    validation = held_out_rows(record, cache, trainees) if validates else None
    return Built(trainees, follower, validation, restored)


def build(
    record: RunRecord,
    cache: Cache,
    device: torch.device,
    numbers: Sequence[int],
    shares_batches: bool = False,
) -> list[Trainee]:
    """The SAEs of these numbers with their optimisers, b_dec at the mean of the training rows."""
    if record.options.autocast:
        require_bfloat16_products(device)
    if record.options.cuda_graphs:
        require_cuda_graphs(device)
    if record.options.compile:
        require_compiler(device)
    # Once for each hookpoint: they are merged from as many files as there are shards.
    statistics_of = functools.cache(lambda name: cache.statistics(name, record.training_shards))
    trainees = []
    for number in numbers:
        entry = record.saes[number]
        sizes, options = entry.config, record.options.of(entry.options)
        targets = targets_of(entry, statistics_of)
        sae = initial_sae(entry, targets, options, device)
        optimizer = make_optimizer(
            options.optimizer,
            sae,
            entry.lr,
            warmup_steps(options.lr_warmup_steps, record.steps),
            record.steps,
            schedule=make_schedule(options, record.steps),
            weight_decay=options.weight_decay,
            decoder_norm=options.decoder_norm,
        )
        rise = options.sparsity_warmup_steps
        objective = objective_of(sizes, record.steps // 20 if rise is None else rise, targets.parts)
        trainees.append(
            Trainee(
                entry,
                sae,
                optimizer,
                Firing(sizes.num_latents, record.dead_after, device),
                Meter(device, objective.names),
                targets.variance,
                objective,
                make_recipe(options, sizes),
                number=number,
                shared=SharedBatches(sae) if shares_batches else None,
            )
        )
    return trainees


def held_out_rows(record: RunRecord, cache: Cache, trainees: list[Trainee]) -> Validation | None:
    """What a run validates on, if it does."""
    options = record.options
    if options.val_every is None:
        return None
    hookpoints = hookpoints_of([trainee.entry for trainee in trainees])
    held_out = record.held_out
    return Validation(
        cache, hookpoints, record.training_shards, held_out, options.val_rows, options.verify
    )
