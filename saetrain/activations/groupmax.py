"""GroupMax: the latents are K groups of M/K neighbours, and each group's largest is active.

A maxout (Goodfellow et al., "Maxout networks", 2013) that keeps the winner's number; as an SAE's
activation it is sparsify's. No selection across a row is needed, so it is cheaper than TopK.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from saetrain.activations.base import Activation, Encoder, Latents
from saetrain.kernels import Way, chosen_by, group_max, sparse_encode_by


class GroupMax(Activation):
    """The largest latent of each of k groups; M must be a multiple of k."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def encode(self, x: Tensor, encoder: Encoder) -> Latents:
        """[N, K], in the groups' order."""
        b_dec = encoder.subtracted
        select = partial(group_max, k=self.k)
        return Latents(
            *sparse_encode_by(x, encoder.W_enc, encoder.b_enc, b_dec, select, by_token=True)
        )

    def way(self) -> Way:
        """Each group's largest."""
        return chosen_by(partial(group_max, k=self.k), by_token=True)
