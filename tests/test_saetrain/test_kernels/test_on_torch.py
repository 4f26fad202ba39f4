"""The torch backend compared with the reference."""

import torch

from saetrain.kernels import on_torch
from saetrain.kernels.sorted_pairs import sort_pairs

SUM_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7}


def test_each_primitive_matches_the_reference(inputs, primitive, assert_primitive_matches):
    assert_primitive_matches(on_torch, primitive, inputs)


def test_each_primitive_gives_the_same_bits_twice(inputs, primitive):
    first = inputs.call(on_torch, primitive)
    assert torch.equal(first, inputs.call(on_torch, primitive))


def test_each_primitive_accepts_tensors_that_are_not_contiguous(
    case, primitive, assert_primitive_matches
):
    inputs = case.inputs(torch.float32, "cpu").map(lambda tensor: tensor.t().contiguous().t())
    assert_primitive_matches(on_torch, primitive, inputs)


def test_each_primitive_accepts_an_empty_batch(dtype, primitive, make_empty):
    inputs = make_empty(dtype)
    got = inputs.call(on_torch, primitive)
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


def test_presorted_pairs_change_no_bit(inputs):
    num_latents = len(inputs.W)
    pairs = sort_pairs(inputs.indices, num_latents)
    outer = (inputs.acts, inputs.indices, inputs.dY, num_latents)
    assert torch.equal(on_torch.scatter_outer(*outer), on_torch.scatter_outer(*outer, pairs))
    flat = (inputs.acts, inputs.indices, num_latents)
    assert torch.equal(on_torch.scatter_sum(*flat), on_torch.scatter_sum(*flat, pairs))


def test_decoding_matches_the_reference_in_output_and_each_gradient(
    inputs, dtype, decode_results, assert_same_results
):
    want = decode_results("reference", inputs.map(torch.Tensor.double))
    assert_same_results(decode_results("torch", inputs), want, SUM_TOLERANCE[dtype])


def test_encoding_matches_the_reference_in_output_and_each_gradient(
    case, encode_results, assert_same_results
):
    # Ties make the selection ambiguous in bfloat16; test_autograd has a case without.
    for dtype in (torch.float32, torch.float64):
        inputs = case.inputs(dtype, "cpu")
        want = encode_results("reference", inputs)
        assert_same_results(encode_results("torch", inputs), want, SUM_TOLERANCE[dtype])


def test_every_gradient_has_the_same_bits_twice(inputs, decode_results, encode_results):
    for results in (decode_results, encode_results):
        first, second = results("torch", inputs), results("torch", inputs)
        assert all(torch.equal(first[name], second[name]) for name in first)
