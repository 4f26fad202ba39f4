"""GroupMax: the largest latent of each of K groups of M/K adjacent latents.

A maxout (Goodfellow et al., "Maxout networks", 2013) that keeps the index of the maximum; sparsify
uses it as an SAE's activation. No selection across a row is needed, so it is cheaper than TopK.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from saetrain.kernels import Selector, group_max, make_selector
from saetrain.model.activations.base import Activation


@dataclass(eq=False)
class GroupMax(Activation):
    """The largest latent of each of k groups; M must be a multiple of k."""

    k: int = field()

    def selector(self) -> Selector:
        """Return the selection of each group's largest latent, in the groups' order."""
        return make_selector(partial(group_max, k=self.k), by_token=True)
