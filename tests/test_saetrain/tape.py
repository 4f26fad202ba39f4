"""A substitute for CUDA graphs on the CPU, for tests.

A tape records every operator call of a step, forward and backward, with the memory that it reads
and writes. A replay repeats the calls in order on that memory, without running the step's Python
code. Host values keep what they were at the recording, as in a CUDA graph.

- A CUDA device runs nothing while recording. Here the calls run, because Python needs their
  results, and memory that existed before is restored afterwards.
- Memory that is only allocated is undefined: replays fill it with NaN or similar.
- Calls that synchronise with the device, or read a size from it, raise an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

Thunk = Callable[[], None]
aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.is_nonzero,
    aten.equal,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.bincount,
    aten.repeat_interleave,
}
ALLOCATE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


class Tape(TorchDispatchMode):
    """Records operator calls made within it, and replays them."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._created: set[int] = set()
        """Storages created by recorded calls; the tape holds them, so that no address is reused."""
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        """Bytes of other storages, and a copy from before they were written."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a call and record it."""
        kwargs = kwargs or {}
        if func.overloadpacket in WAITS or self._reads_a_size(func, args):
            raise AssertionError(f"{func} would make the host wait for the device")
        for tensor in _tensors((args, kwargs)):
            if _storage(tensor) not in self._created:
                self._keep(tensor)
        # Alias now: an in-place view operator may change a tensor's shape later.
        args_then, kwargs_then = tree_map_only(Tensor, _alias, (args, kwargs))
        out = func(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags:
            return out
        known = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        outs = [_alias(tensor) for tensor in _tensors(out)]
        self._created |= {_storage(tensor) for tensor in outs} - known
        self._calls.append((func, args_then, kwargs_then, outs))
        return out

    def note(self, launch: Callable[..., Any], tensors: list[Tensor]) -> None:
        """Run and record a launch outside torch that writes to tensors in place."""
        with _disable_current_modes():
            for tensor in tensors:
                if _storage(tensor) not in self._created:
                    self._keep(tensor)
            launch()
        self._calls.append((_Launch(launch), (), {}, []))

    @staticmethod
    def _reads_a_size(func: Any, args: Any) -> bool:
        """Return whether the call indexes by a mask: the size of its result is on the device."""
        if func.overloadpacket is not aten.index:
            return False
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])

    def _keep(self, tensor: Tensor) -> None:
        if (key := _storage(tensor)) not in self._before:
            whole = _bytes(tensor)
            self._before[key] = whole, whole.clone()

    def undo(self) -> None:
        """Restore the memory that existed before the recording."""
        for whole, held in self._before.values():
            whole.copy_(held)

    def replay(self) -> None:
        """Repeat all calls."""
        with torch.no_grad(), torch.autograd.set_multithreading_enabled(False):
            for func, args, kwargs, outs in self._calls:
                if func.overloadpacket in ALLOCATE:
                    for taped in outs:
                        _spoil(taped)
                    continue
                again = _tensors(func(*args, **kwargs))
                assert len(again) == len(outs)
                for taped, new in zip(outs, again, strict=True):
                    assert taped.shape == new.shape, f"{func} gave another shape"
                    if _storage(taped) != _storage(new):  # neither a view nor written in place
                        taped.copy_(new)


class _Launch:
    overloadpacket = None

    def __init__(self, launch: Callable[..., Any]) -> None:
        self._launch = launch

    def __call__(self) -> None:
        self._launch()


class TapeRecorder:
    """A `GraphRecorder` for a CPU. `recorded` counts recordings, `replayed` replays."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.tape: Tape | None = None
        """Tape that is being recorded."""
        self.calls = 0
        """Number of calls of the last recording."""

    def run(self, work: Thunk) -> None:
        """Run the work."""
        work()

    def record(self, work: Thunk) -> Thunk:
        """Record the work and undo its effects."""
        tape = self.tape = Tape()
        with tape:
            work()
        self.tape = None
        tape.undo()
        self.recorded += 1
        self.calls = len(tape._calls)

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _alias(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> Tensor:
    """Return all bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _spoil(tensor: Tensor) -> None:
    if tensor.dtype.is_floating_point:
        tensor.fill_(torch.nan)
    else:
        tensor.fill_(1 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)
