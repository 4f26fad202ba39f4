"""What a run asks of its processes: one alone, several that share each batch, or share the SAEs."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from actcache.core.distributed import World
from actcache.core.json_codec import decode_json, parse_dataclass, to_json
from actcache.errors import ConfigError
from actcache.stream.activation_stream import ActivationStream, Batch
from actcache.stream.order import lanes_of_rank
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeConfig
from saetrain.distributed.metric_gathering import GatheringTracker, NullTracker, WorkerTracker
from saetrain.distributed.partition import SaeCost, max_lead_steps, partition
from saetrain.distributed.process_group import Failure, RemoteRankError, StoreGroup, connect
from saetrain.distributed.signals import REPEAT_WINDOW, RunStopped, StopRequested, StopSignals
from saetrain.runs.checkpoint import NEWEST, RetentionPolicy, SaeState, finalize_checkpoint
from saetrain.runs.record import RunRecord, SaeEntry
from saetrain.tracking.jsonl import JsonlTracker

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store


T = TypeVar("T")

_SIGNAL = 128  # what is added to a signal's number, as in exit codes, to tell it from errors'


class Coordinator:
    """A process alone: it does everything, and asks nobody.

    Args:
        stop_signals: hears signals.
    """

    rank, world_size = 0, 1
    is_rank_zero = True
    """Whether it decides what the run is, and writes down what there is one of."""
    writes_saes = True
    """Whether it writes SAEs."""
    can_checkpoint_alone = True
    """Whether a run whose rows end in an error can be saved as far as it came."""
    is_data_parallel = False
    """Whether it has some rows of each batch only."""

    def __init__(self, stop_signals: StopSignals | None = None) -> None:
        self.stop_signals = stop_signals or StopSignals()

    def check_supported(self, record: RunRecord) -> None:
        """Refuse a run that these processes cannot share; raises `ConfigError`."""

    def broadcast(self, value: object) -> None:
        """Tell the others what the leader has decided: a dataclass, of a kind that is told once."""

    def receive(self, kind: type[T]) -> T:
        """What the leader has decided."""
        raise AssertionError(f"who is alone decides {kind.__name__}")

    def barrier(self) -> None:
        """Wait until all are here."""

    def init_process_group(self, device: torch.device) -> None:
        """Make ready for what is to be exchanged while training."""

    def assigned_saes(self, entries: Sequence[SaeEntry]) -> list[int]:
        """Numbers of the SAEs that this process trains."""
        return list(range(len(entries)))

    def make_tracker(
        self, write: Callable[[], JsonlTracker], entries: Sequence[SaeEntry]
    ) -> JsonlTracker:
        """What hears of this process's steps; `write` makes the one that writes them down."""
        del entries
        return write()

    def init_throttle(self, step: int, batch_size: int, row_bytes: int) -> None:
        """Called before the first step.

        Args:
            step: steps done.
            batch_size: rows of a step.
            row_bytes: bytes of a row, of all hookpoints of the run.
        """

    def throttle(self, step: int) -> None:
        """Called before each step: some must wait for others. Raises if another has failed."""

    def check_stop_request(self, done: int, waits: bool = False) -> None:
        """Raise `StopRequested` if the run stops after so many steps.

        Args:
            done: steps done.
            waits: whether rows are waited for, which may take hours; it is called now and then
                meanwhile. Else before the next step.
        """
        del done, waits
        if self.stop_signals.received is not None:
            raise StopRequested(self.stop_signals.received)

    def next_batch(self, stream: ActivationStream) -> Batch | None:
        """The next batch. If those of others cannot be read, theirs is the error.

        Raises:
            StopAsked: the run stops before it.
        """
        return next(stream, None)

    def finalize_checkpoint(
        self,
        root: Path,
        step: int,
        place: dict[str, int],
        parts: dict[int, SaeState],
        keep: RetentionPolicy = NEWEST,
    ) -> None:
        """Make a checkpoint count, of which these SAEs (by number) are written."""
        finalize_checkpoint(root, step, place, [parts[number] for number in sorted(parts)], keep)


class MultiProcessCoordinator(Coordinator):
    """One process of several.

    Args:
        store_group: the others.
        stop_signals: hears signals.
    """

    def __init__(self, store_group: StoreGroup, stop_signals: StopSignals | None = None) -> None:
        super().__init__(stop_signals)
        self.stop_signals.announces = False  # they would all say the same
        self.store_group = store_group
        self.rank, self.world_size = store_group.rank, store_group.world_size
        self.is_rank_zero = store_group.rank == 0
        self._waits, self._asked = 0, False

    def broadcast(self, value: object) -> None:
        """Put the dataclass into the store, as JSON, under its class name."""
        self.store_group.put(type(value).__name__, _text(value))

    def receive(self, kind: type[T]) -> T:
        """Parse the dataclass that rank 0 put into the store."""
        said = self.store_group.get(kind.__name__)
        return parse_dataclass(kind, decode_json(said.encode()), "what the leader says")

    def barrier(self) -> None:
        """Wait until every rank has reached the same barrier."""
        self._waits += 1
        self.store_group.check_equal(f"wait {self._waits}", "here")

    def throttle(self, step: int) -> None:
        """Raise if another rank has failed."""
        del step
        self.store_group.check()

    def stop_is_requested(self) -> bool:
        """Whether any process is, as far as is known; if this one is, the others hear of it."""
        if self.stop_signals.received is not None and not self._asked:
            self.store_group.request_stop()
            self._asked = True
        return self._asked or self.store_group.stop_requested


class DdpCoordinator(MultiProcessCoordinator):
    """One of several that have all SAEs, and their lanes of each batch: --parallel ddp.

    They are at the same step always. Which one they stop before, they agree on with its batch.

    Args:
        store_group: the others.
        store: for collectives.
        stop_signals: hears signals.
    """

    is_data_parallel = True

    def __init__(
        self, store_group: StoreGroup, store: Store, stop_signals: StopSignals | None = None
    ) -> None:
        super().__init__(store_group, stop_signals)
        self._store = store
        self.writes_saes = self.is_rank_zero

    def check_supported(self, record: RunRecord) -> None:
        """Refuse lanes that cannot be divided, and what looks at a batch as a whole."""
        lanes_of_rank(record.plan.lanes, self.rank, self.world_size)
        for entry in record.saes:
            if entry.config.activation == "batchtopk":
                raise ConfigError(
                    "--activation batchtopk chooses among a whole batch, of which --parallel ddp "
                    "gives each process a part",
                    got=entry.name,
                    remedy="--parallel modules",
                )

    def init_process_group(self, device: torch.device) -> None:
        """Begin collectives."""
        from saetrain.distributed.collectives import init_collectives

        init_collectives(self._store, self.rank, self.world_size, device)

    def make_tracker(
        self, write: Callable[[], JsonlTracker], entries: Sequence[SaeEntry]
    ) -> JsonlTracker:
        """All know what there is to tell: the leader tells it."""
        del entries
        return write() if self.is_rank_zero else NullTracker()

    def check_stop_request(self, done: int, waits: bool = False) -> None:
        """Wait for no rows any more: others may have theirs, and wait in `next_batch`."""
        del done
        if waits and self.stop_is_requested():
            raise StopRequested(
                self.stop_signals.received or signal.SIGTERM
            )  # there all agree on which

    def next_batch(self, stream: ActivationStream) -> Batch | None:
        """This process's part of the next batch, once all have theirs."""
        from saetrain.distributed.collectives import all_gather_int

        batch, error = None, None
        try:
            batch = next(stream, None)
        except StopRequested:
            pass
        except Exception as problem:
            error = problem
        word = 0 if error is None else getattr(error, "exit_code", 1)
        if error is None and self.stop_is_requested():
            word = _SIGNAL + (self.stop_signals.received or 0)
        words = all_gather_int(word)
        if error is not None:
            raise error
        for rank, code in enumerate(words):
            if 0 < code < _SIGNAL:
                raise RemoteRankError(Failure(rank, code, "its rows cannot be read"))
        if any(words):
            raise StopRequested(_signal_of([code - _SIGNAL for code in words]))
        return batch


class ModuleParallelCoordinator(MultiProcessCoordinator):
    """One of several that have some SAEs, and whole batches: --parallel modules.

    Nobody waits for anybody but for a checkpoint, or because it is too far ahead. Asked to stop,
    each says a step that it can stop before, and all go on to the last of these: who waits for
    another one says it, too, or that one would wait for it.

    Args:
        store_group: the others.
        stop_signals: hears signals.
    """

    can_checkpoint_alone = False  # they are at different steps

    def __init__(self, store_group: StoreGroup, stop_signals: StopSignals | None = None) -> None:
        super().__init__(store_group, stop_signals)
        self._max_lead, self._limit = 1, -1
        self._next = 0  # the next step that this process could stop before
        self._answered = False
        self._stop_at: tuple[int, signal.Signals] | None = None
        store_group.while_waiting = self._reply_if_stopping

    def assigned_saes(self, entries: Sequence[SaeEntry]) -> list[int]:
        """Its share of them, by what they cost; none, if there are more processes than SAEs."""
        works = [SaeCost(e.hookpoint, _width(e.config), e.config.num_latents) for e in entries]
        return partition(works, self.world_size)[self.rank]

    def init_throttle(self, step: int, batch_size: int, row_bytes: int) -> None:
        """Say where it begins."""
        self._max_lead, self._next = max_lead_steps(batch_size, row_bytes), step
        self.store_group.put(f"at/{self.rank}", str(step))

    def make_tracker(
        self, write: Callable[[], JsonlTracker], entries: Sequence[SaeEntry]
    ) -> JsonlTracker:
        """The leader puts together what all tell."""
        names = [entry.name for entry in entries]
        return (
            GatheringTracker(write(), self.store_group, names)
            if self.is_rank_zero
            else WorkerTracker(self.store_group)
        )

    def throttle(self, step: int) -> None:
        """Wait while the last process is too far behind."""
        self.store_group.check()
        self._next = step
        if step % max(1, self._max_lead // 4) == 0:
            self.store_group.put(f"at/{self.rank}", str(step))
        while step > self._limit:
            at = [int(self.store_group.get(f"at/{rank}")) for rank in range(self.world_size)]
            self._limit = min(at) + self._max_lead
            if step > self._limit:
                self.store_group.poll()
        self._next = step + 1  # from here on, whoever waits has done this one

    def check_stop_request(self, done: int, waits: bool = False) -> None:
        """Once any is asked to stop, say where, and hear where all can."""
        del waits
        if not self.stop_is_requested():
            return
        self._reply(done)
        if self._stop_at is None:
            said = [self.store_group.get(f"stop/{rank}").split() for rank in range(self.world_size)]
            signals = [int(number) for _, number in said]
            self._stop_at = max(int(step) for step, _ in said), _signal_of(signals)
        if done >= self._stop_at[0]:
            raise StopRequested(self._stop_at[1])

    def finalize_checkpoint(
        self,
        root: Path,
        step: int,
        place: dict[str, int],
        parts: dict[int, SaeState],
        keep: RetentionPolicy = NEWEST,
    ) -> None:
        """Make it count once every process has written its SAEs; all wait for that."""
        saved, committed = f"saved/{step}", f"committed/{step}"
        if not self.is_rank_zero:
            ours = SavedParts(tuple(parts), tuple(parts.values()))
            self.store_group.put(f"{saved}/{self.rank}", _text(ours))
            self.store_group.get(committed)
            return
        parts = dict(parts)
        for rank in range(1, self.world_size):
            obj: Any = decode_json(self.store_group.pop(f"{saved}/{rank}").encode())
            theirs = parse_dataclass(SavedParts, obj, f"the checkpoint of rank {rank}")
            for number, part, raw in zip(theirs.numbers, theirs.parts, obj["parts"], strict=True):
                # As they were told: parsing makes a float of every whole number.
                parts[number] = dataclasses.replace(part, numbers=raw["numbers"])
        super().finalize_checkpoint(root, step, place, parts, keep)
        self.store_group.put(committed, "")

    def _reply_if_stopping(self) -> None:
        if self.stop_is_requested():
            self._reply(self._next)

    def _reply(self, step: int) -> None:
        if not self._answered:
            self._answered = True
            self.store_group.put(f"stop/{self.rank}", f"{step} {self.stop_signals.received or 0:d}")


def _width(config: SaeConfig) -> int:
    """Of an encoder's and a decoder's row, the mean."""
    return (config.d_in + (config.d_out or config.d_in)) // 2


def _text(value: object) -> str:
    return to_json(value).decode()


def _signal_of(numbers: Sequence[int]) -> signal.Signals:
    """Which signal a run stops by, given that of each process; 0 or less: none of its own."""
    return signal.Signals(next((n for n in numbers if n > 0), signal.SIGTERM))


@dataclass(frozen=True)
class RunBroadcast:
    """What the leader tells before all else."""

    begun: bool
    """Whether the run was begun before."""
    record: RunRecord
    """What it is."""


@dataclass(frozen=True)
class SavedParts:
    """What a process has written of a checkpoint."""

    numbers: tuple[int, ...]
    parts: tuple[SaeState, ...]


@contextmanager
def init_coordinator(
    config: FitConfig, stop_signals: StopSignals, last_words: Callable[[BaseException], None]
) -> Iterator[Coordinator]:
    """This process among those that torchrun started, which begin and end together.

    Args:
        config: says what they share.
        stop_signals: hears signals.
        last_words: told why, if this process has to be ended although it hangs.

    Raises:
        ConfigError: there are several, and the options do not say what they share.
        PeerFailedError: another one has failed, and tells it.
        Stopped: signals asked for it; all have stopped at the same step.
    """
    ranks = World.from_environment()
    stop_signals.repeat_window = REPEAT_WINDOW if "WORLD_SIZE" in os.environ else 0.0
    if ranks.world_size == 1:
        yield Coordinator(stop_signals)
        return
    with connect(ranks) as (store_group, store):
        store_group.on_forced_exit = last_words
        if ranks.rank == 0:
            require_parallel_mode(ranks.world_size, config)
        try:
            by_batches = config.parallel == "ddp"
            yield (
                DdpCoordinator(store_group, store, stop_signals)
                if by_batches
                else ModuleParallelCoordinator(store_group, stop_signals)
            )
        except RunStopped:
            stop_signals.ignore_further()
            raise


def reports_outcome(error: BaseException | None) -> bool:
    """Whether it is this process, of those that torchrun started, to say how the run ended.

    Args:
        error: with which; None: it came to its end.
    """
    if error is None or isinstance(error, RunStopped):
        return os.environ.get("RANK", "0") == "0"
    return not isinstance(error, RemoteRankError)


def require_parallel_mode(processes: int, config: FitConfig) -> None:
    """Refuse several processes that do not know what to share; raises `ConfigError`."""
    if config.parallel is None and processes > 1:
        raise ConfigError(
            f"{processes} processes, and nothing says what they share",
            expected="--parallel ddp (every process has all SAEs, and a part of each batch) or "
            "--parallel modules (each has some of the SAEs, and whole batches)",
            got="no --parallel",
            remedy="modules wherever the run has as many SAEs as processes: it needs no exchange; "
            "or start without torchrun",
        )
