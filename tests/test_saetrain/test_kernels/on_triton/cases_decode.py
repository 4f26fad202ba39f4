"""The Triton path of the primitives against the reference.

Cases are not collected by themselves: test_interpreted runs them through Triton's interpreter and
test_on_gpu natively, each in a process of its own.
"""

import torch

from saetrain.kernels import on_triton

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
