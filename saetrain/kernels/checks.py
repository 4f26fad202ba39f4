"""Refusals that the encoder and the decoder share."""

from torch import Tensor


def check_vector(name: str, vector: Tensor | None, length: int) -> None:
    """Raise `ValueError` unless a vector has a length, or is None."""
    if vector is not None and vector.shape != (length,):
        raise ValueError(f"{name} must be [{length}], got shape {tuple(vector.shape)}")
