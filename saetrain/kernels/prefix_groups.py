"""A split of the pairs into ordered pieces, so that one pass gives several reconstructions.

Reconstruction j sums the pairs of pieces 0 to j. A *bag* is one token's pairs of one piece: bag
n·P + i, of token n and piece i. Slots are brought into order of pieces, so that a bag is a stretch
of the flattened [N, K] arrays. Letters: N tokens, M num_latents, K slots, P pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Selector = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Rows [N, D], b_dec taken from them, W_enc and b_enc, to values and latents [N, K]."""


class Bags(NamedTuple):
    """The pairs of each token, piece by piece.

    Attributes:
        bag: [N, K] int64, not falling: the bag of each pair.
        offsets: [N*P+1] int64; bag b owns the pairs offsets[b] to offsets[b+1].
    """

    bag: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class PrefixGroups:
    """How pairs are split: piece i holds those from bounds[i-1] up to, not including, bounds[i].

    Attributes:
        by: what is compared with the bounds: a pair's "latent", or its "rank" among its token's
            pairs, the strongest having rank 0.
        bounds: P - 1 numbers in order; two that are equal have an empty piece between them.
    """

    by: Literal["latent", "rank"]
    bounds: tuple[int, ...]

    @property
    def number(self) -> int:
        """P."""
        return len(self.bounds) + 1

    def grouped(self, selector: Selector) -> Selector:
        """The same selection, its slots in order of pieces."""
        return partial(self._arranged, selector=selector)

    def bags(self, indices: Tensor) -> Bags:
        """Of latents [N, K] that an arranged selection gave. Nothing here waits for the device."""
        bag = self._bag(indices)  # [N, K]
        bounds = torch.arange(len(indices) * self.number + 1, device=bag.device)
        return Bags(bag, torch.searchsorted(bag.flatten(), bounds))

    def _arranged(
        self, x: Tensor, W: Tensor, b: Tensor, *, selector: Selector
    ) -> tuple[Tensor, Tensor]:
        values, indices = selector(x, W, b)
        if self.by == "rank":
            values, order = values.sort(dim=1, descending=True, stable=True)
            return values, indices.gather(1, order)
        # Rows stand one after the other, so one short sort of all bags orders each of them.
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
