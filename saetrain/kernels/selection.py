"""Selection of latents by their pre-activations, exactly. Letters: N tokens, M num_latents, K k."""

import torch
from torch import Tensor

from saetrain.kernels import backends

_ROOM = 4
_ROOM_ON_DEVICE = 8
"""Slots of a row in BatchTopK, in units of k: more than one, for rows differ."""


def topk(pre_acts: Tensor, k: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Select the same set as `torch.topk`; of equal values, any may be taken.

    A row with a NaN gives NaN for all its values, so that everything computed from it is not
    finite.

    Args:
        pre_acts: [N, M], any floating type.
        k: 1 to M.
        backend: forces one.

    Returns:
        Values, and int64 indices in [0, M), distinct within a row; in any order. [N, K]
    """
    return backends.backend_of(pre_acts, backend).topk(pre_acts, k)


def batch_topk(pre_acts: Tensor, k: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Select the k·N largest of all; what ties with the smallest of them is selected too.

    A search through all N·M is slow: the largest S of each row contain all that are selected, once
    the smallest of these S lies below the threshold in every row. On the CPU this is checked, and S
    doubled until it holds. On a GPU the check would make the host wait: there S is 8k, and a row
    with more than that keeps its 8k largest.

    Args:
        pre_acts: [N, M].
        k: 1 to M.
        backend: forces one.

    Returns:
        Values, 0 in slots that stay empty, and int64 indices. [N, S]
    """
    ops = backends.backend_of(pre_acts, backend)
    N, M = pre_acts.shape
    if N == 0:
        return ops.topk(pre_acts, k)
    if not backends.host_can_read(pre_acts):
        values, indices = ops.topk(pre_acts, min(_ROOM_ON_DEVICE * k, M))
        # The threshold among the slots of every row; the batch's, unless a row has no room.
        cut = ops.batch_topk_threshold(values, k * N)
        return torch.where(_above(values, cut), values, 0), indices
    slots = min(_ROOM * k, M)
    while True:
        values, indices = ops.topk(pre_acts, slots)  # [N, S]
        cut = ops.batch_topk_threshold(values, k * N)
        least = values.amin(dim=1)  # [N]
        full = (least >= cut) & (least > 0)  # there may be more below
        if slots == M or not bool(full.any()):
            return _trimmed(values, indices, cut)
        slots = min(2 * slots, M)


def _above(values: Tensor, cut: Tensor) -> Tensor:
    """Mark the selected values, and NaN, so that it is not lost."""
    return ((values >= cut) & (values > 0)) | values.isnan() | cut.isnan()


def _trimmed(values: Tensor, indices: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Keep only as many slots as the fullest row needs, largest first."""
    values, order = values.sort(dim=1, descending=True, stable=True)
    chosen = _above(values, cut)
    fullest = max(1, int(chosen.sum(dim=1).max()))
    values = torch.where(chosen, values, 0)[:, :fullest]
    return values, indices.gather(1, order)[:, :fullest]


def group_max(pre_acts: Tensor, k: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Select the largest of each of k groups of M/k neighbours, the first of equals.

    A group with a NaN gives NaN.

    Args:
        pre_acts: [N, M], M a multiple of k.
        k: groups.
        backend: forces one.

    Returns:
        Values, and int64 indices in [0, M), in the groups' order. [N, K]
    """
    return backends.backend_of(pre_acts, backend).group_max(pre_acts, k)
