"""The count-th largest of all N·M numbers: the threshold of BatchTopK.

Numbers are compared as integers of the same order (`keys`), a digit of 4 bits at a time from the
top: eight passes for float32, four for the 16-bit types. A pass counts, for each value of the next
digit, the numbers that have it and whose higher digits are those found so far; the threshold's
digit follows from the counts. These are integers, written per program, and all stays on the
device.

Only one pass reads all numbers. It finds the maxima of tiles of T neighbours, and their count-th
largest is found first: at least `count` numbers are as large, so the threshold is not below
it, and the digits are then counted only in tiles whose maximum reaches it.

Letters: N tokens, M num_latents, T width of a tile, P programs.
"""
# Triton's decorator and pointer arguments have no types that mypy could check.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from saetrain.kernels.on_triton.keys import DTYPES, bits_of, is_nan, number_of, ordered
from saetrain.kernels.on_triton.launch import device_of
from saetrain.kernels.on_triton.topk import tile_maxima

DIGIT = 4  # bits
WIDTH = 32  # T
BLOCK = 1024  # numbers that a program loads at once
PROGRAMS = 1056  # 8 on each of a Hopper chip's 132 processors
MOST_BLOCKS = 2**14  # blocks that a program counts: four counts of 16 bits share one integer


@triton.jit(do_not_specialize=["rows", "shift"])
def count_digits_kernel(
    numbers,  # [rows, M]
    maxima,  # [rows, tiles]: count in tiles only that reach `floor`; None: in all
    floor,  # [3] int64: a key, and two numbers that are not used
    state,  # [3] int64: the higher digits, the rank of the threshold below them, count of NaN
    counts,  # [P, 17] int32; the last is how many are NaN
    rows,
    M,
    tiles,  # of a row
    shift,  # bits below the digit
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the digits of every P-th block of tiles per program."""
    higher = tl.load(state)
    seen_0 = tl.zeros([BLOCK // T, T], dtype=tl.int64)
    seen_1 = tl.zeros([BLOCK // T, T], dtype=tl.int64)
    seen_2 = tl.zeros([BLOCK // T, T], dtype=tl.int64)
    seen_3 = tl.zeros([BLOCK // T, T], dtype=tl.int64)
    has_nan = tl.zeros([BLOCK // T, T], dtype=tl.int32)
    end = rows.to(tl.int64) * tiles
    begin = tl.program_id(0).to(tl.int64) * (BLOCK // T)
    for start in range(begin, end, tl.num_programs(0) * (BLOCK // T)):
        # `start` has 64 bits, but in the interpreter it is a Python number without a width.
        tile = start + tl.arange(0, BLOCK // T).to(tl.int64)
        live = tile < end
        if maxima is not None:
            largest = ordered(tl.load(maxima + tile, mask=live, other=0.0)).to(tl.int64)
            live = live & (largest >= tl.load(floor))
        column = (tile % tiles)[:, None] * T + tl.arange(0, T)[None, :]
        valid = live[:, None] & (column < M)
        x = tl.load(numbers + (tile // tiles)[:, None] * M + column, mask=valid, other=0.0)
        has_nan += (valid & is_nan(x)).to(tl.int32)
        key = ordered(x).to(tl.int64) >> shift
        valid = valid & (key // 16 == higher)
        digit = key % 16
        one = tl.full([], 1, dtype=tl.int64) << (digit % 4 * 16)
        seen_0 += tl.where(valid & (digit // 4 == 0), one, 0)
        seen_1 += tl.where(valid & (digit // 4 == 1), one, 0)
        seen_2 += tl.where(valid & (digit // 4 == 2), one, 0)
        seen_3 += tl.where(valid & (digit // 4 == 3), one, 0)
    counts += tl.program_id(0) * 17
    for field in tl.static_range(4):
        tl.store(counts + field, _total(seen_0, field))
        tl.store(counts + 4 + field, _total(seen_1, field))
        tl.store(counts + 8 + field, _total(seen_2, field))
        tl.store(counts + 12 + field, _total(seen_3, field))
    tl.store(counts + 16, tl.sum(tl.sum(has_nan, axis=1), axis=0))


@triton.jit
def _total(seen, field: tl.constexpr):
    """Sum one of the four counts in each integer."""
    one = ((seen >> (field * 16)) & 0xFFFF).to(tl.int32)
    return tl.sum(tl.sum(one, axis=1), axis=0)


@triton.jit(do_not_specialize=["programs"])
def narrow_kernel(
    counts,  # [P, 17] int32
    state,  # [3] int64
    programs,  # P
    BLOCK: tl.constexpr,
):
    """Append the threshold's next digit to the key, in one program."""
    value = tl.arange(0, 16)
    seen = tl.zeros([16], dtype=tl.int64)
    has_nan = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, programs, BLOCK):
        program = start + tl.arange(0, BLOCK)
        valid = program < programs
        position = counts + program[:, None] * 17 + value[None, :]
        found = tl.load(position, mask=valid[:, None] & (value[None, :] < 16), other=0)
        seen += tl.sum(found.to(tl.int64), axis=0)
        has_nan += tl.load(counts + program * 17 + 16, mask=valid, other=0)
    rank = tl.load(state + 1)
    # How many numbers have this digit or a larger one; it falls from the first digit to the last.
    reach = tl.where(value[:, None] <= value[None, :], seen[None, :], 0)
    at_least = tl.sum(reach, axis=1)
    digit = tl.sum((at_least >= rank).to(tl.int64), axis=0) - 1
    larger = tl.sum(tl.where(value > digit, seen, 0), axis=0)
    tl.store(state, tl.load(state) * 16 + digit)
    tl.store(state + 1, rank - larger)
    tl.store(state + 2, tl.load(state + 2) + tl.sum(has_nan, axis=0))


def batch_topk_threshold(pre_acts: Tensor, count: int) -> Tensor:
    """Find the count-th largest of all numbers, no dimensions; NaN if any of them is.

    For float64, `torch.topk` does.
    """
    total = pre_acts.numel()
    assert 1 <= count <= total
    if pre_acts.dtype not in DTYPES:
        least = torch.topk(pre_acts.flatten(), count).values[-1]
        return torch.where(pre_acts.isnan().any(), math.nan, least)
    pre_acts = pre_acts.contiguous()
    maxima = floor = None
    if count * WIDTH < total:  # fewer tiles are searched than there are
        maxima = tile_maxima(pre_acts, WIDTH)
        floor = _count_down(maxima, count, None, None)
    state = _count_down(pre_acts, count, maxima, floor)
    return number_of(state[0], pre_acts.dtype).masked_fill(state[2] > 0, math.nan)


def _count_down(numbers: Tensor, count: int, maxima: Tensor | None, floor: Tensor | None) -> Tensor:
    """Find the key of the count-th largest number and the count of NaN: entries 0 and 2 of [3]."""
    N, M = numbers.shape
    tiles = triton.cdiv(M, WIDTH)
    blocks = triton.cdiv(N * tiles * WIDTH, BLOCK)
    programs = min(blocks, max(PROGRAMS, triton.cdiv(blocks, MOST_BLOCKS)))
    state = torch.zeros(3, dtype=torch.int64, device=numbers.device)
    state[1:2].fill_(count)
    counts = torch.empty(programs, 17, dtype=torch.int32, device=numbers.device)
    with device_of(numbers):
        for shift in range(bits_of(numbers.dtype) - DIGIT, -1, -DIGIT):
            count_digits_kernel[(programs,)](
                numbers,
                maxima,
                floor,
                state,
                counts,
                N,
                M,
                tiles,
                shift,
                T=WIDTH,
                BLOCK=BLOCK,
                num_warps=8,
            )
            narrow_kernel[(1,)](counts, state, programs, BLOCK=64, num_warps=4)
    return state
