"""What is measured along the way, kept on the device until it is logged."""

from __future__ import annotations

import torch
from torch import Tensor

from saetrain.losses import Losses
from saetrain.objective import Part
from saetrain.sums import total


class Meter:
    """Means over the steps since the last line of metrics.jsonl.

    Nothing here waits for the device before `read`. The sums are part of a checkpoint, so that a
    resumed run logs the same line that an uninterrupted one would have.
    """

    NAMES = ("fvu", "auxk", "l0")

    def __init__(self, device: torch.device, terms: tuple[str, ...] = ()) -> None:
        self.names = (*self.NAMES, *terms)
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.steps = 0

    def add(self, losses: Losses) -> None:
        """Count one step."""
        self.count(self.values(losses))

    @torch.no_grad()
    def values(self, losses: Losses) -> Tensor:
        """What is measured of one step; means over its rows. [NAMES]"""
        active = (losses.output.top_acts > 0).sum(dim=1).double()  # [N]
        l0 = total(active) / len(active)
        terms = [term.value.double() for term in losses.terms]
        return torch.stack([losses.fvu.double(), losses.auxk.double(), l0, *terms])

    def count(self, values: Tensor) -> None:
        """Count one step, of which this was measured."""
        self.sums += values
        self.steps += 1

    def repeat(self) -> None:
        """Count, on the host alone, a step that the device counted by itself."""
        self.steps += 1

    def read(self) -> dict[str, float]:
        """The means, and start over."""
        means = (self.sums / max(self.steps, 1)).tolist()
        self.sums.zero_()
        self.steps = 0
        return dict(zip(self.names, means, strict=True))


class Firing:
    """For each latent, how many rows ago it last fired."""

    def __init__(self, num_latents: int, dead_after: int, device: torch.device) -> None:
        self.rows_since = torch.zeros(num_latents, dtype=torch.int64, device=device)  # [M]
        self.dead_after = dead_after

    @torch.no_grad()
    def add(self, encoded: tuple[Tensor, Tensor | None]) -> None:
        """Count one batch: (top_acts [N, K], top_indices [N, K]), or (acts [N, M], None)."""
        top_acts, top_indices = encoded
        self.count(fired(top_acts, top_indices, len(self.rows_since)), len(top_acts))

    def count(self, fired: Tensor, rows: int) -> None:
        """Count so many rows, in which these latents fired: bool [M]."""
        self.rows_since += rows
        self.rows_since.masked_fill_(fired, 0)

    def dead(self) -> Tensor:
        """Which latents have not fired for `dead_after` rows. bool [M]"""
        return self.rows_since >= self.dead_after

    def may_be_dead(self, rows: int) -> bool:
        """Whether a latent can be dead by now, after `rows` rows. No device is asked."""
        return rows >= self.dead_after

    def dead_percent(self, rows: int) -> float | None:
        """Share of dead latents, percent; None if `rows` trained on are too few to know."""
        if rows < self.dead_after:
            return None
        return 100.0 * float(self.dead().double().mean())


@torch.no_grad()
def decoder_norms(W_dec: Tensor, parts: tuple[Part, ...]) -> dict[str, float]:
    """Mean norm of a crosscoder's decoder rows [M, E] at each hookpoint, by its log name."""
    pieces = torch.split(W_dec, [part.width for part in parts], dim=1)
    means = [total(piece.norm(dim=1).double()) / len(piece) for piece in pieces]
    return {f"norm/{p.name}": float(mean) for p, mean in zip(parts, means, strict=True)}


def fired(top_acts: Tensor, top_indices: Tensor | None, num_latents: int) -> Tensor:
    """Which latents are active in any row. bool [M]

    Without indices, the activations are those of all latents, [N, M]. With them,
    a maximum, not an assignment: where an index repeats, the order of writing does not matter.
    """
    if top_indices is None:
        return (top_acts > 0).any(dim=0)
    hits = torch.zeros(num_latents, dtype=torch.int32, device=top_acts.device)
    active = (top_acts > 0).int().flatten()
    return hits.scatter_reduce_(0, top_indices.flatten(), active, "amax").bool()
