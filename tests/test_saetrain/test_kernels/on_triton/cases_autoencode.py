"""Encoder and decoder as one on the Triton path; and what of it the kernels do by bags.

Letters: N tokens, D d_in, E width of the output, M num_latents, K k, P pieces.
"""

import pytest
import torch

from saetrain.kernels import (
    PrefixGroups,
    autoencode,
    keep_bf16_copy,
    on_torch,
    on_triton,
    reference,
)
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


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("groups", [None, PIECES], ids=["one", "groups"])
def test_under_autocast_rows_are_gathered_in_bfloat16_and_summed_in_float32(
    device, make_coding, monkeypatch, copied, groups
):
    """Outputs and each gradient equal those from rounded tables in float64."""
    monkeypatch.setenv("SAETRAIN_KERNELS", "triton")
    coding = make_coding("rounded", 13, D, D, M, 5, prefix_groups=groups)
    given = coding.inputs(torch.float32, device)
    if copied:
        keep_bf16_copy(given["W_dec"])
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        coded = autoencode(**given, selector=coding.selector(), prefix_groups=groups)
    outs = coded.reconstructions
    dY = [torch.randn(13, D, generator=torch.Generator().manual_seed(n)) for n in range(len(outs))]
    dY = [gradient.to(device) for gradient in dY]
    loss = sum((out * gradient).sum() for out, gradient in zip(outs, dY, strict=True))
    found = dict(zip(given, torch.autograd.grad(loss, list(given.values())), strict=True))
    assert all(t.dtype == torch.float32 for t in (*outs, coded.top_acts, *found.values()))

    acts, indices = coded.top_acts.detach().double(), coded.top_indices
    wide = {name: tensor.detach().double() for name, tensor in given.items()}
    bags = None if groups is None else groups.bags(indices)
    W = given["W_dec"].detach().bfloat16().double() if copied else wide["W_dec"]
    of_bags = reference.gather_sum(acts, indices, W, bags).view(13, len(outs), D)
    for out, want in zip(outs, of_bags.cumsum(dim=1).unbind(1), strict=True):
        torch.testing.assert_close(out.double(), want + wide["b_dec"], rtol=1e-5, atol=1e-5)
    sums = torch.stack(dY, dim=1).flip(1).cumsum(1).flip(1).flatten(0, 1)  # [N P, D]
    rounded = sums.bfloat16().double()
    g = reference.gather_dot(rounded, indices, W, bags=bags, acts=acts)
    x = (given["x"] - given["subtracted"]).detach().bfloat16().double()
    expected = {
        "W_dec": reference.scatter_outer(acts, indices, rounded, M, bags=bags),
        "W_enc": reference.scatter_outer(g, indices, x, M),
        "b_enc": reference.scatter_sum(g, indices, M),
        "b_dec": sum(dY).double().sum(dim=0),
        "x": reference.gather_sum(g, indices, wide["W_enc"]),
    }
    expected["subtracted"] = -(expected["b_enc"] @ wide["W_enc"])
    for name, want in expected.items():
        bound = 1e-5 * want.abs().max().item()
        torch.testing.assert_close(found[name].double(), want, rtol=1e-5, atol=bound)


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
