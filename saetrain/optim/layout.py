"""Names, shapes and dtypes of an optimiser's saved state, compared before it is loaded.

Kernels of an optimiser do not check the shapes of moments: one of another shape would be read
and written out of bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class StateLayout:
    """Tensors and numbers of a saved state after at least one update of every parameter."""

    tensors: dict[str, TensorSpec]
    """Tensors that it must hold, by name."""
    numbers: frozenset[str] = frozenset()
    """Numbers that it must hold."""
    optional: dict[str, TensorSpec] = field(default_factory=dict)
    """Tensors that it may hold."""
    optional_numbers: frozenset[str] = frozenset()
    """Numbers that it may hold."""


def spec_of(tensor: Tensor, dtype: torch.dtype | None = None) -> TensorSpec:
    """Return the shape of a tensor with its dtype, or another one."""
    return TensorSpec(tuple(tensor.shape), dtype or tensor.dtype)


COUNTER = TensorSpec((), torch.float32)
"""A number of updates, as torch's optimisers keep it."""
