"""Parameters of a launch: the tensor's device, the dtype of sums, and the width of a block.

A warp reads 512 bytes at once, 16 by each of its 32 threads. Where a program has a block of
columns of 512 bytes times its number of warps, each thread has the same columns of every row
of the block, and sums over rows stay in its registers: no shared memory, no barrier.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

WARP_BYTES = 512


def wide(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype in which sums are formed."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return int(triton.next_power_of_2(number))


def columns(width: int, dtype: torch.dtype, most_bytes: int) -> tuple[int, int]:
    """Return how many columns of a row a program takes, and with how many warps.

    Args:
        width: columns of a row.
        dtype: type of the row's numbers.
        most_bytes: largest part of a row in one program, a power of two.
    """
    block = min(power_of_two(width), most_bytes // dtype.itemsize)
    block = max(block, 16)
    return block, max(1, block * dtype.itemsize // WARP_BYTES)


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
