"""Memory of gradients that are done with, for the next ones. On the CPU alone.

A weight's gradient is the largest thing that a step allocates. Fresh from the system, every page of
it is first filled with zeros, which takes five times as long as to write the gradient; on CUDA,
torch keeps memory itself. Whoever drops a gradient gives it back with `release_gradient`; if nobody
does, nothing is kept. Letters: D d_in, M num_latents.
"""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_KEPT = 2  # as many as weights of an autoencoder
_LEAST = 1 << 22  # bytes; below, malloc keeps memory itself


class _ReusableMemory:
    def __init__(self) -> None:
        self._free: list[torch.UntypedStorage] = []
        self._lent: dict[int, StorageWeakRef] = {}
        """By the storage's own number, which no other has while there is a weak reference. Not by
        the address: once a gradient is gone, malloc gives it to others."""

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory with anything in it, of a type and on a device."""
        out = torch.empty(0, dtype=like.dtype, device=like.device)
        size = out.element_size() * torch.Size(shape).numel()
        if like.device.type != "cpu" or size < _LEAST:
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        for number, storage in enumerate(self._free):
            if size <= storage.nbytes() <= 2 * size:
                del self._free[number]
                break
        else:
            storage = torch.empty(shape, dtype=like.dtype).untyped_storage()
        self._lent = {number: ref for number, ref in self._lent.items() if not ref.expired()}  # type: ignore[no-untyped-call]
        self._lent[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return out.set_(storage, 0, shape)  # type: ignore[call-overload, no-any-return]

    def give(self, tensor: Tensor) -> None:
        """Back, if it was lent."""
        if tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        if self._lent.pop(storage._cdata, None) is None:
            return
        self._free = sorted([*self._free, storage], key=lambda s: s.nbytes())[-_KEPT:]

    def forget(self) -> None:
        """Give all that is free back to the system."""
        self._free = []


_SPARES = _ReusableMemory()


def reuse_memory(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """As `torch.empty`, of the type and on the device of `like`; in used memory if there is any."""
    return _SPARES.take(shape, like)


def release_gradient(parameter: Tensor) -> None:
    """Forget a gradient that nobody else will look at: its memory is written to again."""
    if parameter.grad is not None:
        _SPARES.give(parameter.grad)
        parameter.grad = None


def free_memory() -> None:
    """Give memory that is kept for gradients back to the system."""
    _SPARES.forget()
