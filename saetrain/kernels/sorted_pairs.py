"""The (latent, token) pairs of a batch: sorted by latent, and grouped by token.

Letters: N tokens, M num_latents, K k, P groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_NAME = "_saetrain_pairs"


class SortedPairs(NamedTuple):
    """All N*K pairs in order of latent, and within a latent in order of (token, slot).

    Attributes:
        order: [N*K] int64, position of each pair in the flattened [N, K] arrays.
        token: [N*K] int64, each pair's token.
        offsets: [M+1] int64; latent m owns the pairs offsets[m] to offsets[m+1]. Behind offsets[M]
            are the pairs that are left out, if any.
    """

    order: Tensor
    token: Tensor
    offsets: Tensor


class Bags(NamedTuple):
    """The pairs of each token, group by group; see `saetrain.kernels.prefix_groups`.

    Attributes:
        bag: [N, K] int64, not falling: the bag of each pair.
        offsets: [N*P+1] int64; bag b owns the pairs offsets[b] to offsets[b+1].
    """

    bag: Tensor
    offsets: Tensor


def sort_pairs(indices: Tensor, num_latents: int, empty: Tensor | None = None) -> SortedPairs:
    """Sort the pairs of `indices` ([N, K] int64, each in [0, num_latents)) once, stably.

    Equal input gives equal output on every device. Nothing here waits for the device.

    Args:
        indices: latents.
        num_latents: M.
        empty: pairs that are left out, bool [N, K]; only for backends with `SKIPS_EMPTY`.
    """
    k = indices.shape[1]
    # A latent's number fits int32, and a radix sort takes half as long over half as many bits.
    keys = indices.reshape(-1).to(torch.int32)  # [N*K]
    if empty is not None:
        keys.masked_fill_(empty.reshape(-1), num_latents)
    latents, order = torch.sort(keys, stable=True)  # [N*K]
    bounds = torch.arange(num_latents + 1, device=indices.device, dtype=torch.int32)
    offsets = torch.searchsorted(latents, bounds)  # [M+1]
    return SortedPairs(order, order // k, offsets)


class SharedSortedPairs:
    """The sorted pairs of one tensor of indices, sorted on first use.

    The encoder attaches this to the indices that it returns, so that its backward pass and those of
    all decoders of the same indices share one sort. Indices that were written to in between
    (torch's version counter of the tensor has changed) are sorted again.
    """

    def __init__(self, indices: Tensor, num_latents: int) -> None:
        self._indices, self._num_latents = indices.detach(), num_latents
        self._version = indices._version
        self._pairs: SortedPairs | None = None

    def get(self) -> SortedPairs:
        """Return the sorted pairs, sorting them if necessary."""
        if self._pairs is None or self._indices._version != self._version:
            self._version = self._indices._version
            self._pairs = sort_pairs(self._indices, self._num_latents)
        return self._pairs

    def attach_to(self, indices: Tensor) -> None:
        """Store this object on the Python tensor `indices`, where `of` finds it."""
        setattr(indices, _NAME, self)

    @staticmethod
    def of(indices: Tensor, num_latents: int) -> "SharedSortedPairs":
        """Return the object attached to these indices, or a new one."""
        found = getattr(indices, _NAME, None)
        if isinstance(found, SharedSortedPairs) and found._num_latents == num_latents:
            return found
        return SharedSortedPairs(indices, num_latents)
