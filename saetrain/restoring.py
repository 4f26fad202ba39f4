"""A run as its newest checkpoint that is whole left it; the same one on every process."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from actcache.atomic import digest_file
from actcache.errors import FormatError
from saetrain.best import best_folder
from saetrain.checkpoint import Keep, State, load_checkpoint, load_parts, remove_others
from saetrain.crew import Crew
from saetrain.follow import Follower
from saetrain.formats.sparsify import WEIGHTS
from saetrain.run import RunRecord
from saetrain.saving import export, forget_other_bests
from saetrain.trainee import Trainee


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
