"""BatchTopK: the K·N largest latents of a batch of N rows, so that rows may have more or fewer.

Bussmann, Leask and Nanda, "BatchTopK sparse autoencoders" (2024). A row alone has no batch:
afterwards the latents above one threshold are active, the mean over batches of the smallest
activation that was chosen. Here that is a running mean which forgets: θ ← 0.95 θ + 0.05 min.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from saetrain.kernels import Selector, batch_topk, make_selector
from saetrain.model.activations.base import Activation, Encoder, Latents, pre_activations

FORGET = 0.05
"""Weight of the newest batch in the threshold."""


class BatchTopK(Activation):
    """The k·N largest latents of a batch while training, those above the threshold otherwise."""

    threshold: Tensor
    """Where the last batches were cut; -1 before the first. float64 []"""

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.k = k
        empty = torch.tensor(-1.0, dtype=torch.float64, device=device)
        self.register_buffer("threshold", empty)

    def encode(self, x: Tensor, encoder: Encoder) -> Latents:
        """Training: [N, S], S slots as `batch_topk` has them. Else dense, [N, M]."""
        if not self.training:
            pre_acts = pre_activations(x, encoder)  # [N, M]
            chosen = pre_acts > self.threshold
            return Latents(torch.relu(pre_acts) * chosen, None)
        return super().encode(x, encoder)

    def selector(self) -> Selector | None:
        """The batch's largest, while training."""
        return make_selector(partial(batch_topk, k=self.k)) if self.training else None

    @torch.no_grad()
    def observe(self, top_acts: Tensor, anew: bool = False) -> None:
        """Move the threshold to the smallest activation of the first batch, towards all others'."""
        smallest = torch.where(top_acts > 0, top_acts, torch.inf).min().double()
        mixed = (1 - FORGET) * self.threshold + FORGET * smallest
        moved = smallest if anew else torch.where(self.threshold < 0, smallest, mixed)
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))
