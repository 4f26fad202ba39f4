"""What a step takes of a device's memory, at a size that is trained at: formulas, counted.

Letters: N tokens, D d_in, M num_latents, K k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from saetrain.training.sae_trainer import StepSettings
from saetrain.training.step import train_step

pytest.importorskip("triton")

N, D, M, K = 8192, 2048, 65536, 32
BYTES = 4
WEIGHT = M * D * BYTES
PER_TOKEN = N * (4 * D + 64 * K) * BYTES
"""Rows in both types, what is subtracted from them, the reconstruction, its error; pairs."""
PER_LATENT = 32 * M * BYTES
SUMS = 2 * N * K * D // 128 * BYTES
"""Of chunks of pairs, for both weights' gradients."""
STATE = {"signum": 2 * WEIGHT, "adam": 4 * WEIGHT}
"""Of the optimiser: z; both moments."""
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["signum", "adam"])


class Counted:
    """One step, after two others.

    Attributes:
        held: bytes between steps.
        beyond: most bytes beyond these.
        taken: all that was taken.
    """

    def __init__(self, device: Any, step: Callable[[int], None]) -> None:
        for number in range(2):
            step(number)
        self.held = device.now
        device.forget()
        step(2)
        assert device.now == self.held  # nothing stays
        self.beyond, self.taken = device.most - self.held, device.taken


@pytest.fixture
def count(cuda: Any, make_trainee_on: Callable[..., Any]) -> Callable[..., Counted]:
    def run(optimizer: str, settings: StepSettings, auxk_alpha: float = 0.0) -> Counted:
        settings = dataclasses.replace(settings, auxk_alpha=auxk_alpha)
        trainer = make_trainee_on(D, M, K, optimizer=optimizer, settings=settings)
        with cuda.building():
            rows = torch.empty(N, D, dtype=torch.bfloat16)
        with cuda.counted(rows, *trainer.sae.parameters()) as device:
            return Counted(device, lambda step: train_step(trainer, rows, step))

    return run


def widest(counted: Counted) -> int:
    """Columns of the widest tensor that has a row for each token."""
    return max(shape[1] for _, shape, *_ in counted.taken if shape[:1] == (N,) and len(shape) == 2)


@OPTIMIZERS
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_forms_no_row_for_each_pair_and_stays_within_its_formula(
    count: Callable[..., Counted], optimizer: str, autocast: bool
) -> None:
    counted = count(optimizer, StepSettings(autocast=autocast))
    pre_acts = min(2**30, N * M * (2 if autocast else 4))
    rounded = WEIGHT if autocast else 0  # W_enc for the product, W_dec for gathers, both kept
    assert max(taken.size for taken in counted.taken) == max(pre_acts, WEIGHT)
    assert counted.held <= 2 * WEIGHT + STATE[optimizer] + rounded + N * D * 2 + PER_LATENT
    # Pre-activations and their tiles' maxima; when they are gone, both gradients.
    encoding = pre_acts + pre_acts // 16
    assert counted.beyond <= max(encoding, 2 * WEIGHT + SUMS) + PER_TOKEN + PER_LATENT


@OPTIMIZERS
def test_with_chunks_of_latents_no_pre_acts_are_wider(
    count: Callable[..., Counted], optimizer: str
) -> None:
    chunk = 4096
    counted = count(optimizer, StepSettings(chunk_latents=chunk))
    assert widest(counted) == chunk
    assert max(taken.size for taken in counted.taken) == WEIGHT
    assert counted.beyond <= 2 * WEIGHT + SUMS + PER_TOKEN + PER_LATENT


def test_dead_latents_take_room_for_their_list_alone(count: Callable[..., Counted]) -> None:
    chunk = 4096
    counted = count("signum", StepSettings(chunk_latents=chunk), auxk_alpha=1 / 32)
    listed = 8 * (D // 2)
    assert widest(counted) == listed
    pairs = N * (D // 2) * 8
    assert max(taken.size for taken in counted.taken) <= max(WEIGHT, pairs)
    matrices = 5 * N * listed * BYTES  # [N, A]: pre-activations, what is left of them, gradients
    of_rows = 4 * listed * D * BYTES  # weights of the listed, and their gradients
    assert counted.beyond <= max(2 * WEIGHT, matrices) + of_rows + PER_TOKEN + PER_LATENT


def test_many_pairs_are_multiplied_without_sums_of_chunks_or_sorted_pairs(
    cuda: Any, count: Callable[..., Counted]
) -> None:
    many = 10 * D  # where annealing of k begins: gathers take 28.4 GB, products 5.6
    settings = StepSettings(autocast=True, k_start=many, k_end=K, k_anneal_steps=10**9)
    counted = count("signum", settings)
    assert set(cuda.launches) == {"update_kernel"}
    of_pairs = N * many * (8 + 3 * BYTES)  # their latents, acts, gradients
    products = WEIGHT // 2 + 2**30  # a gradient in bfloat16, and a scattered matrix
    assert counted.beyond <= 2 * WEIGHT + products + of_pairs + PER_TOKEN + PER_LATENT


@OPTIMIZERS
def test_beyond_what_stays_a_step_takes_less_than_a_third_of_what_the_peers_does(
    cuda: Any,
    count: Callable[..., Counted],
    sparsify: ModuleType,
    optimizer: str,
) -> None:
    from schedulefree import ScheduleFreeWrapper
    from sparsify.sign_sgd import SignSGD

    with cuda.building():
        rows = torch.empty(N, D, dtype=torch.bfloat16)
        config = sparsify.SparseCoderConfig(num_latents=M, k=K)
        module = sparsify.SparseCoder(D, config, device="cuda")
    updates: Any = torch.optim.Adam(module.parameters())
    if optimizer == "signum":
        updates = ScheduleFreeWrapper(SignSGD(module.parameters()), momentum=0.95)
        updates.train()
    forward = sparsify.SparseCoder.forward.__wrapped__  # the method without its autocast

    def step(_: int) -> None:
        module.set_decoder_norm_to_unit_norm()
        with torch.autocast("cuda", torch.bfloat16):
            forward(module, rows.float()).fvu.backward()
        module.remove_gradient_parallel_to_decoder_directions()
        updates.step()
        updates.zero_grad()

    weights: tuple[Tensor, ...] = tuple(module.parameters())
    with cuda.counted(rows, *weights) as device:
        theirs = Counted(device, step)
    ours = count(optimizer, StepSettings(autocast=True, chunk_latents=4096))
    assert ours.held <= theirs.held + WEIGHT + PER_LATENT  # both weights in bfloat16
    assert ours.beyond < theirs.beyond / 3
