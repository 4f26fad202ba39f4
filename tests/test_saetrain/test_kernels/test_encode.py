"""Chunks of tokens and latents that the encoder computes at once, and equal results for all.

Letters: N tokens, D d_in, M num_latents, K k.
"""

import pytest
import torch

from saetrain.kernels import (
    dense,
    group_max,
    make_selector,
    sparse_decode,
    sparse_encode,
    sparse_encode_by,
)
from saetrain.kernels.dense import tokens_at_once

N, D, M, K = 70, 33, 4500, 8


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(N, D, generator=generator), torch.randn(M, D, generator=generator)
    b_enc, b_dec = torch.randn(M, generator=generator), torch.randn(D, generator=generator)
    return x, W, b_enc, b_dec


def scattered(encoded):
    """Scatter latents to [N, M], whatever the order of slots."""
    return torch.zeros(len(encoded.top_acts), M).scatter(1, encoded.top_indices, encoded.top_acts)


def reference(x, W, b_enc, b_dec, k=K):
    pre_acts = (x.double() - b_dec.double()) @ W.double().T + b_enc.double()
    values, indices = pre_acts.topk(k)
    return torch.zeros(len(x), M, dtype=torch.float64).scatter(1, indices, values.relu())


def assert_close(got, want):
    """Check the relative error of each row."""
    assert bool(((got - want).norm(dim=1) <= 1e-6 * want.norm(dim=1)).all())


@pytest.mark.parametrize("chunk", [None, 1, 7, 1000, 4499, 4500, 9999])
def test_chunks_of_latents_are_merged_exactly(problem, chunk):
    assert_close(scattered(sparse_encode(*problem, K, chunk)), reference(*problem))


def test_more_may_be_selected_than_a_chunk_holds(problem):
    encoded = sparse_encode(*problem, 300, 40)
    assert_close(scattered(encoded), reference(*problem, 300))
    assert all(len(set(row.tolist())) == 300 for row in encoded.top_indices)


def test_tokens_are_encoded_in_chunks(problem, monkeypatch):
    monkeypatch.setattr(dense, "_LEAST", 16)
    monkeypatch.setattr(dense, "_BYTES", 1)
    assert tokens_at_once(N, problem[1]) == 16
    assert_close(scattered(sparse_encode(*problem, K)), reference(*problem))
    by_token = sparse_encode_by(*problem, make_selector(lambda p: group_max(p, 9), by_token=True))
    monkeypatch.setattr(dense, "_BYTES", 1 << 30)
    assert tokens_at_once(N, problem[1]) == N
    at_once = sparse_encode_by(*problem, make_selector(lambda p: group_max(p, 9)))
    assert torch.equal(by_token.top_indices, at_once.top_indices)
    torch.testing.assert_close(by_token.top_acts, at_once.top_acts)


@pytest.mark.parametrize("chunk", [None, 6, 1000])
def test_a_token_with_a_nan_gives_nan_and_no_other_does(problem, chunk):
    problem[0][5, 2] = torch.nan
    top_acts, top_indices = sparse_encode(*problem, K, chunk)
    assert top_acts[5].isnan().all()
    assert not top_acts[:5].isnan().any()
    assert not top_acts[6:].isnan().any()
    assert top_indices.min() >= 0
    assert top_indices.max() < M


def test_a_nan_in_one_latents_weights_gives_nan_for_every_token(problem):
    problem[1][4321, 0] = torch.nan
    for chunk in (None, 6, 1000):
        assert sparse_encode(*problem, K, chunk).top_acts.isnan().all()


def test_under_autocast_the_product_alone_is_in_bfloat16(problem):
    with torch.autocast("cpu", torch.bfloat16):
        encoded = sparse_encode(*problem, K)
    assert encoded.top_acts.dtype == torch.float32
    assert torch.equal(encoded.top_acts, encoded.top_acts.bfloat16().float())
    want = reference(*problem).topk(K).values  # values alone: near ties, others are selected
    got = encoded.top_acts.double().sort(dim=1, descending=True).values
    assert (got - want).norm() < 1e-2 * want.norm()


@pytest.mark.parametrize("chunk", [0, -3])
def test_an_empty_chunk_raises(problem, chunk):
    with pytest.raises(ValueError, match="chunk_latents must be 1 or more"):
        sparse_encode(*problem, K, chunk)


def test_encoder_and_decoder_share_one_sort(problem, monkeypatch):
    calls = []
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda *a, **o: calls.append(1) or sort(*a, **o))
    x, W, b_enc, b_dec = problem
    W_enc, W_dec = W.clone().requires_grad_(), W.clone().requires_grad_()
    top_acts, top_indices = sparse_encode(x, W_enc, b_enc, b_dec, K)
    out = sparse_decode(top_acts, top_indices, W_dec, b_dec)
    (out + sparse_decode(top_acts * 2, top_indices, W_dec)).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16], ids=str)
def test_a_latent_active_for_8192_tokens_loses_no_digits(number):
    """Check the sum in pieces: one float32 sum has an error above 1e-6 here."""
    generator = torch.Generator().manual_seed(1)
    tokens, width = 8192, 17
    indices = torch.randint(50, (tokens, 3), generator=generator)
    indices[:, 1] = 7
    acts = torch.rand(tokens, 3, generator=generator).to(number)
    dY = torch.randn(tokens, width, generator=generator).to(number) + 1
    W = torch.zeros(60, width, dtype=number, requires_grad=True)
    sparse_decode(acts, indices, W).backward(dY)
    want = torch.zeros(60, width, dtype=torch.float64)
    for slot in range(3):
        want.index_add_(0, indices[:, slot], acts[:, slot, None].double() * dY.double())
    error = (W.grad - want).norm(dim=1)
    limit = 1e-6 if number == torch.float32 else 1e-2
    assert bool((error <= limit * want.norm(dim=1)).all()), error / want.norm(dim=1)
    assert not W.grad[50:].any()


def test_on_a_device_at_most_a_gibibyte_of_pre_activations_is_computed_at_once():
    def at_once(tokens, latents, of):
        return tokens_at_once(tokens, torch.empty(latents, 1, dtype=of, device="meta"), "cuda")

    assert at_once(8192, 65536, torch.bfloat16) == 8192
    assert at_once(32768, 131072, torch.bfloat16) == 4096
    assert at_once(8192, 65536, torch.float32) == 4096
    assert at_once(8192, 2**22, torch.float32) == 1024  # no fewer
    assert at_once(7, 2**22, torch.float32) == 7
