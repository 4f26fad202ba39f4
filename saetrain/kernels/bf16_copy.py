"""Copies of weights in bfloat16, so that a product under autocast need not cast its weight.

A copy is found by its weight, goes when that goes, and knows the version of the weight that it is
of: torch counts every write to a tensor, so one that nobody copied is noticed by itself. Updates
(`update.py`) write the copy in their own pass.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class _Shadow:
    copy: Tensor
    version: int
    """Of the weight, when it was copied."""


_SHADOWS: MutableMapping[Tensor, _Shadow] = WeakTensorKeyDictionary()


@torch.no_grad()
def keep_bf16_copy(weight: Tensor) -> None:
    """From now on keep a copy of a contiguous weight in bfloat16; make it right where it is not.

    One that would not be cast is left alone: of bfloat16, or of float64, which autocast leaves.
    """
    if weight.dtype not in (torch.float32, torch.float16):
        return
    assert weight.is_contiguous()
    bf16_copy = _SHADOWS.get(weight)
    if bf16_copy is None or bf16_copy.copy.device != weight.device:
        _SHADOWS[weight] = _Shadow(weight.to(torch.bfloat16), weight._version)
    elif bf16_copy.version != weight._version:
        bf16_copy.copy.copy_(weight)
        bf16_copy.version = weight._version


def bf16_copy_of(weight: Tensor) -> Tensor | None:
    """The weight in bfloat16, or rows of it; None: no copy is kept, or it is not right any more."""
    whole = weight if weight._base is None else weight._base
    bf16_copy = _SHADOWS.get(whole)
    if (
        bf16_copy is None
        or bf16_copy.version != whole._version
        or bf16_copy.copy.device != whole.device
    ):
        return None
    if whole is weight:
        return bf16_copy.copy
    offset = weight.storage_offset() - whole.storage_offset()
    return bf16_copy.copy.as_strided(weight.shape, weight.stride(), offset)


def mark_bf16_copy(weight: Tensor) -> None:
    """Say that the copy of a weight has just been written with it."""
    _SHADOWS[weight].version = weight._version
