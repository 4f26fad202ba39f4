"""What one sparse autoencoder is, and which combinations cannot be built."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from actcache.errors import ConfigError


@dataclass(frozen=True)
class SaeConfig:
    """One sparse autoencoder, transcoder or crosscoder: the contents of `cfg.json`."""

    d_in: int
    """Width of what is encoded, D; of a crosscoder, of all its hookpoints together."""
    num_latents: int
    """Latents, M."""
    k: int
    """Latents that may be active at once, K; unused where a penalty makes latents sparse."""
    activation: ActivationName = "topk"
    """How latents become active."""
    multi_topk: bool = False
    """Whether the loss of 4k latents is trained on too, at 1/8."""
    matryoshka: tuple[int, ...] = ()
    """Numbers of first latents that must reconstruct alone, rising; M itself goes without saying"""
    transcode: bool = False
    """Whether it predicts other rows than those it reads; b_dec is then not taken from them, and
    decoder rows may have any norm."""
    skip_connection: bool = False
    """Whether it has a linear path from input to output beside its latents."""
    d_out: int | None = None
    """Width of what is predicted; null: d_in."""
    widths: tuple[int, ...] = ()
    """Widths of a crosscoder's hookpoints, in order; none: it is no crosscoder."""
    sparsity: float = 0.0
    """Weight of the penalty: on L0 (jumprelu), or on L1 in roots of the variance (relu, gated)."""
    threshold: float = 0.01
    """Where jumprelu's thresholds begin, in roots of the variance."""
    bandwidth: float = 0.05
    """Width of the window in which jumprelu's thresholds feel a gradient, in the same unit."""

    @property
    def width_out(self) -> int:
        """Width of what is predicted."""
        return self.d_in if self.d_out is None else self.d_out

    def __post_init__(self) -> None:
        """Refuse sizes and combinations that cannot be built."""
        require_sae(self)


ActivationName = Literal["topk", "batchtopk", "groupmax", "jumprelu", "relu", "gated"]


def require_sae(sae: SaeConfig) -> None:
    """Refuse sizes and combinations that cannot be built."""
    if min(sae.d_in, sae.num_latents, sae.k, sae.width_out, *sae.widths, 1) < 1:
        raise ConfigError("an SAE's sizes must be positive", got=sae)
    if sae.k > sae.num_latents and sae.activation not in PENALISED:
        raise ConfigError(
            "--k is larger than the number of latents",
            expected=f"<= {sae.num_latents}",
            got=sae.k,
            remedy="a smaller --k, or more --num-latents",
        )
    if sae.activation == "groupmax" and sae.num_latents % sae.k:
        raise ConfigError(
            "--activation groupmax takes one latent of each of k equal groups",
            expected=f"a number of latents that --k {sae.k} divides",
            got=sae.num_latents,
            remedy="another --k or --num-latents",
        )
    if sae.multi_topk and sae.activation != "topk":
        raise ConfigError(
            "--multi-topk goes with --activation topk",
            got=sae.activation,
            remedy="leave one of them out",
        )
    rising = (0, *sae.matryoshka, sae.num_latents)
    if any(low >= high for low, high in pairwise(rising)):
        raise ConfigError(
            "--matryoshka takes rising numbers of latents",
            expected=f"1 to {sae.num_latents - 1}, each larger than the one before",
            got=list(sae.matryoshka),
            remedy="another order, or more --num-latents",
        )
    if sae.multi_topk and sae.matryoshka:
        raise ConfigError(
            "--multi-topk and --matryoshka are two ways to train one dictionary at many sizes",
            expected="one of them",
            remedy="leave one of them out",
        )
    if sae.widths and (sum(sae.widths) != sae.d_in or sae.transcode):
        raise ConfigError(
            "a crosscoder reads and predicts all of its hookpoints",
            expected=f"d_in {sum(sae.widths)}, no --transcode",
            got=sae,
        )
    if sae.d_out not in (None, sae.d_in) and not sae.transcode:
        raise ConfigError("an autoencoder's output is as wide as its input", got=sae)
    for name in ("sparsity", "threshold"):
        value = getattr(sae, name)
        if not 0 <= value < float("inf"):
            raise ConfigError(f"--{name} is out of range", expected=">= 0", got=value)
    if not 0 < sae.bandwidth < float("inf"):
        raise ConfigError("--bandwidth is out of range", expected="> 0", got=sae.bandwidth)


PENALISED = {"jumprelu": 1e-3, "relu": 3e-2, "gated": 3e-2}
"""Activations that a penalty makes sparse instead of k, and the penalty's weight by default."""


ANNEALED = ("topk", "batchtopk")
"""Activations whose k may fall in a run."""
