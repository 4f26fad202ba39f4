"""Running metrics of one SAE, accumulated on its device so that a step never waits for it.

Letters: N rows, D d_in, M latents, E width of the output, K active latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saetrain.kernels import total
from saetrain.model.losses import Losses, OutputSlice
from saetrain.tracking import EDGES

if TYPE_CHECKING:
    from saetrain.training.penalty_control import PenaltyController

MEANS = ("fvu", "auxk", "l0")
"""Names of the means that every SAE has."""
_L0 = MEANS.index("l0")


@dataclass
class MeanMeter:
    """Means of losses and L0 over the steps since the last line of metrics.jsonl.

    The sums are part of a checkpoint, so that a resumed run logs the same line as an uninterrupted
    one.
    """

    names: tuple[str, ...]
    """`MEANS`, and the names of the other losses."""
    sums: Tensor
    """One sum for each name. float64 [len(names)]"""
    steps: int = 0
    residual: ResidualShare | None = None
    """What else each step's values are added to."""
    controller: PenaltyController | None = None
    """With --target-l0, the weight of the penalty, which follows each step's L0."""

    def add(self, losses: Losses) -> None:
        """Add the losses of one step."""
        self.count(self.values(losses))

    @torch.no_grad()
    def values(self, losses: Losses) -> Tensor:
        """Return one step's means over its rows, in the order of `names`. [len(names)]"""
        active = (losses.output.top_acts > 0).sum(dim=1).double()  # [N]
        l0 = total(active) / len(active)
        terms = [term.value.double() for term in losses.terms]
        return torch.stack([losses.fvu.double(), losses.auxk.double(), l0, *terms])

    def count(self, values: Tensor) -> None:
        """Add one step's `values`."""
        self.sums += values
        self.steps += 1
        if self.residual is not None:
            self.residual.count(values)
        if self.controller is not None:
            self.controller.count(values[_L0])

    def count_replayed(self) -> None:
        """Advance the host's counter for a step that a CUDA graph added on the device."""
        self.steps += 1

    def pop_means(self) -> dict[str, float]:
        """Return the means and reset the sums."""
        means = (self.sums / max(self.steps, 1)).tolist()
        self.sums.zero_()
        self.steps = 0
        return dict(zip(self.names, means, strict=True))


@dataclass
class ResidualShare:
    """Share of each hookpoint's variance that the residual holds: a moving average of its FVU.

    AuxK is divided by it. The average is over the steps before, so that the loss of a batch is the
    mean of those of its parts, on one process or several.
    """

    sums: Tensor
    """Decayed sum of each hookpoint's FVU, and of 1. float64 [hookpoints + 1]"""

    def share(self) -> Tensor:
        """Return the average of each hookpoint, after at least one step. float64 [hookpoints]

        At least what rounding leaves of a residual, so that one of 0 does not make AuxK NaN.
        """
        return (self.sums[:-1] / self.sums[-1]).clamp(min=_LEAST_SHARE)

    def count(self, values: Tensor) -> None:
        """Add one step's `MeanMeter.values`."""
        hookpoints = len(self.sums) - 1
        # Terms begin with each hookpoint's FVU, if there are several.
        first = 0 if hookpoints == 1 else len(MEANS)
        self.sums *= _DECAY  # in place: a recorded step reads this address
        self.sums[:-1] += values[first : first + hookpoints]
        self.sums[-1] += 1


_DECAY = 0.9  # half of the weight on the last seven steps
_LEAST_SHARE = 1e-12


@dataclass
class DeadLatentTracker:
    """Rows since each latent last fired."""

    rows_since: Tensor
    """int64 [M]"""
    dead_after: int
    """Rows after which a latent counts as dead."""

    @torch.no_grad()
    def add(self, encoded: tuple[Tensor, Tensor | None]) -> None:
        """Count one batch: (top_acts [N, K], top_indices [N, K]), or (acts [N, M], None)."""
        top_acts, top_indices = encoded
        self.count(fired(top_acts, top_indices, len(self.rows_since)), len(top_acts))

    def count(self, fired: Tensor, rows: int) -> None:
        """Count `rows` rows, in at least one of which these latents fired: bool [M]."""
        self.rows_since += rows
        self.rows_since.masked_fill_(fired, 0)

    def dead(self) -> Tensor:
        """Return which latents have not fired for `dead_after` rows. bool [M]"""
        return self.rows_since >= self.dead_after

    def may_be_dead(self, rows: int) -> bool:
        """Return whether a latent can be dead after `rows` rows, without reading the device."""
        return rows >= self.dead_after

    def dead_percent(self, rows: int) -> float | None:
        """Return the share of dead latents, percent; None until `dead_after` rows are trained."""
        if rows < self.dead_after:
            return None
        return 100.0 * float(self.dead().double().mean())


class DeadLatentBound:
    """Upper bound on the rows since any latent fired, kept on the host without synchronisation.

    The largest of `rows_since` is copied to the host in the background. From when a copy starts,
    the host adds the rows of every step to its number, so the sum is a bound whenever the copy
    arrives. While it is below `dead_after` no latent is dead, and AuxK, which would find none, is
    left out. When a copy arrives depends on the device's speed; results do not.
    """

    may_be_dead = True
    """Whether a latent may be dead in the step of the last `advance`."""

    def __init__(self, dead_tracker: DeadLatentTracker) -> None:
        self._tracker = dead_tracker
        self._bound: int | None = None
        """The bound before the current step; None: no copy has arrived."""
        self._copy: Callable[[], int | None] | None = None
        self._since_copy = 0
        """Rows since the copy under way started."""
        self._rows = 0
        """Rows of the current step, which count from the next one on."""
        self._without_dead = 0
        """Steps in a row in which no latent can have been dead."""

    def advance(self, rows: int, hold: int = 0) -> None:
        """Advance to the next step: read a copy that has arrived, and start one if it is due.

        Args:
            rows: rows of the step, of all processes.
            hold: steps for which `may_be_dead` stays true after it was.
        """
        self._since_copy += self._rows
        if self._bound is not None:
            self._bound += self._rows
        if self._copy is not None and (found := self._copy()) is not None:
            self._bound, self._copy = found + self._since_copy, None
        # A copy is due at half of dead_after, so that it arrives before all of it.
        if self._copy is None and (self._bound is None or 2 * self._bound >= self._dead_after):
            self._copy, self._since_copy = copy_to_host(self._tracker.rows_since.max()), 0
        self._rows = rows
        dead = self._bound is None or self._bound >= self._dead_after
        self._without_dead = 0 if dead else self._without_dead + 1
        self.may_be_dead = self._without_dead <= hold

    @property
    def _dead_after(self) -> int:
        return self._tracker.dead_after


def copy_to_host(number: Tensor) -> Callable[[], int | None]:
    """Start copying an integer from a CUDA device; return a function that returns it, or None.

    The function never waits: it returns None until the copy has arrived.
    """
    pinned = torch.empty((), dtype=number.dtype, pin_memory=True)
    pinned.copy_(number, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(number.device))

    def read() -> int | None:
        return int(pinned) if arrived.query() else None  # type: ignore[no-untyped-call]

    return read


@dataclass
class LatentStats:
    """Density of each latent and mean gradient norm, since each was last logged."""

    active: Tensor
    """Number of rows on which each latent fired. int64 [M]"""
    norms: Tensor
    """Sum of the gradient's norms. float64, no dimensions"""
    rows: int = 0
    updates: int = 0

    @torch.no_grad()
    def add_latents(self, top_acts: Tensor, top_indices: Tensor | None) -> None:
        """Count one batch: (top_acts [N, K], top_indices [N, K]), or (acts [N, M], None)."""
        self.count(active_rows(top_acts, top_indices, len(self.active)), len(top_acts))

    def count(self, active: Tensor, rows: int) -> None:
        """Count `rows` rows; `active` is the number of them on which each latent fires, [M]."""
        self.active += active
        self.rows += rows

    @torch.no_grad()
    def add_gradient(self, norm: Tensor) -> None:
        """Count one update by the norm of its gradient; on the device, no dimensions."""
        self.norms += norm
        self.updates += 1

    def count_replayed(self, rows: int) -> None:
        """Advance the host's counters for a step that a CUDA graph added on the device."""
        self.rows += rows
        self.updates += 1

    def pop_grad_norm(self) -> dict[str, Any]:
        """Return the mean norm of the gradient and reset it; None if there was no update."""
        mean = float(self.norms) / max(self.updates, 1)
        known = self.updates > 0 and math.isfinite(mean)  # it overflows before the losses do
        self.norms.zero_()
        self.updates = 0
        return {"grad_norm": mean if known else None}

    def pop_density(self) -> dict[str, Any]:
        """Return the histogram of the latents' densities and reset it."""
        density = self.active.cpu().numpy() / max(self.rows, 1)
        fires = density[density > 0]
        # Compare densities, not their logarithms: those differ from machine to machine.
        edges = [0.0, *(10.0**edge for edge in EDGES[1:-1]), 1.0]
        counts = np.histogram(fires, edges)[0].tolist()
        found = {"rows": self.rows, "never": len(density) - len(fires), "counts": counts}
        self.active.zero_()
        self.rows = 0
        return {"log10_density": found}

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return tensors and numbers for a checkpoint."""
        numbers = {"rows": self.rows, "updates": self.updates}
        return {"active": self.active, "norms": self.norms}, {**numbers}

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Load the result of `state`."""
        self.active.copy_(tensors["active"])
        self.norms.copy_(tensors["norms"])
        self.rows, self.updates = int(numbers["rows"]), int(numbers["updates"])


def fired(top_acts: Tensor, top_indices: Tensor | None, num_latents: int) -> Tensor:
    """Return which latents are active in any row. bool [M]

    Args:
        top_acts: activations of the chosen latents [N, K]; without indices, of all latents [N, M].
        top_indices: the chosen latents [N, K].
        num_latents: M.
    """
    if top_indices is None:
        return (top_acts > 0).any(dim=0)
    hits = torch.zeros(num_latents, dtype=torch.int32, device=top_acts.device)
    active = (top_acts > 0).int().flatten()
    # A maximum, not an assignment: its result does not depend on the order of repeated indices.
    return hits.scatter_reduce_(0, top_indices.flatten(), active, "amax").bool()


@torch.no_grad()
def active_rows(top_acts: Tensor, top_indices: Tensor | None, num_latents: int) -> Tensor:
    """Return the number of rows on which each latent is active, int64 [M]. Arguments as `fired`."""
    active = top_acts > 0
    if top_indices is None:
        return active.sum(dim=0)
    counts = torch.zeros(num_latents, dtype=torch.int64, device=top_acts.device)
    # Integer sums do not depend on the order of addition.
    return counts.scatter_add_(0, top_indices.flatten(), active.long().flatten())


@torch.no_grad()
def decoder_norm_range(W_dec: Tensor) -> dict[str, float]:
    """Return the smallest and the largest norm of a decoder's rows [M, E]."""
    norms = W_dec.norm(dim=1)  # [M]
    return {"decoder_norm_min": float(norms.min()), "decoder_norm_max": float(norms.max())}


@torch.no_grad()
def decoder_norms(W_dec: Tensor, parts: tuple[OutputSlice, ...]) -> dict[str, float]:
    """Return the mean norm of a crosscoder's decoder rows [M, E] at each hookpoint."""
    slices = torch.split(W_dec, [part.width for part in parts], dim=1)
    means = [total(piece.norm(dim=1).double()) / len(piece) for piece in slices]
    return {f"norm/{p.name}": float(mean) for p, mean in zip(parts, means, strict=True)}
