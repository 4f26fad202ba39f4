"""TopK: the K largest latents of each row.

Makhzani and Frey, "k-Sparse autoencoders" (2013); Gao et al., "Scaling and evaluating sparse
autoencoders" (2024), section 2.3: z = TopK(ReLU(W_enc (x - b_dec) + b_enc)).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from saetrain.activations.base import Activation, Encoder, Latents
from saetrain.kernels import sparse_encode, sparse_encode_by


class TopK(Activation):
    """The k largest latents of each row, of which fewer may be positive."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def encode(self, x: Tensor, encoder: Encoder) -> Latents:
        """[N, K], in no order."""
        b_dec = encoder.subtracted
        return Latents(*sparse_encode(x, encoder.W_enc, encoder.b_enc, b_dec, self.k))

    def encode_more(self, x: Tensor, encoder: Encoder, slots: int) -> Latents:
        """The largest `slots` latents of each row, the k largest of them first: [N, S]."""
        largest = partial(torch.topk, k=slots, dim=-1, sorted=True)
        b_dec = encoder.subtracted
        return Latents(*sparse_encode_by(x, encoder.W_enc, encoder.b_enc, b_dec, largest))
