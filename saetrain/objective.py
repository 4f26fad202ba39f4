"""What is trained on besides the FVU, as numbers: the losses themselves stand in `losses`.

AuxK goes with all of these; its weight is the run's.
"""

from __future__ import annotations

from dataclasses import dataclass

from saetrain.config import SaeConfig


@dataclass(frozen=True)
class Part:
    """A hookpoint of a crosscoder: its own columns of what is predicted."""

    name: str
    """Hookpoint."""
    width: int
    """Its columns."""
    variance: float
    """Mean of ‖x - mean‖² over its training rows."""


@dataclass(frozen=True)
class Objective:
    """Additions to the FVU of one SAE."""

    multi_topk: bool = False
    """Train on the reconstruction from 4k latents too."""
    prefixes: tuple[int, ...] = ()
    """Numbers of first latents that must reconstruct alone; without M."""
    sparsity: float = 0.0
    """Weight of the activation's penalty, after its warm-up."""
    warmup: int = 0
    """Steps in which that weight rises from 0."""
    parts: tuple[Part, ...] = ()
    """Of a crosscoder, at least two; none: what is predicted is one hookpoint's."""
    gated: bool = False
    """Whether the activation has a gate that must reconstruct by itself."""

    def sparsity_at(self, step: int) -> float:
        """Weight of the penalty in a step (from 0)."""
        return self.sparsity * min(1.0, (step + 1) / max(1, self.warmup))

    @property
    def names(self) -> tuple[str, ...]:
        """What the losses are called, in the order of `Losses.terms`."""
        names = [f"fvu/{part.name}" for part in self.parts]
        names += ["multi_topk_fvu"] * self.multi_topk
        names += [f"fvu_{prefix}" for prefix in self.prefixes]
        names += ["penalty"] * (self.sparsity > 0)
        names += ["gate_fvu"] * self.gated
        return tuple(names)


PLAIN = Objective()
"""The FVU, and AuxK."""


def objective_of(config: SaeConfig, warmup: int, parts: tuple[Part, ...] = ()) -> Objective:
    """What an SAE of this kind is trained on.

    Args:
        config: its kind.
        warmup: steps in which a penalty rises.
        parts: hookpoints of a crosscoder.
    """
    return Objective(
        multi_topk=config.multi_topk,
        prefixes=config.matryoshka,
        sparsity=config.sparsity,
        warmup=warmup,
        parts=parts,
        gated=config.activation == "gated",
    )
