"""Selections of the CPU's backends compared with `torch.topk`, except among equal values.

Letters: N tokens, M num_latents, K k.
"""

import pytest
import torch

from saetrain.kernels import topk
from saetrain.kernels.on_torch.selection import tile_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")
SIZES = [(1, 1), (5, 5), (33, 7), (130, 1), (1000, 3), (4096, 32), (4096, 33), (4608, 32)]
SIZES += [(5003, 32), (8192, 1), (70_000, 512), (65_536, 512), (2048, 2048), (1024, 512)]


@pytest.fixture(params=["reference", "torch"])
def backend(request):
    return request.param


def make(N, M, dtype=torch.float32, seed=0):
    return torch.randn(N, M, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(pre_acts, k, backend):
    """Check that values are the k largest, and indices theirs, without duplicates."""
    values, indices = topk(pre_acts, k, backend=backend)
    assert values.shape == indices.shape == (len(pre_acts), k)
    assert values.dtype == pre_acts.dtype
    assert indices.dtype == torch.int64
    assert torch.equal(pre_acts.gather(1, indices), values)
    assert all(len(set(row.tolist())) == k for row in indices)
    want = torch.topk(pre_acts, k).values
    assert torch.equal(values.sort(dim=1, descending=True).values, want)


@pytest.mark.parametrize("number", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "K"), SIZES)
def test_the_k_largest_of_each_row_are_selected(M, K, number, backend):
    check(make(3, M, number), K, backend)


@pytest.mark.parametrize("number", DTYPES, ids=str)
def test_special_rows_are_selected_from_correctly(number, backend):
    rows = make(10, 5003, number)
    rows[0] = 0.25
    rows[1] = rows[1].abs().neg() - 1
    rows[2] = -INF
    rows[3, ::7] = INF
    rows[4, 4990:] = INF  # in what is left of the row beside whole tiles
    rows[5, 10:] = -INF  # fewer than k numbers
    rows[6] = torch.arange(5003)
    rows[7] = -torch.arange(5003)
    rows[8, 64:96] = 100.0  # all in one tile
    rows[9, 3::64] = 100.0  # one in every tile
    check(rows, 32, backend)


def test_long_rows_are_selected_from_by_tiles():
    assert tile_of(make(1, 4608), 32) == 32
    assert tile_of(make(1, 65_536), 32) == 64
    assert tile_of(make(1, 65_536), 512) == 32
    assert tile_of(make(1, 4095), 32) is None


@pytest.mark.parametrize("number", DTYPES, ids=str)
@pytest.mark.parametrize("column", [0, 2500, 4991, 5002])
def test_a_nan_gives_nan_for_its_whole_row_and_no_other(column, number, backend):
    rows = make(3, 5003, number)
    rows[1, column] = NAN
    values, indices = topk(rows, 32, backend=backend)
    assert values[1].isnan().all()
    assert not values[[0, 2]].isnan().any()
    assert indices.min() >= 0
    assert indices.max() < 5003


def test_a_row_of_nothing_but_nan_has_indices_in_range(backend):
    values, indices = topk(torch.full((2, 5003), NAN), 32, backend=backend)
    assert values.isnan().all()
    assert indices.min() >= 0
    assert indices.max() < 5003


def test_rows_of_a_larger_matrix_are_selected_from(backend):
    check(make(4, 9000)[:, 11:5014], 32, backend)


def test_no_tokens_give_nothing(backend):
    values, indices = topk(torch.empty(0, 5003), 32, backend=backend)
    assert values.shape == indices.shape == (0, 32)


def test_two_selections_have_the_same_bits(backend):
    rows = make(4, 5003).round(decimals=1)  # many are equal
    (values, indices), (again, indices_again) = (
        topk(rows, 32, backend=backend),
        topk(rows, 32, backend=backend),
    )
    assert torch.equal(values, again)
    assert torch.equal(indices, indices_again)
