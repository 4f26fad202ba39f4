"""The k largest of each row, exactly. Letters: N tokens, M num_latents, K k."""

import torch
from torch import Tensor

from saetrain.kernels import backends as paths
from saetrain.kernels.backends import backend_module, select_backend


def topk(pre_acts: Tensor, k: int, *, path: str | None = None) -> tuple[Tensor, Tensor]:
    """Select as `torch.topk` does, as a set; which of equal values are taken is not said.

    A row with a NaN gives NaN for all its values, so that what is made of it is not finite.

    Args:
        pre_acts: [N, M], any floating type.
        k: 1 to M.
        path: forces one.

    Returns:
        Values, and int64 indices in [0, M), distinct within a row; in any order. [N, K]
    """
    return backend_module(select_backend(pre_acts, path)).topk(pre_acts, k)


_ROOM = 4
_ROOM_ON_DEVICE = 8
"""Slots of a row, in k: more than k, for rows differ."""


def batch_topk(pre_acts: Tensor, k: int, *, path: str | None = None) -> tuple[Tensor, Tensor]:
    """Select the k·N largest of all; what ties with the smallest of them is selected too.

    Looking through all N·M for them is slow: the largest S of each row hold all that are wanted
    once each row's smallest of these falls short. On the CPU that is looked at, and S doubled until
    it is so. On a GPU to look would make the host wait: there S is 8k, and a row with more than
    that keeps its 8k largest.

    Args:
        pre_acts: [N, M].
        k: 1 to M.
        path: forces one.

    Returns:
        Values, 0 in slots that stay empty, and int64 indices. [N, S]
    """
    path = select_backend(pre_acts, path)
    N, M = pre_acts.shape
    if N == 0:
        return topk(pre_acts, k, path=path)
    if not paths.host_can_read(pre_acts):
        values, indices = topk(pre_acts, min(_ROOM_ON_DEVICE * k, M), path=path)
        # The cut among what every row holds; it is that of the batch unless a row has no room.
        cut = backend_module(path).batch_topk_threshold(values, k * N)
        return torch.where(_above(values, cut), values, 0), indices
    slots = min(_ROOM * k, M)
    while True:
        values, indices = topk(pre_acts, slots, path=path)  # [N, S]
        cut = backend_module(path).batch_topk_threshold(values, k * N)
        least = values.amin(dim=1)  # [N]
        full = (least >= cut) & (least > 0)  # there may be more below
        if slots == M or not bool(full.any()):
            return _trimmed(values, indices, cut)
        slots = min(2 * slots, M)


def _above(values: Tensor, cut: Tensor) -> Tensor:
    """What is selected, and NaN, so that it is not lost."""
    return ((values >= cut) & (values > 0)) | values.isnan() | cut.isnan()


def _trimmed(values: Tensor, indices: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Only as many slots as the fullest row needs, largest first."""
    values, order = values.sort(dim=1, descending=True, stable=True)
    chosen = _above(values, cut)
    fullest = max(1, int(chosen.sum(dim=1).max()))
    values = torch.where(chosen, values, 0)[:, :fullest]
    return values, indices.gather(1, order)[:, :fullest]


def group_max(pre_acts: Tensor, k: int, *, path: str | None = None) -> tuple[Tensor, Tensor]:
    """Select the largest of each of k groups of M/k neighbours, the first of equals.

    A group with a NaN gives NaN.

    Args:
        pre_acts: [N, M], M a multiple of k.
        k: groups.
        path: forces one.

    Returns:
        Values, and int64 indices in [0, M), in the groups' order. [N, K]
    """
    return backend_module(select_backend(pre_acts, path)).group_max(pre_acts, k)
