"""--parallel ddp: every process has all SAEs, and its lanes of each batch.

Gradients are averaged by torch's DistributedDataParallel. All else that a step learns from its
rows, which latents fired and what was measured, is that of the whole batch on every process, too:
so all have the same state at every step, and the checkpoint of one is that of all.

How DDP packs gradients together changes after its first step, and sums of three or more numbers
hang on where they lie in a package: a resumed run would differ. So each gradient is reduced by
itself; its bits then follow from its shape and the number of processes alone.
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
    """What joins the parts of a batch that processes have, for one SAE.

    Args:
        sae: the same on every process.
    """

    def __init__(self, sae: nn.Module) -> None:
        self._ddp = DistributedDataParallel(_LossModule(sae))
        self._ddp.register_comm_hook(None, lambda _, bucket: average_each_gradient(bucket))

    def forward(self, loss_config: Callable[..., Losses], *arguments: Any) -> Losses:
        """`objective(*arguments)` of the SAE; the backward pass leaves all rows' mean gradient."""
        losses: Losses = self._ddp(loss_config, *arguments)
        return losses

    def no_sync(self) -> AbstractContextManager[None]:
        """Within it, backward passes add up gradients on each process alone."""
        return self._ddp.no_sync()

    def all_mean(self, value: Tensor) -> Tensor:
        """Mean of a small tensor over processes, the same bits on each of them."""
        return all_gather(value).mean(dim=0)

    def count(
        self,
        losses: Losses,
        dead_tracker: DeadLatentTracker,
        latent_stats: LatentStats,
        meter: MeanMeter,
    ) -> None:
        """Count a step as a process alone does, but of the whole batch."""
        top_acts, top_indices = losses.output.top_acts, losses.output.top_indices
        ours = active_rows(top_acts, top_indices, len(dead_tracker.rows_since))  # [M]
        active = all_gather(ours.int()).sum(dim=0)
        rows = len(top_acts) * world_size()
        dead_tracker.count(active > 0, rows)
        latent_stats.count(active, rows)
        meter.count(self.all_mean(meter.values(losses)))


class _LossModule(nn.Module):
    """Losses as the forward pass of a module, which is what DDP takes."""

    def __init__(self, sae: nn.Module) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, loss_config: Callable[..., Losses], *arguments: Any) -> Losses:
        return loss_config(*arguments)
