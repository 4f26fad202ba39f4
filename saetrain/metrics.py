"""What is measured along the way, kept on the device until it is logged."""

from __future__ import annotations

import torch
from torch import Tensor

from saetrain.kernels import Encoded
from saetrain.losses import Losses, total


class Meter:
    """Means over the steps since the last line of metrics.jsonl.

    Nothing here waits for the device before `read`. The sums are part of a checkpoint, so that a
    resumed run logs the same line that an uninterrupted one would have.
    """

    NAMES = ("fvu", "auxk", "l0")

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self.steps = 0

    @torch.no_grad()
    def add(self, losses: Losses) -> None:
        """Count one step."""
        active = (losses.output.top_acts > 0).sum(dim=1).double()  # [N]
        l0 = total(active) / len(active)
        self.sums += torch.stack([losses.fvu.double(), losses.auxk.double(), l0])
        self.steps += 1

    def read(self) -> dict[str, float]:
        """The means, and start over."""
        means = (self.sums / max(self.steps, 1)).tolist()
        self.sums.zero_()
        self.steps = 0
        return dict(zip(self.NAMES, means, strict=True))


class Firing:
    """For each latent, how many rows ago it last fired."""

    def __init__(self, num_latents: int, dead_after: int, device: torch.device) -> None:
        self.rows_since = torch.zeros(num_latents, dtype=torch.int64, device=device)  # [M]
        self.dead_after = dead_after

    @torch.no_grad()
    def add(self, encoded: Encoded | tuple[Tensor, Tensor]) -> None:
        """Count one batch: (top_acts [N, K], top_indices [N, K])."""
        top_acts, top_indices = encoded
        self.rows_since += len(top_acts)
        self.rows_since[fired(top_acts, top_indices, len(self.rows_since))] = 0

    def dead(self) -> Tensor:
        """Which latents have not fired for `dead_after` rows. bool [M]"""
        return self.rows_since >= self.dead_after

    def dead_percent(self, rows: int) -> float | None:
        """Share of dead latents, percent; None if `rows` trained on are too few to know."""
        if rows < self.dead_after:
            return None
        return 100.0 * float(self.dead().double().mean())


def fired(top_acts: Tensor, top_indices: Tensor, num_latents: int) -> Tensor:
    """Which latents are active in any row. bool [M]

    A maximum, not an assignment: where an index repeats, the order of writing does not matter.
    """
    hits = torch.zeros(num_latents, dtype=torch.int32, device=top_acts.device)
    active = (top_acts > 0).int().flatten()
    return hits.scatter_reduce_(0, top_indices.flatten(), active, "amax").bool()
