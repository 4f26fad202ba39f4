"""CUDA graphs (--cuda-graphs): a step of all SAEs is recorded once and replayed.

A step launches about a hundred kernels for each SAE. If they are short, the device waits for the
host, which can launch one every few microseconds. A CUDA graph launches all of them at once.

A replay runs the same kernels with the same arguments on the same memory. So everything that
changes between steps lies in fixed device memory: rows, weights, state, sums, and the few scalars
that the host computes for each step (`_StepScalars`). The host passes these scalars as kernel
arguments before each replay, without synchronisation and without a host buffer that it could
overwrite too soon. Values that are baked into the graph, such as k, must be constant by then. Once
latents may be dead and AuxK begins, the step is recorded again, and so is it when none has been for
some time. The host advances its own counters for each replay.

All steps of such a run, recorded or not, read the scalars from device memory. So the results do not
depend on when a step was recorded: neither on interruptions nor on the number of warm-up steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from actcache.errors import ConfigError, RunError
from saetrain.model.sae import rows_of
from saetrain.optim.fused import FusedOptimizer
from saetrain.training.sae_trainer import SaeTrainer
from saetrain.training.step import refresh_bf16_copies, train_batch, train_on_rows

if TYPE_CHECKING:
    from actcache.stream.activation_stream import Batch


Groups = dict[str, list[SaeTrainer]]

WARM_UP = 3
"""Steps run before the same step is recorded, so that compilation and allocation are over."""
_HOLD = 256
"""Steps for which AuxK stays in the recorded step after the last that may have had dead latents:
recording takes the time of a few steps."""
_WIDTH = 8
"""Scalars per optimiser. A multiple of 16 bytes: Triton specialises kernels on the alignment of
pointers, and so one compiled kernel serves all SAEs."""


class GraphedSteps:
    """Steps of all SAEs of a process: warm-up steps first, then replays of a recorded one.

    Args:
        groups: the SAEs, by hookpoint, all on one device.
        recorder: records and replays; None: `CudaGraphs`.
        warm_up: steps before a recording, at least one.
    """

    def __init__(
        self, groups: Groups, recorder: GraphRecorder | None = None, warm_up: int = WARM_UP
    ) -> None:
        self._groups, self._warm_up = groups, warm_up
        self._trainers = [trainer for group in groups.values() for trainer in group]
        device = self._trainers[0].sae.W_enc.device
        self._recorder = CudaGraphs(device) if recorder is None else recorder
        self._scalars = _StepScalars(self._trainers, device)
        self._schedules_end = max(trainer.schedules_end for trainer in self._trainers)
        self._rows: dict[str, Tensor] = {}
        """Fixed device memory of each group's rows, read by the recorded step. Each [N, D]"""
        self._use_auxk: tuple[bool, ...] = ()
        """For each SAE, whether the last step included AuxK."""
        self._warmed = 0
        self._replay: Thunk | None = None

    def make(self, batch: Batch, step: int) -> None:
        """Run step `step` (from 0) of all SAEs.

        Raises:
            RunError: the step cannot be recorded.
        """
        self._scalars.write(step)
        for trainer in self._trainers:
            rows = len(batch.activations[trainer.entry.hookpoints[0]])
            trainer.advance_dead_bound(rows, hold=_HOLD)
        if not self._copy_rows(batch):
            train_batch(self._groups, batch, step)
            return
        use_auxk = tuple(
            t.uses_auxk(step, len(self._rows[t.entry.hookpoint])) for t in self._trainers
        )
        if use_auxk != self._use_auxk:  # the recorded step differs from now on
            self._use_auxk, self._warmed, self._replay = use_auxk, 0, None
        if self._replay is not None:
            self._replay_step()
        elif self._warmed < self._warm_up:
            self._recorder.run(lambda: self._train_all(step))
            # k may still change in the step numbered schedules_end itself.
            self._warmed += step > self._schedules_end
        else:
            self._replay = self._record(step)  # recording advanced the host's counters
            self._replay()

    def _copy_rows(self, batch: Batch) -> bool:
        """Copy a batch into the fixed memory; return False if its sizes or dtypes differ."""
        for name, group in self._groups.items():
            rows = rows_of(group[0].entry, batch.activations)
            if name not in self._rows:
                self._rows[name] = torch.empty_like(rows, device=group[0].sae.W_enc.device)
            fixed = self._rows[name]
            if (fixed.shape, fixed.dtype) != (rows.shape, rows.dtype):
                return False
            fixed.copy_(rows, non_blocking=True)
        return True

    def _train_all(self, step: int) -> None:
        for name, group in self._groups.items():
            train_on_rows(group, self._rows[name], step)

    def _record(self, step: int) -> Thunk:
        try:
            return self._recorder.record(lambda: self._train_all(step))
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RunError(
                f"step {step} cannot be recorded as a CUDA graph",
                got=str(error).partition("\n")[0],
                remedy="resume from the last checkpoint with --resume --force-config and without "
                "--cuda-graphs",
            ) from error

    def _replay_step(self) -> None:
        assert self._replay is not None
        for trainer in self._trainers:
            # A write to a weight between steps leaves its bfloat16 copy outdated.
            refresh_bf16_copies(trainer.sae, trainer.settings)
            trainer.count_replayed_step(len(self._rows[trainer.entry.hookpoint]))
        self._replay()


class _StepScalars:
    """Scalars that the host computes for each step, in fixed device memory.

    Args:
        trainers: SAEs whose optimisers are bound to this memory.
        device: their device.
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
        """Advance every optimiser to step `step` (from 0), and write its scalars."""
        targets: list[Tensor] = []
        values: list[float] = []
        for optimizer, row in zip(self._optimizers, self._all, strict=True):
            scalars = optimizer.advance(step)
            targets += row.unbind()[: len(scalars)]
            values += scalars
        self._step.fill_(step)
        self._all.zero_()
        torch._foreach_add_(targets, values)  # one launch, with the values as arguments


def with_cuda_graphs(groups: Groups) -> Callable[[Groups, Batch, int], None]:
    """Return a function like `saetrain.training.step.train_batch` that replays recorded steps."""
    if not groups:  # more processes than SAEs
        return train_batch
    steps = GraphedSteps(groups)
    return lambda _, batch, step: steps.make(batch, step)


Thunk = Callable[[], None]


class GraphRecorder(Protocol):
    """Interface of `CudaGraphs`, which tests replace."""

    def run(self, work: Thunk) -> None:
        """Run the work now, as a warm-up of its recording."""

    def record(self, work: Thunk) -> Thunk:
        """Record the work without running it; return a function that replays it."""


class CudaGraphs:
    """Recorder of CUDA graphs: warms up and records work on a side stream of a device.

    Follows "whole network capture" in torch's notes on CUDA semantics.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, work: Thunk) -> None:
        """Run the work on the side stream, ordered with the current stream before and after."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Thunk) -> Thunk:
        """Record the work. Synchronises with the device once."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: meanwhile, other threads read rows and allocate pinned memory.
        mode = "thread_local"
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode=mode),
        ):
            work()

        def replay() -> None:
            with torch.cuda.device(self._device):  # it may not be the current one
                graph.replay()

        return replay


def require_cuda_graphs(device: torch.device) -> None:
    """Raise `ConfigError` unless the device records CUDA graphs."""
    if device.type != "cuda" or torch.version.cuda is None:
        raise ConfigError(
            "--cuda-graphs needs a CUDA device",
            expected="cuda",
            got=str(device),
            remedy="leave it out",
        )
