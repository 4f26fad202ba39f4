"""The Triton kernels natively on a CUDA device: all small cases, and sizes that are trained at.

Letters: N tokens, D d_in, M num_latents, K k.
"""

import math

import pytest
import torch

from saetrain.kernels import UpdateOptions, reference, select_backend, sparse_decode, sparse_encode
from saetrain.kernels.backends import backend_module
from saetrain.kernels.dense import products_from

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]
SKEWED = {"name": "large", "N": 8192, "D": 2048, "M": 16384, "K": 32, "hits": "skewed"}


@pytest.fixture
def large(make_case, dtype):
    """One latent is hit by each of the 8,192 tokens."""
    return make_case(**SKEWED).inputs(dtype, "cuda")


@pytest.fixture
def ops():
    return backend_module("triton")


@pytest.fixture
def no_waiting():
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def filled(make_step, *sizes, dtype):
    """A step of random numbers and latents on the device."""
    step = make_step(*sizes, dtype, "cuda")
    for tensor in step:
        if tensor.is_floating_point():
            tensor.normal_()
        elif tensor.dtype == torch.int64:
            tensor.random_(0, len(step.W))
        else:
            tensor.fill_(True)
    return step


def test_every_small_case_passes_natively(run_cases):
    assert run_cases(TRITON_INTERPRET="0", SAETRAIN_KERNELS="triton") > 350


def test_a_cuda_tensor_takes_the_triton_path_by_itself(monkeypatch):
    monkeypatch.delenv("SAETRAIN_KERNELS", raising=False)
    assert select_backend(torch.zeros(1, device="cuda")) == "triton"


def test_each_primitive_matches_the_reference_at_size(
    large, primitive, ops, assert_primitive_matches
):
    assert_primitive_matches(ops, primitive, large)


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_each_primitive_gives_the_same_bits_twice_at_size(large, primitive, path):
    ops = backend_module(path)
    first = large.call(ops, primitive)
    assert torch.equal(first, large.call(ops, primitive))


def test_the_torch_path_matches_the_reference_on_cuda_too(
    large, primitive, assert_primitive_matches
):
    assert_primitive_matches(backend_module("torch"), primitive, large)


def test_both_gradients_match_the_reference_and_have_the_same_bits_twice_at_size(large, ops):
    acts, indices, dY, M = large.acts, large.indices, large.dY, len(large.W)
    g, x = acts.flip(0), dY.flip(0)
    got = ops.weight_gradients(acts, dY, g, x, indices, M)
    again = ops.weight_gradients(acts, dY, g, x, indices, M)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    wide = [tensor.double() for tensor in (acts, dY, g, x)]
    want = reference.scatter_outer(wide[0], indices, wide[1], M)
    bound = 1e-2 if dY.dtype == torch.bfloat16 else 1e-6
    hit = want.norm(dim=1)
    assert bool(((got[0].double() - want).norm(dim=1) <= bound * hit).all())
    want = reference.scatter_outer(wide[2], indices, wide[3], M)
    assert (got[1].double() - want).norm() <= bound * want.norm()
    want = reference.scatter_sum(wide[2], indices, M)
    assert (got[2].double() - want).norm() <= bound * want.norm()


@pytest.mark.parametrize("of", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [1, 32, 64, 512])
@pytest.mark.parametrize("M", [24576, 65536, 100003])
def test_selection_equals_that_of_torch_at_size(ops, M, k, of):
    pre_acts = torch.randn(512, M, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    pre_acts = pre_acts.to(of)
    pre_acts[7] = pre_acts[7].round()
    pre_acts[8, M - 1] = math.nan
    values, indices = ops.topk(pre_acts, k)
    want = torch.topk(pre_acts, k).values
    assert bool(values[8].isnan().all())
    sound = torch.arange(512, device="cuda") != 8
    assert torch.equal(values[sound].sort().values, want[sound].sort().values)
    assert torch.equal(pre_acts.gather(1, indices)[sound], values[sound])
    assert bool((indices.sort().values.diff() > 0).all())
    assert torch.equal(indices, ops.topk(pre_acts, k)[1])


@pytest.mark.parametrize("of", [torch.bfloat16, torch.float32], ids=str)
def test_the_threshold_of_a_batch_is_that_of_torch_at_size(ops, of):
    pre_acts = torch.randn(1024, 24576, device="cuda").to(of)
    for count in (1, 1024 * 32, 1024 * 1000):
        want = torch.topk(pre_acts.flatten(), count).values[-1]
        assert torch.equal(ops.batch_topk_threshold(pre_acts, count), want)


@pytest.mark.parametrize("of", [torch.bfloat16, torch.float32], ids=str)
def test_the_largest_of_groups_are_those_of_torch_at_size(ops, of):
    pre_acts = torch.randn(4096, 24576, device="cuda").to(of)
    for got, want in zip(
        ops.group_max(pre_acts, 32), reference.group_max(pre_acts, 32), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(65536, 2048), (999, 10007)], ids=str)
def test_a_step_of_the_optimisers_matches_the_reference_at_size(ops, shape):
    w, z, v, grad = (torch.randn(*shape, device="cuda") for _ in range(4))
    w /= w.norm(dim=1, keepdim=True)
    signum = {"lr": 1e-3, "mix": 0.1, "momentum": 0.95, "unit": True}
    adam = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "step": 9}
    results = []
    for path in (ops, reference):
        tensors = [t.clone() for t in (w, z, w, z, v.square())]
        path.signum_update_(*tensors[:2], grad.clone(), UpdateOptions(**signum))
        path.adam_update_(*tensors[2:], grad.clone(), UpdateOptions(**adam, unit=True))
        results.append(tensors)
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()


def test_nothing_waits_for_the_device(ops, make_step, no_waiting):
    filled(make_step, 2048, 768, 24576, 32, dtype=torch.bfloat16).run(ops)


def test_another_number_of_tokens_compiles_nothing_anew(ops, make_step, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # every compilation leaves a folder there
    filled(make_step, 512, 640, 20480, 32, dtype=torch.bfloat16).run(ops)
    known = sorted(tmp_path.iterdir())
    assert known
    for N in (1, 2, 100, 1000, 4096):
        filled(make_step, N, 640, 20480, 32, dtype=torch.bfloat16).run(ops)
    assert sorted(tmp_path.iterdir()) == known


def peak(call):
    """Bytes that `call` takes beyond what was there, its results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    del results
    return torch.cuda.max_memory_allocated() - before


def test_memory_is_that_of_the_results_and_of_sums_of_chunks(ops, make_step):
    N, D, M, K = 8192, 2048, 65536, 32
    step = filled(make_step, N, D, M, K, dtype=torch.bfloat16)
    weights, pairs = M * D * 2, N * K
    slack = 16 * 2**20  # of a sort's own, and of what the allocator rounds up
    acts, g, indices, x, dY, W, pre_acts, *_ = step
    gradients = peak(lambda: ops.weight_gradients(acts, dY, g, x, indices, M))
    assert gradients <= 2 * weights + 2 * pairs * D * 4 // 128 + 50 * pairs + slack
    assert peak(lambda: ops.gather_sum(acts, indices, W)) <= N * D * 2 + slack
    assert peak(lambda: ops.gather_dot(dY, indices, W)) <= pairs * (2 + D // 64) + slack
    assert peak(lambda: ops.topk(pre_acts, K)) <= pre_acts.numel() * 2 // 16 + slack


def test_offsets_past_two_to_the_thirty_one_reach_the_right_rows(ops):
    D, M = 2048, 2**20 + 64  # M * D = 2^31 + 2^17
    W = torch.zeros(M, D, dtype=torch.bfloat16, device="cuda")
    W[-1] = 3.0
    acts = torch.ones(1, 1, dtype=W.dtype, device="cuda")
    last = torch.full((1, 1), M - 1, device="cuda")
    dY = torch.ones(1, D, dtype=W.dtype, device="cuda")
    assert bool((ops.gather_sum(acts, last, W) == 3).all())
    assert ops.gather_dot(dY, last, W).item() == 3 * D
    for outer in ops.weight_gradients(acts, dY, acts, dY, last, M)[:2]:
        assert bool((outer[-1] == 1).all())
        assert not outer[:-1].any()
    ops.signum_update_(W, W.clone(), W, UpdateOptions(lr=1.0, mix=1.0, momentum=0.9))
    assert bool((W[-1] < 3).all())


def test_more_than_two_to_the_thirty_one_pairs_and_pre_acts_are_taken(ops):
    K = 4
    N = 2**29 + 8  # N * K = 2^31 + 32
    indices = torch.ones(N, K, dtype=torch.int64, device="cuda")
    indices[-1] = 2
    acts = torch.ones(N, K, dtype=torch.bfloat16, device="cuda")
    W = torch.ones(3, 1, dtype=torch.bfloat16, device="cuda")
    assert bool((ops.gather_sum(acts, indices, W)[-5:] == K).all())
    del indices, acts
    M = 65536
    pre_acts = torch.zeros(2**15 + 8, M, dtype=torch.bfloat16, device="cuda")  # 2^31 + 2^19
    pre_acts[-1, -3:] = torch.tensor([3.0, 5.0, 4.0])
    values, indices = ops.topk(pre_acts, 3)
    assert sorted(indices[-1].tolist()) == [M - 3, M - 2, M - 1]
    assert sorted(values[-1].tolist()) == [3.0, 4.0, 5.0]
    assert ops.batch_topk_threshold(pre_acts, 2).item() == 4.0
    assert ops.group_max(pre_acts, 4)[1][-1, -1].item() == M - 2


def test_the_gradients_match_the_reference_at_size(
    make_case, decode_results, encode_results, assert_same_results
):
    case = make_case(name="large", N=1024, D=768, M=8192, K=32)
    inputs = case.inputs(torch.float32, "cuda")
    for results in (decode_results, encode_results):
        assert_same_results(results("triton", inputs), results("reference", inputs), 1e-5)


def test_many_pairs_are_multiplied_and_match_the_reference(
    make_coding, autoencode_results, assert_same_results
):
    sizes = (8192, 512, 512)
    coding = make_coding("many pairs", 256, 512, 512, 8192, products_from(*sizes, torch.float64))
    got = autoencode_results("triton", coding, torch.float64, "cuda")
    assert_same_results(got, autoencode_results("reference", coding, torch.float64, "cuda"), 1e-12)


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
