"""Set-up of a run: SAEs, optimizers and held-out rows, at step 0 or from a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from actcache.cache.reader import Cache
from actcache.core.process import free_memory
from actcache.core.progress import format_bytes
from actcache.errors import ConfigError, FormatError
from saetrain.config.fit_config import FitConfig, with_defaults, with_precision
from saetrain.config.sae import SaeEntry, hookpoints_of
from saetrain.distributed.coordinator import Coordinator
from saetrain.launch.finetune import load_pretrained
from saetrain.model.losses import make_loss_config, target_stats
from saetrain.optim import make_schedule, warmup_steps
from saetrain.runs.checkpoint import (
    ForeignCheckpointError,
    RetentionPolicy,
    State,
    best_folder,
    differing_file,
    load_checkpoint,
    load_parts,
    remove_others,
    require_format,
    tensors_path,
)
from saetrain.runs.record import RunRecord
from saetrain.runs.segments import SegmentTracker
from saetrain.tracking.jsonl import METRICS, cut_to_checkpoint, require_lines
from saetrain.training.checkpointing import export, prune_best
from saetrain.training.cuda_graphs import require_cuda_graphs
from saetrain.training.ddp import DdpStep
from saetrain.training.init import FirstRows, init_b_dec_at_median
from saetrain.training.penalty_control import PenaltyController
from saetrain.training.run_state import RunState
from saetrain.training.sae_trainer import (
    SaeTrainer,
    adam_constants,
    initial_sae,
    lasting_bytes,
    make_optimizer,
    make_step_settings,
    precision_on,
    use_precision,
)
from saetrain.training.state_layout import require_state
from saetrain.training.step import (
    require_bfloat16_products,
    require_compiler,
)
from saetrain.training.validation import Validation

_LONGEST_REASON = 400  # characters of a warning that an error takes


@dataclass(frozen=True)
class RunBroadcast:
    """Message of rank 0 that starts the run on the other ranks."""

    resumed: bool
    record: RunRecord


@dataclass(frozen=True)
class CheckpointBroadcast:
    """Message of rank 0 that names a checkpoint to restore."""

    step: int | None
    """Its steps; None if there is none."""
    is_final: bool
    """False while rank 0 waits for the other ranks to check it."""


def set_up_run(root: Path, config: FitConfig, run: RunState, coordinator: Coordinator) -> None:
    """Build SAEs and optimizers; for a resumed run, restore its newest checkpoint.

    Raises:
        ActcacheError: one of its subclasses: the run cannot be built.
    """
    record, cache = run.record, run.cache
    coordinator.init_process_group(run.device)
    indices = coordinator.assigned_saes(record.saes)
    run.trainers = make_trainers(record, cache, run.device, indices, coordinator.batch_parts)
    if record.segment_shards is not None:
        run.segment_tracker = SegmentTracker(root, record, cache, coordinator.is_rank_zero)
    if run.resumed:
        restore_checkpoint(root, run, coordinator)
    if run.step == 0:
        first = FirstRows(cache, record.plan, config.verify)
        for trainer in run.trainers:
            if trainer.entry.options.b_dec_init == "geometric-median":
                init_b_dec_at_median(trainer.sae, trainer.entry, first)
            if record.origins:
                load_pretrained(trainer.sae, record.origins[trainer.index], record.options)
    options = record.options
    if options.val_every is not None and coordinator.writes_saes and run.step < record.steps:
        run.validation = Validation(
            cache,
            hookpoints_of([trainer.entry for trainer in run.trainers]),
            record.training_shards,
            record.held_out,
            options.val_rows,
            options.verify,
            record.massive,
        )


def make_trainers(
    record: RunRecord,
    cache: Cache,
    device: torch.device,
    indices: Sequence[int],
    batch_parts: int = 1,
) -> list[SaeTrainer]:
    """Build the SAEs of these indices, b_dec at the mean of the training rows, and optimizers."""
    defaults, version = record.defaults, record.defaults_version
    precision = precision_on(device, record.options, defaults, record.precision)
    use_precision(precision, device)
    run_options = with_precision(record.options, precision)
    if precision == "bfloat16":
        require_bfloat16_products(device)
    if record.options.cuda_graphs:
        require_cuda_graphs(device)
    if record.options.compile:
        require_compiler(device)
    require_memory([record.saes[index] for index in indices], run_options, device)
    # Merged once per hookpoint, from one file per shard.
    statistics_of = functools.cache(lambda name: record.statistics(cache, name))
    trainers = []
    for index in indices:
        entry = record.saes[index]
        sizes = entry.config
        options = with_defaults(run_options.of(entry.options), version)
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
            adam=adam_constants(options),
            decoder_norm=options.decoder_norm,
        )
        warmup = options.sparsity_warmup_steps
        loss_config = make_loss_config(
            sizes,
            record.steps // 20 if warmup is None else warmup,
            targets.parts,
            target_l0=options.target_l0,
            frequency=options.frequency_penalty,
            auxk_scaled_down=defaults.auxk_scaled_down,
            auxk_slope=defaults.auxk_slope,
        )
        trainers.append(
            SaeTrainer(
                entry,
                sae,
                optimizer,
                record.dead_after,
                targets.variance,
                loss_config,
                make_step_settings(options, sizes),
                index=index,
                ddp=DdpStep(sae) if batch_parts > 1 else None,
                defaults=defaults,
            )
        )
        if loss_config.target_l0 is not None:
            quadratic = sae.activation.counts
            trainers[-1].meter.controller = PenaltyController(
                loss_config, record.steps, device, quadratic=quadratic
            )
    return trainers


def require_memory(entries: Sequence[SaeEntry], options: FitConfig, device: torch.device) -> None:
    """Refuse SAEs whose weights, optimizer state and gradients cannot fit, before they are built.

    Raises:
        ConfigError: they need more memory than the device, or the machine, has.
    """
    needed = most = 0
    for entry in entries:
        lasting = lasting_bytes(entry, options, device.type)
        needed += lasting.weights + lasting.optimizer_state
        most = max(most, lasting.gradients)
    needed += most
    free = free_memory(device)
    if needed > free:
        names = ", ".join(entry.name for entry in entries[:3])
        names += ", ..." * (len(entries) > 3)
        raise ConfigError(
            f"out of memory: {len(entries)} SAEs do not fit ({names})",
            expected=f"<= {format_bytes(free)}, which are free on {device}",
            got=f"{format_bytes(needed)} of weights, optimizer state and gradients",
            remedy="fewer latents or SAEs, --optimizer signum, or --parallel modules over more "
            "devices",
        )


def restore_checkpoint(root: Path, run: RunState, coordinator: Coordinator) -> None:
    """Load the newest good checkpoint, if there is one, and repair the files that go with it.

    Raises:
        FormatError: no checkpoint is good, or one belongs to another run.
    """
    record = run.record
    wanted = {trainer.index for trainer in run.trainers}
    checkpoint: tuple[State, list[dict[str, Tensor]]] | None = None

    def warn(error: FormatError, step: int) -> None:
        run.restore_warnings += (
            f"{_in_one_line(error)}: this checkpoint is damaged; resuming from step {step:,}, and "
            "the steps after it are done again",
        )

    def accept(state: State, tensors: list[dict[str, Tensor]]) -> None:
        _require_contents(root, run, state, tensors)
        coordinator.broadcast(CheckpointBroadcast(state.step, is_final=False))
        for problem in filter(None, coordinator.gather("")):
            raise FormatError(problem)

    if coordinator.is_rank_zero:
        check = functools.partial(_check_files, root, record)
        checkpoint = load_checkpoint(root, wanted, check, warn, accept)
        step = None if checkpoint is None else checkpoint[0].step
        coordinator.broadcast(CheckpointBroadcast(step, is_final=True))
    else:
        while not (candidate := coordinator.receive(CheckpointBroadcast)).is_final:
            assert candidate.step is not None
            problem = ""
            try:
                checkpoint = load_parts(root, candidate.step, wanted)
                _require_contents(root, run, *checkpoint)
            except ForeignCheckpointError:
                raise
            except FormatError as error:
                problem = _in_one_line(error)
            coordinator.gather(problem)
        step = candidate.step
    if checkpoint is not None:
        _load_state(run, *checkpoint)
    coordinator.barrier()  # every rank has read its checkpoint: the others can be removed
    if coordinator.is_rank_zero and step is not None:
        options = record.options
        keep = RetentionPolicy(options.keep_last, options.keep_every, options.save_every)
        remove_others(root, step, keep)
        if checkpoint is not None and checkpoint[0].metrics is not None:
            cut_to_checkpoint(root / METRICS, checkpoint[0].metrics)
    coordinator.barrier()
    if not coordinator.writes_saes:
        return
    prune_best(root, run.trainers)
    if checkpoint is not None:
        for trainer in run.trainers:
            if differing_file(root / trainer.entry.name, checkpoint[0].saes[trainer.index]):
                export(root, trainer)  # it was of a later step


def _require_contents(
    root: Path, run: RunState, state: State, tensors: list[dict[str, Tensor]]
) -> None:
    """Require that this run can go on from a checkpoint, before anything of it is loaded.

    Raises:
        ForeignCheckpointError: it is of another run.
        FormatError: a tensor or number is not what this run's SAEs need.
    """
    record = run.record
    if run.segment_tracker is None:
        epoch, step = divmod(state.step, record.plan.steps_per_epoch)
        position: dict[str, int] | None = {"epoch": epoch, "step": step}
    else:
        position = run.segment_tracker.position_after(state.step, record.epochs)
    fits = len(tensors) == len(record.saes) and 0 <= state.step <= record.steps
    if not fits or state.stream != position:
        expected = f"{len(record.saes)} SAEs, step 0 to {record.steps}, the stream at {position}"
        got = f"{len(tensors)} SAEs, step {state.step}, the stream at {state.stream}"
        raise _foreign_checkpoint(root, expected, got)
    for trainer in run.trainers:
        part, sae = tensors[trainer.index], state.saes[trainer.index]
        path = tensors_path(root, state.step, trainer.index)
        rows = state.step * record.plan.batch_size
        require_state(trainer, part, sae.numbers, path, state.step, rows)


def _load_state(run: RunState, state: State, tensors: list[dict[str, Tensor]]) -> None:
    """Load a checkpoint into the trainers."""
    for trainer in run.trainers:
        sae = state.saes[trainer.index]
        trainer.load_state(tensors[trainer.index], sae.numbers)
        trainer.best = sae.best
    run.step, run.stream_state = state.step, state.stream


def _in_one_line(error: FormatError) -> str:
    details = [("expected", error.expected), ("got", error.got)]
    given = [f"{name} {text}" for name, text in details if text is not None]
    text = " ".join("; ".join([error.what, *given]).split())
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."


def _check_files(root: Path, record: RunRecord, state: State) -> None:
    """Raise `FormatError` if a file that a checkpoint names differs, or it is of another format."""
    require_format(root, record, state)
    if state.metrics is not None:
        require_lines(root / METRICS, state.metrics)
    for entry, sae in zip(record.saes, state.saes, strict=False):
        if sae.best is None:
            continue
        folder = best_folder(root / entry.name, sae.best.step)
        if path := differing_file(folder, sae.best):
            raise FormatError(f"{path} differs from the file that its checkpoint names")


def _foreign_checkpoint(root: Path, expected: object, got: object) -> ForeignCheckpointError:
    return ForeignCheckpointError(
        f"{root} holds a checkpoint of another run",
        expected=expected,
        got=got,
        remedy="restore it from a copy, or remove checkpoint-* there and restart the run with "
        "--resume",
    )
