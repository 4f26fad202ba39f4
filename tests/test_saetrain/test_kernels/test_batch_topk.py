"""Selection of the k·N largest of a batch. Letters: N tokens, M num_latents."""

import pytest
import torch

from saetrain.kernels import batch_topk
from saetrain.kernels.backends import backend_module


@pytest.fixture(params=["reference", "torch"])
def backend(request):
    return request.param


def dense(pre_acts, k, backend):
    values, indices = batch_topk(pre_acts, k, backend=backend)
    return torch.zeros_like(pre_acts).scatter_add(1, indices, values)


def largest(pre_acts, k):
    cut = pre_acts.flatten().sort(descending=True).values[k * len(pre_acts) - 1]
    return torch.where((pre_acts >= cut) & (pre_acts > 0), pre_acts, 0)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_largest_of_the_whole_batch_are_selected(k, backend):
    rows = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dense(rows, k, backend), largest(rows, k))


@pytest.mark.parametrize("row", [0, 17])
def test_one_row_may_have_all_selected_latents(row, backend):
    rows = torch.randn(30, 200, generator=torch.Generator().manual_seed(1))
    rows[row] += 100
    assert torch.equal(dense(rows, 6, backend), largest(rows, 6))


def test_a_nan_anywhere_is_selected(backend):
    rows = torch.randn(30, 200, generator=torch.Generator().manual_seed(1))
    rows[4, 199] = torch.nan
    assert batch_topk(rows, 2, backend=backend)[0].isnan().any()


def test_there_are_as_many_slots_as_in_the_fullest_row(backend):
    rows = torch.randn(40, 100, generator=torch.Generator().manual_seed(2))
    values, _ = batch_topk(rows, 5, backend=backend)
    assert values.shape[1] == (largest(rows, 5) > 0).sum(1).max()


def test_the_threshold_is_the_value_at_its_rank(backend):
    rows = torch.randn(13, 37, generator=torch.Generator().manual_seed(3))
    ranked = rows.flatten().sort(descending=True).values
    for count in (1, 2, 100, 13 * 37):
        found = backend_module(backend).batch_topk_threshold(rows, count)
        assert found.shape == ()
        assert found == ranked[count - 1]


def test_on_a_device_rows_have_eight_times_k_slots_without_synchronisation():
    """Run on meta tensors, which hold no numbers, so that reading one raises."""
    values, indices = batch_topk(torch.empty(30, 200, device="meta"), 6, backend="torch")
    assert values.shape == indices.shape == (30, 48)
