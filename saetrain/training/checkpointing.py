"""What a run leaves on disk: SAEs as others load them, and checkpoints."""

from __future__ import annotations

from pathlib import Path

from actcache.errors import ActcacheError
from actcache.filesystem.atomic import FileReceipt
from saetrain.config.fit_config import FitConfig
from saetrain.distributed.coordinator import Crew
from saetrain.formats.sparsify import save_sae
from saetrain.runs.checkpoint import NEWEST, Keep, best_steps, save_part
from saetrain.tracking.jsonl import Tracker
from saetrain.training.best import keep_only
from saetrain.training.non_finite import require_finite_loss
from saetrain.training.sae_trainer import Trainee


class Saving:
    """Saves a run now and then, and knows how far it is saved.

    Args:
        root: folder of the run.
        trainees: the SAEs.
        tracker: whose lines must be durable before a checkpoint is.
        crew: the processes of the run.
        options: when to save, and what stays.
        saved: steps that are saved.
    """

    def __init__(
        self,
        root: Path,
        trainees: list[Trainee],
        tracker: Tracker,
        crew: Crew,
        options: FitConfig,
        saved: int,
    ) -> None:
        self._root, self._trainees, self._tracker, self._crew = root, trainees, tracker, crew
        self._every, self._keep = options.save_every, Keep(options.keep_last, options.keep_every)
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
        if self._crew.can_keep:
            self.save(done, place)

    def rescue(self, done: int, place: dict[str, int]) -> None:
        """Save what was learnt before rows could not be read, and say what is saved."""
        say = self._tracker.bar.say
        try:
            self.save_while_waiting(done, place)
        except ActcacheError as error:  # what happened to the rows is the news, not this
            say(f"warning: step {done:,} could not be saved: {error}")
        if self._saved:
            say(
                f"rows could not be read; step {self._saved:,} is saved, and --resume goes on from "
                "there"
            )
        if self._crew.can_keep:
            self._crew.wait()  # whoever ends first takes the others with it


def save(
    root: Path,
    done: int,
    trainees: list[Trainee],
    place: dict[str, int],
    crew: Crew,
    keep: Keep = NEWEST,
) -> None:
    """Write every SAE as others load it, and a checkpoint.

    The checkpoint comes last: killed before it, the run does these steps again and writes the same
    SAEs; killed after it, nothing is missing.
    """
    if not crew.saves:
        return
    for trainee in trainees:
        _require_finite_state(root, trainee, done)
    exports = [export(root, trainee) for trainee in trainees]
    parts = {
        trainee.number: save_part(root, done, trainee.number, trainee.state(), file, trainee.best)
        for trainee, file in zip(trainees, exports, strict=True)
    }
    crew.commit(root, done, place, parts, keep)
    forget_other_bests(root, trainees)


def export(root: Path, trainee: Trainee) -> FileReceipt:
    """Write an SAE as others load it."""
    weights, unit = trainee.exported(), trainee.unit_norm()
    entry = trainee.entry
    return save_sae(root / entry.name, entry.config, weights, entry.reads, unit)


def forget_other_bests(root: Path, trainees: list[Trainee]) -> None:
    """Remove best ones that no checkpoint names: of before, or newer than what is gone on from."""
    for trainee in trainees:
        saved = set() if trainee.best is None else best_steps(root, trainee.number)
        trainee.saved_bests = frozenset(saved)
        keep_only(root / trainee.entry.name, saved)


def _require_finite_state(root: Path, trainee: Trainee, step: int) -> None:
    """Refuse to save what a loss that was not finite has touched.

    The weights alone do not tell: the sign of NaN is 0, so signum keeps them finite.
    """
    require_finite_loss(root, trainee, float(trainee.meter.sums.sum()), step)
    for parameter in trainee.sae.parameters():
        if not bool(parameter.isfinite().all()):
            require_finite_loss(root, trainee, float("nan"), step)
