"""Exact selection of the k largest of each row, in two small selections instead of a large one.

A row is cut into tiles of T neighbours. The k largest lie within the k tiles whose maxima are
largest: a tile outside these has k larger or equal maxima above all its numbers. So one
pass over the row finds the tiles' maxima, k tiles are selected by them, and k values among the
k·T in these tiles. Rows that are too wide even so select their tiles in the same way.

A selection compares numbers as integers of the same order (`keys`). It finds the k-th largest key
bit by bit: a bit is set if k keys or more are at least as large with it. All larger keys are
selected, and then the first of the equal ones until valid are k; a running count gives each its
slot. A NaN has the largest key, so its tile is among the selected ones and it is found; then
all values of its row are NaN. Padding has a key below all numbers', and valid are k numbers.

Letters: N tokens, M num_latents, K k, T width of a tile.
"""
# Triton's decorator and pointer arguments have no types that mypy could check.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from saetrain.kernels.on_triton.keys import DTYPES, bits_of, is_nan, ordered
from saetrain.kernels.on_triton.launch import device_of, power_of_two

MOST_K = 1024  # beyond it, torch.topk
DIRECT = 2048  # numbers among which one program selects without tiles
WIDEST = 2**13  # at most: 16 to each of its 512 threads, whose registers hold no more
WIDTHS = (8, 64)  # least and most of T: 16 bytes or more in one piece
MAXIMA_BLOCK = 4096  # numbers that a program reads of a row for its tiles' maxima


@triton.jit
def tile_maxima_kernel(
    numbers,  # [N, M]
    maxima,  # [N, tiles]
    M,
    tiles,
    TILES: tl.constexpr,
    T: tl.constexpr,
):
    """Find the maxima of one (row, TILES tiles) per program."""
    n = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    column = tile[:, None] * T + tl.arange(0, T)[None, :]
    x = tl.load(numbers + n * M + column, mask=column < M, other=float("-inf"))
    has_nan = tl.max(is_nan(x).to(tl.int32), axis=1)
    largest = tl.max(tl.where(is_nan(x), float("-inf"), x.to(tl.float32)), axis=1)
    largest = tl.where(has_nan > 0, float("nan"), largest)
    tl.store(maxima + n * tiles + tile, largest.to(maxima.dtype.element_ty), mask=tile < tiles)


@triton.jit
def select_kernel(
    numbers,  # [N, M]
    tiles,  # [N, K] int32: tiles to select within; None: the whole row
    values,  # [N, K], or None: write no values
    selected,  # [N, K] int64 or int32
    M,
    K,
    T: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Select from one row per program."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    if tiles is None:
        column = i
        valid = i < M
    else:
        valid = i // T < K
        tile = tl.load(tiles + n * K + i // T, mask=valid, other=0)
        column = tile * T + i % T
        valid = valid & (column < M)
    x = tl.load(numbers + n * M + column, mask=valid, other=0.0)
    key = tl.where(valid, ordered(x), 0)

    least = tl.full([], 0, dtype=tl.uint32)  # the K-th largest key
    for step in range(BITS):
        bit = tl.full([], 1, dtype=tl.uint32) << (BITS - 1 - step)
        trial = (least | bit).to(tl.uint32)
        enough = tl.sum((key >= trial).to(tl.int32), axis=0) >= K
        least = tl.where(enough, trial, least).to(tl.uint32)

    larger = (key > least).to(tl.int32)
    equal = (key == least).to(tl.int32)
    # Both counts in one scan: fewer than 2^11 are larger, at most 2^13 are equal.
    running = tl.cumsum(larger + equal * 2048, axis=0)
    larger_count = tl.sum(larger, axis=0)
    nth_larger = running % 2048
    nth_equal = running // 2048
    chosen = (larger > 0) | ((equal > 0) & (nth_equal <= K - larger_count))
    slot = tl.where(larger > 0, nth_larger, larger_count + nth_equal) - 1
    tl.store(selected + n * K + slot, column.to(selected.dtype.element_ty), mask=chosen)
    if values is not None:
        has_nan = tl.sum((valid & is_nan(x)).to(tl.int32), axis=0) > 0
        value = tl.where(has_nan, float("nan"), x.to(tl.float32))
        tl.store(values + n * K + slot, value.to(values.dtype.element_ty), mask=chosen)


def topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the k largest of each row, in any order: values [N, k], indices [N, k] int64.

    Of equal values, the same are taken every time. A row with a NaN gives
    NaN for all its values. Beyond k = 1024, and for float64, `torch.topk` selects.
    """
    N, M = pre_acts.shape
    if k > MOST_K or pre_acts.dtype not in DTYPES:
        values, indices = torch.topk(pre_acts, k, dim=-1, sorted=False)
        return values.masked_fill(pre_acts.isnan().any(dim=1, keepdim=True), math.nan), indices
    assert 1 <= k <= M
    pre_acts = pre_acts.contiguous()
    values = torch.empty(N, k, dtype=pre_acts.dtype, device=pre_acts.device)
    indices = torch.empty(N, k, dtype=torch.int64, device=pre_acts.device)
    if N:
        _select(pre_acts, values, indices)
    return values, indices


def tile_maxima(numbers: Tensor, width: int) -> Tensor:
    """Find the maximum of every `width` neighbours in each row, or NaN: [N, tiles]."""
    N, M = numbers.shape
    tiles = triton.cdiv(M, width)
    maxima = torch.empty(N, tiles, dtype=numbers.dtype, device=numbers.device)
    block = min(MAXIMA_BLOCK // width, power_of_two(tiles))
    with device_of(numbers):
        tile_maxima_kernel[(N, triton.cdiv(tiles, block))](
            numbers, maxima, M, tiles, TILES=block, T=width, num_warps=4
        )
    return maxima


def tile_width(num_latents: int, k: int) -> int:
    """Return T: 8 to 64, the power of two that makes both selections most nearly equally large."""
    balanced = round(math.log2(max(1.0, num_latents / k)) / 2)
    return min(max(1 << balanced, WIDTHS[0]), WIDTHS[1], WIDEST // power_of_two(k))


def _select(numbers: Tensor, values: Tensor | None, selected: Tensor) -> None:
    """Write the columns of each row's largest numbers, and the numbers unless `values` is None."""
    N, M = numbers.shape
    k = selected.shape[1]
    width = tile_width(M, k)
    tiles = None
    block = max(16, power_of_two(M))
    tiled = max(DIRECT, min(2 * k * width, WIDEST)) < M  # then there are more than k tiles
    if tiled:
        tiles = torch.empty(N, k, dtype=torch.int32, device=numbers.device)
        _select(tile_maxima(numbers, width), None, tiles)
        block = power_of_two(k * width)
    assert block <= WIDEST
    with device_of(numbers):
        select_kernel[(N,)](
            numbers,
            tiles,
            values,
            selected,
            M,
            k,
            T=width,
            BITS=bits_of(numbers.dtype),
            BLOCK=block,
            num_warps=max(1, block // 512),
        )
