"""The sparse autoencoder: encoding, decoding and unit-norm decoder rows.

TopK SAE of Gao et al., "Scaling and evaluating sparse autoencoders" (2024), section 2.3:

    z = TopK(ReLU(W_enc (x - b_dec) + b_enc)),    x̂ = W_decᵀ z + b_dec

or another activation (`saetrain.model.activations`) instead of TopK. Variants:

- an autoencoder reconstructs the rows that it reads; a crosscoder (Lindsey et al., "Sparse
  crosscoders for cross-layer features and model diffing", 2024) those of several hookpoints,
  concatenated;
- a transcoder (Dunefsky, Chlenski and Nanda, "Transcoders find interpretable LLM feature
  circuits", 2024) reads a module's input and predicts its output: b_dec is not subtracted from the
  input, and the decoder starts at zero, its rows of any norm;
- a skip transcoder (Paulo, Shabalin and Belrose, "Transcoders beat sparse autoencoders for
  interpretability", 2025) adds a linear path: x̂ has + W_skip x.

Letters: N tokens, D d_in, E width of the output (D except for transcoders), M num_latents, K k.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from actcache.errors import ConfigError
from saetrain.config.sae import MAX_SIZE, SaeConfig, SaeEntry
from saetrain.kernels import (
    Autoencoded,
    PrefixGroups,
    Selector,
    autoencode,
    dense_decode,
    normalise_rows_,
    project_,
    sparse_decode,
)
from saetrain.model.activations import (
    Activation,
    BatchTopK,
    Gated,
    GroupMax,
    JumpRelu,
    Latents,
    Relu,
    TopK,
)


class SaeOutput(NamedTuple):
    """Result of a forward pass."""

    reconstruction: Tensor
    """x̂. [N, E]"""
    top_acts: Tensor
    """Activations of the selected latents, not negative, [N, K]; of all latents, [N, M], where
    top_indices is None."""
    top_indices: Tensor | None
    """Indices of the selected latents, int64. [N, K]"""
    pre_acts: Tensor | None = None
    """Pre-activations; dense activations only. [N, M]"""


class Sae(nn.Module):
    """A sparse autoencoder, TopK unless another activation is given.

    Weights are initialised as in sparsify: encoder rows uniform in ±1/sqrt(D), decoder rows the
    same scaled to unit norm (zero for a transcoder), biases zero. Callers set `b_dec` to the data's
    mean before training.

    Args:
        d_in: width of the rows it reads, D.
        num_latents: number of latents, M.
        k: largest number of active latents per row, K; unused with a sparsity penalty.
        activation: an activation with this k, or with k = 0; None: TopK.
        d_out: width of the predicted rows, E; None: D.
        transcode: predict other rows than it reads.
        skip_connection: add a linear path from input to output.
        seed: seed of the initial weights, always drawn on the CPU.
        device: device of the weights.
        dtype: type of the weights.

    Raises:
        ConfigError: the sizes or the seed are out of range, or sizes that must be equal differ.
    """

    def __init__(
        self,
        d_in: int,
        num_latents: int,
        k: int,
        *,
        activation: Activation | None = None,
        d_out: int | None = None,
        transcode: bool = False,
        skip_connection: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.d_in, self.num_latents = d_in, num_latents
        self.d_out = d_in if d_out is None else d_out
        sizes = (d_in, num_latents, self.d_out)
        if not all(type(size) is int and 1 <= size <= MAX_SIZE for size in sizes):
            raise ConfigError(
                "an SAE's sizes are out of range", expected=f"1 to {MAX_SIZE}", got=sizes
            )
        if type(k) is not int or not 0 <= k <= num_latents:
            raise ConfigError("k is out of range", expected=f"0 to {num_latents}", got=k)
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise ConfigError("seed is out of range", expected="0 to 2**32 - 1", got=seed)
        if self.d_out != d_in and not transcode:
            raise ConfigError(
                "an autoencoder's output must be as wide as its input", expected=d_in, got=d_out
            )
        self.transcode = transcode
        W = torch.empty(num_latents, d_in, dtype=dtype)
        bound = d_in**-0.5
        W.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        self.W_enc = nn.Parameter(W.to(device))  # [M, D]
        self.b_enc = nn.Parameter(torch.zeros(num_latents, device=device, dtype=dtype))  # [M]
        W_dec = torch.zeros(num_latents, self.d_out, dtype=dtype) if transcode else W.clone()
        W_dec = W_dec.to(device)
        if not transcode:
            W_dec.div_(W_dec.norm(dim=1, keepdim=True) + torch.finfo(dtype).eps)
        self.W_dec = nn.Parameter(W_dec)  # [M, E]
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, device=device, dtype=dtype))  # [E]
        self.W_skip: nn.Parameter | None = None  # [E, D]
        if skip_connection:
            empty = torch.zeros(self.d_out, d_in, device=device, dtype=dtype)
            self.W_skip = nn.Parameter(empty)
        self.activation = TopK(k) if activation is None else activation
        assert self.activation.k in (0, k)

    @property
    def k(self) -> int:
        """Largest number of active latents per row, K; 0 with a sparsity penalty."""
        return self.activation.k

    @k.setter
    def k(self, k: int) -> None:
        assert self.activation.k > 0
        self.activation.k = k

    @property
    def subtracted(self) -> Tensor | None:
        """Bias that is subtracted from rows before encoding: b_dec; None for a transcoder."""
        return None if self.transcode else self.b_dec

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Split rows into the encoder's input [N, D] and the target [N, E].

        A transcoder's rows [N, D + E] are the concatenation of both. For other SAEs input and
        target are the same rows [N, D].
        """
        if not self.transcode:
            return rows, rows
        return rows[:, : self.d_in], rows[:, self.d_in :]

    def encode(self, x: Tensor) -> Latents:
        """Compute the latents of rows x [N, D]."""
        latents: Latents = self.activation.encode(x, self)
        return latents

    def decode(
        self, top_acts: Tensor, top_indices: Tensor | None, x: Tensor | None = None
    ) -> Tensor:
        """Reconstruct rows [N, E] from latents; a skip connection also needs the input x [N, D]."""
        if top_indices is not None:
            out = sparse_decode(top_acts, top_indices, self.W_dec, self.b_dec)
        else:
            out = dense_decode(top_acts, self.W_dec, self.b_dec)
        if self.W_skip is None:
            return out
        assert x is not None
        return out + x @ self.W_skip.T

    def forward(self, x: Tensor) -> SaeOutput:
        """Encode and decode x [N, D], which has the weights' dtype."""
        if (selector := self.activation.selector()) is not None:
            coded = self.autoencode(x, selector)
            return SaeOutput(coded.reconstructions[0], coded.top_acts, coded.top_indices)
        top_acts, top_indices, pre_acts = self.encode(x)
        out = self.decode(top_acts, top_indices, x)
        return SaeOutput(out, top_acts, top_indices, pre_acts)

    def autoencode(
        self,
        x: Tensor,
        selector: Selector,
        prefix_groups: PrefixGroups | None = None,
        rows: Tensor | None = None,
    ) -> Autoencoded:
        """Encode and decode x [N, D] with one backward pass; see `saetrain.kernels.autoencode`.

        Args:
            x: rows, [N, D].
            selector: selection of the latents, usually the activation's.
            prefix_groups: groups of latents whose running sums are returned as reconstructions.
            rows: latents whose weights are returned too, [A] int64.
        """
        weights = (self.W_enc, self.b_enc, self.subtracted, self.W_dec, self.b_dec)
        coded = autoencode(
            x, *weights, selector, prefix_groups=prefix_groups, rows=rows, active=self.k
        )
        if self.W_skip is None:
            return coded
        skipped = x @ self.W_skip.T  # [N, E]
        with_skip = tuple(out + skipped for out in coded.reconstructions)
        return coded._replace(reconstructions=with_skip)

    @torch.no_grad()
    def centre_encoder(self, mean: Tensor) -> None:
        """Set the encoder's biases so that the pre-activations of a row `mean` [D] are 0.

        For a transcoder, which subtracts no b_dec from its input: b_enc = -W_enc · mean, as in
        sparsify; and the same for the bias of gated's magnitudes.
        """
        assert self.transcode
        mean = mean.to(self.W_enc.device, torch.float64)
        weights, biases = (torch.split(p, _CENTRED) for p in (self.W_enc, self.b_enc))
        for W_enc, b_enc in zip(weights, biases, strict=True):
            b_enc.copy_(-(W_enc.double() * mean).sum(dim=1))
        if isinstance(self.activation, Gated):
            self.activation.b_mag.copy_(self.b_enc * self.activation.r_mag.exp())

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Scale every decoder row to unit Euclidean norm; do nothing for a transcoder."""
        if self.transcode:
            return
        normalise_rows_(self.W_dec)

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Remove the component of W_dec's gradient that is parallel to its rows.

        With unit rows w and gradient g: g - (g·w) w. Bricken et al., "Towards monosemanticity"
        (2023), appendix on training. A transcoder's gradient is left unchanged.
        """
        if self.transcode:
            return
        assert self.W_dec.grad is not None
        project_(self.W_dec, self.W_dec.grad)


_CENTRED = 1024
"""Latents whose encoder rows are held in float64 at once."""


def rows_of(entry: SaeEntry, activations: Mapping[str, Tensor]) -> Tensor:
    """Concatenate an SAE's rows of a batch: [N, D], or for a transcoder [N, D + E]; see `split`."""
    names = entry.hookpoints
    if len(names) == 1:
        return activations[names[0]]
    return torch.cat([activations[name] for name in names], dim=1)


def build_sae(
    config: SaeConfig,
    *,
    unit: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    log_threshold: bool = False,
) -> Sae:
    """Build an SAE with initial weights from its configuration.

    Args:
        config: configuration.
        unit: root of the variance of the rows it reads: JumpReLU's thresholds are multiples of it.
        seed: seed of the initial weights.
        device: device of the weights.
        dtype: type of the weights.
        log_threshold: take the logarithm of JumpReLU's thresholds as the parameter.
    """
    k, M = config.k, config.num_latents
    activation: Activation = TopK(k)
    if config.activation == "batchtopk":
        activation = BatchTopK(k, device)
    elif config.activation == "groupmax":
        activation = GroupMax(k)
    elif config.activation == "jumprelu":
        threshold, bandwidth = config.threshold * unit, config.bandwidth * unit
        activation = JumpRelu(
            M, threshold, bandwidth, log_threshold=log_threshold, device=device, dtype=dtype
        )
    elif config.activation == "relu":
        activation = Relu()
    elif config.activation == "gated":
        activation = Gated(M, device=device, dtype=dtype)
    return Sae(
        config.d_in,
        M,
        k,
        activation=activation,
        d_out=config.d_out,
        transcode=config.transcode,
        skip_connection=config.skip_connection,
        seed=seed,
        device=device,
        dtype=dtype,
    )
