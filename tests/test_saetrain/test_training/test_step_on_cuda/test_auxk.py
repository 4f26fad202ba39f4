"""AuxK on a device: it costs nothing while no latent is dead.

Letters: N tokens, D d_in, M num_latents, K k.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from saetrain.training.sae_trainer import StepSettings
from saetrain.training.step import train_step

pytest.importorskip("triton")

N, D, M, K = 8192, 2048, 65536, 32
LISTED = 8 * (D // 2)
"""Latents in AuxK's list."""
STEPS = 6


def work_of_step(cuda: Any, trainer: Any) -> tuple[Counter[str], list[tuple[int, ...]], int]:
    """Return kernels launched, shapes allocated and operators of the last of some steps."""
    with cuda.building():
        rows = torch.empty(N, D, dtype=torch.bfloat16)
    with cuda.watched() as device:
        for step in range(STEPS):
            cuda.launches.clear()
            device.forget()
            train_step(trainer, rows, step)
    return Counter(cuda.launches), [taken.shape for taken in device.taken], device.most


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu"])
def test_auxk_costs_nothing_while_no_latent_is_dead(
    cuda: Any, make_trainee_on: Callable[..., Any], activation: str
) -> None:
    kind: dict[str, Any] = {} if activation == "topk" else {"activation": activation}
    kind |= {"sparsity": 1e-3} if activation == "relu" else {}
    alphas = {"off": 0.0, "no latent dead": 1 / 32, "some dead": 1 / 32}
    work = {}
    for name, alpha in alphas.items():
        cuda.arriving = 10 * N if name == "some dead" else 0
        trainer = make_trainee_on(
            D, M, K, settings=StepSettings(auxk_alpha=alpha), dead_after=4 * N, **kind
        )
        work[name] = work_of_step(cuda, trainer)
    launches, shapes, most = work["no latent dead"]
    without, its_shapes, its_most = work["off"]
    assert launches == without
    assert most <= its_most + 2 * 512  # the number that is copied
    assert [shape for shape in shapes if shape] == [shape for shape in its_shapes if shape]
    acting, shapes, _ = work["some dead"]
    assert acting.total() > without.total()
    assert (N, LISTED) in shapes


def test_auxk_acts_while_the_host_knows_nothing_and_from_when_a_latent_may_be_dead(
    cuda: Any, make_trainee_on: Callable[..., Any]
) -> None:
    trainer = make_trainee_on(settings=StepSettings(auxk_alpha=1 / 32), dead_after=4 * N)
    acts = []
    arriving = [None, None, 0, None, None, None, 0, None, 0]
    for step, cuda.arriving in enumerate(arriving):
        trainer.advance_dead_bound(N)
        acts.append(trainer.uses_auxk(step + 100, N))
    # Copies start in steps 0, 2 and 6: that which arrives in step 6 is 4 steps old.
    assert acts == [True, True, False, False, True, True, True, True, False]
