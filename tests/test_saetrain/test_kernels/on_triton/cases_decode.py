"""The Triton path of the primitives against the reference.

Cases are not collected by themselves: test_interpreted runs them through Triton's interpreter and
test_on_gpu natively, each in a process of its own.
"""

import math

import pytest
import torch

from saetrain.kernels import on_torch, on_triton, reference
from saetrain.kernels.sorted_pairs import sort_pairs

SUM_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7}


def test_each_primitive_matches_the_reference(inputs, primitive, assert_primitive_matches):
    assert_primitive_matches(on_triton, primitive, inputs)


def test_each_primitive_gives_the_same_bits_twice(device, primitive, make_case):
    case = make_case(name="skewed", N=40, D=300, M=11, K=3, hits="skewed")
    inputs = case.inputs(torch.float32, device)
    first = inputs.call(on_triton, primitive)
    assert torch.equal(first, inputs.call(on_triton, primitive))


def test_each_primitive_takes_tensors_that_are_not_contiguous(
    primitive, device, assert_primitive_matches, make_odd
):
    inputs = make_odd(torch.float32, device).map(lambda tensor: tensor.t().contiguous().t())
    assert_primitive_matches(on_triton, primitive, inputs)


def test_each_primitive_takes_no_tokens_at_all(dtype, primitive, device, make_empty):
    inputs = make_empty(dtype, device)
    got = inputs.call(on_triton, primitive)
    assert (
        got.shape
        == {
            "gather_sum": (0, 5),
            "gather_dot": (0, 3),
            "scatter_outer": (4, 5),
            "scatter_sum": (4,),
        }[primitive]
    )
    assert not got.any()


def test_rows_of_empty_slots_are_not_read(case, dtype, device):
    """Of 8k slots of BatchTopK, k hold something."""
    inputs = case.inputs(dtype, device)
    acts, indices, W, dY = inputs.acts, inputs.indices, inputs.W, inputs.dY
    read = torch.zeros(len(W), dtype=torch.bool, device=device)
    read[indices[acts != 0]] = True
    spoiled = W.masked_fill(~read[:, None], math.nan)
    out = on_triton.gather_sum(acts, indices, W)
    assert torch.equal(on_triton.gather_sum(acts, indices, spoiled), out)
    dots = on_triton.gather_dot(dY, indices, spoiled, acts=acts)
    want = on_triton.gather_dot(dY, indices, W)
    assert torch.equal(dots, torch.where(acts == 0, 0, want))


@pytest.mark.parametrize("ops", [on_torch, on_triton, reference], ids=["torch", "triton", "plain"])
def test_with_acts_the_gradient_of_an_empty_slot_is_zero(ops, case, device):
    inputs = case.inputs(torch.float64, device)
    arguments = (inputs.dY, inputs.indices, inputs.W)
    want = torch.where(inputs.acts == 0, 0, reference.gather_dot(*arguments))
    for pairs in (None, sort_pairs(inputs.indices, len(inputs.W))):
        torch.testing.assert_close(ops.gather_dot(*arguments, pairs, acts=inputs.acts), want)


def test_tables_in_bfloat16_are_summed_in_float32_and_give_float32(case, device):
    inputs = case.inputs(torch.float32, device)
    acts, indices, W, dY = inputs.acts, inputs.indices, inputs.W.bfloat16(), inputs.dY.bfloat16()
    out = on_triton.gather_sum(acts, indices, W)
    wide = acts.double(), W.double(), dY.double()
    want = {
        "out": (out, reference.gather_sum(wide[0], indices, wide[1])),
        "dots": (
            on_triton.gather_dot(dY, indices, W, acts=acts),
            reference.gather_dot(wide[2], indices, wide[1], acts=wide[0]),
        ),
        "with W in float32": (
            on_triton.gather_dot(dY, indices, inputs.W, acts=acts),
            reference.gather_dot(wide[2], indices, inputs.W.double(), acts=wide[0]),
        ),
    }
    for name, (got, expected) in want.items():
        assert got.dtype == torch.float32, name
        bound = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=bound)


def test_decoding_matches_the_reference_in_output_and_each_gradient(
    case, device, decode_results, assert_same_results
):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = case.inputs(dtype, device)
        want = decode_results("reference", inputs.map(torch.Tensor.double))
        assert_same_results(decode_results("triton", inputs), want, SUM_TOLERANCE[dtype])


def test_encoding_matches_the_reference_in_output_and_each_gradient(
    case, device, encode_results, assert_same_results
):
    for dtype in (torch.float32, torch.float64):
        inputs = case.inputs(dtype, device)
        want = encode_results("reference", inputs)
        assert_same_results(encode_results("triton", inputs), want, SUM_TOLERANCE[dtype])
