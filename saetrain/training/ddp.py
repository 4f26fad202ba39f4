"""Data parallelism (--parallel ddp): every process holds all SAEs and some lanes of each batch.

DistributedDataParallel averages the gradients. Latent counts and losses are all-gathered too, so
every process has the same state after every step, and rank 0's checkpoint is that of all.

DDP rebuilds its gradient buckets after the first step, and the rounding of a sum depends on its
offset in a bucket, so a resumed run would differ. A communication hook therefore reduces each
gradient by itself: its bits depend only on its shape and the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from saetrain.distributed.collectives import all_gather, average_each_gradient, world_size
from saetrain.model.losses import Losses
from saetrain.training.metrics import DeadLatentTracker, LatentStats, MeanMeter, active_rows


class DdpStep:
    """Collectives of one SAE's steps.

    Args:
        sae: identical on every process.
    """

    def __init__(self, sae: nn.Module) -> None:
        self._ddp = DistributedDataParallel(_LossModule(sae))
        self._ddp.register_comm_hook(None, lambda _, bucket: average_each_gradient(bucket))

    def forward(self, loss_config: Callable[..., Losses], *arguments: Any) -> Losses:
        """Return `loss_config(*arguments)`; its backward pass averages gradients over ranks."""
        losses: Losses = self._ddp(loss_config, *arguments)
        return losses

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context in which backward passes accumulate gradients without all-reduce."""
        return self._ddp.no_sync()

    def all_mean(self, value: Tensor) -> Tensor:
        """Return the mean of a small tensor over processes, with the same bits on each."""
        return all_gather(value).mean(dim=0)

    def count(
        self,
        losses: Losses,
        dead_tracker: DeadLatentTracker,
        latent_stats: LatentStats,
        meter: MeanMeter,
    ) -> None:
        """Count one step's latents and losses over the whole batch, by all-gather."""
        top_acts, top_indices = losses.output.top_acts, losses.output.top_indices
        local = active_rows(top_acts, top_indices, len(dead_tracker.rows_since))  # [M]
        active = all_gather(local.int()).sum(dim=0)
        rows = len(top_acts) * world_size()
        dead_tracker.count(active > 0, rows)
        latent_stats.count(active, rows)
        meter.count(self.all_mean(meter.values(losses)))


class _LossModule(nn.Module):
    """A module whose forward pass computes the losses, as DistributedDataParallel requires."""

    def __init__(self, sae: nn.Module) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, loss_config: Callable[..., Losses], *arguments: Any) -> Losses:
        return loss_config(*arguments)
