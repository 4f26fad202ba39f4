"""TopK: the K largest latents of each row.

Makhzani and Frey, "k-Sparse autoencoders" (2013); Gao et al., "Scaling and evaluating sparse
autoencoders" (2024), section 2.3: z = TopK(ReLU(W_enc (x - b_dec) + b_enc)).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from saetrain.kernels import Selector, topk_selector
from saetrain.model.activations.base import Activation


@dataclass(eq=False)
class TopK(Activation):
    """The k largest latents of each row; those that are not positive are 0."""

    k: int = field()
    chunk_latents: int | None = None
    """Latents whose pre-activations are computed at once; None: all."""

    def selector(self) -> Selector:
        """Return the selection of the k largest latents, unordered."""
        return self.selector_of(self.k)

    def selector_of(self, slots: int) -> Selector:
        """Return the selection of the `slots` largest latents of each row, unordered."""
        return topk_selector(slots, self.chunk_latents)
