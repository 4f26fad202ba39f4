"""A stand-in for a CUDA graph on the CPU, as faithful as it can be made to be.

Every call of a step that reaches a device, forward and backward, goes to a tape with the very
memory that it reads and writes; a replay makes the calls again in their order, on that memory, and
nothing else: no Python of the step runs. What the host knew while it was recorded stays as it was
then, as in a CUDA graph.

- While recording, a CUDA device does nothing. Here calls are made, as Python needs their results;
  memory that was there before is put back afterwards.
- Memory that is only allocated holds anything: replays fill it with NaN, or the like.
- Whatever would make a host wait for its device, or ask it for a size, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

Work = Callable[[], None]
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
    """What is called within it, to be called again."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._made: set[int] = set()
        """Storages that recorded calls made; the tape keeps them, so that none comes twice."""
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        """Bytes of others that calls were about to write to, and what they held."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make a call, and note it."""
        kwargs = kwargs or {}
        if func.overloadpacket in WAITS or self._asks_for_a_size(func, args):
            raise AssertionError(f"{func} would make the host wait for the device")
        for tensor in _tensors((args, kwargs)):
            if _storage(tensor) not in self._made:
                self._keep(tensor)
        # Now: what a tensor is a view of may change in place, without any number being written.
        args_then, kwargs_then = tree_map_only(Tensor, _alias, (args, kwargs))
        out = func(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags:
            return out
        known = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        outs = [_alias(tensor) for tensor in _tensors(out)]
        self._made |= {_storage(tensor) for tensor in outs} - known
        self._calls.append((func, args_then, kwargs_then, outs))
        return out

    def note(self, launch: Callable[..., Any], tensors: list[Tensor]) -> None:
        """Make a call that torch knows nothing of, and note it; it writes to tensors in place."""
        with _disable_current_modes():
            for tensor in tensors:
                if _storage(tensor) not in self._made:
                    self._keep(tensor)
            launch()
        self._calls.append((_Launch(launch), (), {}, []))

    @staticmethod
    def _asks_for_a_size(func: Any, args: Any) -> bool:
        """Whether a mask picks numbers: how many, only the device knows."""
        if func.overloadpacket is not aten.index:
            return False
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])

    def _keep(self, tensor: Tensor) -> None:
        if (key := _storage(tensor)) not in self._before:
            whole = _bytes(tensor)
            self._before[key] = whole, whole.clone()

    def undo(self) -> None:
        """Put back what was there before; what was made holds anything now."""
        for whole, held in self._before.values():
            whole.copy_(held)

    def replay(self) -> None:
        """Make all calls again."""
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
        """The one that is being recorded."""
        self.calls = 0
        """Of a recording."""

    def run(self, work: Work) -> None:
        """Do it."""
        work()

    def record(self, work: Work) -> Work:
        """Tape it, as if it had not been done."""
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
    """All of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _spoil(tensor: Tensor) -> None:
    if tensor.dtype.is_floating_point:
        tensor.fill_(torch.nan)
    else:
        tensor.fill_(1 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)
