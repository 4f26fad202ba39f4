"""Encoder and decoder as one on the Triton path; and what of it the kernels do by bags.

Letters: N tokens, D d_in, E width of the output, M num_latents, K k, P pieces.
"""

import pytest
import torch

from saetrain.kernels import PrefixGroups, on_torch, on_triton, reference
from saetrain.kernels.sorted_pairs import sort_pairs

N, D, E, M, K, P = 260, 20, 33, 50, 2, 3
PIECES = PrefixGroups("latent", (0, 20))


def test_every_output_and_gradient_matches_the_reference(
    coding, device, autoencode_results, assert_same_results
):
    want = autoencode_results("reference", coding, torch.float64, device)
    got = autoencode_results("triton", coding, torch.float64, device)
    assert_same_results(got, want, 1e-13)


def test_in_float32_it_matches_the_reference_and_has_the_same_bits_twice(
    device, make_coding, autoencode_results, assert_same_results
):
    coding = make_coding("wider", 40, D, E, M, K, prefix_groups=PIECES, rows=(3, 9))
    first, second = (autoencode_results("triton", coding, torch.float32, device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    want = autoencode_results("reference", coding, torch.float64, device)
    assert_same_results(first, want, 1e-6)


@pytest.fixture
def problem(device):
    generator = torch.Generator().manual_seed(7)
    indices = torch.randint(M, (N, K), generator=generator)
    indices[:, 0] = 30  # more than a chunk of pairs
    selector = PIECES.grouped(lambda *_: (indices, indices))
    _, indices = selector(indices, indices, indices, on_torch)
    sizes = ((N, K), (N * P, E), (N, K), (N, D), (M, E))
    floats = [torch.randn(*size, generator=generator).double().to(device) for size in sizes]
    indices = indices.to(device)
    return *floats, indices, PIECES.bags(indices)


@pytest.mark.parametrize("ops", [on_torch, on_triton], ids=["torch", "triton"])
def test_every_primitive_takes_bags_and_another_width_of_the_output(ops, problem):
    acts, dY, g, x, W, indices, bags = problem
    pairs = sort_pairs(indices, M)
    results = [
        (ops.gather_sum(acts, indices, W, bags), reference.gather_sum(acts, indices, W, bags)),
        *(
            (
                ops.gather_dot(dY, indices, W, *given, bags=bags),
                reference.gather_dot(dY, indices, W, bags=bags),
            )
            for given in ((), (pairs,))
        ),
        (
            ops.scatter_outer(acts, indices, dY, M, bags=bags),
            reference.scatter_outer(acts, indices, dY, M, bags=bags),
        ),
        *zip(
            ops.weight_gradients(acts, dY, g, x, indices, M, pairs, bags=bags),
            reference.weight_gradients(acts, dY, g, x, indices, M, bags=bags),
            strict=True,
        ),
    ]
    for got, want in results:
        assert got.shape == want.shape
        assert (got - want).norm() <= 1e-14 * want.norm()
