"""The count-th largest of a batch. Letters: N tokens, M num_latents."""

import math

import pytest
import torch

from saetrain.kernels import on_triton, reference

TYPES = pytest.mark.parametrize(
    "of", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)


def numbers(N, M, of, device):
    generator = torch.Generator().manual_seed(N)
    made = torch.randn(N, M, generator=generator)
    made[:, ::7] = made[:, ::7].round()
    made[0, :2] = torch.tensor([math.inf, -math.inf])[: made[0, :2].numel()]
    return made.to(device, of)


@TYPES
@pytest.mark.parametrize("shape", [(1, 1), (40, 1), (7, 300)], ids=str)
def test_the_threshold_is_exactly_the_number_of_that_rank(shape, of, device):
    pre_acts = numbers(*shape, of, device)
    total = pre_acts.numel()
    for count in {(total + 31) // 32, total // 2 + 1}:  # among few tiles, and among all numbers
        got = on_triton.batch_topk_threshold(pre_acts, count)
        assert got.shape == ()
        assert got.dtype == of
        assert torch.equal(got, reference.batch_topk_threshold(pre_acts, count)), count


@TYPES
def test_a_nan_anywhere_makes_the_threshold_nan(of, device):
    pre_acts = numbers(5, 200, of, device)
    pre_acts[-1, -1] = math.nan
    for count in (9, 1000):
        assert bool(on_triton.batch_topk_threshold(pre_acts, count).isnan())


def test_numbers_that_are_all_equal_and_all_minus_infinity_are_ranked(device):
    for value in (-3.0, -math.inf, math.inf):
        pre_acts = torch.full((5, 70), value, device=device, dtype=torch.bfloat16)
        assert on_triton.batch_topk_threshold(pre_acts, 9).item() == value


def test_numbers_that_are_not_contiguous_are_ranked(device):
    pre_acts = numbers(30, 50, torch.bfloat16, device).t()
    want = reference.batch_topk_threshold(pre_acts, 9)
    assert torch.equal(on_triton.batch_topk_threshold(pre_acts, 9), want)
