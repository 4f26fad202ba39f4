"""Floating numbers as unsigned integers in the same order.

A positive number's bits, read as an integer, grow with it; a negative one's fall. So the key of a
number is its bits with the sign bit set, or, of a negative one, with all bits inverted. Every
NaN has the largest key. No number has key 0, the key of padding: it is below -inf.
"""
# Triton's decorator and pointer arguments have no types that mypy could check.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def bits_of(dtype: torch.dtype) -> int:
    """Return the number of bits of a key: 32 or 16."""
    return dtype.itemsize * 8


@triton.jit
def is_nan(x):
    """Mark where x is NaN, in float32: Triton's interpreter compares bfloat16 by its bits."""
    x = x.to(tl.float32)
    return x != x


@triton.jit
def ordered(x):
    """Compute the keys of x as uint32; those of 16-bit numbers are below 2^16."""
    if x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        key = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
        largest = 0xFFFFFFFF
    else:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32)
        key = tl.where(bits >> 15 != 0, 0xFFFF - bits, bits | 0x8000)
        largest = 0xFFFF
    return tl.where(is_nan(x), largest, key).to(tl.uint32)


def number_of(key: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the numbers of type `dtype` from their keys, int64: the inverse of `ordered`."""
    if dtype == torch.float32:
        bits = torch.where(key >> 31 != 0, key - 2**31, 2**32 - 1 - key)
        signed = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)
    else:
        bits = torch.where(key >> 15 != 0, key - 2**15, 2**16 - 1 - key)
        signed = torch.where(bits >= 2**15, bits - 2**16, bits).to(torch.int16)
    return signed.view(dtype)
