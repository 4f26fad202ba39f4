"""A split of the pairs into ordered groups, so that one pass gives several reconstructions.

Reconstruction j sums the pairs of groups 0 to j. A *bag* is one token's pairs of one group: bag
n·P + i, of token n and group i. Slots are ordered by group, so that a bag is a contiguous range of
the flattened [N, K] arrays. Letters: N tokens, M num_latents, K slots, P groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from saetrain.kernels.backends import Primitives
from saetrain.kernels.sorted_pairs import Bags

Selector = Callable[[Tensor, Tensor, Tensor, Primitives], tuple[Tensor, Tensor]]
"""Select latents: rows x - b_dec [N, D], W_enc, b_enc and the backend to values and latents
[N, K]."""


@dataclass(frozen=True)
class PrefixGroups:
    """Bounds of the groups: group i holds the pairs from bounds[i-1] to bounds[i], exclusive.

    Attributes:
        by: what is compared with the bounds: a pair's "latent", or its "rank" among its token's
            pairs, the strongest having rank 0.
        bounds: P - 1 numbers in order; two that are equal have an empty group between them.
    """

    by: Literal["latent", "rank"]
    bounds: tuple[int, ...]

    @property
    def number(self) -> int:
        """Number of groups, P."""
        return len(self.bounds) + 1

    def grouped(self, selector: Selector) -> Selector:
        """Return the same selection with its slots ordered by group."""
        return partial(self._select, selector)

    def bags(self, indices: Tensor) -> Bags:
        """Find the bags of latents [N, K] of a grouped selection; never waits for the device."""
        bag = self._bag(indices)  # [N, K]
        bounds = torch.arange(len(indices) * self.number + 1, device=bag.device)
        return Bags(bag, torch.searchsorted(bag.flatten(), bounds))

    def _select(
        self, selector: Selector, x: Tensor, W: Tensor, b: Tensor, ops: Primitives
    ) -> tuple[Tensor, Tensor]:
        values, indices = selector(x, W, b, ops)
        if self.by == "rank":
            values, order = values.sort(dim=1, descending=True, stable=True)
            return values, indices.gather(1, order)
        # Rows lie one after the other, so one short sort of all bags orders each of them.
        order = torch.sort(self._bag(indices).flatten().to(torch.int32), stable=True).indices
        return values.flatten()[order].view_as(values), indices.flatten()[order].view_as(indices)

    def _bag(self, indices: Tensor) -> Tensor:
        N, K = indices.shape
        compared = indices
        if self.by == "rank":
            compared = torch.arange(K, device=indices.device).expand(N, K)
        bag = self.number * torch.arange(N, device=indices.device).unsqueeze(1).repeat(1, K)
        for bound in self.bounds:
            bag += compared >= bound
        return bag  # [N, K]
