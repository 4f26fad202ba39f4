"""What an autoencoder and its losses ask of an activation.

Letters: N tokens, D d_in, M num_latents, K k, S slots.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from saetrain.kernels import Selector, dense_encode, sparse_encode_by


class Latents(NamedTuple):
    """The latents of a batch."""

    top_acts: Tensor
    """Activations, not negative; [N, S], or of all latents, [N, M], where top_indices is None."""
    top_indices: Tensor | None
    """Their numbers, int64. [N, S]"""
    pre_acts: Tensor | None = None
    """What a penalty is taken of, with its gradient; only if dense. [N, M]"""


class Encoder(Protocol):
    """The weights that an activation is given: those of a `Sae`."""

    W_enc: nn.Parameter
    """[M, D]"""
    b_enc: nn.Parameter
    """[M]"""

    @property
    def subtracted(self) -> Tensor | None:
        """What is taken from rows before they are encoded: b_dec [D], or nothing."""


class Activation(nn.Module):
    """Base of all activations; without parameters or penalty, override `selector` or `encode`."""

    k = 0
    """Latents that may be active at once; 0 where a penalty decides."""

    compiles = False
    """Whether what it does to [N, M] numbers is compiled; for those that say so."""

    def encode(self, x: Tensor, encoder: Encoder) -> Latents:
        """Latents of rows x [N, D]; sparse unless an activation does it itself."""
        selector = self.selector()
        assert selector is not None
        W_enc, b_enc, b_dec = encoder.W_enc, encoder.b_enc, encoder.subtracted
        return Latents(*sparse_encode_by(x, W_enc, b_enc, b_dec, selector))

    def selector(self) -> Selector | None:
        """How latents are selected where they come sparse; else None."""
        return None

    def project(self) -> None:
        """Bring parameters back to where they mean something. Before each step."""

    def observe(self, top_acts: Tensor, anew: bool = False) -> None:
        """Learn from a batch's activations what is not learnt by gradient. After each step.

        Args:
            top_acts: as `Latents` has them.
            anew: whether k is another than before, so that what was learnt is void.
        """
        del top_acts, anew

    def penalty(self, latents: Latents, norms: Tensor) -> Tensor | None:
        """What makes latents sparse, of each row: [N], or None if nothing has to.

        Args:
            latents: what `encode` gave.
            norms: of the decoder's rows. [M]
        """
        del latents, norms
        return None

    counts = False
    """Whether the penalty is a number of latents, and not in the unit of the rows."""

    def gate(self, latents: Latents) -> Tensor | None:
        """Activations [N, M] that must reconstruct by themselves through a frozen decoder."""
        del latents
        return None


def pre_activations(x: Tensor, encoder: Encoder) -> Tensor:
    """(x - b_dec) W_encᵀ + b_enc: [N, M]."""
    return dense_encode(x, encoder.W_enc, encoder.b_enc, encoder.subtracted)
