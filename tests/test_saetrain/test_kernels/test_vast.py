"""Sizes above 2^31 with the torch backend, on tensors whose memory is allocated when written.

Functions that would write or sort all numbers are tested on "meta", or marked `soak`.

Letters: N tokens, D d_in, M num_latents, K k.
"""

import pytest
import torch

from saetrain.kernels import UpdateOptions, batch_topk, on_torch
from saetrain.kernels.on_torch import update
from saetrain.kernels.sorted_pairs import sort_pairs

LIMIT = 2**31
D, M = 2048, 2**20 + 4096
BF16 = torch.bfloat16


def ones(*shape):
    return torch.ones(*shape, dtype=BF16)


@pytest.fixture
def last():
    return torch.full((1, 1), M - 1)


@pytest.mark.parametrize("in_order", [False, True])
def test_rows_of_weights_are_gathered(lazily, last, in_order):
    W = lazily(M, D, dtype=BF16)
    W[-1] = 3.0
    assert W.numel() > LIMIT
    assert bool((on_torch.gather_sum(ones(1, 1), last, W) == 3).all())
    pairs = sort_pairs(last, M) if in_order else None
    assert on_torch.gather_dot(ones(1, D), last, W, pairs).item() == 3 * D


@pytest.mark.soak
def test_rows_of_a_gradient_are_written(last):
    """Write all rows, 4 GB."""
    got = on_torch.scatter_outer(ones(1, 1), last, ones(1, D), M)
    assert got.numel() > LIMIT
    assert bool((got[-1] == 1).all())
    assert not got[:-1].any()


@pytest.mark.soak
def test_more_pairs_are_gathered(lazily):
    """Read 17 GB of zeros that are never allocated."""
    N, K = 2, 2**30 + 4
    acts, indices = lazily(N, K, dtype=BF16), lazily(N, K, dtype=torch.int64)
    acts[-1, -4:], indices[-1, -4:] = 1.0, 2
    W = torch.tensor([[0.0], [0.0], [3.0]], dtype=BF16)
    assert acts.numel() > LIMIT
    assert on_torch.gather_sum(acts, indices, W).tolist() == [[0.0], [12.0]]


@pytest.mark.soak
def test_the_largest_of_more_pre_acts_are_selected(lazily):
    of_row = 65536
    pre_acts = lazily(2**15 + 8, of_row, dtype=torch.float32)
    pre_acts[-1, -3:] = torch.tensor([3.0, 5.0, 4.0])
    assert pre_acts.numel() > LIMIT
    values, indices = on_torch.topk(pre_acts, 3)
    assert sorted(indices[-1].tolist()) == [of_row - 3, of_row - 2, of_row - 1]
    assert sorted(values[-1].tolist()) == [3.0, 4.0, 5.0]
    assert on_torch.group_max(pre_acts, 4)[1][-1, -1] == of_row - 2
    values, indices = batch_topk(pre_acts, 1)
    assert values[-1].tolist() == [5.0, 4.0, 3.0]
    assert indices[-1].tolist() == [of_row - 2, of_row - 1, of_row - 3]


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_the_last_rows_of_weights_are_updated(lazily, monkeypatch, optimizer, unit):
    """Update the last part only; `test_parts_cover_all_rows` covers the others."""
    parts = update._parts
    monkeypatch.setattr(update, "_parts", lambda tensor: list(parts(tensor))[-1:])
    rows = 16
    vast = [lazily(M, D, dtype=BF16) for _ in range(4 if optimizer == "adam" else 3)]
    few = torch.randn(len(vast), rows, D, generator=torch.Generator().manual_seed(0)).to(BF16)
    few[2].abs_()  # a second moment
    for matrix, some in zip(vast, few, strict=True):
        matrix[-rows:] = some
    for matrices in (vast, few):
        if optimizer == "signum":
            options = UpdateOptions(lr=0.1, mix=0.2, momentum=0.9, unit=unit)
            on_torch.signum_update_(*matrices, options)
        else:
            numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
            on_torch.adam_update_(*matrices, UpdateOptions(**numbers, step=2, unit=unit))
    for got, expected in zip(vast, few, strict=True):
        assert torch.equal(got[-rows:], expected)


def test_parts_cover_all_rows(lazily):
    tensor = lazily(M, D, dtype=BF16)
    parts = list(update._parts(tensor))
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert parts[0].start == 0
    assert parts[-1].stop >= M
    assert tensor[parts[-1]].storage_offset() > LIMIT


def test_offsets_of_more_pairs_have_64_bits():
    indices = torch.empty(LIMIT // 8 + 1, 8, device="meta", dtype=torch.int64)
    pairs = sort_pairs(indices, 3)
    assert pairs.order.shape == pairs.token.shape == (LIMIT + 8,)
    assert {tensor.dtype for tensor in pairs} == {torch.int64}
