"""Coordination of a run's processes: one process, data parallel (ddp), or SAEs dealt out (modules).

`Coordinator` is the interface and the implementation for one process; its subclasses implement the
two modes of `--parallel`.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from actcache.cache.reader import Cache
from actcache.core.json_codec import decode_json, parse_dataclass, to_json
from actcache.core.process import World
from actcache.core.rendezvous import FIRST_NOTICE, WaitNotice, ranks
from actcache.errors import ConfigError, RunError
from actcache.filesystem.atomic import FileDigest
from actcache.stream.activation_stream import ActivationStream, Batch
from actcache.stream.order import lanes_of_rank
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeEntry
from saetrain.distributed.metric_gathering import (
    GatheringTracker,
    NullTracker,
    TrackerArgs,
    WorkerTracker,
)
from saetrain.distributed.partition import SaeCost, max_lead_steps, partition
from saetrain.distributed.process_group import Failure, RemoteRankError, StoreGroup, connect
from saetrain.distributed.signals import (
    REPEAT_WINDOW,
    RunStopped,
    StopRequested,
    StopSignals,
    exit_code_of,
)
from saetrain.runs.checkpoint import NEWEST, RetentionPolicy, SaeState, finalize_checkpoint
from saetrain.runs.record import RunRecord
from saetrain.tracking.jsonl import JsonlTracker

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store


T = TypeVar("T")

STOP_SECONDS = 10.0
"""Seconds that a rank waits for rows to come to the step at which all ranks stop."""
_SIGNAL = 128  # added to a signal number in an all-gather of exit codes, which are smaller


class Coordinator:
    """A run of one process: every collective operation returns at once.

    Args:
        stop_signals: receives SIGTERM and SIGINT.
        parallel: --parallel, which is checked here too: the same command line must not be
            accepted by one process and refused by several.
    """

    is_rank_zero = True
    """Whether this process decides what the run is, and writes the files that exist once."""
    writes_saes = True
    """Whether this process writes the SAEs that it trains."""
    can_checkpoint_alone = True
    """Whether a checkpoint needs no barrier, because all ranks are at the same step."""
    batch_rank, batch_parts = 0, 1
    """Part of each batch that this process trains on, and number of parts."""

    def __init__(
        self, stop_signals: StopSignals | None = None, parallel: str | None = None
    ) -> None:
        self.stop_signals, self._parallel = stop_signals or StopSignals(), parallel

    def check_supported(self, record: RunRecord) -> None:
        """Raise `ConfigError` for a run that this mode of parallelism cannot train."""
        if self._parallel == "ddp":
            require_no_batchtopk(record)

    def broadcast(self, value: object) -> None:
        """Broadcast a dataclass from rank 0."""

    def receive(self, kind: type[T]) -> T:
        """Receive the dataclass of this class that rank 0 broadcasts."""
        raise AssertionError(f"a single process cannot receive {kind.__name__}")

    def gather(self, text: str) -> list[str]:
        """Gather a string of each rank on rank 0, by rank; other ranks return an empty list."""
        return [text]

    def barrier(self) -> None:
        """Wait until every rank has reached the same barrier."""

    def init_process_group(self, device: torch.device) -> None:
        """Initialise torch's process group, if training needs collectives."""

    def assigned_saes(self, entries: Sequence[SaeEntry]) -> list[int]:
        """Return the indices of the SAEs that this process trains."""
        return list(range(len(entries)))

    def make_tracker(self, args: TrackerArgs, entries: Sequence[SaeEntry]) -> JsonlTracker:
        """Make the tracker of this process, which writes metrics.jsonl or sends its metrics."""
        del entries
        return JsonlTracker(*args)

    def init_throttle(self, step: int, record: RunRecord, cache: Cache) -> None:
        """Prepare `throttle` before the first step; `step` steps are done."""

    def throttle(self, step: int) -> None:
        """Wait before a step while other ranks lag too far behind; raise if one has failed."""

    def check_stop_request(self, done: int, waits: bool = False) -> None:
        """Raise `StopRequested` if the run stops after `done` steps.

        Args:
            done: steps done.
            waits: True for the calls made now and then while the stream waits for rows of a
                harvest; False for the call before each step.
        """
        del done, waits
        if self.stop_signals.received is not None:
            raise StopRequested(self.stop_signals.received)

    def next_batch(self, stream: ActivationStream) -> Batch | None:
        """Return the next batch, or None at the end.

        Raises:
            RemoteRankError: another rank cannot read its part of the batch.
            StopRequested: the run stops before the batch.
        """
        return next(stream, None)

    def finalize_checkpoint(
        self,
        root: Path,
        step: int,
        position: dict[str, int],
        parts: dict[int, SaeState],
        keep: RetentionPolicy = NEWEST,
        metrics: FileDigest | None = None,
    ) -> None:
        """Write the JSON file that makes a checkpoint valid, once all its SAEs are written.

        Args:
            root: folder of the run.
            step: steps done.
            position: position of the stream.
            parts: the SAEs that this process has written, by index.
            keep: which older checkpoints stay.
            metrics: digest of metrics.jsonl; None in a run of format 1.
        """
        ordered = [parts[index] for index in sorted(parts)]
        finalize_checkpoint(root, step, position, ordered, keep, metrics)


def require_no_batchtopk(record: RunRecord) -> None:
    """Refuse BatchTopK with --parallel ddp; raises `ConfigError`."""
    for entry in record.saes:
        if entry.config.activation == "batchtopk":
            raise ConfigError(
                "--activation batchtopk chooses among a whole batch, of which --parallel ddp gives "
                "each process a part",
                got=entry.name,
                remedy="--parallel modules",
            )


class MultiProcessCoordinator(Coordinator):
    """Coordinator of one process of several: the part that both modes of `--parallel` share.

    Args:
        group: the processes of the run.
        stop_signals: receives SIGTERM and SIGINT.
    """

    def __init__(self, group: StoreGroup, stop_signals: StopSignals | None = None) -> None:
        super().__init__(stop_signals)
        self.stop_signals.announces = False  # every rank would print the same line
        self.group = group
        self.is_rank_zero = group.rank == 0
        group.while_waiting = self._while_waiting
        self._stop_sent = False
        self._calls: Counter[str] = Counter()  # every rank makes the same ones

    def broadcast(self, value: object) -> None:
        """Put the dataclass into the store, as JSON, under its class name and a number."""
        self.group.put(self._key(type(value).__name__), to_json(value).decode())

    def receive(self, kind: type[T]) -> T:
        """Parse the dataclass that rank 0 put into the store."""
        text = self.group.get(self._key(kind.__name__))
        return parse_dataclass(kind, decode_json(text.encode()), "the broadcast of rank 0")

    def gather(self, text: str) -> list[str]:
        """Put the string into the store; on rank 0, wait for those of all ranks."""
        key = self._key("gather")
        self.group.put(f"{key}/{self.group.rank}", text)
        ranks = range(self.group.world_size) if self.is_rank_zero else ()
        return [self.group.get(f"{key}/{rank}") for rank in ranks]

    def _key(self, call: str) -> str:
        self._calls[call] += 1
        return f"{call} {self._calls[call]}"

    def barrier(self) -> None:
        """Wait until every rank has reached the same barrier."""
        self.group.barrier()

    def _while_waiting(self) -> None:
        """Pass on a signal of this rank at each poll of a wait."""
        self.stop_is_requested()

    def throttle(self, step: int) -> None:
        """Raise if another rank has failed."""
        del step
        self.group.check()

    def stop_is_requested(self) -> bool:
        """Return whether any rank has received a signal; send a signal of this rank to the rest."""
        if self.stop_signals.received is not None and not self._stop_sent:
            self.group.request_stop()
            self._stop_sent = True
        return self._stop_sent or self.group.stop_requested


class DdpCoordinator(MultiProcessCoordinator):
    """Data parallelism, --parallel ddp: every rank has all SAEs, and its lanes of each batch.

    All ranks are at the same step. An all-gather with each batch decides whether they stop there.

    Args:
        group: the processes of the run.
        store: for torch's process group.
        stop_signals: receives SIGTERM and SIGINT.
    """

    def __init__(
        self, group: StoreGroup, store: Store, stop_signals: StopSignals | None = None
    ) -> None:
        super().__init__(group, stop_signals)
        self._store, self._batches = store, 0
        self.writes_saes = self.is_rank_zero
        self.batch_rank, self.batch_parts = group.rank, group.world_size

    def check_supported(self, record: RunRecord) -> None:
        """Raise `ConfigError` for lanes that cannot be divided, and for BatchTopK."""
        lanes_of_rank(record.plan.lanes, self.batch_rank, self.batch_parts)
        require_no_batchtopk(record)

    def init_process_group(self, device: torch.device) -> None:
        """Initialise torch's process group with gloo, and NCCL on GPUs."""
        from saetrain.distributed.collectives import init_collectives

        init_collectives(self._store, self.batch_rank, self.batch_parts, device)

    def make_tracker(self, args: TrackerArgs, entries: Sequence[SaeEntry]) -> JsonlTracker:
        """Write metrics on rank 0 only: collectives have given every rank the same values."""
        del entries
        return JsonlTracker(*args) if self.is_rank_zero else NullTracker()

    def check_stop_request(self, done: int, waits: bool = False) -> None:
        """End a wait for rows: other ranks may have their rows, and wait in `next_batch`."""
        del done
        if waits and self.stop_is_requested():
            # The all-gather in `next_batch` decides on the signal.
            raise StopRequested(self.stop_signals.received or signal.SIGTERM)

    def next_batch(self, stream: ActivationStream) -> Batch | None:
        """Return this rank's part of the next batch, after an all-gather of the ranks' states."""
        from saetrain.distributed.collectives import all_gather_int

        batch, error = None, None
        try:
            batch = next(stream, None)
        except StopRequested:
            pass
        except Exception as read_error:
            error = read_error
        code = 0 if error is None else exit_code_of(error)
        if error is None and self.stop_is_requested():
            code = _SIGNAL + (self.stop_signals.received or 0)
        codes = all_gather_int(code, self._wait_for_batches())
        if error is not None:
            raise error
        for rank, code in enumerate(codes):
            if 0 < code < _SIGNAL:
                raise RemoteRankError(Failure(rank, code, "its rows cannot be read"))
        if any(codes):
            raise StopRequested(_signal_of([code - _SIGNAL for code in codes]))
        return batch

    def _wait_for_batches(self) -> Callable[[], None]:
        """Return what to do while others have no batch yet: pass on a signal, report the wait."""
        self._batches += 1
        notice, is_sent = self.group.notice(), False

        def whom() -> str:
            late = [
                r
                for r in range(self.batch_parts)
                if not self.group.has(f"waits/{self._batches}/{r}")
            ]
            return f"{ranks(late)}, whose rows are not there yet" if late else "the exchange"

        def poll() -> None:
            nonlocal is_sent
            self.group.check()
            self.stop_is_requested()
            if notice.seconds > FIRST_NOTICE / 2 and not is_sent:
                is_sent = True
                self.group.put(f"waits/{self._batches}/{self.batch_rank}", "")
            notice.update(whom)

        return poll


class ModuleParallelCoordinator(MultiProcessCoordinator):
    """SAEs dealt out to ranks, --parallel modules: every rank reads whole batches.

    Ranks wait only for checkpoints, and for a rank that lags too far behind. After a stop request
    each rank sends the first step that it can stop before, and all train up to the maximum. A rank
    that waits sends its step, too: the others would otherwise wait for it.

    Args:
        group: the processes of the run.
        stop_signals: receives SIGTERM and SIGINT.
    """

    can_checkpoint_alone = False  # the ranks are at different steps

    def __init__(self, group: StoreGroup, stop_signals: StopSignals | None = None) -> None:
        super().__init__(group, stop_signals)
        self._max_lead, self._limit = 1, -1
        self._next = 0  # the first step that this rank could stop before
        self._stop_step_sent = False
        self._stop_at: tuple[int, signal.Signals] | None = None
        self._waiting: WaitNotice | None = None

    def assigned_saes(self, entries: Sequence[SaeEntry]) -> list[int]:
        """Return this rank's share by cost; none, if there are more processes than SAEs."""
        costs = [
            # d_in of the cost: mean of an encoder's and a decoder's row
            SaeCost(e.hookpoint, (c.d_in + (c.d_out or c.d_in)) // 2, c.num_latents)
            for e, c in ((e, e.config) for e in entries)
        ]
        return partition(costs, self.group.world_size)[self.group.rank]

    def init_throttle(self, step: int, record: RunRecord, cache: Cache) -> None:
        """Derive the largest lead in steps from the bytes of a row, and publish the first step."""
        names = dict.fromkeys(name for entry in record.saes for name in entry.hookpoints)
        row_bytes = sum(cache.row_dtype.row_bytes(cache.manifest.width(name)) for name in names)
        self.start_throttle(step, max_lead_steps(record.plan.batch_size, row_bytes))

    def start_throttle(self, step: int, max_lead: int) -> None:
        """Publish the first step, and let no rank be more than `max_lead` steps ahead."""
        self._max_lead, self._next = max_lead, step
        self.group.put(f"at/{self.group.rank}", str(step))

    def make_tracker(self, args: TrackerArgs, entries: Sequence[SaeEntry]) -> JsonlTracker:
        """Gather the metrics of all ranks on rank 0."""
        if not self.is_rank_zero:
            return WorkerTracker(self.group)
        return GatheringTracker(args, self.group, [entry.name for entry in entries])

    def throttle(self, step: int) -> None:
        """Publish the step, and wait while the last rank is too far behind."""
        self.group.check()
        self._next = step
        if step % max(1, self._max_lead // 4) == 0:
            self.group.put(f"at/{self.group.rank}", str(step))
        if step > self._limit:
            self._wait_for_the_last(step)
        self._next = step + 1  # any later wait comes after this step

    def _wait_for_the_last(self, step: int) -> None:
        notice = self.group.notice()
        while True:
            at = [int(self.group.get(f"at/{rank}")) for rank in range(self.group.world_size)]
            last = min(at)
            self._limit = last + self._max_lead
            if step <= self._limit:
                return
            self.group.poll()
            notice.update(f"rank {at.index(last)}, which is at step {last:,}")

    def check_stop_request(self, done: int, waits: bool = False) -> None:
        """Gather, after a stop request, the step that each rank can stop before; take the last.

        Raises:
            RunError: this rank waits for the rows of a step before that one, and they do not come.
        """
        if not self.stop_is_requested():
            return
        self._send_stop_step(done)
        if self._stop_at is None:
            ranks = range(self.group.world_size)
            replies = [self.group.get(f"stop/{rank}").split() for rank in ranks]
            signals = [int(number) for _, number in replies]
            self._stop_at = max(int(step) for step, _ in replies), _signal_of(signals)
        if done >= self._stop_at[0]:
            raise StopRequested(self._stop_at[1])
        if not waits:
            self._waiting = None
        elif self._waiting is None:
            self._waiting = self.group.notice()
        if waits and self._waiting is not None and self._waiting.seconds > STOP_SECONDS:
            raise RunError(
                f"rank {self.group.rank} was stopped by a signal while it waited for rows",
                expected=f"the rows of step {done + 1:,}, to save step {self._stop_at[0]:,} with "
                "the other ranks",
                got=f"none within {STOP_SECONDS:.0f} s",
                remedy="see whether its disk answers; --resume continues from the newest "
                "checkpoint",
            )

    def finalize_checkpoint(
        self,
        root: Path,
        step: int,
        position: dict[str, int],
        parts: dict[int, SaeState],
        keep: RetentionPolicy = NEWEST,
        metrics: FileDigest | None = None,
    ) -> None:
        """Gather the states of all SAEs on rank 0, which finalizes; the others wait for that."""
        saved, committed = f"saved/{step}", f"committed/{step}"
        if not self.is_rank_zero:
            own = SavedParts(tuple(parts), tuple(parts.values()))
            self.group.put(f"{saved}/{self.group.rank}", to_json(own).decode())
            self.group.get(committed)
            return
        parts = dict(parts)
        for rank in range(1, self.group.world_size):
            obj: Any = decode_json(self.group.pop(f"{saved}/{rank}").encode())
            received = parse_dataclass(SavedParts, obj, f"the checkpoint of rank {rank}")
            states = zip(received.numbers, received.parts, obj["parts"], strict=True)
            for index, part, raw in states:
                # The raw numbers: parsing turns whole numbers into floats.
                parts[index] = dataclasses.replace(part, numbers=raw["numbers"])
        super().finalize_checkpoint(root, step, position, parts, keep, metrics)
        self.group.put(committed, "")

    def _while_waiting(self) -> None:
        if self.stop_is_requested():
            self._send_stop_step(self._next)

    def _send_stop_step(self, step: int) -> None:
        if not self._stop_step_sent:
            self._stop_step_sent = True
            received = self.stop_signals.received or 0
            self.group.put(f"stop/{self.group.rank}", f"{step} {received:d}")


def _signal_of(numbers: Sequence[int]) -> signal.Signals:
    """Return the first signal of those of all ranks (0 or less: none received); else SIGTERM."""
    return signal.Signals(next((n for n in numbers if n > 0), signal.SIGTERM))


@dataclass(frozen=True)
class SavedParts:
    """Message of a rank that has written its part of a checkpoint."""

    numbers: tuple[int, ...]
    """Indices of its SAEs."""
    parts: tuple[SaeState, ...]


@contextmanager
def init_coordinator(
    config: FitConfig, stop_signals: StopSignals, on_forced_exit: Callable[[BaseException], None]
) -> Iterator[Coordinator]:
    """Connect this process with those that torchrun started; all end the run together.

    Args:
        config: holds --parallel, the way in which several processes share the work.
        stop_signals: receives SIGTERM and SIGINT.
        on_forced_exit: called with the error before a main thread that hangs is ended.

    Raises:
        ConfigError: there are several processes, and no --parallel.
        RemoteRankError: another rank has failed, and reports it.
        RunStopped: a signal has stopped all ranks at the same step.
    """
    world = World.from_environment()
    stop_signals.repeat_window = REPEAT_WINDOW if "WORLD_SIZE" in os.environ else 0.0
    if world.world_size == 1:
        yield Coordinator(stop_signals, config.parallel)
        return
    with connect(world) as (group, store):
        group.on_forced_exit = on_forced_exit
        if world.rank == 0:
            require_parallel_mode(world.world_size, config)
        try:
            if config.parallel == "ddp":
                yield DdpCoordinator(group, store, stop_signals)
            else:
                yield ModuleParallelCoordinator(group, stop_signals)
        except RunStopped:
            stop_signals.ignore_further()
            raise


def reports_outcome(error: BaseException | None) -> bool:
    """Return whether this rank writes exit.json and prints the error.

    Args:
        error: the error that ended the run; None after success.
    """
    if error is None or isinstance(error, RunStopped):
        return os.environ.get("RANK", "0") == "0"
    return not isinstance(error, RemoteRankError)


def require_parallel_mode(processes: int, config: FitConfig) -> None:
    """Require --parallel for several processes; raises `ConfigError`."""
    if config.parallel is None and processes > 1:
        raise ConfigError(
            f"{processes} processes, and --parallel does not say what they share",
            expected="--parallel ddp (every process has all SAEs, and a part of each batch) or "
            "--parallel modules (each has some of the SAEs, and whole batches)",
            got="no --parallel",
            remedy="modules wherever the run has as many SAEs as processes: it needs no exchange; "
            "or start without torchrun",
        )
