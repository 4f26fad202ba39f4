"""Both weights' gradients at once, and latents that most tokens hit.

Letters: N tokens, D d_in, M num_latents, K k.
"""

import math

import pytest
import torch

from saetrain.kernels import on_triton, reference
from saetrain.kernels.on_triton.segments import CHUNK
from saetrain.kernels.sorted_pairs import sort_pairs

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def make(indices, D, M, dtype, device):
    generator = torch.Generator().manual_seed(1)
    floats = [
        torch.randn(*shape, generator=generator) for shape in (indices.shape, (len(indices), D))
    ]
    floats += [torch.randn(*t.shape, generator=generator) for t in floats]
    acts, dY, g, x = (tensor.to(device, dtype) for tensor in floats)
    return acts, dY, g, x, indices.to(device), M


def expected(acts, dY, g, x, indices, M):
    acts, dY, g, x = (tensor.double() for tensor in (acts, dY, g, x))
    return reference.weight_gradients(acts, dY, g, x, indices, M)


def check(inputs, pairs=None):
    """Each latent's row, relative to the same sum over absolute values; zeros where it has none."""
    *floats, indices, M = inputs
    sizes = expected(*map(torch.abs, floats), indices, M)
    results = on_triton.weight_gradients(*inputs, pairs)
    for got, want, size in zip(results, expected(*inputs), sizes, strict=True):
        assert got.dtype == inputs[1].dtype
        rows = (len(want), -1)
        error = (got.double() - want).reshape(rows).norm(dim=1)
        bound = TOLERANCE[got.dtype] * size.reshape(rows).norm(dim=1)
        assert bool((error <= bound).all()), f"worst excess {(error - bound).max().item():.3g}"


def test_both_gradients_match_the_reference(case, device):
    indices = case.inputs(torch.float32, "cpu").indices
    for dtype in (torch.float32, torch.bfloat16):
        check(make(indices, case.D, case.M, dtype, device))


def of_counts(*counts):
    """[sum, 1]: latent m is hit counts[m] times."""
    hits = torch.cat([torch.full((count,), m) for m, count in enumerate(counts)])
    return hits[torch.randperm(len(hits), generator=torch.Generator().manual_seed(2))][:, None]


HOT = {
    "one chunk exactly": (CHUNK,),
    "a pair more than a chunk": (CHUNK + 1, 3),
    "from a chunk's middle to another's": (10, 2 * CHUNK + 7, 5),
    "two in one chunk": (CHUNK + 9, CHUNK + 9, 0, 4),
    "two in one chunk, one pair between": (CHUNK + 9, 1, CHUNK + 9),
    "whole chunks": (CHUNK, 2 * CHUNK, 3 * CHUNK, 1),
    "begins with a chunk, ends with all": (2 * CHUNK, CHUNK + 50),
    "ends with a chunk": (100, 2 * CHUNK - 100, 20),
}


@pytest.mark.parametrize("counts", HOT.values(), ids=HOT.keys())
def test_a_latent_of_several_chunks_is_summed_wherever_it_begins_and_ends(counts, device):
    check(make(of_counts(*counts), 5, len(counts) + 1, torch.float32, device))


def test_a_latent_that_2048_tokens_hit_loses_no_digits(device):
    indices = torch.zeros(2048, 1, dtype=torch.int64)
    *floats, indices, M = make(indices, 2, 2, torch.float32, device)
    check((*map(torch.abs, floats), indices, M))  # where all have one sign, one long sum loses most


def test_pairs_that_are_sorted_already_are_used(device):
    inputs = make(of_counts(5, 0, 300), 4, 3, torch.float32, device)
    check(inputs, sort_pairs(inputs[4], 3))


def test_sums_of_bfloat16_are_not_rounded_where_float32_is_wanted(device):
    inputs = make(of_counts(5, 0, 300), 20, 3, torch.bfloat16, device)
    results = on_triton.weight_gradients(*inputs, dtype=torch.float32)
    for got, want in zip(results, expected(*inputs), strict=True):
        assert got.dtype == torch.float32
        assert (got.double() - want).norm() <= 1e-6 * want.norm()


def test_both_gradients_have_the_same_bits_twice_and_those_of_one_alone(device):
    inputs = make(of_counts(5, 0, 300), 20, 3, torch.float32, device)
    first, second = on_triton.weight_gradients(*inputs), on_triton.weight_gradients(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    acts, dY, g, x, indices, M = inputs
    assert torch.equal(first[0], on_triton.scatter_outer(acts, indices, dY, M))
    assert torch.equal(first[1], on_triton.scatter_outer(g, indices, x, M))


@pytest.mark.parametrize("share", [0.9, 1.0])
@pytest.mark.parametrize("counts", HOT.values(), ids=HOT.keys())
def test_empty_slots_are_left_out_and_the_rows_of_their_tokens_are_not_read(counts, share, device):
    """They come last: after a chunk's end, within a chunk, and in whole chunks of their own."""
    inputs = make(of_counts(*counts), 5, len(counts) + 1, torch.float32, device)
    acts, dY, g, x, indices, M = inputs
    drawn = torch.rand(indices.shape, generator=torch.Generator().manual_seed(3))
    empty = drawn.to(device) < share
    acts.masked_fill_(empty, 0)
    g.masked_fill_(empty, 0)
    pairs = sort_pairs(indices, M, empty)
    check(inputs, pairs)
    want = on_triton.weight_gradients(*inputs, pairs)
    unread = empty.all(dim=1, keepdim=True)
    spoiled = [rows.masked_fill(unread, math.nan) for rows in (dY, x)]
    got = on_triton.weight_gradients(acts, spoiled[0], g, spoiled[1], indices, M, pairs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    sums = on_triton.scatter_sum(g, indices, M, pairs)
    assert torch.equal(sums.nonzero(), want[2].nonzero())


def test_no_tokens_leave_zeros(device):
    inputs = make(torch.zeros(0, 3).long(), 4, 6, torch.float32, device)
    assert not any(tensor.any() for tensor in on_triton.weight_gradients(*inputs))
