"""The training loop: read a batch, step, log, validate, save."""

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
from saetrain.training.non_finite import require_finite_loss, with_row_addresses
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
    """Train from `first_step` to the run's last step, or to the end of its data.

    Args:
        root: folder of the run.
        record: the run's record.
        trainers: the SAEs of this process.
        stream: positioned at the batch of `first_step`.
        tracker: receives metrics.
        first_step: steps done.
        segment_tracker: with --follow, pins the segments used of a cache that is being harvested.
        validation: held-out rows, if the run validates.
        coordinator: the processes of the run; None: this one alone.

    Returns:
        Steps done in the whole run.

    Raises:
        RunStopped: a signal requested it; the steps before it are saved.
        NonFiniteError: a loss is not finite. It has changed no weight, and the last checkpoint
            before it stays.
        CorruptShardError: a shard has changed or is missing; the steps before it are saved, as
            they are for any other read error.
    """
    coordinator = coordinator or Coordinator()
    checkpointer = Checkpointer(root, trainers, tracker, coordinator, record.options, first_step)
    groups, options = by_hookpoint(trainers), record.options
    done, position = first_step, stream.state_dict()
    make_step = with_cuda_graphs(groups) if options.cuda_graphs else train_batch

    def on_wait(shard: int) -> None:
        notice(shard)
        coordinator.throttle(done)
        checkpointer.save_while_waiting(done, position)
        coordinator.check_stop_request(done, waits=True)

    if segment_tracker is not None:
        notice = HarvestWaitNotice(
            stream.cache, segment_tracker.plans.segmentation.shards_each, tracker.bar
        )
        stream.on_wait = on_wait
    plan_of = functools.partial(plan_of_step, record, segment_tracker)
    with with_row_addresses(root, stream.cache, plan_of):
        try:
            for step in range(first_step, record.steps):
                coordinator.throttle(step)
                coordinator.check_stop_request(done)
                batch = _next_batch(coordinator, stream, checkpointer, done, position)
                if batch is None:
                    break
                # Not earlier: before the first batch there is nothing to save.
                coordinator.stop_signals.install()
                if segment_tracker is not None:
                    segment_tracker.pin(batch)
                make_step(groups, batch, step)
                done, position = step + 1, stream.state_dict()
                last = done == record.steps or batch.last
                if done % options.log_every == 0 or last:
                    histogram, metrics = options.has_histogram(done, last=last), {}
                    for trainer in trainers:
                        figures = trainer.pop_metrics(
                            done, done * record.plan.batch_size, histogram
                        )
                        require_finite_loss(root, trainer, figures["fvu"] + figures["auxk"], done)
                        metrics[trainer.entry.name] = figures
                    tracker.log(done, metrics, stream.seconds_waited)
                if validation is not None and (done % (options.val_every or 1) == 0 or last):
                    found = validate(root, groups, validation, done, options.save_best)
                    tracker.log_held_out(done, found, validation.rows)
                if checkpointer.is_due(done) or last:
                    checkpointer.save(done, position)
                if last:
                    break
        except StopRequested as stop:
            checkpointer.save(done, position)
            raise RunStopped(stop.signal, done) from None
    return done


def _next_batch(
    coordinator: Coordinator,
    stream: ActivationStream,
    checkpointer: Checkpointer,
    done: int,
    position: dict[str, int],
) -> Batch | None:
    """Return the next batch; after a read error, save the steps done and raise it."""
    try:
        return coordinator.next_batch(stream)
    except LostRankError:  # saving needs all ranks
        raise
    except Exception:
        checkpointer.save_after_read_error(done, position)
        raise
