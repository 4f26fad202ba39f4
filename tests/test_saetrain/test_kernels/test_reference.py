"""The reference compared with loops over numbers and dense formulas, in float64."""

import torch

from saetrain.kernels import reference


def dense_acts(inputs):
    """Scatter activations to [N, M]; those of repeated latents are added."""
    dense = torch.zeros(len(inputs.acts), len(inputs.W), dtype=torch.float64)
    for n, row in enumerate(inputs.indices.tolist()):
        for k, m in enumerate(row):
            dense[n, m] += inputs.acts[n, k].item()
    return dense


def float64_inputs(case):
    return case.inputs(torch.float64, "cpu")


def test_gather_sum_is_the_product_of_dense_acts_with_w(case):
    inputs = float64_inputs(case)
    got = inputs.call(reference, "gather_sum")
    torch.testing.assert_close(got, dense_acts(inputs) @ inputs.W)


def test_gather_dot_picks_elements_of_the_dense_product(case):
    inputs = float64_inputs(case)
    got = inputs.call(reference, "gather_dot")
    torch.testing.assert_close(got, (inputs.dY @ inputs.W.T).gather(1, inputs.indices))


def test_scatter_outer_is_the_transposed_product(case):
    inputs = float64_inputs(case)
    got = inputs.call(reference, "scatter_outer")
    torch.testing.assert_close(got, dense_acts(inputs).T @ inputs.dY)


def test_scatter_sum_is_the_sum_over_tokens(case):
    inputs = float64_inputs(case)
    got = inputs.call(reference, "scatter_sum")
    torch.testing.assert_close(got, dense_acts(inputs).sum(dim=0))


def test_bfloat16_is_rounded_only_at_the_end(case, primitive, assert_primitive_matches):
    assert_primitive_matches(reference, primitive, case.inputs(torch.bfloat16, "cpu"))


def test_decoding_has_the_gradients_of_the_dense_formula(case, decode_results, assert_same_results):
    inputs = float64_inputs(case)
    acts = dense_acts(inputs)
    want = {
        "output": acts @ inputs.W + inputs.b_dec,
        "top_acts": (inputs.dY @ inputs.W.T).gather(1, inputs.indices),
        "W_dec": acts.T @ inputs.dY,
        "b_dec": inputs.dY.sum(dim=0),
    }
    assert_same_results(decode_results("reference", inputs), want, 1e-12)


def test_encoding_has_the_gradients_of_the_dense_formula(case, encode_results, assert_same_results):
    inputs = float64_inputs(case)
    got = encode_results("reference", inputs)
    centred = inputs.dY - inputs.b_dec
    acts = (centred @ inputs.W.T + inputs.b_enc).relu()
    k = min(case.K, case.M)
    kept = acts * (acts >= acts.topk(k).values[:, -1:])
    # What the fixture sends back into each positive activation.
    g = (kept + 1.0) * (torch.arange(case.M) % 7 - 3) * (kept > 0)
    want = {
        "dense acts": kept,
        "x": g @ inputs.W,
        "W_enc": g.T @ centred,
        "b_enc": g.sum(dim=0),
        "b_dec": -g.sum(dim=0) @ inputs.W,
    }
    assert_same_results(got, want, 1e-12)
