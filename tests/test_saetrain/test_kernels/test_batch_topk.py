"""The k·N largest of a batch. Letters: N tokens, M num_latents."""

import pytest
import torch

from saetrain.kernels import batch_topk
from saetrain.kernels.backends import backend_module


@pytest.fixture(params=["reference", "torch"])
def path(request):
    return request.param


def dense(pre_acts, k, path):
    values, indices = batch_topk(pre_acts, k, backend=path)
    return torch.zeros_like(pre_acts).scatter_add(1, indices, values)


def largest(pre_acts, k):
    cut = pre_acts.flatten().sort(descending=True).values[k * len(pre_acts) - 1]
    return torch.where((pre_acts >= cut) & (pre_acts > 0), pre_acts, 0)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_largest_of_the_whole_batch_are_selected(k, path):
    rows = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dense(rows, k, path), largest(rows, k))


@pytest.mark.parametrize("row", [0, 17])
def test_a_row_may_take_all_that_there_is(row, path):
    rows = torch.randn(30, 200, generator=torch.Generator().manual_seed(1))
    rows[row] += 100
    assert torch.equal(dense(rows, 6, path), largest(rows, 6))


def test_a_nan_anywhere_is_reported(path):
    rows = torch.randn(30, 200, generator=torch.Generator().manual_seed(1))
    rows[4, 199] = torch.nan
    assert batch_topk(rows, 2, backend=path)[0].isnan().any()


def test_slots_are_no_more_than_the_fullest_row_needs(path):
    rows = torch.randn(40, 100, generator=torch.Generator().manual_seed(2))
    values, _ = batch_topk(rows, 5, backend=path)
    assert values.shape[1] == (largest(rows, 5) > 0).sum(1).max()


def test_the_threshold_is_the_value_at_its_rank(path):
    rows = torch.randn(13, 37, generator=torch.Generator().manual_seed(3))
    ranked = rows.flatten().sort(descending=True).values
    for count in (1, 2, 100, 13 * 37):
        found = backend_module(path).batch_topk_threshold(rows, count)
        assert found.shape == ()
        assert found == ranked[count - 1]


def test_on_a_device_rows_have_room_for_eight_times_k_and_nobody_waits():
    """Meta tensors hold no numbers: whoever would look at one raises."""
    values, indices = batch_topk(torch.empty(30, 200, device="meta"), 6, backend="torch")
    assert values.shape == indices.shape == (30, 48)
