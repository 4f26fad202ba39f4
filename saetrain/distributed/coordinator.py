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

from actcache.core.distributed import Ranks
from actcache.core.json_codec import decode_json, parse_dataclass, to_json
from actcache.errors import ConfigError
from actcache.stream.activation_stream import ActivationStream, Batch
from actcache.stream.order import lanes_of_rank
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeConfig
from saetrain.distributed.metric_gathering import Gatherer, Reporter, Silent
from saetrain.distributed.partition import Work, shares, steps_apart
from saetrain.distributed.process_group import Failure, PeerFailedError, Peers, meet
from saetrain.distributed.signals import ECHO, StopAsked, Stopped, Stopping
from saetrain.runs.checkpoint import NEWEST, Keep, SaeState, commit
from saetrain.runs.record import RunRecord, SaeEntry
from saetrain.tracking.jsonl import Tracker

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store


T = TypeVar("T")

_SIGNAL = 128  # what is added to a signal's number, as in exit codes, to tell it from errors'


class Crew:
    """A process alone: it does everything, and asks nobody.

    Args:
        stopping: hears signals.
    """

    rank, processes = 0, 1
    leads = True
    """Whether it decides what the run is, and writes down what there is one of."""
    saves = True
    """Whether it writes SAEs."""
    can_keep = True
    """Whether a run whose rows end in an error can be saved as far as it came."""
    shares_batches = False
    """Whether it has some rows of each batch only."""

    def __init__(self, stopping: Stopping | None = None) -> None:
        self.stopping = stopping or Stopping()

    def require(self, record: RunRecord) -> None:
        """Refuse a run that these processes cannot share; raises `ConfigError`."""

    def tell(self, value: object) -> None:
        """Tell the others what the leader has decided: a dataclass, of a kind that is told once."""

    def hear(self, kind: type[T]) -> T:
        """What the leader has decided."""
        raise AssertionError(f"who is alone decides {kind.__name__}")

    def wait(self) -> None:
        """Wait until all are here."""

    def begin(self, device: torch.device) -> None:
        """Make ready for what is to be exchanged while training."""

    def saes(self, entries: Sequence[SaeEntry]) -> list[int]:
        """Numbers of the SAEs that this process trains."""
        return list(range(len(entries)))

    def tracker(self, write: Callable[[], Tracker], entries: Sequence[SaeEntry]) -> Tracker:
        """What hears of this process's steps; `write` makes the one that writes them down."""
        del entries
        return write()

    def set_pace(self, step: int, batch_size: int, row_bytes: int) -> None:
        """Called before the first step.

        Args:
            step: steps done.
            batch_size: rows of a step.
            row_bytes: bytes of a row, of all hookpoints of the run.
        """

    def keep_pace(self, step: int) -> None:
        """Called before each step: some must wait for others. Raises if another has failed."""

    def look(self, done: int, waits: bool = False) -> None:
        """Raise `StopAsked` if the run stops after so many steps.

        Args:
            done: steps done.
            waits: whether rows are waited for, which may take hours; it is called now and then
                meanwhile. Else before the next step.
        """
        del done, waits
        if self.stopping.asked is not None:
            raise StopAsked(self.stopping.asked)

    def next_batch(self, stream: ActivationStream) -> Batch | None:
        """The next batch. If those of others cannot be read, theirs is the error.

        Raises:
            StopAsked: the run stops before it.
        """
        return next(stream, None)

    def commit(
        self,
        root: Path,
        step: int,
        place: dict[str, int],
        parts: dict[int, SaeState],
        keep: Keep = NEWEST,
    ) -> None:
        """Make a checkpoint count, of which these SAEs (by number) are written."""
        commit(root, step, place, [parts[number] for number in sorted(parts)], keep)


class _Several(Crew):
    """One process of several.

    Args:
        peers: the others.
        stopping: hears signals.
    """

    def __init__(self, peers: Peers, stopping: Stopping | None = None) -> None:
        super().__init__(stopping)
        self.stopping.tells = False  # they would all say the same
        self.peers = peers
        self.rank, self.processes = peers.rank, peers.world_size
        self.leads = peers.rank == 0
        self._waits, self._asked = 0, False

    def tell(self, value: object) -> None:
        self.peers.say(type(value).__name__, _text(value))

    def hear(self, kind: type[T]) -> T:
        said = self.peers.hear(kind.__name__)
        return parse_dataclass(kind, decode_json(said.encode()), "what the leader says")

    def wait(self) -> None:
        self._waits += 1
        self.peers.agree(f"wait {self._waits}", "here")

    def keep_pace(self, step: int) -> None:
        del step
        self.peers.check()

    def is_asked_to_stop(self) -> bool:
        """Whether any process is, as far as is known; if this one is, the others hear of it."""
        if self.stopping.asked is not None and not self._asked:
            self.peers.ask_to_stop()
            self._asked = True
        return self._asked or self.peers.asked_to_stop


class BatchCrew(_Several):
    """One of several that have all SAEs, and their lanes of each batch: --parallel ddp.

    They are at the same step always. Which one they stop before, they agree on with its batch.

    Args:
        peers: the others.
        store: for collectives.
        stopping: hears signals.
    """

    shares_batches = True

    def __init__(self, peers: Peers, store: Store, stopping: Stopping | None = None) -> None:
        super().__init__(peers, stopping)
        self._store = store
        self.saves = self.leads

    def require(self, record: RunRecord) -> None:
        """Refuse lanes that cannot be divided, and what looks at a batch as a whole."""
        lanes_of_rank(record.plan.lanes, self.rank, self.processes)
        for entry in record.saes:
            if entry.config.activation == "batchtopk":
                raise ConfigError(
                    "--activation batchtopk chooses among a whole batch, of which --parallel ddp "
                    "gives each process a part",
                    got=entry.name,
                    remedy="--parallel modules",
                )

    def begin(self, device: torch.device) -> None:
        """Begin collectives."""
        from saetrain.distributed.collectives import join_collectives

        join_collectives(self._store, self.rank, self.processes, device)

    def tracker(self, write: Callable[[], Tracker], entries: Sequence[SaeEntry]) -> Tracker:
        """All know what there is to tell: the leader tells it."""
        del entries
        return write() if self.leads else Silent()

    def look(self, done: int, waits: bool = False) -> None:
        """Wait for no rows any more: others may have theirs, and wait in `next_batch`."""
        del done
        if waits and self.is_asked_to_stop():
            raise StopAsked(self.stopping.asked or signal.SIGTERM)  # there all agree on which

    def next_batch(self, stream: ActivationStream) -> Batch | None:
        """This process's part of the next batch, once all have theirs."""
        from saetrain.distributed.collectives import said_by_all

        batch, error = None, None
        try:
            batch = next(stream, None)
        except StopAsked:
            pass
        except Exception as problem:
            error = problem
        word = 0 if error is None else getattr(error, "exit_code", 1)
        if error is None and self.is_asked_to_stop():
            word = _SIGNAL + (self.stopping.asked or 0)
        words = said_by_all(word)
        if error is not None:
            raise error
        for rank, code in enumerate(words):
            if 0 < code < _SIGNAL:
                raise PeerFailedError(Failure(rank, code, "its rows cannot be read"))
        if any(words):
            raise StopAsked(_signal_of([code - _SIGNAL for code in words]))
        return batch


class SaeCrew(_Several):
    """One of several that have some SAEs, and whole batches: --parallel modules.

    Nobody waits for anybody but for a checkpoint, or because it is too far ahead. Asked to stop,
    each says a step that it can stop before, and all go on to the last of these: who waits for
    another one says it, too, or that one would wait for it.

    Args:
        peers: the others.
        stopping: hears signals.
    """

    can_keep = False  # they are at different steps

    def __init__(self, peers: Peers, stopping: Stopping | None = None) -> None:
        super().__init__(peers, stopping)
        self._apart, self._limit = 1, -1
        self._next = 0  # the next step that this process could stop before
        self._answered = False
        self._end: tuple[int, signal.Signals] | None = None
        peers.while_waiting = self._answer_if_asked

    def saes(self, entries: Sequence[SaeEntry]) -> list[int]:
        """Its share of them, by what they cost; none, if there are more processes than SAEs."""
        works = [Work(e.hookpoint, _width(e.config), e.config.num_latents) for e in entries]
        return shares(works, self.processes)[self.rank]

    def set_pace(self, step: int, batch_size: int, row_bytes: int) -> None:
        """Say where it begins."""
        self._apart, self._next = steps_apart(batch_size, row_bytes), step
        self.peers.say(f"at/{self.rank}", str(step))

    def tracker(self, write: Callable[[], Tracker], entries: Sequence[SaeEntry]) -> Tracker:
        """The leader puts together what all tell."""
        names = [entry.name for entry in entries]
        return Gatherer(write(), self.peers, names) if self.leads else Reporter(self.peers)

    def keep_pace(self, step: int) -> None:
        """Wait while the last process is too far behind."""
        self.peers.check()
        self._next = step
        if step % max(1, self._apart // 4) == 0:
            self.peers.say(f"at/{self.rank}", str(step))
        while step > self._limit:
            at = [int(self.peers.hear(f"at/{rank}")) for rank in range(self.processes)]
            self._limit = min(at) + self._apart
            if step > self._limit:
                self.peers.pause()
        self._next = step + 1  # from here on, whoever waits has done this one

    def look(self, done: int, waits: bool = False) -> None:
        """Once any is asked to stop, say where, and hear where all can."""
        del waits
        if not self.is_asked_to_stop():
            return
        self._answer(done)
        if self._end is None:
            said = [self.peers.hear(f"stop/{rank}").split() for rank in range(self.processes)]
            signals = [int(number) for _, number in said]
            self._end = max(int(step) for step, _ in said), _signal_of(signals)
        if done >= self._end[0]:
            raise StopAsked(self._end[1])

    def commit(
        self,
        root: Path,
        step: int,
        place: dict[str, int],
        parts: dict[int, SaeState],
        keep: Keep = NEWEST,
    ) -> None:
        """Make it count once every process has written its SAEs; all wait for that."""
        saved, committed = f"saved/{step}", f"committed/{step}"
        if not self.leads:
            ours = _Saved(tuple(parts), tuple(parts.values()))
            self.peers.say(f"{saved}/{self.rank}", _text(ours))
            self.peers.hear(committed)
            return
        parts = dict(parts)
        for rank in range(1, self.processes):
            obj: Any = decode_json(self.peers.take(f"{saved}/{rank}").encode())
            theirs = parse_dataclass(_Saved, obj, f"the checkpoint of rank {rank}")
            for number, part, raw in zip(theirs.numbers, theirs.parts, obj["parts"], strict=True):
                # As they were told: parsing makes a float of every whole number.
                parts[number] = dataclasses.replace(part, numbers=raw["numbers"])
        super().commit(root, step, place, parts, keep)
        self.peers.say(committed, "")

    def _answer_if_asked(self) -> None:
        if self.is_asked_to_stop():
            self._answer(self._next)

    def _answer(self, step: int) -> None:
        if not self._answered:
            self._answered = True
            self.peers.say(f"stop/{self.rank}", f"{step} {self.stopping.asked or 0:d}")


def _width(config: SaeConfig) -> int:
    """Of an encoder's and a decoder's row, the mean."""
    return (config.d_in + (config.d_out or config.d_in)) // 2


def _text(value: object) -> str:
    return to_json(value).decode()


def _signal_of(numbers: Sequence[int]) -> signal.Signals:
    """Which signal a run stops by, given that of each process; 0 or less: none of its own."""
    return signal.Signals(next((n for n in numbers if n > 0), signal.SIGTERM))


@dataclass(frozen=True)
class Decided:
    """What the leader tells before all else."""

    begun: bool
    """Whether the run was begun before."""
    record: RunRecord
    """What it is."""


@dataclass(frozen=True)
class _Saved:
    """What a process has written of a checkpoint."""

    numbers: tuple[int, ...]
    parts: tuple[SaeState, ...]


@contextmanager
def assemble(
    config: FitConfig, stopping: Stopping, last_words: Callable[[BaseException], None]
) -> Iterator[Crew]:
    """This process among those that torchrun started, which begin and end together.

    Args:
        config: says what they share.
        stopping: hears signals.
        last_words: told why, if this process has to be ended although it hangs.

    Raises:
        ConfigError: there are several, and the options do not say what they share.
        PeerFailedError: another one has failed, and tells it.
        Stopped: signals asked for it; all have stopped at the same step.
    """
    ranks = Ranks.from_environment()
    stopping.echo = ECHO if "WORLD_SIZE" in os.environ else 0.0
    if ranks.world_size == 1:
        yield Crew(stopping)
        return
    with meet(ranks) as (peers, store):
        peers.last_words = last_words
        if ranks.rank == 0:
            require_choice(ranks.world_size, config)
        try:
            by_batches = config.parallel == "ddp"
            yield BatchCrew(peers, store, stopping) if by_batches else SaeCrew(peers, stopping)
        except Stopped:
            stopping.ignore()
            raise


def tells(error: BaseException | None) -> bool:
    """Whether it is this process, of those that torchrun started, to say how the run ended.

    Args:
        error: with which; None: it came to its end.
    """
    if error is None or isinstance(error, Stopped):
        return os.environ.get("RANK", "0") == "0"
    return not isinstance(error, PeerFailedError)


def require_choice(processes: int, config: FitConfig) -> None:
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
