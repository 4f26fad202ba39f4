"""Saving a run: its SAEs in the export format, and checkpoints.

With --save-best, `SAE/best-STEP/` holds the SAE with the lowest held-out FVU. Checkpoints name its
step, and it stays as long as one of them does, so a killed run resumes as if it had not been.
"""

from __future__ import annotations

import math
from pathlib import Path

from actcache.errors import ActcacheError
from actcache.filesystem.atomic import FileDigest
from saetrain.config.fit_config import FitConfig
from saetrain.distributed.coordinator import Coordinator
from saetrain.formats.sparsify import SaeDigests, export_sae
from saetrain.runs.checkpoint import (
    Best,
    RetentionPolicy,
    best_folder,
    best_steps,
    remove_other_bests,
    save_sae_state,
)
from saetrain.tracking.jsonl import JsonlTracker
from saetrain.training.non_finite import require_finite_loss
from saetrain.training.sae_trainer import SaeTrainer


class Checkpointer:
    """Writer of a run's checkpoints at intervals, with the last step that is saved.

    Args:
        root: folder of the run.
        trainers: the SAEs of this process.
        tracker: its metrics lines are flushed to disk before a checkpoint is written.
        coordinator: the processes of the run.
        options: intervals and retention.
        saved: step of the checkpoint that the run resumed from, or 0.
        format_version: format of the run, which its checkpoints follow.
    """

    def __init__(
        self,
        root: Path,
        trainers: list[SaeTrainer],
        tracker: JsonlTracker,
        coordinator: Coordinator,
        options: FitConfig,
        saved: int,
        format_version: int = 2,
    ) -> None:
        self._root, self._trainers, self._tracker = root, trainers, tracker
        self._coordinator, self._every = coordinator, options.save_every
        self._keep = RetentionPolicy(options.keep_last, options.keep_every, options.save_every)
        self._saved, self._format_version = saved, format_version

    def is_due(self, done: int) -> bool:
        """Return whether --save-every or --keep-every requires a checkpoint of this step."""
        return done % self._every == 0 or self._keep.is_due(done)

    def save(self, done: int, position: dict[str, int]) -> None:
        """Save the SAEs and a checkpoint, unless this step is saved already.

        The checkpoint is written last. A run killed before that repeats the steps since the last
        one and writes the same SAEs.

        Args:
            done: steps done.
            position: state of the stream: position of the next batch.

        Raises:
            NonFiniteError: a loss or a weight is not finite.
        """
        if done > self._saved:
            self._tracker.sync()
            metrics = self._tracker.metrics_digest() if self._format_version > 1 else None
            save(self._root, done, self._trainers, position, self._coordinator, self._keep, metrics)
            self._saved = done

    def save_while_waiting(self, done: int, position: dict[str, int]) -> None:
        """Save while waiting for rows, if this process can do so without the other ranks."""
        if self._coordinator.can_checkpoint_alone:
            self.save(done, position)

    def save_after_read_error(self, done: int, position: dict[str, int]) -> None:
        """Save the steps before rows that could not be read, and print which step is saved."""
        print_line = self._tracker.bar.print_line
        try:
            self.save_while_waiting(done, position)
        except ActcacheError as error:  # the read error is the one to raise
            print_line(f"warning: step {done:,} could not be saved: {error}")
        if self._saved:
            print_line(
                f"rows could not be read; step {self._saved:,} is saved, --resume continues there"
            )
        if self._coordinator.can_checkpoint_alone:
            self._coordinator.barrier()  # the first rank to exit ends the others


def save(
    root: Path,
    done: int,
    trainers: list[SaeTrainer],
    position: dict[str, int],
    coordinator: Coordinator,
    keep: RetentionPolicy,
    metrics: FileDigest | None,
) -> None:
    """Write every SAE in the export format, then a checkpoint; see `Checkpointer.save`."""
    if not coordinator.writes_saes:
        return
    for trainer in trainers:
        # The weights alone do not show a bad loss: sign(NaN) is 0, so signum keeps them finite.
        value = float(trainer.meter.sums.sum())
        finite = all(bool(p.isfinite().all()) for p in trainer.sae.parameters())
        require_finite_loss(root, trainer, value if finite else value + math.nan, done)
    exports = [export(root, trainer) for trainer in trainers]
    parts = {
        t.index: save_sae_state(root, done, t.index, t.state(), weights, t.best, config)
        for t, (weights, config) in zip(trainers, exports, strict=True)
    }
    coordinator.finalize_checkpoint(root, done, position, parts, keep, metrics)
    prune_best(root, trainers)


def export(root: Path, trainer: SaeTrainer) -> SaeDigests:
    """Write an SAE in the export format to its folder in the run."""
    return _export(root / trainer.entry.name, trainer)


def save_best(root: Path, trainer: SaeTrainer, step: int, fvu: float) -> None:
    """Write an SAE as its best so far; remove those that no checkpoint names."""
    folder = root / trainer.entry.name
    trainer.best = Best(step, fvu, *_export(best_folder(folder, step), trainer))
    remove_other_bests(folder, {step, *trainer.saved_bests})


def prune_best(root: Path, trainers: list[SaeTrainer]) -> None:
    """Remove the best SAEs that no checkpoint names: older ones, or newer than the resumed step."""
    for trainer in trainers:
        saved = set() if trainer.best is None else best_steps(root, trainer.index)
        trainer.saved_bests = frozenset(saved)
        remove_other_bests(root / trainer.entry.name, saved)


def _export(folder: Path, trainer: SaeTrainer) -> SaeDigests:
    entry = trainer.entry
    weights, unit = trainer.export_weights(), trainer.unit_norm()
    multi_topk = trainer.defaults.sparsify_multi_topk
    return export_sae(folder, entry.config, weights, entry.reads, unit, multi_topk)
