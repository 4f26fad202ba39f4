"""`autoencode` compared with the reference, and with encoder and decoder called separately.

Letters: N tokens, D d_in, E width of the output, M num_latents, K k.
"""

import pytest
import torch

from saetrain.kernels import (
    PrefixGroups,
    autoencode,
    on_torch,
    sparse_decode,
    sparse_encode,
    topk_selector,
)
from saetrain.kernels import sorted_pairs as pairs

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}
N, D, M, K = 7, 37, 19, 5
TWO = PrefixGroups("latent", (9,))
NAMES = ("x", "W_enc", "b_enc", "subtracted", "W_dec", "b_dec")


@pytest.mark.parametrize("number", TOLERANCE, ids=str)
def test_every_output_and_gradient_matches_the_reference(
    coding, number, autoencode_results, assert_same_results
):
    want = autoencode_results("reference", coding, torch.float64, "cpu")
    got = autoencode_results("torch", coding, number, "cpu")
    cancels = 10 if coding.N == 1 else 1  # a gradient of one number is a difference of two
    assert_same_results(got, want, cancels * TOLERANCE[number])


def test_in_bfloat16_every_sum_is_rounded_once(make_coding, autoencode_results):
    """Select all latents, as rounding may change the selection."""
    coding = make_coding("all of them", 40, D, D, 5, 5, rows=(0, 3))
    exact = {n: t.bfloat16().double() for n, t in coding.inputs(torch.float64, "cpu").items()}
    want = coding.results({n: t.requires_grad_() for n, t in exact.items()})
    got = autoencode_results("torch", coding, torch.bfloat16, "cpu")
    for name in want:
        if name not in ("top_acts", "top_indices", "acts", "indices"):  # in any order
            error = (got[name].double() - want[name].double()).norm()
            assert error <= 1e-2 * want[name].double().norm(), name


def test_every_output_and_gradient_has_the_same_bits_twice(coding, autoencode_results):
    first, second = (autoencode_results("torch", coding, torch.float32, "cpu") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("wanted", NAMES)
def test_an_input_that_alone_requires_a_gradient_has_the_same_one(
    wanted, make_coding, autoencode_results, assert_same_results
):
    coding = make_coding("alone", N, D, D, M, K, prefix_groups=TWO, rows=(18, 2))
    frozen = set(NAMES) - {wanted}
    want = autoencode_results("reference", coding, torch.float64, "cpu")
    got = autoencode_results("torch", coding, torch.float64, "cpu", *frozen)
    gradients = {name for name in want if name.startswith("gradient")}
    assert_same_results(
        got,
        {n: t for n, t in want.items() if n not in gradients or n == f"gradient of {wanted}"},
        1e-13,
    )


def leaves(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    sizes = ((N, D), (M, D), (M,), (D,), (M, D), (D,))
    return [torch.randn(*s, generator=generator).to(dtype).requires_grad_() for s in sizes]


@pytest.fixture
def by_torch(monkeypatch):
    monkeypatch.setenv("SAETRAIN_KERNELS", "torch")


@pytest.mark.usefixtures("by_torch")
def test_without_prefix_groups_it_has_the_bits_of_separate_encoder_and_decoder():
    together, apart = leaves(), leaves()
    out = autoencode(*together, topk_selector(K)).reconstructions[0]
    x, W_enc, b_enc, subtracted, W_dec, b_dec = apart
    acts, indices = sparse_encode(x, W_enc, b_enc, subtracted, K)
    want = sparse_decode(acts, indices, W_dec, b_dec)
    assert torch.equal(out, want)
    for result in (out, want):
        result.square().sum().backward()
    for name, one, other in zip(NAMES, together, apart, strict=True):
        assert torch.equal(one.grad, other.grad), name


@pytest.mark.usefixtures("by_torch")
def test_weight_rows_and_a_subtracted_b_dec_have_the_bits_of_indexing():
    results = []
    for together in (True, False):
        x, W_enc, b_enc, _, W_dec, b_dec = inputs = leaves()
        rows = torch.tensor([18, 2])
        if together:
            coded = autoencode(*inputs[:3], b_dec, W_dec, b_dec, topk_selector(K), rows=rows)
            out, of_rows = coded.reconstructions[0], coded.rows
        else:
            out = sparse_decode(*sparse_encode(x, W_enc, b_enc, b_dec, K), W_dec, b_dec)
            of_rows = W_enc[rows], b_enc[rows], W_dec[rows]
        more = ((x - b_dec) @ of_rows[0].T + of_rows[1]) @ of_rows[2]
        (out.square().sum() + more.square().sum()).backward()
        results.append([leaf.grad for leaf in (W_enc, b_enc, W_dec, b_dec)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("prefix_groups", [None, TWO, PrefixGroups("rank", (2,))])
def test_pairs_are_sorted_once_for_autoencode_and_all_decoders_of_its_indices(
    monkeypatch, prefix_groups
):
    calls = []
    sort = pairs.sort_pairs
    for module in (pairs, on_torch.decode):
        monkeypatch.setattr(module, "sort_pairs", lambda *a: calls.append(1) or sort(*a))
    inputs = leaves()
    coded = autoencode(*inputs, topk_selector(K), prefix_groups=prefix_groups)
    more = sparse_decode(coded.top_acts, coded.top_indices, inputs[4])
    sum([*coded.reconstructions, more]).sum().backward()
    assert len(calls) == 1


@pytest.mark.usefixtures("by_torch")
def test_the_backward_pass_saves_nothing_wider_than_the_rows():
    saved = []

    def keep(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        autoencode(*leaves(), topk_selector(K), prefix_groups=TWO, rows=torch.tensor([3]))
    assert sorted(saved) == sorted([(N, D), (M, D), (M, D), (D,), (N, K), (N, K), (1,)])


@pytest.mark.usefixtures("by_torch")
def test_without_tokens_gradients_are_zero():
    inputs = leaves()
    inputs[0] = inputs[0][:0]
    coded = autoencode(*inputs, topk_selector(K), prefix_groups=TWO)
    assert [tuple(out.shape) for out in coded.reconstructions] == [(0, D), (0, D)]
    sum(coded.reconstructions).sum().backward()
    assert not any(leaf.grad.any() for leaf in inputs[1:])


@pytest.mark.usefixtures("by_torch")
def test_under_autocast_all_but_the_product_keeps_the_dtype_of_the_weights():
    inputs = leaves()
    with torch.autocast("cpu", torch.bfloat16):
        coded = autoencode(*inputs, topk_selector(K), prefix_groups=TWO, rows=torch.tensor([3]))
        torch.autograd.backward(
            [*coded.reconstructions, coded.rows.W_dec],
            [torch.ones(N, D), torch.ones(N, D), torch.ones(1, D)],
        )
    assert torch.equal(coded.top_acts, coded.top_acts.bfloat16().float())
    results = [*coded.reconstructions, *coded.rows, *(leaf.grad for leaf in inputs)]
    assert all(tensor.dtype == torch.float32 for tensor in results)


@pytest.mark.usefixtures("by_torch")
def test_a_second_derivative_raises():
    inputs = leaves()
    out = autoencode(*inputs, topk_selector(K)).reconstructions[0]
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_row_with_a_nan_gives_nan_in_every_reconstruction_and_no_other_row_does(
    backend, monkeypatch
):
    monkeypatch.setenv("SAETRAIN_KERNELS", backend)
    inputs = leaves()
    inputs[0].data[4, 1] = torch.nan
    coded = autoencode(*inputs, topk_selector(K), prefix_groups=PrefixGroups("rank", (2,)))
    for out in coded.reconstructions:
        assert out[4].isnan().all()
        assert not out[[0, 1, 2, 3, 5, 6]].isnan().any()


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        (0, (N, D + 1), r"x must be \[tokens, 37\]"),
        (3, (D + 1,), r"subtracted must be \[37\], got shape \(38,\)"),
        (4, (M + 1, D), r"W_dec must be \[19, d_out\] in torch.float32"),
        (5, (M,), r"b_dec must be \[37\], got shape \(19,\)"),
    ],
)
def test_inputs_of_other_shapes_raise_with_their_name(name, shape, match):
    inputs = leaves()
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=match):
        autoencode(*inputs, topk_selector(K))


def test_a_decoder_of_another_dtype_raises():
    inputs = leaves()
    inputs[4] = inputs[4].double()
    with pytest.raises(ValueError, match=r"got shape .* in torch\.float64"):
        autoencode(*inputs, topk_selector(K))
