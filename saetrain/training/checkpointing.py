"""What a run leaves on disk: SAEs as others load them, and checkpoints."""

from __future__ import annotations

from pathlib import Path

from actcache.errors import ActcacheError
from actcache.filesystem.atomic import FileDigest
from saetrain.config.fit_config import FitConfig
from saetrain.distributed.coordinator import Coordinator
from saetrain.formats.sparsify import save_sae
from saetrain.runs.checkpoint import NEWEST, RetentionPolicy, best_steps, save_sae_state
from saetrain.tracking.jsonl import JsonlTracker
from saetrain.training.best import keep_only
from saetrain.training.non_finite import require_finite_loss
from saetrain.training.sae_trainer import SaeTrainer


class Checkpointer:
    """Saves a run now and then, and knows how far it is saved.

    Args:
        root: folder of the run.
        trainers: the SAEs.
        tracker: whose lines must be durable before a checkpoint is.
        coordinator: the processes of the run.
        options: when to save, and what stays.
        saved: steps that are saved.
    """

    def __init__(
        self,
        root: Path,
        trainers: list[SaeTrainer],
        tracker: JsonlTracker,
        coordinator: Coordinator,
        options: FitConfig,
        saved: int,
    ) -> None:
        self._root, self._trainees, self._tracker, self._crew = root, trainers, tracker, coordinator
        self._every, self._keep = (
            options.save_every,
            RetentionPolicy(options.keep_last, options.keep_every),
        )
        self._saved = saved

    def is_due(self, done: int) -> bool:
        """Whether there must be a checkpoint of a step."""
        return done % self._every == 0 or self._keep.is_due(done)

    def save(self, done: int, place: dict[str, int]) -> None:
        """Save so many steps, unless they are.

        Args:
            done: steps done.
            place: where the next batch lies.
        """
        if done > self._saved:
            self._tracker.sync()
            save(self._root, done, self._trainees, place, self._crew, self._keep)
            self._saved = done

    def save_while_waiting(self, done: int, place: dict[str, int]) -> None:
        """Save, if these processes can by themselves: who stops the run now loses nothing."""
        if self._crew.can_checkpoint_alone:
            self.save(done, place)

    def save_after_read_error(self, done: int, place: dict[str, int]) -> None:
        """Save what was learnt before rows could not be read, and say what is saved."""
        say = self._tracker.bar.print_line
        try:
            self.save_while_waiting(done, place)
        except ActcacheError as error:  # what happened to the rows is the news, not this
            say(f"warning: step {done:,} could not be saved: {error}")
        if self._saved:
            say(
                f"rows could not be read; step {self._saved:,} is saved, and --resume goes on from "
                "there"
            )
        if self._crew.can_checkpoint_alone:
            self._crew.barrier()  # whoever ends first takes the others with it


def save(
    root: Path,
    done: int,
    trainers: list[SaeTrainer],
    place: dict[str, int],
    coordinator: Coordinator,
    keep: RetentionPolicy = NEWEST,
) -> None:
    """Write every SAE as others load it, and a checkpoint.

    The checkpoint comes last: killed before it, the run does these steps again and writes the same
    SAEs; killed after it, nothing is missing.
    """
    if not coordinator.writes_saes:
        return
    for trainer in trainers:
        _require_finite_state(root, trainer, done)
    exports = [export(root, trainer) for trainer in trainers]
    parts = {
        trainer.index: save_sae_state(
            root, done, trainer.index, trainer.state(), file, trainer.best
        )
        for trainer, file in zip(trainers, exports, strict=True)
    }
    coordinator.finalize_checkpoint(root, done, place, parts, keep)
    prune_best(root, trainers)


def export(root: Path, trainer: SaeTrainer) -> FileDigest:
    """Write an SAE as others load it."""
    weights, unit = trainer.export_weights(), trainer.unit_norm()
    entry = trainer.entry
    return save_sae(root / entry.name, entry.config, weights, entry.reads, unit)


def prune_best(root: Path, trainers: list[SaeTrainer]) -> None:
    """Remove best ones that no checkpoint names: of before, or newer than what is gone on from."""
    for trainer in trainers:
        saved = set() if trainer.best is None else best_steps(root, trainer.index)
        trainer.saved_bests = frozenset(saved)
        keep_only(root / trainer.entry.name, saved)


def _require_finite_state(root: Path, trainer: SaeTrainer, step: int) -> None:
    """Refuse to save what a loss that was not finite has touched.

    The weights alone do not tell: the sign of NaN is 0, so signum keeps them finite.
    """
    require_finite_loss(root, trainer, float(trainer.meter.sums.sum()), step)
    for parameter in trainer.sae.parameters():
        if not bool(parameter.isfinite().all()):
            require_finite_loss(root, trainer, float("nan"), step)
