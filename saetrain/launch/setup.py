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
from saetrain.distributed.coordinator import Crew
from saetrain.formats.sparsify import WEIGHTS
from saetrain.launch.finetune import begin_with
from saetrain.model.hookpoint_io import hookpoints_of, targets_of
from saetrain.model.losses import objective_of
from saetrain.optim import make_optimizer, make_schedule, warmup_steps
from saetrain.runs.checkpoint import Keep, State, load_checkpoint, load_parts, remove_others
from saetrain.runs.record import RunRecord
from saetrain.runs.segments import Follower
from saetrain.training.best import best_folder
from saetrain.training.checkpointing import export, forget_other_bests
from saetrain.training.cuda_graphs import require_cuda_graphs
from saetrain.training.ddp import SharedBatches
from saetrain.training.init import FirstRows, initial_sae, start_at_median
from saetrain.training.metrics import Firing, Meter
from saetrain.training.sae_trainer import Trainee
from saetrain.training.step import require_bfloat16_products, require_compiler
from saetrain.training.step_settings import make_recipe
from saetrain.training.validation import Validation


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


@dataclass(frozen=True)
class Restored:
    """What a run goes on from; by default, its beginning."""

    step: int = 0
    """Steps done."""
    stream: dict[str, int] = field(default_factory=dict)
    """State of the stream."""
    warnings: tuple[str, ...] = ()
    """One if a newer checkpoint is damaged."""


def restore(
    root: Path, record: RunRecord, trainees: list[Trainee], follower: Follower | None, crew: Crew
) -> Restored:
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

    wanted = {trainee.number for trainee in trainees}
    if crew.leads:
        check = functools.partial(_require_bests, root, record)
        checkpoint = load_checkpoint(root, wanted, check, fell_back)
        crew.tell(_Chosen(None if checkpoint is None else checkpoint[0].step))
    else:
        step = crew.hear(_Chosen).step
        checkpoint = None if step is None else load_parts(root, step, wanted)
    if checkpoint is not None:
        _put_back(root, record, trainees, follower, *checkpoint)
    crew.wait()  # nobody removes what another one still reads
    if crew.leads and checkpoint is not None:
        keep = Keep(record.options.keep_last, record.options.keep_every)
        remove_others(root, checkpoint[0].step, keep)
    crew.wait()
    if crew.saves:
        forget_other_bests(root, trainees)
    if checkpoint is None:
        return Restored()
    state, _ = checkpoint
    for trainee in trainees if crew.saves else ():
        exported = root / trainee.entry.name / WEIGHTS
        written = state.saes[trainee.number].export
        if not exported.is_file() or digest_file(exported) != written:  # of a later step
            export(root, trainee)
    return Restored(state.step, state.stream, tuple(warnings))


@dataclass(frozen=True)
class _Chosen:
    """The checkpoint that a run goes on from."""

    step: int | None
    """Steps done; None: there is none."""


def _put_back(
    root: Path,
    record: RunRecord,
    trainees: list[Trainee],
    follower: Follower | None,
    state: State,
    tensors: list[dict[str, Tensor]],
) -> None:
    """Load a checkpoint into what is trained; raises `FormatError` if it is not of this run."""
    if follower is None:
        epoch, step = divmod(state.step, record.plan.steps_per_epoch)
        place: dict[str, int] | None = {"epoch": epoch, "step": step}
    else:
        place = follower.place_after(state.step, record.epochs)
    fits = len(tensors) == len(record.saes) and 0 <= state.step <= record.steps
    if not fits or state.stream != place:
        expected = f"{len(record.saes)} SAEs, step 0 to {record.steps}, the stream at {place}"
        got = f"{len(tensors)} SAEs, step {state.step}, the stream at {state.stream}"
        raise _foreign_checkpoint(root, expected, got)
    for trainee in trainees:
        part, sae = tensors[trainee.number], state.saes[trainee.number]
        try:
            trainee.load_state(part, sae.numbers)
        except (KeyError, RuntimeError) as error:
            raise _foreign_checkpoint(root, f"the state of {trainee.entry}", error) from error
        trainee.best = sae.best


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
