"""The loop, nothing else."""

from __future__ import annotations

import functools
from pathlib import Path

from actcache.stream.activation_stream import ActivationStream, Batch
from saetrain.distributed.coordinator import Coordinator
from saetrain.distributed.process_group import LostRankError
from saetrain.distributed.signals import RunStopped, StopRequested
from saetrain.runs.record import RunRecord
from saetrain.runs.segments import HarvestWaitNotice, SegmentTracker, plan_of_step
from saetrain.tracking.jsonl import JsonlTracker
from saetrain.training.checkpointing import Checkpointer
from saetrain.training.cuda_graphs import with_cuda_graphs
from saetrain.training.log_records import collect_metrics
from saetrain.training.non_finite import with_row_addresses
from saetrain.training.sae_trainer import SaeTrainer, by_hookpoint
from saetrain.training.step import train_batch
from saetrain.training.validation import Validation, validate


def train(
    root: Path,
    record: RunRecord,
    trainers: list[SaeTrainer],
    stream: ActivationStream,
    tracker: JsonlTracker,
    first_step: int,
    segment_tracker: SegmentTracker | None = None,
    validation: Validation | None = None,
    coordinator: Coordinator | None = None,
) -> int:
    """Train until the run's last step, or the last of its data, from `first_step` on.

    Args:
        root: folder of the run.
        record: what the run is.
        trainers: what is trained.
        stream: at the batch of `first_step`.
        tracker: hears of every step that is logged.
        first_step: steps done.
        segment_tracker: pins what is used of a cache that is still being harvested.
        validation: held-out rows, if the run validates.
        coordinator: the processes of the run; None: this one alone, whom nobody asks to stop.

    Returns:
        Steps done in the whole run.

    Raises:
        Stopped: a signal asked for it, and the steps before it are saved.
        NonFiniteError: a loss is not finite; it has reached no weight, and a checkpoint before it
            stays.
        CorruptShardError: a shard has changed or is gone; the steps before it are saved. So they
            are for any other error of the reader.
    """
    coordinator = coordinator or Coordinator()
    checkpointer = Checkpointer(root, trainers, tracker, coordinator, record.options, first_step)
    groups, options = by_hookpoint(trainers), record.options
    done, place = first_step, stream.state_dict()
    make_step = with_cuda_graphs(groups) if options.cuda_graphs else train_batch

    def wait(shard: int) -> None:
        waiting(shard)
        coordinator.throttle(done)
        checkpointer.save_while_waiting(done, place)
        coordinator.check_stop_request(done, waits=True)

    if segment_tracker is not None:
        waiting = HarvestWaitNotice(
            stream.cache, segment_tracker.plans.segmentation.shards_each, tracker.bar
        )
        stream.on_wait = wait
    read = {entry.name: entry.hookpoints for entry in record.saes}
    place_of = functools.partial(plan_of_step, record, segment_tracker)
    with with_row_addresses(root, stream.cache, read, place_of):
        try:
            for step in range(first_step, record.steps):
                coordinator.throttle(step)
                coordinator.check_stop_request(done)
                batch = _next_batch(coordinator, stream, checkpointer, done, place)
                if batch is None:
                    break
                # Not earlier: while the first rows are read, there is nothing to save.
                coordinator.stop_signals.install()
                if segment_tracker is not None:
                    segment_tracker.pin(batch)
                make_step(groups, batch, step)
                done, place = step + 1, stream.state_dict()
                last = done == record.steps or batch.last
                if done % options.log_every == 0 or last:
                    histogram = options.has_histogram(done, last=last)
                    rows = done * record.plan.batch_size
                    figures = collect_metrics(root, trainers, done, rows, histogram)
                    tracker.log(done, figures, stream.seconds_waited)
                if validation is not None and (done % (options.val_every or 1) == 0 or last):
                    found = validate(root, groups, validation, done, options.save_best)
                    tracker.log_held_out(done, found, validation.rows)
                if checkpointer.is_due(done) or last:
                    checkpointer.save(done, place)
                if last:
                    break
        except StopRequested as stop:
            checkpointer.save(done, place)
            raise RunStopped(stop.signal, done) from None
    return done


def _next_batch(
    coordinator: Coordinator,
    stream: ActivationStream,
    checkpointer: Checkpointer,
    done: int,
    place: dict[str, int],
) -> Batch | None:
    """The next batch; if it cannot be read, what is done is saved first."""
    try:
        return coordinator.next_batch(stream)
    except LostRankError:  # nobody is left to save with
        raise
    except Exception:
        checkpointer.save_after_read_error(done, place)
        raise
