"""Base class of the activations, and the latents that they return.

Letters: N tokens, D d_in, M num_latents, K k, S slots.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from saetrain.kernels import Selector, dense_encode, sparse_encode_by


class Latents(NamedTuple):
    """The latents of a batch."""

    top_acts: Tensor
    """Activations, not negative: [N, S], or of all latents [N, M] where top_indices is None."""
    top_indices: Tensor | None
    """Indices of the latents, int64. [N, S]"""
    pre_acts: Tensor | None = None
    """Pre-activations, differentiable, for the penalty; dense activations only. [N, M]"""


class Encoder(Protocol):
    """Weights of a `Sae` that an activation reads."""

    W_enc: nn.Parameter
    """[M, D]"""
    b_enc: nn.Parameter
    """[M]"""

    @property
    def subtracted(self) -> Tensor | None:
        """Bias that is subtracted from rows before encoding: b_dec [D], or None."""


class Activation:
    """Base class, without parameters or penalty; subclasses override `selector` or `encode`.

    One that has parameters or buffers is an `nn.Module` too.
    """

    k = 0
    """Largest number of active latents per row; 0 with a sparsity penalty."""

    compiles = False
    """Run the element-wise operations through torch.compile; read by JumpReLU and gated."""

    def encode(self, x: Tensor, encoder: Encoder) -> Latents:
        """Compute the latents of rows x [N, D]; sparse, by `selector`, unless overridden."""
        selector = self.selector()
        assert selector is not None
        W_enc, b_enc, b_dec = encoder.W_enc, encoder.b_enc, encoder.subtracted
        return Latents(*sparse_encode_by(x, W_enc, b_enc, b_dec, selector))

    def selector(self) -> Selector | None:
        """Return the selection of sparse latents; None: latents are dense."""
        return None

    def project(self) -> None:
        """Project parameters back into their valid range. Called before each step."""

    def observe(self, top_acts: Tensor, k_changed: bool = False) -> None:
        """Update buffers from a batch's activations. Called after each step.

        Args:
            top_acts: activations, as in `Latents`.
            k_changed: k differs from the last step's: earlier statistics are discarded.
        """
        del top_acts, k_changed

    def penalty(self, latents: Latents, norms: Tensor) -> Tensor | None:
        """Compute each row's sparsity penalty, [N]; None: the activation has no penalty.

        Args:
            latents: result of `encode`.
            norms: norms of the decoder's rows. [M]
        """
        del latents, norms
        return None

    def l0(self, latents: Latents) -> Tensor:
        """Return the number of active latents of each row, with a gradient. [N]"""
        raise AssertionError(f"{type(self).__name__} has no penalty on L0: {len(latents)}")

    def firing_shares(self, latents: Latents) -> Tensor:
        """Return the share of the rows on which each latent fires, with a gradient. [M]"""
        raise AssertionError(f"{type(self).__name__} has no penalty on L0: {len(latents)}")

    counts = False
    """Whether the penalty is a number of latents (L0); otherwise it has the unit of the rows."""

    def gate(self, latents: Latents) -> Tensor | None:
        """Return gate activations [N, M], trained with a frozen decoder; None: no gate."""
        del latents
        return None


def pre_activations(x: Tensor, encoder: Encoder) -> Tensor:
    """Compute (x - b_dec) W_encᵀ + b_enc. [N, M]"""
    return dense_encode(x, encoder.W_enc, encoder.b_enc, encoder.subtracted)
