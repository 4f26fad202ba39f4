"""The largest of each group. Letters: N tokens, M num_latents, K k."""

import math

import pytest
import torch

from saetrain.kernels import on_triton, reference

SIZES = [(1, 1), (6, 6), (6, 1), (90, 10), (96, 32), (5000, 2), (3000, 1000)]


@pytest.mark.parametrize(
    "of", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_first_of_each_groups_largest_is_taken(size, of, device):
    M, k = size
    generator = torch.Generator().manual_seed(M)
    pre_acts = torch.randn(5, M, generator=generator)
    pre_acts[1] = pre_acts[1].round()  # equals, and zeros of both signs
    pre_acts[2] = -math.inf
    pre_acts[3] = -0.0
    pre_acts[3, -1] = 0.0
    pre_acts[4, M // 2] = math.nan
    pre_acts = pre_acts.to(device, of)
    values, indices = on_triton.group_max(pre_acts, k)
    want, places = reference.group_max(pre_acts, k)
    assert values.dtype == of
    torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, places)


def test_no_tokens_have_no_groups(device):
    values, indices = on_triton.group_max(torch.empty(0, 6, device=device), 3)
    assert values.shape == indices.shape == (0, 3)
