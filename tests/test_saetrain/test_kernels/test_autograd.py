"""Public functions: gradients by finite differences, dtypes, errors.

Letters: N tokens, D d_in, M num_latents, K k.
"""

import pytest
import torch

from saetrain.kernels import sparse_decode, sparse_encode

N, D, M, K = 4, 5, 7, 3


def make(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def make_weights(dtype=torch.float64):
    """Make W [M, D], b_enc [M] and b_dec [D]."""
    return make(M, D, dtype=dtype, seed=1), make(M, dtype=dtype, seed=2), make(D, dtype=dtype)


def make_indices():
    return torch.randint(M, (N, K), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["reference", "torch"], autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("SAETRAIN_KERNELS", request.param)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_decoding_match_finite_differences(bias):
    W_dec, _, b_dec = make_weights()
    inputs = (make(N, K), make_indices(), W_dec, b_dec if bias else None)
    assert torch.autograd.gradcheck(sparse_decode, inputs)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_encoding_match_finite_differences(bias):
    x = make(N, D, seed=3)
    W_enc, b_enc, b_dec = make_weights()
    b_dec = b_dec if bias else None
    centred = x - b_dec if bias else x
    ranked = (centred @ W_enc.T + b_enc).sort(descending=True).values
    gaps = ranked[:, :-1] - ranked[:, 1:]
    assert gaps.min() > 1e-4, "two latents are nearly tied: choose another seed"
    assert ranked.abs().min() > 1e-4, "a latent is nearly at the kink: choose another seed"
    assert ranked[:, :K].min() < 0, "no selected latent is off: choose another seed"

    def top_acts(*args):
        return sparse_encode(*args, K).top_acts

    assert torch.autograd.gradcheck(top_acts, (x, W_enc, b_enc, b_dec))


def test_a_selected_latent_that_is_not_active_has_no_gradient():
    x, W_enc = torch.ones(1, 2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    top_acts, _ = sparse_encode(x, W_enc, torch.zeros(2), None, k=2)
    assert sorted(top_acts.tolist()[0]) == [0.0, 1.0]
    top_acts.sum().backward()
    assert W_enc.grad.tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_encoding_in_bfloat16_matches_float64_without_ties():
    x = torch.tensor([[3.0, -2.0, 5.0, 7.0], [1.0, 6.0, -4.0, 2.0]])
    W_enc = torch.eye(4) * 0.5
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (x, W_enc, torch.ones(4), torch.ones(4))]
        top_acts, top_indices = sparse_encode(*leaves, k=2)
        (top_acts * (top_indices + 1)).sum().backward()
        results.append([leaf.grad.tolist() for leaf in leaves])
        assert top_acts.dtype == dtype
        dense = torch.zeros(2, 4, dtype=dtype).scatter(1, top_indices, top_acts.detach())
        assert dense.tolist() == [[0.0, 0.0, 3.0, 4.0], [0.0, 3.5, 0.0, 1.5]]
    assert results[0] == results[1]


def test_a_second_derivative_raises(monkeypatch):
    monkeypatch.setenv("SAETRAIN_KERNELS", "torch")
    top_acts = make(N, K)
    out = sparse_decode(top_acts, make_indices(), make_weights()[0])
    (grad,) = torch.autograd.grad(out.square().sum(), top_acts, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_backward_pass_saves_nothing_of_size_tokens_by_latents(monkeypatch):
    monkeypatch.setenv("SAETRAIN_KERNELS", "torch")
    saved = []

    def keep(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sparse_encode(make(N, D), *make_weights(), K)
    assert sorted(saved) == sorted([(N, D), (M, D), (D,), (N, K), (N, K)])


def test_only_inputs_that_require_a_gradient_have_one():
    W, b_enc, b_dec = make_weights()
    x = make(N, D).detach()
    top_acts, top_indices = sparse_encode(x, W.detach(), b_enc, b_dec.detach(), K)
    assert not top_indices.requires_grad
    sparse_decode(top_acts, top_indices, W.detach(), b_dec.detach()).sum().backward()
    assert b_enc.grad is not None
    assert W.grad is None
    assert b_dec.grad is None


def test_inputs_of_a_narrower_dtype_are_cast_to_the_dtype_of_the_weights():
    W, b_enc, b_dec = make_weights(torch.float32)
    x = make(N, D, dtype=torch.bfloat16)
    top_acts, top_indices = sparse_encode(x, W, b_enc, b_dec, K)
    out = sparse_decode(top_acts.bfloat16(), top_indices, W, b_dec)
    out.sum().backward()
    assert top_acts.dtype == out.dtype == W.grad.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16


def test_under_autocast_all_but_the_product_keeps_the_dtype_of_the_weights():
    W, b_enc, b_dec = make_weights(torch.float32)
    x = make(N, D, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        top_acts, top_indices = sparse_encode(x, W, b_enc, b_dec, K)
        out = sparse_decode(top_acts, top_indices, W, b_dec)
        out.backward(torch.ones_like(out))
    assert top_acts.dtype == out.dtype == torch.float32
    assert torch.equal(top_acts, top_acts.bfloat16().float())
    dense = torch.zeros(N, M).scatter(1, top_indices, top_acts.detach())
    torch.testing.assert_close(out, dense @ W + b_dec)
    assert all(tensor.grad.dtype == torch.float32 for tensor in (W, b_enc, b_dec, x))


@pytest.mark.parametrize("k", [0, M + 1])
def test_k_outside_one_to_num_latents_raises(k):
    with pytest.raises(ValueError, match=f"k must be 1 to num_latents = {M}, got {k}"):
        sparse_encode(make(N, D), *make_weights(), k)


def test_inputs_of_other_shapes_raise_with_their_name():
    W, b_enc, b_dec = make_weights()
    indices = make_indices()
    with pytest.raises(ValueError, match=r"x must be \[tokens, 5\].*flatten"):
        sparse_encode(make(2, 2, D), W, b_enc, b_dec, K)
    with pytest.raises(ValueError, match=r"b_enc must be \[7\], got shape \(5,\)"):
        sparse_encode(make(N, D), W, b_dec, b_dec, K)
    with pytest.raises(ValueError, match=r"b_dec must be \[5\], got shape \(7,\)"):
        sparse_decode(make(N, K), indices, W, b_enc)
    with pytest.raises(ValueError, match=r"W_enc must be \[num_latents, d_in\]"):
        sparse_encode(make(N, D), b_enc, b_enc, b_dec, K)
    with pytest.raises(ValueError, match=r"W_dec must be \[num_latents, d_in\]"):
        sparse_decode(make(N, K), indices, b_enc)
    with pytest.raises(ValueError, match=r"must both be \[tokens, k\]"):
        sparse_decode(make(N, K + 1), indices, W)
    with pytest.raises(ValueError, match="top_indices must be int64"):
        sparse_decode(make(N, K), indices.int(), W)


def test_an_index_out_of_range_raises_on_the_cpu():
    with pytest.raises((RuntimeError, IndexError), match=rf"\b{M}\b"):
        sparse_decode(make(1, 1), torch.tensor([[M]]), make_weights()[0])
