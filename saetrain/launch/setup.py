"""The SAEs of a run with all that trains them, as they are before the first step."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from actcache.cache.reader import Cache
from actcache.errors import FormatError
from actcache.filesystem.atomic import digest_file
from saetrain.distributed.coordinator import Coordinator
from saetrain.formats.sparsify import WEIGHTS
from saetrain.launch.finetune import load_pretrained
from saetrain.model.hookpoint_io import hookpoints_of, target_stats
from saetrain.model.losses import make_loss_config
from saetrain.optim import make_optimizer, make_schedule, warmup_steps
from saetrain.runs.checkpoint import (
    RetentionPolicy,
    State,
    best_folder,
    load_checkpoint,
    load_parts,
    remove_others,
)
from saetrain.runs.record import RunRecord
from saetrain.runs.segments import SegmentTracker
from saetrain.training.checkpointing import export, prune_best
from saetrain.training.cuda_graphs import require_cuda_graphs
from saetrain.training.ddp import DdpStep
from saetrain.training.init import FirstRows, init_b_dec_at_median, initial_sae
from saetrain.training.metrics import DeadLatentTracker, MeanMeter
from saetrain.training.sae_trainer import SaeTrainer
from saetrain.training.step import require_bfloat16_products, require_compiler
from saetrain.training.step_settings import make_step_settings
from saetrain.training.validation import Validation


@dataclass(frozen=True)
class RunState:
    """All that a run needs in order to go, or to go on."""

    trainers: list[SaeTrainer]
    """What this process trains."""
    segment_tracker: SegmentTracker | None
    """Its side of following a harvest."""
    validation: Validation | None
    """Held-out rows, if this process validates."""
    resume_point: ResumePoint
    """Where it goes on from."""


def set_up_run(
    root: Path,
    record: RunRecord,
    cache: Cache,
    device: torch.device,
    coordinator: Coordinator,
    begun: bool,
) -> RunState:
    """Build a run as it begins; one that was begun before, as its newest checkpoint left it.

    Raises:
        ActcacheError: one of its kinds: it cannot be built.
    """
    coordinator.init_process_group(device)
    numbers = coordinator.assigned_saes(record.saes)
    trainers = make_trainers(record, cache, device, numbers, coordinator.is_data_parallel)
    segment_tracker = (
        None
        if record.segment_shards is None
        else SegmentTracker(root, record, cache, coordinator.is_rank_zero)
    )
    resume_point = (
        restore_checkpoint(root, record, trainers, segment_tracker, coordinator)
        if begun
        else ResumePoint()
    )
    if resume_point.step == 0:
        first = FirstRows(cache, record.plan)
        for trainer in trainers:
            init_b_dec_at_median(trainer.sae, trainer.entry, first)
            if record.origins:
                origin = record.origins[trainer.index]
                load_pretrained(trainer.sae, trainer.entry, origin, record.options)
    validates = coordinator.writes_saes and resume_point.step < record.steps
    validation = held_out_rows(record, cache, trainers) if validates else None
    return RunState(trainers, segment_tracker, validation, resume_point)


def make_trainers(
    record: RunRecord,
    cache: Cache,
    device: torch.device,
    numbers: Sequence[int],
    is_data_parallel: bool = False,
) -> list[SaeTrainer]:
    """The SAEs of these numbers with their optimisers, b_dec at the mean of the training rows."""
    if record.options.autocast:
        require_bfloat16_products(device)
    if record.options.cuda_graphs:
        require_cuda_graphs(device)
    if record.options.compile:
        require_compiler(device)
    # Once for each hookpoint: they are merged from as many files as there are shards.
    statistics_of = functools.cache(lambda name: cache.statistics(name, record.training_shards))
    trainers = []
    for number in numbers:
        entry = record.saes[number]
        sizes, options = entry.config, record.options.of(entry.options)
        targets = target_stats(entry, statistics_of)
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
        loss_config = make_loss_config(
            sizes, record.steps // 20 if rise is None else rise, targets.parts
        )
        trainers.append(
            SaeTrainer(
                entry,
                sae,
                optimizer,
                DeadLatentTracker(sizes.num_latents, record.dead_after, device),
                MeanMeter(device, loss_config.names),
                targets.variance,
                loss_config,
                make_step_settings(options, sizes),
                index=number,
                ddp=DdpStep(sae) if is_data_parallel else None,
            )
        )
    return trainers


def held_out_rows(record: RunRecord, cache: Cache, trainers: list[SaeTrainer]) -> Validation | None:
    """What a run validates on, if it does."""
    options = record.options
    if options.val_every is None:
        return None
    hookpoints = hookpoints_of([trainer.entry for trainer in trainers])
    held_out = record.held_out
    return Validation(
        cache, hookpoints, record.training_shards, held_out, options.val_rows, options.verify
    )


@dataclass(frozen=True)
class ResumePoint:
    """What a run goes on from; by default, its beginning."""

    step: int = 0
    """Steps done."""
    stream: dict[str, int] = field(default_factory=dict)
    """State of the stream."""
    warnings: tuple[str, ...] = ()
    """One if a newer checkpoint is damaged."""


def restore_checkpoint(
    root: Path,
    record: RunRecord,
    trainers: list[SaeTrainer],
    segment_tracker: SegmentTracker | None,
    coordinator: Coordinator,
) -> ResumePoint:
    """Put back the newest checkpoint that is whole, if there is one, and all that lies beside it.

    Raises:
        FormatError: all are damaged, or it belongs to another run.
    """
    warnings: list[str] = []

    def fell_back(error: FormatError, step: int) -> None:
        warnings.append(
            f"{error.what}: the newest checkpoint is damaged; going on from step {step:,}, and all "
            "that came after it is done again"
        )

    wanted = {trainer.index for trainer in trainers}
    if coordinator.is_rank_zero:
        check = functools.partial(_require_bests, root, record)
        checkpoint = load_checkpoint(root, wanted, check, fell_back)
        coordinator.broadcast(CheckpointChoice(None if checkpoint is None else checkpoint[0].step))
    else:
        step = coordinator.receive(CheckpointChoice).step
        checkpoint = None if step is None else load_parts(root, step, wanted)
    if checkpoint is not None:
        _load_state(root, record, trainers, segment_tracker, *checkpoint)
    coordinator.barrier()  # nobody removes what another one still reads
    if coordinator.is_rank_zero and checkpoint is not None:
        keep = RetentionPolicy(record.options.keep_last, record.options.keep_every)
        remove_others(root, checkpoint[0].step, keep)
    coordinator.barrier()
    if coordinator.writes_saes:
        prune_best(root, trainers)
    if checkpoint is None:
        return ResumePoint()
    state, _ = checkpoint
    for trainer in trainers if coordinator.writes_saes else ():
        exported = root / trainer.entry.name / WEIGHTS
        written = state.saes[trainer.index].export
        if not exported.is_file() or digest_file(exported) != written:  # of a later step
            export(root, trainer)
    return ResumePoint(state.step, state.stream, tuple(warnings))


@dataclass(frozen=True)
class CheckpointChoice:
    """The checkpoint that a run goes on from."""

    step: int | None
    """Steps done; None: there is none."""


def _load_state(
    root: Path,
    record: RunRecord,
    trainers: list[SaeTrainer],
    segment_tracker: SegmentTracker | None,
    state: State,
    tensors: list[dict[str, Tensor]],
) -> None:
    """Load a checkpoint into what is trained; raises `FormatError` if it is not of this run."""
    if segment_tracker is None:
        epoch, step = divmod(state.step, record.plan.steps_per_epoch)
        place: dict[str, int] | None = {"epoch": epoch, "step": step}
    else:
        place = segment_tracker.position_after(state.step, record.epochs)
    fits = len(tensors) == len(record.saes) and 0 <= state.step <= record.steps
    if not fits or state.stream != place:
        expected = f"{len(record.saes)} SAEs, step 0 to {record.steps}, the stream at {place}"
        got = f"{len(tensors)} SAEs, step {state.step}, the stream at {state.stream}"
        raise _foreign_checkpoint(root, expected, got)
    for trainer in trainers:
        part, sae = tensors[trainer.index], state.saes[trainer.index]
        try:
            trainer.load_state(part, sae.numbers)
        except (KeyError, RuntimeError) as error:
            raise _foreign_checkpoint(root, f"the state of {trainer.entry}", error) from error
        trainer.best = sae.best


def _require_bests(root: Path, record: RunRecord, state: State) -> None:
    """Raise `FormatError` if a best SAE that a checkpoint names is not as it was saved."""
    for entry, sae in zip(record.saes, state.saes, strict=False):
        if sae.best is None:
            continue
        path = best_folder(root / entry.name, sae.best.step) / WEIGHTS
        got = digest_file(path) if path.is_file() else "nothing"
        if got != sae.best.file:
            raise FormatError(
                f"{path} is not what its checkpoint wrote", expected=sae.best.file, got=got
            )


def _foreign_checkpoint(root: Path, expected: object, got: object) -> FormatError:
    return FormatError(
        f"{root} holds a checkpoint that is not of this run",
        expected=expected,
        got=got,
        remedy="restore it from a copy, or remove checkpoint-* there and begin the run anew with "
        "--resume",
    )
