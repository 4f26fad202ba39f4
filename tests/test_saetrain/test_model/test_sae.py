"""The SAE module compared with sparsify's. Letters: N tokens, D d_in, M num_latents, K k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from saetrain.config.sae import SaeConfig
from saetrain.model.sae import Sae, build_sae

N, D, M, K = 20, 12, 40, 5


def randomised(sae: Any, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def batch(seed: int = 4) -> torch.Tensor:
    return torch.randn(
        N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )  # [N, D]


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
@pytest.mark.parametrize("d_in", [1, 5, 16, 100, 576])
def test_initial_weights_equal_sparsifys_bit_for_bit(
    make_sparse_coder: Callable[..., Any], d_in: int, seed: int
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sparse_coder = make_sparse_coder(d_in, 96, 4)
    sae = Sae(d_in, 96, 4, seed=seed)
    assert torch.equal(sae.W_enc, sparse_coder.encoder.weight)
    assert torch.equal(sae.W_dec, sparse_coder.W_dec)
    assert torch.equal(sae.b_enc, sparse_coder.encoder.bias)
    assert torch.equal(sae.b_dec, sparse_coder.b_dec)


def test_initial_decoder_rows_have_unit_norm_and_the_encoders_directions() -> None:
    sae = Sae(D, M, K)
    assert sae.W_dec.norm(dim=1).sub(1).abs().max() < 1e-6
    cosine = torch.nn.functional.cosine_similarity(sae.W_enc, sae.W_dec)
    assert cosine.min() > 1 - 1e-6
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()


def test_building_does_not_change_the_global_random_state() -> None:
    before = torch.get_rng_state()
    Sae(D, M, K, seed=9)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_forward_pass_equals_sparsifys(make_sparse_coder: Callable[..., Any]) -> None:
    sae, sparse_coder = (
        Sae(D, M, K, dtype=torch.float64),
        make_sparse_coder(D, M, K, dtype=torch.float64),
    )
    randomised(sae)
    with torch.no_grad():
        sparse_coder.encoder.weight.copy_(sae.W_enc)
        sparse_coder.encoder.bias.copy_(sae.b_enc)
        sparse_coder.W_dec.copy_(sae.W_dec)
        sparse_coder.b_dec.copy_(sae.b_dec)
    ours, theirs = sae(batch()), sparse_coder(batch())
    torch.testing.assert_close(ours.reconstruction, theirs.sae_out, rtol=1e-12, atol=1e-12)
    # Neither orders the K latents of a row.
    ours_order, theirs_order = ours.top_indices.sort(), theirs.latent_indices.sort()
    assert torch.equal(ours_order.values, theirs_order.values)
    torch.testing.assert_close(
        ours.top_acts.gather(1, ours_order.indices),
        theirs.latent_acts.gather(1, theirs_order.indices),
    )


def test_the_forward_pass_equals_its_formula_with_few_latents_active() -> None:
    sae = Sae(D, M, K, dtype=torch.float64)
    randomised(sae)
    with torch.no_grad():
        sae.b_enc.sub_(8)  # most rows have fewer than K positive latents
    x = batch()
    pre_acts = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc  # [N, M]
    kth = pre_acts.sort(dim=1, descending=True).values[:, K - 1 : K]  # [N, 1]
    z = torch.where(pre_acts >= kth, pre_acts.relu(), 0)  # [N, M]
    assert (z > 0).sum(dim=1).min() < K
    torch.testing.assert_close(sae(x).reconstruction, z @ sae.W_dec + sae.b_dec)
    assert (sae(x).top_acts >= 0).all()


def test_normalising_gives_unit_rows_and_a_zero_row_stays_finite() -> None:
    sae = Sae(D, M, K)
    randomised(sae)
    with torch.no_grad():
        sae.W_dec[3] = 0
    sae.normalise_decoder()
    norms = sae.W_dec.norm(dim=1)
    assert norms[3] == 0
    assert norms[torch.arange(M) != 3].sub(1).abs().max() < 1e-6


def test_the_parallel_component_of_the_gradient_is_removed_as_in_sparsify(
    make_sparse_coder: Callable[..., Any],
) -> None:
    sae, sparse_coder = (
        Sae(D, M, K, dtype=torch.float64),
        make_sparse_coder(D, M, K, dtype=torch.float64),
    )
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(M, D, generator=generator, dtype=torch.float64)
    sae.W_dec.grad = gradient.clone()
    with torch.no_grad():
        sparse_coder.W_dec.copy_(sae.W_dec)
    sparse_coder.W_dec.grad = gradient.clone()
    sae.remove_parallel_gradient()
    sparse_coder.remove_gradient_parallel_to_decoder_directions()
    torch.testing.assert_close(sae.W_dec.grad, sparse_coder.W_dec.grad)
    assert (sae.W_dec.grad * sae.W_dec).sum(dim=1).abs().max() < 1e-12
    # What is taken out is parallel: along each row's own direction and nothing else.
    taken = gradient - sae.W_dec.grad
    along = (taken * sae.W_dec).sum(dim=1, keepdim=True) * sae.W_dec
    torch.testing.assert_close(taken, along.detach())


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu", "gated"])
def test_a_centred_transcoder_begins_as_one_whose_rows_have_mean_zero(activation: Any) -> None:
    """More latents than are centred at once."""
    config = SaeConfig(D, 1500, K, activation=activation, transcode=True, threshold=0.1)
    mean = 50 * batch(5)[0]
    plain, centred = (build_sae(config, dtype=torch.float64) for _ in range(2))
    centred.centre_encoder(mean)
    expected, found = plain.encode(batch()), centred.encode(batch() + mean)
    assert (expected.top_acts > 0).any()
    torch.testing.assert_close(found.top_acts, expected.top_acts, rtol=1e-9, atol=1e-11)
