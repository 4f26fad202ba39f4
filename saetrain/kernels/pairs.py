"""The (latent, token) pairs of a batch, sorted by latent.

Letters: N tokens, M num_latents, K k.
"""

from typing import NamedTuple

import torch
from torch import Tensor


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
