"""Architecture of one sparse autoencoder: the fields of `cfg.json` and their validation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from actcache.errors import ConfigError


@dataclass(frozen=True)
class SaeConfig:
    """Architecture of an SAE, transcoder or crosscoder: the contents of `cfg.json`."""

    d_in: int
    """Width of the input, D; for a crosscoder, the sum over its hookpoints."""
    num_latents: int
    """Number of latents, M."""
    k: int
    """Number of latents that may be active at once, K; unused with jumprelu, relu and gated."""
    activation: ActivationName = "topk"
    """Activation function of the latents."""
    multi_topk: bool = False
    """Whether to add the loss of the reconstruction from 4k latents, with weight 1/8."""
    matryoshka: tuple[int, ...] = ()
    """Sizes of the nested dictionaries that must reconstruct alone, ascending; M is implied."""
    transcode: bool = False
    """Whether the target differs from the input. b_dec is then not subtracted from the input, and
    decoder rows may have any norm."""
    skip_connection: bool = False
    """Whether a linear map from input to output is added to the reconstruction."""
    d_out: int | None = None
    """Width of the output; null: d_in."""
    widths: tuple[int, ...] = ()
    """Widths of a crosscoder's hookpoints, in order; empty for other SAEs."""
    sparsity: float = 0.0
    """Weight of the penalty: on L0 (jumprelu), or on L1 in units of the rows' standard deviation
    (relu, gated)."""
    threshold: float = 0.01
    """Initial threshold of jumprelu, in units of the rows' standard deviation."""
    bandwidth: float = 0.05
    """Width of the window around jumprelu's threshold in which it has a gradient, same unit."""

    @property
    def width_out(self) -> int:
        """Width of the output: `d_out`, or `d_in` if that is None."""
        return self.d_in if self.d_out is None else self.d_out

    def __post_init__(self) -> None:
        """Reject invalid sizes and combinations."""
        require_sae(self)


ActivationName = Literal["topk", "batchtopk", "groupmax", "jumprelu", "relu", "gated"]


def require_sae(sae: SaeConfig) -> None:
    """Reject invalid sizes and combinations; raises `ConfigError`."""
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
            "--activation groupmax selects one latent from each of k equal groups",
            expected=f"a number of latents divisible by --k {sae.k}",
            got=sae.num_latents,
            remedy="another --k or --num-latents",
        )
    if sae.multi_topk and sae.activation != "topk":
        raise ConfigError(
            "--multi-topk needs --activation topk",
            got=sae.activation,
            remedy="omit one of them",
        )
    sizes = (0, *sae.matryoshka, sae.num_latents)
    if any(low >= high for low, high in pairwise(sizes)):
        raise ConfigError(
            "--matryoshka takes ascending numbers of latents",
            expected=f"1 to {sae.num_latents - 1}, each larger than the previous",
            got=list(sae.matryoshka),
            remedy="another order, or more --num-latents",
        )
    if sae.multi_topk and sae.matryoshka:
        raise ConfigError(
            "--multi-topk and --matryoshka are mutually exclusive",
            expected="one of them",
            remedy="omit one of them",
        )
    if sae.widths and (sum(sae.widths) != sae.d_in or sae.transcode):
        raise ConfigError(
            "a crosscoder reads and predicts all of its hookpoints",
            expected=f"d_in {sum(sae.widths)}, no --transcode",
            got=sae,
        )
    if sae.d_out not in (None, sae.d_in) and not sae.transcode:
        raise ConfigError("an autoencoder's output must be as wide as its input", got=sae)
    require_range(sae, ">= 0", "sparsity", "threshold")
    require_range(sae, "> 0", "bandwidth")


_RANGES: dict[str, Callable[[float], bool]] = {
    ">= 1": lambda x: x >= 1,
    ">= 0": lambda x: 0 <= x < math.inf,
    "> 0": lambda x: 0 < x < math.inf,
    "0 to 1": lambda x: 0 <= x <= 1,
    "0 to 2**32 - 1": lambda x: 0 <= x < 2**32,
}


def require_range(options: object, expected: str, *names: str) -> None:
    """Reject options outside a range, one of the keys of `_RANGES`. None is accepted."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not _RANGES[expected](value):
            raise ConfigError(f"{flag(name)} is out of range", expected=expected, got=value)


def flag(name: str) -> str:
    """Return an option's name on the command line."""
    return "--" + name.replace("_", "-")


PENALISED = {"jumprelu": 1e-3, "relu": 3e-2, "gated": 3e-2}
"""Activations made sparse by a penalty instead of k, with the penalty's default weight."""

ANNEALED = ("topk", "batchtopk")
"""Activations that support --k-anneal-steps."""
