"""Densities of latents, norms of gradients and of decoder rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from saetrain.tracking import EDGES
from saetrain.training.metrics import LatentStats, decoder_norm_range


def new_stats(num_latents: int) -> LatentStats:
    active = torch.zeros(num_latents, dtype=torch.int64)
    return LatentStats(active, torch.zeros((), dtype=torch.float64))


def bins(found: dict[str, Any]) -> dict[float, int]:
    """Return the counts of non-empty bins by their lower edge."""
    counts = found["log10_density"]["counts"]
    assert len(counts) == len(EDGES) - 1
    return {edge: count for edge, count in zip(EDGES, counts, strict=False) if count}


def test_the_histogram_counts_latents_by_the_share_of_rows_on_which_they_are_active() -> None:
    latent_stats = new_stats(6)
    top_acts = torch.ones(1000, 2)
    top_indices = torch.zeros(1000, 2, dtype=torch.int64)
    top_indices[:, 1] = 1  # latents 0 and 1 are chosen in every row
    top_acts[10:, 1] = 0  # latent 1 is active in 10 of 1,000
    top_indices[0, 0] = 2  # latent 2 in one, so latent 0 in 999
    latent_stats.add_latents(top_acts[:400], top_indices[:400])
    latent_stats.add_latents(top_acts[400:], top_indices[400:])
    found = latent_stats.pop_density()
    assert found["log10_density"]["rows"] == 1000
    assert found["log10_density"]["never"] == 3
    assert bins(found) == {-3.0: 1, -2.0: 1, -0.25: 1}
    assert latent_stats.pop_density()["log10_density"]["rows"] == 0  # reset


def test_density_1_is_in_the_last_bin_and_the_smallest_in_the_first() -> None:
    latent_stats = new_stats(2)
    latent_stats.add_latents(torch.ones(1, 2), torch.tensor([[0, 1]]))
    latent_stats.load_state(
        {"active": torch.tensor([10**10, 1]), "norms": torch.zeros((), dtype=torch.float64)},
        {"rows": 10**10, "updates": 0},
    )
    assert bins(latent_stats.pop_density()) == {-8.0: 1, -0.25: 1}


def test_dense_activations_are_counted_like_chosen_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.relu(torch.randn(50, 12, generator=generator))  # [N, M]
    chosen, of_all = new_stats(12), new_stats(12)
    chosen.add_latents(*dense.topk(12, dim=1))
    of_all.add_latents(dense, None)
    assert chosen.pop_density() == of_all.pop_density()


def test_grad_norm_is_a_mean_over_updates_and_none_without_updates() -> None:
    latent_stats = new_stats(2)
    assert latent_stats.pop_grad_norm() == {"grad_norm": None}
    for norm in (1.0, 4.0):
        latent_stats.add_gradient(torch.tensor(norm))
    assert latent_stats.pop_grad_norm() == {"grad_norm": 2.5}
    assert latent_stats.pop_grad_norm() == {"grad_norm": None}


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_logged_as_none_once(norm: float) -> None:
    latent_stats = new_stats(2)
    latent_stats.add_gradient(torch.tensor(norm))
    assert latent_stats.pop_grad_norm() == {"grad_norm": None}
    latent_stats.add_gradient(torch.tensor(3.0))
    assert latent_stats.pop_grad_norm() == {"grad_norm": 3.0}


def test_the_state_restores_every_counter() -> None:
    first, second = new_stats(3), new_stats(3)
    first.add_latents(torch.ones(4, 1), torch.tensor([[0], [0], [2], [2]]))
    first.add_gradient(torch.tensor(2.0))
    tensors, numbers = first.state()
    second.load_state({name: t.clone() for name, t in tensors.items()}, dict(numbers))
    assert (first.pop_grad_norm(), first.pop_density()) == (
        second.pop_grad_norm(),
        second.pop_density(),
    )


def test_the_decoder_norm_range_is_over_its_rows() -> None:
    W_dec = torch.tensor([[3.0, 4.0], [0.0, 0.5], [1.0, 0.0]])
    assert decoder_norm_range(W_dec) == {"decoder_norm_min": 0.5, "decoder_norm_max": 5.0}
