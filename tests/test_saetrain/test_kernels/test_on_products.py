"""The sparse primitives by dense products, which a device takes for many pairs of a token.

Letters: N tokens, D d_in, M num_latents, K k.
"""

import sys

import pytest
import torch

from saetrain.kernels import (
    autoencode,
    backends,
    keep_bf16_copy,
    on_products,
    on_torch,
    reference,
    topk_selector,
)
from saetrain.kernels.dense import products_from

N, D, M, K = 13, 20, 50, 30


@pytest.fixture(params=["at once", "in parts"], autouse=True)
def parts(request, monkeypatch):
    """All tokens of a case in one product, and a few at a time."""
    if request.param == "in parts":
        monkeypatch.setattr(on_products, "BYTES", 400)


@pytest.fixture
def by_products(monkeypatch):
    """Let a CPU take a device's branch, and products from one pair of a token on."""
    monkeypatch.setenv("SAETRAIN_KERNELS", "torch")
    monkeypatch.setattr(on_torch, "MIXES_TYPES", True)
    monkeypatch.setattr(backends, "host_can_read", lambda _: False)
    module = sys.modules["saetrain.kernels.autoencode"]
    monkeypatch.setattr(module, "products_from", lambda *_: 1)
    for name in ("gather_sum", "gather_dot", "scatter_outer", "weight_gradients"):
        monkeypatch.delattr(on_torch, name)


@pytest.mark.parametrize("number", [torch.float32, torch.float64], ids=str)
def test_each_primitive_matches_the_reference(case, number, primitive, assert_primitive_matches):
    assert_primitive_matches(on_products, primitive, case.inputs(number, "cpu"))


def test_products_in_bfloat16_are_rounded_once(make_case, assert_primitive_matches):
    inputs = make_case("no latent twice", N, D, M, 1).inputs(torch.bfloat16, "cpu")
    for name in ("gather_sum", "gather_dot"):
        assert_primitive_matches(on_products, name, inputs)


def test_with_acts_the_gradient_of_an_empty_slot_is_zero(case):
    inputs = case.inputs(torch.float64, "cpu")
    given = (inputs.dY, inputs.indices, inputs.W)
    want = reference.gather_dot(*given, acts=inputs.acts)
    torch.testing.assert_close(on_products.gather_dot(*given, acts=inputs.acts), want)


def test_no_tokens_have_zeros(make_empty):
    inputs = make_empty(torch.float32)
    assert inputs.call(on_products, "gather_sum").shape == (0, 5)
    assert not inputs.call(on_products, "scatter_outer").any()
    assert not inputs.call(on_products, "scatter_sum").any()


@pytest.mark.usefixtures("by_products")
def test_every_output_and_gradient_matches_the_reference(
    make_coding, autoencode_results, assert_same_results
):
    wider = make_coding("wider", 6, 13, 41, 19, 12, rows=(1, 4))
    for coding in (wider, make_coding("slots", 7, D, D, 19, 5, select="batch", rows=(3,))):
        got = autoencode_results("torch", coding, torch.float64, "cpu")
        want = autoencode_results("reference", coding, torch.float64, "cpu")
        assert_same_results(got, want, 1e-13)


@pytest.mark.usefixtures("by_products")
@pytest.mark.parametrize("wanted", ["x", "W_enc", "b_enc", "subtracted", "W_dec", "b_dec"])
def test_an_input_that_alone_requires_a_gradient_has_the_same_one(
    wanted, make_coding, autoencode_results
):
    coding = make_coding("alone", N, D, D, M, K)
    frozen = {"x", "W_enc", "b_enc", "subtracted", "W_dec", "b_dec"} - {wanted}
    got = autoencode_results("torch", coding, torch.float64, "cpu", *frozen)
    want = autoencode_results("reference", coding, torch.float64, "cpu")
    name = f"gradient of {wanted}"
    torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("by_products")
def test_under_autocast_products_are_rounded_and_sums_and_results_are_float32(make_coding):
    coding = make_coding("rounded", N, D, D, M, K)
    given = coding.inputs(torch.float32, "cpu")
    keep_bf16_copy(given["W_dec"])
    with torch.autocast("cpu", torch.bfloat16):
        coded = autoencode(**given, selector=coding.selector())
    out = coded.reconstructions[0]
    dY = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((out * dY).sum(), list(given.values()))
    assert {tensor.dtype for tensor in (out, coded.top_acts, *found)} == {torch.float32}
    acts, indices = coded.top_acts.detach().double(), coded.top_indices
    x, _, _, subtracted, W_dec, b_dec = (t.detach().double() for t in given.values())
    g = reference.gather_dot(dY.double(), indices, W_dec, acts=acts)
    wanted = {
        "out": (out, reference.gather_sum(acts, indices, W_dec) + b_dec),
        "W_enc": (found[1], reference.scatter_outer(g, indices, x - subtracted, M)),
        "b_enc": (found[2], reference.scatter_sum(g, indices, M)),
        "W_dec": (found[4], reference.scatter_outer(acts, indices, dY.double(), M)),
    }
    for name, (got, want) in wanted.items():
        assert (got.double() - want).norm() < 2**-7 * want.norm(), name


def test_products_are_taken_from_a_number_of_pairs_that_rises_with_the_latents(monkeypatch):
    bf16, sizes = torch.bfloat16, (65536, 2048, 2048)
    assert products_from(*sizes, bf16) == 429
    assert products_from(16384, 2048, 2048, bf16) == 108
    assert products_from(4608, 576, 576, bf16) == 64  # few pairs are always gathered
    for precision, pairs in {"high": 429, "highest": 2744}.items():
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda p=precision: p)
        assert products_from(*sizes, torch.float32) == pairs


def test_few_active_slots_are_gathered_however_many_are_empty(monkeypatch):
    monkeypatch.setenv("SAETRAIN_KERNELS", "torch")
    monkeypatch.setattr(on_torch, "MIXES_TYPES", True)
    monkeypatch.setattr(backends, "host_can_read", lambda _: False)
    calls, gather_sum = [], on_products.gather_sum
    monkeypatch.setattr(
        on_products, "gather_sum", lambda *a, **kw: calls.append(1) or gather_sum(*a, **kw)
    )
    weights = (torch.zeros(99, 80), torch.zeros(99), None, torch.zeros(99, 80), torch.zeros(80))
    for active in (None, 80, 63):
        autoencode(torch.ones(3, 80), *weights, topk_selector(80), active=active)
    assert len(calls) == 2
