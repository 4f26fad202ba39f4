"""Offsets past 2^31 in every kernel; test_interpreted runs these in a process of its own.

Tensors take memory only where they are written (`lazily`), and of each launch only those programs
are run that meet the offsets. NumPy's numbers of 32 bits, which the interpreter counts with,
overflow as a GPU's do.

Letters: N tokens, D d_in, M num_latents, K k.
"""

import builtins
import sys

import pytest
import torch

from saetrain.kernels import UpdateOptions, on_triton, reference
from saetrain.kernels.on_triton import batch_topk
from saetrain.kernels.sorted_pairs import SortedPairs, sort_pairs

LIMIT = 2**31
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def nothing_is_copied_back(monkeypatch):
    """The interpreter copies arguments onto themselves, which would make all of them real."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)


@pytest.fixture
def only(monkeypatch):
    """Run programs of these numbers alone, on each axis; negative ones count from its end."""
    from triton.runtime import interpreter

    def choose(*numbers):
        def chosen(*bounds):
            if sys._getframe(1).f_code.co_name != "__call__":
                return builtins.range(*bounds)
            (end,) = bounds
            return sorted({n % end for n in numbers if -end <= n < end})

        monkeypatch.setattr(interpreter, "range", chosen, raising=False)

    return choose


def ones(*shape, dtype=BF16):
    return torch.ones(*shape, dtype=dtype)


def test_rows_of_weights_are_gathered(lazily):
    D, M = 2048, 2**20 + 64
    W = lazily(M, D, dtype=BF16)
    W[-1] = 3.0
    assert W.numel() > LIMIT
    last = torch.full((1, 1), M - 1)
    assert bool((on_triton.gather_sum(ones(1, 1), last, W) == 3).all())
    assert on_triton.gather_dot(ones(1, D), last, W).item() == 3 * D


@pytest.mark.parametrize("N", [1, 300], ids=["few", "hot"])
def test_rows_of_gradients_are_written(only, N):
    D, M = 2048, 2**20 + 64
    indices = torch.full((N, 1), M - 1)
    acts, dY = ones(N, 1), ones(N, D)
    only(*range(2 * -(-N // 256)), -1)  # edges of all chunks, and the last latent
    dW_dec, dW_enc, db_enc = on_triton.weight_gradients(acts, dY, 2 * acts, dY, indices, M)
    assert dW_dec.numel() > LIMIT
    assert dW_dec[-1, -1] == N
    assert dW_enc[-1, -1] == 2 * N
    assert db_enc[-1] == 2 * N
    outer = on_triton.scatter_outer(acts, indices, dY, M, sort_pairs(indices, M))
    assert outer[-1, -1] == N


def test_more_pairs_are_gathered(lazily, only):
    N, K, D = 2**28 + 1, 8, 2
    acts, indices = lazily(N, K, dtype=BF16), lazily(N, K, dtype=torch.int64)
    dY, W = lazily(N, D, dtype=BF16), torch.tensor([[0, 0], [0, 0], [3, 5]], dtype=BF16)
    assert acts.numel() > LIMIT
    acts[-1], indices[-1], dY[-1] = 1.0, 2, 1.0
    only(-1)
    assert on_triton.gather_sum(acts, indices, W)[-1].tolist() == [24, 40]
    assert on_triton.gather_dot(dY, indices, W)[-1].tolist() == [8] * K


def test_products_of_blocks_of_columns_are_added(lazily, only):
    N, K, D = 2**20 + 1, 512, 2048  # four blocks
    indices, dY = lazily(N, K, dtype=torch.int64), lazily(N, D, dtype=BF16)
    indices[-1], dY[-1] = 1, 1.0
    W = ones(2, D)
    only(*range(4), -1)
    got = on_triton.gather_dot(dY, indices, W)
    assert 4 * got.numel() > LIMIT
    assert got[-1].tolist() == [D] * K


@pytest.fixture
def many_pairs(lazily):
    """2^31 pairs of latent 0 and 520 of the last, 2; one a token: acts, indices, rows, pairs."""
    hot = 520
    N = LIMIT + hot
    acts, rows = lazily(N, 1, dtype=BF16), lazily(N, 1, dtype=BF16)
    indices, order = lazily(N, 1, dtype=torch.int64), lazily(N, dtype=torch.int64)
    acts[-hot:], rows[-hot:], indices[-hot:] = 1.0, 1.0, 2
    order[-hot:] = torch.arange(LIMIT, N)
    offsets = torch.tensor([0, LIMIT, LIMIT, N])
    return acts, indices, rows, SortedPairs(order, order, offsets)


def test_gradients_are_formed_of_more_pairs(many_pairs, only):
    acts, indices, rows, pairs = many_pairs
    chunk = LIMIT // 256
    only(*range(2 * chunk, 2 * chunk + 6), -1)
    got = on_triton.weight_gradients(acts, rows, acts, rows, indices, 3, pairs)
    for result in got:
        assert result[-1].item() == 520


def test_values_of_more_pairs_are_added(many_pairs, only):
    acts, indices, _, pairs = many_pairs
    only(-1)
    assert on_triton.scatter_sum(acts, indices, 3, pairs)[-1].item() == 520


@pytest.fixture
def pre_acts(lazily):
    made = lazily(2**15 + 8, 65536, dtype=BF16)
    assert made.numel() > LIMIT
    made[-1, -3:] = torch.tensor([3.0, 5.0, 4.0])
    return made


def test_the_largest_pre_acts_are_selected(pre_acts, only):
    M = pre_acts.shape[1]
    only(*range(16), -1)  # all of a row's tiles
    values, indices = on_triton.topk(pre_acts, 3)
    assert sorted(indices[-1].tolist()) == [M - 3, M - 2, M - 1]
    assert sorted(values[-1].tolist()) == [3.0, 4.0, 5.0]
    values, indices = on_triton.group_max(pre_acts, 4)
    assert indices[-1, -1].item() == M - 2
    assert values[-1, -1].item() == 5.0


def test_digits_of_pre_acts_are_counted(pre_acts, only):
    N, M = pre_acts.shape
    programs = pre_acts.numel() // batch_topk.BLOCK
    counts = torch.zeros(programs, 17, dtype=torch.int32)
    state = torch.tensor([0, 1, 0])
    only(-1)
    batch_topk.count_digits_kernel[(programs,)](
        pre_acts,
        None,
        None,
        state,
        counts,
        N,
        M,
        M // batch_topk.WIDTH,
        12,
        T=batch_topk.WIDTH,
        BLOCK=batch_topk.BLOCK,
    )
    of_zero, of_three_to_five = 8, 12  # keys 0x8000 and 0xC040 to 0xC0A0
    assert counts[-1, of_zero] == batch_topk.BLOCK - 3
    assert counts[-1, of_three_to_five] == 3


@pytest.mark.parametrize("unit", [True, False])
def test_weights_are_updated(lazily, only, unit):
    D, M = 2048, 2**20 + 1
    matrices = [lazily(M, D, dtype=BF16) for _ in range(4)]
    bf16_copy = lazily(M, D, dtype=BF16)
    numbers = torch.randn(4, D, generator=torch.Generator().manual_seed(0)).to(BF16)
    numbers[3].abs_()
    for matrix, row in zip(matrices, numbers, strict=True):
        matrix[-1] = row
    want = [row.unsqueeze(0).clone() for row in numbers]
    w, m, grad, v = matrices
    signum = {"lr": 0.1, "mix": 0.2, "momentum": 0.9, "unit": unit}
    adam = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "step": 2}
    only(-2, -1)  # without unit rows, a program has 1024 elements
    on_triton.signum_update_(w, m, grad, UpdateOptions(**signum, bf16_copy=bf16_copy))
    options = UpdateOptions(**adam, unit=unit, bf16_copy=bf16_copy)
    on_triton.adam_update_(w, m, v, grad, options)
    reference.signum_update_(want[0], want[1], want[2].clone(), UpdateOptions(**signum))
    options = UpdateOptions(**adam, unit=unit)
    reference.adam_update_(want[0], want[1], want[3], want[2].clone(), options)
    for got, expected in zip(matrices, want, strict=True):
        torch.testing.assert_close(got[-1:], expected, rtol=2**-5, atol=2**-5)
    assert torch.equal(bf16_copy[-1], w[-1])
