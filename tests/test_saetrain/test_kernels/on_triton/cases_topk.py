"""Exact selection. Letters: N tokens, M num_latents, K k."""

import math

import pytest
import torch

from saetrain.kernels import on_triton, reference
from saetrain.kernels.on_triton.topk import DIRECT, MOST_K, WIDEST, tile_maxima, tile_width

HALVES_AND_SINGLE = pytest.mark.parametrize(
    "of", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
# Widths that are powers of two and not, in one selection, in two, and in three.
SIZES = [
    *[(1, 1), (2, 2), (5, 1), (37, 37), (64, 5), (1000, 32), (2048, 512), (1025, 1024)],
    *[(DIRECT + 1, 1), (3000, 16), (4096, 64), (8193, 512), (9000, 1024), (10007, 7), (70001, 3)],
]


def rows(M, of, device):
    """Random; rounded, so that many are equal; all equal; negative; infinite; hardly any finite."""
    generator = torch.Generator().manual_seed(M)
    random = torch.randn(1, M, generator=generator)
    made = torch.cat([random, random.round(), random * 0 - 1.5, -random.abs() - 1, random, random])
    made[4, ::3] = math.inf
    made[4, 1::3] = -math.inf
    made[5] = -math.inf
    made[5, M // 2] = 2.0
    return made.to(device, of)


def check(pre_acts, k, spoiled=()):
    values, indices = on_triton.topk(pre_acts, k)
    want, _ = reference.topk(pre_acts, k)
    assert values.dtype == pre_acts.dtype
    assert indices.dtype == torch.int64
    assert values.shape == indices.shape == (len(pre_acts), k)
    assert bool(((indices >= 0) & (indices < pre_acts.shape[1])).all())
    assert bool((indices.sort().values.diff() > 0).all()), "a latent is selected twice"
    sound = [n for n in range(len(pre_acts)) if n not in spoiled]
    assert bool(values[list(spoiled)].isnan().all())
    # The same numbers as often; and each is that of its latent.
    assert torch.equal(values[sound].sort().values, want[sound].sort().values)
    assert torch.equal(pre_acts.gather(1, indices)[sound], values[sound])


@HALVES_AND_SINGLE
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_selection_equals_that_of_torch(size, of, device):
    M, k = size
    check(rows(M, of, device), k)


@HALVES_AND_SINGLE
@pytest.mark.parametrize("size", [(5, 5), (100, 3), (5000, 7), (3000, 64)], ids=str)
def test_a_nan_anywhere_gives_nan_for_all_of_its_row_and_for_no_other(size, of, device):
    M, k = size
    pre_acts = rows(M, of, device)
    for row, place in ((0, 0), (1, M // 2), (3, M - 1)):
        pre_acts[row, place] = math.nan
    pre_acts[3] = -pre_acts[3]  # its sign bit is no matter
    pre_acts[4] = math.nan
    check(pre_acts, k, spoiled=(0, 1, 3, 4))


def test_every_number_of_sixteen_bits_keeps_its_place(device):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    for of in (torch.bfloat16, torch.float16):
        every = bits.view(of)
        every = every[~every.isnan()][None].to(device)
        for k in (1, 900):
            check(every, k)
            check(every.flip(1), k)


def test_the_smallest_and_the_largest_numbers_of_float32_keep_their_place(device):
    tiny, big = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    numbers = [-math.inf, -big, -1.0, -tiny, -1e-45, -0.0, 0.0, 1e-45, tiny, 1.0, big, math.inf]
    every = torch.tensor([numbers], device=device)
    for k in range(1, len(numbers) + 1):
        check(every, k)


def test_padding_is_never_selected_where_all_that_there_is_is_minus_infinity(device):
    for M, k in ((5, 5), (33, 32), (DIRECT + 3, 100)):
        check(torch.full((2, M), -math.inf, device=device), k)


def test_rows_that_are_not_contiguous_and_none_at_all_are_taken(device):
    check(rows(3000, torch.float32, device)[:, ::2], 9)
    values, indices = on_triton.topk(torch.empty(0, 7, device=device), 3)
    assert values.shape == indices.shape == (0, 3)


def test_selection_is_the_same_every_time_among_equals(device):
    pre_acts = rows(5000, torch.bfloat16, device)
    _, first = on_triton.topk(pre_acts, 50)
    assert torch.equal(first, on_triton.topk(pre_acts, 50)[1])


def test_what_the_kernels_do_not_select_torch_does(device):
    pre_acts = rows(MOST_K + 10, torch.float32, device)
    check(pre_acts, MOST_K + 1)
    pre_acts = rows(50, torch.float64, device)
    pre_acts[2, 3] = math.nan
    check(pre_acts, 5, spoiled=(2,))


@HALVES_AND_SINGLE
def test_maxima_of_tiles_are_those_of_neighbours_and_of_what_is_left(of, device):
    pre_acts = rows(1000, of, device)
    pre_acts[0, 37] = math.nan
    maxima = tile_maxima(pre_acts, 32)
    padded = torch.nn.functional.pad(pre_acts.float(), (0, 24), value=-math.inf)
    want = padded.view(6, 32, 32).amax(dim=-1).to(of)
    torch.testing.assert_close(maxima, want, rtol=0, atol=0, equal_nan=True)


def test_tiles_fit_one_program_whatever_is_selected():
    for M in (2049, 24576, 65536, 131072, 10**6, 10**8):
        for k in (1, 2, 31, 32, 64, 100, 300, 512, 1024):
            width = tile_width(M, k)
            assert 8 <= width <= 64
            assert k * width <= WIDEST
            assert M <= WIDEST or M / width > k
