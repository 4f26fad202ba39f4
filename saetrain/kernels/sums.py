"""Sums whose bits do not depend on the number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

from saetrain.kernels import backends as paths

_CHUNK = 4096


def total(values: Tensor) -> Tensor:
    """Sum of a vector [N].

    A sum over everything is split among threads once it is long enough; sums of at most 4,096
    numbers are not. A device has no such threads, and for each sum a launch.
    """
    if paths.host_can_read(values):
        return torch.stack([chunk.sum() for chunk in torch.split(values, _CHUNK)]).sum()
    return values.sum()
