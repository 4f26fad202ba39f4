"""--cuda-graphs: a whole step of all SAEs recorded once, and replayed.

A step launches some hundred kernels for each SAE. Where these are short, the device waits for the
host, which can launch one every few microseconds. Recorded as a CUDA graph, all of them are one
launch.

What is replayed are the same kernels with the same arguments on the same memory. So whatever
changes from step to step must lie in memory that stays: rows, weights, state, sums, and the numbers
that the host computes for each step, which are few (`_StepScalars`). They are written there before
each replay, as arguments of launches: nothing waits, and there is no memory of the host that it
could overwrite too soon. What else the host decides, such as k, must have settled before; once
latents may be dead, and AuxK begins, another step is recorded. What the host counts, it counts for
each replay.

All steps of such a run, recorded or not, read their numbers there, so that when a step was recorded
touches no result: neither where a run was interrupted nor how long it warmed up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from actcache.errors import ConfigError, RunError
from saetrain.model.hookpoint_io import rows_of
from saetrain.optim.fused import FusedOptimizer
from saetrain.training.sae_trainer import SaeTrainer
from saetrain.training.step import refresh_bf16_copies, train_batch, train_on_rows

if TYPE_CHECKING:
    from actcache.stream.activation_stream import Batch


Groups = dict[str, list[SaeTrainer]]

WARM_UP = 3
"""Steps like the recorded one before it: what is compiled, loaded or allocated once, is so then."""
_WIDTH = 8
"""Numbers that an optimiser has room for. A multiple of 16 bytes, so that what Triton compiles for
one SAE, which hangs on how a pointer is aligned, serves all."""


class GraphedSteps:
    """Makes the steps of all SAEs of a process: some as they are, then replays of one.

    Args:
        groups: the SAEs, by hookpoint, all on one device.
        recorder: None: that of CUDA.
        warm_up: steps like the recorded one before it, at least one.
    """

    def __init__(
        self, groups: Groups, recorder: GraphRecorder | None = None, warm_up: int = WARM_UP
    ) -> None:
        self._groups, self._warm_up = groups, warm_up
        self._trainees = [trainer for group in groups.values() for trainer in group]
        device = self._trainees[0].sae.W_enc.device
        self._recorder = CudaGraphs(device) if recorder is None else recorder
        self._numbers = _StepScalars(self._trainees, device)
        self._settled_at = max(trainer.schedules_end for trainer in self._trainees)
        self._rows: dict[str, Tensor] = {}
        """Of the batch, where recorded work reads them, by group. Each [N, D]"""
        self._learning: tuple[bool, ...] = ()
        """Which SAEs had dead latents to learn from in the last step, as far as the host knows."""
        self._warmed = 0
        self._replay: Thunk | None = None

    def make(self, batch: Batch, step: int) -> None:
        """Make step `step` (from 0) of all SAEs.

        Raises:
            RunError: it cannot be recorded.
        """
        self._numbers.write(step)
        if not self._take(batch):
            train_batch(self._groups, batch, step)
            return
        learning = tuple(self._learns(trainer, step) for trainer in self._trainees)
        if learning != self._learning:  # another step from now on
            self._learning, self._warmed, self._replay = learning, 0, None
        if self._replay is not None:
            self._make_again()
        elif self._warmed < self._warm_up:
            self._recorder.run(lambda: self._make_all(step))
            # In the step of that number k may be another than before, which is learnt from.
            self._warmed += step > self._settled_at
        else:
            self._replay = self._record(step)  # the host has counted it
            self._replay()

    def _take(self, batch: Batch) -> bool:
        """Copy a batch to where recorded work reads it, unless it has other sizes."""
        for name, group in self._groups.items():
            rows = rows_of(group[0].entry, batch.activations)
            if name not in self._rows:
                self._rows[name] = torch.empty_like(rows, device=group[0].sae.W_enc.device)
            kept = self._rows[name]
            if (kept.shape, kept.dtype) != (rows.shape, rows.dtype):
                return False
            kept.copy_(rows, non_blocking=True)
        return True

    def _learns(self, trainer: SaeTrainer, step: int) -> bool:
        rows = len(self._rows[trainer.entry.hookpoint])
        return trainer.uses_auxk(step, rows, trainer.entry.options.auxk_alpha)

    def _make_all(self, step: int) -> None:
        for name, group in self._groups.items():
            train_on_rows(group, self._rows[name], step)

    def _record(self, step: int) -> Thunk:
        try:
            return self._recorder.record(lambda: self._make_all(step))
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RunError(
                f"step {step} cannot be recorded as a CUDA graph",
                got=str(error).partition("\n")[0],
                remedy="go on from the last checkpoint with --resume --force-config and without "
                "--cuda-graphs",
            ) from error

    def _make_again(self) -> None:
        assert self._replay is not None
        for trainer in self._trainees:
            # Whoever wrote to a weight between steps did not write to its copy.
            refresh_bf16_copies(trainer.sae, trainer.settings)
            trainer.count_replayed_step(len(self._rows[trainer.entry.hookpoint]))
        self._replay()


class _StepScalars:
    """What changes from step to step and is known to the host, where the device reads it.

    Args:
        trainers: whose steps read it from now on.
        device: where they are.
    """

    def __init__(self, trainers: Sequence[SaeTrainer], device: torch.device) -> None:
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._all = torch.zeros(len(trainers), _WIDTH, device=device)
        self._optimizers: list[FusedOptimizer] = []
        for trainer, row in zip(trainers, self._all, strict=True):
            assert isinstance(trainer.optimizer, FusedOptimizer)
            assert trainer.settings.grad_acc_steps == 1
            assert trainer.ddp is None
            trainer.device_step = self._step
            trainer.optimizer.bind_step_scalars(row)
            self._optimizers.append(trainer.optimizer)

    @torch.no_grad()
    def write(self, step: int) -> None:
        """Count step `step` (from 0) of every optimiser, and write its numbers."""
        places: list[Tensor] = []
        values: list[float] = []
        for optimizer, row in zip(self._optimizers, self._all, strict=True):
            counted = optimizer.advance(step)
            places += row.unbind()[: len(counted)]
            values += counted
        self._step.fill_(step)
        self._all.zero_()
        torch._foreach_add_(places, values)  # one launch, which takes the values along


def with_cuda_graphs(groups: Groups) -> Callable[[Groups, Batch, int], None]:
    """`saetrain.training.step.train_batch` of these SAEs, recorded."""
    if not groups:  # a process beyond the SAEs
        return train_batch
    steps = GraphedSteps(groups)

    def make_step(same: Groups, batch: Batch, step: int) -> None:
        assert same is groups
        steps.make(batch, step)

    return make_step


Thunk = Callable[[], None]


class GraphRecorder(Protocol):
    """What records; `CudaGraphs`, or a test's."""

    def run(self, work: Thunk) -> None:
        """Do some work now, as it is done before it can be recorded."""

    def record(self, work: Thunk) -> Thunk:
        """Record some work, which the device does not do yet; what is returned does it."""


class CudaGraphs:
    """Records work on a CUDA device, on a stream of its own, where it is also warmed up.

    After "whole network capture" in torch's notes on CUDA semantics.

    Args:
        device: whose work it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, work: Thunk) -> None:
        """Do some work now, after what is under way, and before what follows."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            work()
        here.wait_stream(self._stream)

    def record(self, work: Thunk) -> Thunk:
        """Record some work. Waits for the device, this once."""
        graph = torch.cuda.CUDAGraph()
        # Other threads read rows and allocate pinned memory meanwhile, which is no part of it.
        mode = "thread_local"
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode=mode),
        ):
            work()

        def replay() -> None:
            with torch.cuda.device(self._device):  # which need not be the current one
                graph.replay()

        return replay


def require_cuda_graphs(device: torch.device) -> None:
    """Raise `ConfigError` where there is no CUDA to record its graphs."""
    if device.type != "cuda" or torch.version.cuda is None:
        raise ConfigError(
            "--cuda-graphs needs a CUDA device",
            expected="cuda",
            got=str(device),
            remedy="leave it out",
        )
