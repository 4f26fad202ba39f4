"""The Triton kernels natively on a CUDA device, small cases and large."""

import pytest
import torch

from saetrain.kernels import chosen_path, reference, sparse_decode, sparse_encode
from saetrain.kernels.paths import primitives

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("nan_in_fresh_memory"),
]


@pytest.fixture
def large(make_case, dtype):
    case = make_case(name="large", N=4096, D=2048, M=16384, K=32, hits="skewed")
    return case.inputs(dtype, "cuda")


@pytest.fixture
def triton_ops():
    return primitives("triton")


def test_every_small_case_passes_natively(run_triton_cases):
    assert run_triton_cases(TRITON_INTERPRET="0", SAETRAIN_KERNELS="triton") > 150


def test_a_cuda_tensor_takes_the_triton_path_by_itself(monkeypatch):
    monkeypatch.delenv("SAETRAIN_KERNELS", raising=False)
    assert chosen_path(torch.zeros(1, device="cuda")) == "triton"


def test_each_primitive_matches_the_reference_at_size(
    large, primitive, triton_ops, assert_primitive_matches
):
    assert_primitive_matches(triton_ops, primitive, large)


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_each_primitive_gives_the_same_bits_twice_at_size(large, primitive, path):
    ops = primitives(path)
    first = large.call(ops, primitive)
    assert torch.equal(first, large.call(ops, primitive))


def test_the_torch_path_matches_the_reference_on_cuda_too(
    large, primitive, assert_primitive_matches
):
    assert_primitive_matches(primitives("torch"), primitive, large)


def test_the_gradients_match_the_reference_at_size(
    make_case, decode_results, encode_results, assert_same_results
):
    case = make_case(name="large", N=1024, D=768, M=8192, K=32)
    inputs = case.inputs(torch.float32, "cuda")
    for results in (decode_results, encode_results):
        assert_same_results(results("triton", inputs), results("reference", inputs), 1e-5)


def test_offsets_past_two_to_the_thirty_one_reach_the_right_rows(triton_ops):
    D, M = 2048, 2**20 + 64  # M * D = 2^31 + 2^17
    W = torch.zeros(M, D, dtype=torch.bfloat16, device="cuda")
    W[-1] = 3.0
    acts = torch.ones(1, 1, dtype=W.dtype, device="cuda")
    last = torch.full((1, 1), M - 1, device="cuda")
    dY = torch.ones(1, D, dtype=W.dtype, device="cuda")
    assert bool((triton_ops.gather_sum(acts, last, W) == 3).all())
    assert triton_ops.gather_dot(dY, last, W).item() == 3 * D
    outer = triton_ops.scatter_outer(acts, last, dY, M)
    assert bool((outer[-1] == 1).all())
    assert not outer[:-1].any()


def test_under_autocast_the_weights_keep_their_dtype_and_get_gradients(make_case):
    inputs = make_case(name="autocast", N=64, D=96, M=200, K=8).inputs(torch.float32, "cuda")
    W_enc = inputs.W.clone().requires_grad_()
    W_dec = inputs.W.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        top_acts, top_indices = sparse_encode(inputs.dY, W_enc, inputs.b_enc, inputs.b_dec, 8)
        out = sparse_decode(top_acts, top_indices, W_dec, inputs.b_dec)
        out.backward(inputs.dY)
    assert top_acts.dtype == out.dtype == W_enc.grad.dtype == W_dec.grad.dtype == torch.float32
    wide = (top_acts.detach().double(), top_indices, inputs.dY.double())
    want = reference.scatter_outer(*wide, 200)
    torch.testing.assert_close(W_dec.grad.double(), want, rtol=1e-5, atol=1e-5)
