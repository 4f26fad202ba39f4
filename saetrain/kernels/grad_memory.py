"""Memory of released gradients, recycled for the next ones. On the CPU alone.

A weight's gradient is the largest allocation of a step. The system fills every page of fresh memory
with zeros, which takes five times as long as writing the gradient; on CUDA, torch recycles memory
itself. `release_gradient` returns a gradient's memory; without that call, nothing is kept. Letters:
D d_in, M num_latents.
"""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_KEPT = 2  # as many as weights of an autoencoder
_LEAST = 1 << 22  # bytes; below, malloc recycles memory itself

_free: list[torch.UntypedStorage] = []
_lent: dict[int, StorageWeakRef] = {}
"""Storages in use, by the storage object's address, which no other has while there is a weak
reference. Not by the data's address: malloc reuses that for other tensors."""


def reuse_memory(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Allocate as `torch.empty` does, like `like`; in recycled memory if there is any."""
    out = torch.empty(0, dtype=like.dtype, device=like.device)
    size = out.element_size() * torch.Size(shape).numel()
    if like.device.type != "cpu" or size < _LEAST:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    for number, storage in enumerate(_free):
        if size <= storage.nbytes() <= 2 * size:
            del _free[number]
            break
    else:
        storage = torch.empty(shape, dtype=like.dtype).untyped_storage()
    for number in [number for number, ref in _lent.items() if ref.expired()]:  # type: ignore[no-untyped-call]
        del _lent[number]
    _lent[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
    return out.set_(storage, 0, shape)  # type: ignore[call-overload, no-any-return]


def release_gradient(parameter: Tensor) -> None:
    """Drop a gradient that is not used any more, and recycle its memory."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is None or gradient.device.type != "cpu":
        return
    storage = gradient.untyped_storage()
    if _lent.pop(storage._cdata, None) is not None:
        _free[:] = sorted([*_free, storage], key=lambda s: s.nbytes())[-_KEPT:]


def free_memory() -> None:
    """Return the memory that is kept for gradients to the system."""
    _free.clear()
