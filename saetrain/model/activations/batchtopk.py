"""BatchTopK: the K·N largest latents of a batch of N rows, so that their number varies by row.

Bussmann, Leask and Nanda, "BatchTopK sparse autoencoders" (2024). Outside training the latents
above one threshold are active, so that a row does not depend on its batch. The threshold is an
exponential moving average of each batch's smallest selected activation: θ ← 0.95 θ + 0.05 min.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from saetrain.kernels import Selector, batch_topk, make_selector
from saetrain.model.activations.base import Activation, Encoder, Latents, pre_activations

FORGET = 0.05
"""Weight of the newest batch in the moving average of the threshold."""


class BatchTopK(Activation, nn.Module):
    """The k·N largest latents of a batch in training, those above the threshold otherwise."""

    threshold: Tensor
    """Moving average of the smallest selected activation; -1 before the first batch. float64 []"""

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.k = k
        empty = torch.tensor(-1.0, dtype=torch.float64, device=device)
        self.register_buffer("threshold", empty)

    def encode(self, x: Tensor, encoder: Encoder) -> Latents:
        """Compute latents: in training sparse, [N, S] (see `batch_topk`); else dense, [N, M]."""
        if not self.training:
            pre_acts = pre_activations(x, encoder)  # [N, M]
            active = pre_acts > self.threshold
            return Latents(torch.relu(pre_acts) * active, None)
        return super().encode(x, encoder)

    def selector(self) -> Selector | None:
        """Return the selection of the batch's k·N largest latents in training, else None."""
        return make_selector(partial(batch_topk, k=self.k)) if self.training else None

    @torch.no_grad()
    def observe(self, top_acts: Tensor, k_changed: bool = False) -> None:
        """Update the threshold: set it from the first batch, average it with later ones."""
        smallest = torch.where(top_acts > 0, top_acts, torch.inf).min().double()
        mixed = (1 - FORGET) * self.threshold + FORGET * smallest
        moved = smallest if k_changed else torch.where(self.threshold < 0, smallest, mixed)
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))
