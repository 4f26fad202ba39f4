"""The (latent, token) pairs of a batch, sorted by latent.

Letters: N tokens, M num_latents, K k.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_NAME = "_saetrain_pairs"


class SortedPairs(NamedTuple):
    """All N*K pairs in order of latent, and within a latent in order of (token, slot).

    Attributes:
        order: [N*K] int64, where each pair stands in the flattened [N, K] arrays.
        token: [N*K] int64, each pair's token.
        offsets: [M+1] int64; latent m owns the pairs offsets[m] to offsets[m+1].
    """

    order: Tensor
    token: Tensor
    offsets: Tensor


def sort_pairs(indices: Tensor, num_latents: int) -> SortedPairs:
    """Sort the pairs of `indices` ([N, K] int64, each in [0, num_latents)) once, stably.

    Equal input gives equal output on every device. Nothing here waits for the device.
    """
    k = indices.shape[1]
    # A latent's number fits int32, and a radix sort takes half as long over half as many bits.
    latents, order = torch.sort(indices.reshape(-1).to(torch.int32), stable=True)  # [N*K]
    bounds = torch.arange(num_latents + 1, device=indices.device, dtype=torch.int32)
    offsets = torch.searchsorted(latents, bounds)  # [M+1]
    return SortedPairs(order, order // k, offsets)


class SharedSortedPairs:
    """The sorted pairs of one tensor of indices, sorted when they are first asked for.

    The encoder leaves this on the indices that it returns (`share`), so that its backward pass and
    those of all decoders of the same indices sort once together. Indices that were written to in
    between are sorted anew: torch counts what is written to a tensor.
    """

    def __init__(self, indices: Tensor, num_latents: int) -> None:
        self._indices, self._num_latents = indices.detach(), num_latents
        self._version = indices._version
        self._pairs: SortedPairs | None = None

    def get(self) -> SortedPairs:
        """Sorted, now at the latest."""
        if self._pairs is None or self._indices._version != self._version:
            self._version = self._indices._version
            self._pairs = sort_pairs(self._indices, self._num_latents)
        return self._pairs

    def attach_to(self, indices: Tensor) -> None:
        """Let whoever is given this tensor, the same object, find the pairs."""
        setattr(indices, _NAME, self)

    @staticmethod
    def of(indices: Tensor, num_latents: int) -> "SharedSortedPairs":
        """Those that were left on these indices; else new ones."""
        found = getattr(indices, _NAME, None)
        if isinstance(found, SharedSortedPairs) and found._num_latents == num_latents:
            return found
        return SharedSortedPairs(indices, num_latents)
