"""The sparse autoencoder: encode, decode, and what keeps its decoder rows at unit norm.

TopK SAE of Gao et al., "Scaling and evaluating sparse autoencoders" (2024), section 2.3:

    z = TopK(ReLU(W_enc (x - b_dec) + b_enc)),    x̂ = W_decᵀ z + b_dec

or another activation (`saetrain.model.activations`) in TopK's place. It reads and predicts

- the same rows, an autoencoder; of several hookpoints side by side, a crosscoder (Lindsey et al.,
  "Sparse crosscoders for cross-layer features and model diffing", 2024);
- a module's input and output, a transcoder (Dunefsky, Chlenski and Nanda, "Transcoders find
  interpretable LLM feature circuits", 2024): b_dec belongs to the output alone, is not taken from
  the input, and the decoder begins at zero, its rows of any norm;
- that with a linear path beside the latents, a skip transcoder (Paulo, Shabalin and Belrose,
  "Transcoders beat sparse autoencoders for interpretability", 2025): x̂ has + W_skip x.

Imports torch, `saetrain.kernels` and `saetrain.model.activations` only.
Letters: N tokens, D d_in, E width of the output (D but for transcoders), M num_latents, K k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

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
from saetrain.model.activations import Activation, Latents, TopK


class SaeOutput(NamedTuple):
    """What a forward pass gives."""

    reconstruction: Tensor
    """x̂. [N, E]"""
    top_acts: Tensor
    """Activations of the chosen latents, not negative. [N, K]; of all, where top_indices is None:
    [N, M]"""
    top_indices: Tensor | None
    """Their numbers, int64. [N, K]"""
    pre_acts: Tensor | None = None
    """What dense activations were made of. [N, M]"""


class Sae(nn.Module):
    """A sparse autoencoder, TopK unless another activation is given.

    Weights begin as in sparsify: encoder rows uniform in ±1/sqrt(D), decoder rows the same at unit
    norm (a transcoder's zero), biases zero; set `b_dec` to the data's mean before training.

    Args:
        d_in: width of the activations, D.
        num_latents: latents, M.
        k: latents that may be active at once, K; says nothing where a penalty decides.
        activation: TopK with this k if None; else one with this k, or none.
        d_out: width of what is predicted, E; D if None.
        transcode: whether that are other rows than those it reads.
        skip_connection: whether there is a linear path beside the latents.
        seed: seed of the initial weights, drawn on the CPU whatever the device.
        device: where the weights live.
        dtype: their type.
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
        assert transcode or self.d_out == d_in
        self.transcode = transcode
        W = torch.empty(num_latents, d_in, dtype=dtype)
        bound = d_in**-0.5
        W.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        self.W_enc = nn.Parameter(W.to(device))  # [M, D]
        self.b_enc = nn.Parameter(torch.zeros(num_latents, device=device, dtype=dtype))  # [M]
        W_dec = torch.zeros(num_latents, self.d_out, dtype=dtype) if transcode else W.clone()
        self.W_dec = nn.Parameter(W_dec.to(device))  # [M, E]
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, device=device, dtype=dtype))  # [E]
        self.W_skip: nn.Parameter | None = None  # [E, D]
        if skip_connection:
            empty = torch.zeros(self.d_out, d_in, device=device, dtype=dtype)
            self.W_skip = nn.Parameter(empty)
        self.activation = TopK(k) if activation is None else activation
        assert self.activation.k in (0, k)
        self.normalise_decoder()

    @property
    def k(self) -> int:
        """Latents that may be active at once: the activation's."""
        return self.activation.k

    @k.setter
    def k(self, k: int) -> None:
        assert self.activation.k > 0
        self.activation.k = k

    @property
    def subtracted(self) -> Tensor | None:
        """What is taken from rows before they are encoded: b_dec, but not by a transcoder."""
        return None if self.transcode else self.b_dec

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What is read [N, D] and what is to be predicted [N, E].

        A transcoder's rows [N, D + E] hold both side by side, another's [N, D] are both.
        """
        if not self.transcode:
            return rows, rows
        return rows[:, : self.d_in], rows[:, self.d_in :]

    def encode(self, x: Tensor) -> Latents:
        """Latents of rows x [N, D]."""
        latents: Latents = self.activation.encode(x, self)
        return latents

    def decode(
        self, top_acts: Tensor, top_indices: Tensor | None, x: Tensor | None = None
    ) -> Tensor:
        """Reconstruction [N, E] from latents, and from rows x [N, D] if there is a skip."""
        if top_indices is not None:
            out = sparse_decode(top_acts, top_indices, self.W_dec, self.b_dec)
        else:
            out = dense_decode(top_acts, self.W_dec, self.b_dec)
        if self.W_skip is None:
            return out
        assert x is not None
        return out + x @ self.W_skip.T

    def forward(self, x: Tensor) -> SaeOutput:
        """Encode and decode x [N, D], in the weights' type."""
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
            selector: how latents are selected: the activation's, mostly.
            prefix_groups: whose running sums are reconstructions, too.
            rows: latents whose weights are wanted besides, [A] int64.
        """
        weights = (self.W_enc, self.b_enc, self.subtracted, self.W_dec, self.b_dec)
        coded = autoencode(x, *weights, selector, prefix_groups=prefix_groups, rows=rows)
        if self.W_skip is None:
            return coded
        skipped = x @ self.W_skip.T  # [N, E]
        with_skip = tuple(out + skipped for out in coded.reconstructions)
        return coded._replace(reconstructions=with_skip)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Give every decoder row unit Euclidean norm; not a transcoder's."""
        if self.transcode:
            return
        normalise_rows_(self.W_dec)

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Take from W_dec's gradient what would only change the norm of its rows.

        With unit rows w and gradient g: g - (g·w) w. Bricken et al., "Towards monosemanticity"
        (2023), appendix on training. Nothing is taken from a transcoder's.
        """
        if self.transcode:
            return
        assert self.W_dec.grad is not None
        project_(self.W_dec, self.W_dec.grad)
