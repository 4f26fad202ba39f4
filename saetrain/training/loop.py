"""The loop, nothing else."""

from __future__ import annotations

import functools
from pathlib import Path

from actcache.stream.activation_stream import ActivationStream, Batch
from saetrain.distributed.coordinator import Crew
from saetrain.distributed.process_group import PeerGoneError
from saetrain.distributed.signals import StopAsked, Stopped
from saetrain.runs.record import RunRecord
from saetrain.runs.segments import Follower, Waiting, plan_of_step
from saetrain.tracking.jsonl import Tracker
from saetrain.training.checkpointing import Saving
from saetrain.training.cuda_graphs import steps_as_recorded
from saetrain.training.log_records import read_figures
from saetrain.training.non_finite import rows_told
from saetrain.training.sae_trainer import Trainee, by_hookpoint
from saetrain.training.step import train_batch
from saetrain.training.validation import Validation, validate


def train(
    root: Path,
    record: RunRecord,
    trainees: list[Trainee],
    stream: ActivationStream,
    tracker: Tracker,
    first_step: int,
    follower: Follower | None = None,
    validation: Validation | None = None,
    crew: Crew | None = None,
) -> int:
    """Train until the run's last step, or the last of its data, from `first_step` on.

    Args:
        root: folder of the run.
        record: what the run is.
        trainees: what is trained.
        stream: at the batch of `first_step`.
        tracker: hears of every step that is logged.
        first_step: steps done.
        follower: pins what is used of a cache that is still being harvested.
        validation: held-out rows, if the run validates.
        crew: the processes of the run; None: this one alone, whom nobody asks to stop.

    Returns:
        Steps done in the whole run.

    Raises:
        Stopped: a signal asked for it, and the steps before it are saved.
        NonFiniteError: a loss is not finite; it has reached no weight, and a checkpoint before it
            stays.
        CorruptShardError: a shard has changed or is gone; the steps before it are saved. So they
            are for any other error of the reader.
    """
    crew = crew or Crew()
    saving = Saving(root, trainees, tracker, crew, record.options, first_step)
    groups, options = by_hookpoint(trainees), record.options
    done, place = first_step, stream.state_dict()
    make_step = steps_as_recorded(groups) if options.cuda_graphs else train_batch

    def wait(shard: int) -> None:
        waiting(shard)
        crew.keep_pace(done)
        saving.save_while_waiting(done, place)
        crew.look(done, waits=True)

    if follower is not None:
        waiting = Waiting(stream.cache, follower.plans.segmentation.shards_each, tracker.bar)
        stream.on_wait = wait
    read = {entry.name: entry.hookpoints for entry in record.saes}
    place_of = functools.partial(plan_of_step, record, follower)
    with rows_told(root, stream.cache, read, place_of):
        try:
            for step in range(first_step, record.steps):
                crew.keep_pace(step)
                crew.look(done)
                batch = _next_batch(crew, stream, saving, done, place)
                if batch is None:
                    break
                crew.stopping.listen()  # not before: while first rows are read, nothing is to save
                if follower is not None:
                    follower.use(batch)
                make_step(groups, batch, step)
                done, place = step + 1, stream.state_dict()
                last = done == record.steps or batch.last
                if done % options.log_every == 0 or last:
                    histogram = options.has_histogram(done, last=last)
                    rows = done * record.plan.batch_size
                    figures = read_figures(root, trainees, done, rows, histogram)
                    tracker.log(done, figures, stream.seconds_waited)
                if validation is not None and (done % (options.val_every or 1) == 0 or last):
                    found = validate(root, groups, validation, done, options.save_best)
                    tracker.log_held_out(done, found, validation.rows)
                if saving.is_due(done) or last:
                    saving.save(done, place)
                if last:
                    break
        except StopAsked as stop:
            saving.save(done, place)
            raise Stopped(stop.signal, done) from None
    return done


def _next_batch(
    crew: Crew, stream: ActivationStream, saving: Saving, done: int, place: dict[str, int]
) -> Batch | None:
    """The next batch; if it cannot be read, what is done is saved first."""
    try:
        return crew.next_batch(stream)
    except PeerGoneError:  # nobody is left to save with
        raise
    except Exception:
        saving.rescue(done, place)
        raise
