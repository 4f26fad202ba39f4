"""One training step of ours and of sparsify's, from the same start, ready to be compared.

A contender is a pair: `step(x, number)` trains on rows x [N, D] in float32, and `finish()` gives
the function from rows to reconstructions that the library would publish.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # sparsify asks for it on a CPU

import torch
from torch import Tensor

from saetrain.config import OptimizerName, SaeConfig
from saetrain.metrics import Firing, Meter
from saetrain.optim import default_lr, make_optimizer
from saetrain.run import SaeEntry
from saetrain.sae import Sae
from saetrain.step import train_step
from saetrain.trainee import Trainee

Step = Callable[[Tensor, int], None]
Reconstruct = Callable[[Tensor], Tensor]
Contender = tuple[Step, Callable[[], Reconstruct]]


@dataclass(frozen=True)
class Setting:
    """What both sides are given alike."""

    d_in: int
    num_latents: int
    k: int
    optimizer: OptimizerName
    steps: int
    """Of the whole run."""
    warmup: int
    """Steps; adam only."""
    seed: int
    device: torch.device

    @property
    def lr(self) -> float:
        """Learning rate by sparsify's law, which is ours."""
        return default_lr(self.optimizer, self.num_latents)


def ours(setting: Setting, mean: Tensor, variance: float) -> Contender:
    """Our step. b_dec begins at `mean` [D]; the loss divides by `variance`."""
    s = setting
    sae = Sae(s.d_in, s.num_latents, s.k, seed=s.seed, device=s.device)
    with torch.no_grad():
        sae.b_dec.copy_(mean)
    trainee = Trainee(
        SaeEntry("rows", SaeConfig(s.d_in, s.num_latents, s.k), s.lr, s.seed),
        sae,
        make_optimizer(s.optimizer, sae, s.lr, s.warmup, s.steps),
        Firing(s.num_latents, 10_000_000, s.device),
        Meter(s.device),
        variance,
    )

    def finish() -> Reconstruct:
        sae.load_state_dict(trainee.optimizer.weights_to_export())
        return lambda x: sae(x).reconstruction

    return lambda x, step: train_step(trainee, x, step, 0.0), finish


def sparsify(setting: Setting) -> Contender:
    """Sparsify's module in the order of its own trainer; b_dec begins at the first batch's mean."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    from transformers import get_linear_schedule_with_warmup

    s = setting
    torch.manual_seed(s.seed)
    config = SparseCoderConfig(num_latents=s.num_latents, k=s.k)
    sae = SparseCoder(s.d_in, config, s.device, dtype=torch.float32)
    schedule: Any = None
    if s.optimizer == "signum":
        update: Any = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=s.lr), momentum=0.95)
        update.train()
    else:
        update = torch.optim.Adam(sae.parameters(), lr=s.lr)
        schedule = get_linear_schedule_with_warmup(update, s.warmup, s.steps)
    since_fired = torch.zeros(s.num_latents, dtype=torch.long, device=s.device)

    def step(x: Tensor, number: int) -> None:
        if number == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        output = sae(x)
        output.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        update.step()
        update.zero_grad()
        if schedule is not None:
            schedule.step()
        since_fired.add_(len(x))
        since_fired[output.latent_indices.flatten()] = 0

    def finish() -> Reconstruct:
        if s.optimizer == "signum":
            update.eval()
        return lambda x: sae(x).sae_out

    return step, finish
