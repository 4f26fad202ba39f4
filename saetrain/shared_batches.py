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
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.nn.parallel import DistributedDataParallel

from saetrain.losses import Losses
from saetrain.metrics import Firing, Meter
from saetrain.vitals import Vitals, active_rows

_PATIENCE = timedelta(days=30)
"""A harvest may be waited for. Whoever waits for one that is gone learns it from `peers`."""


class SharedBatches:
    """What joins the parts of a batch that processes have, for one SAE.

    Args:
        sae: the same on every process.
    """

    def __init__(self, sae: nn.Module) -> None:
        self._ddp = DistributedDataParallel(_Objective(sae))
        self._ddp.register_comm_hook(None, lambda _, bucket: mean_of_each(bucket))

    def losses(self, objective: Callable[..., Losses], *arguments: Any) -> Losses:
        """`objective(*arguments)` of the SAE; the backward pass leaves all rows' mean gradient."""
        losses: Losses = self._ddp(objective, *arguments)
        return losses

    def apart(self) -> AbstractContextManager[None]:
        """Within it, backward passes add up gradients on each process alone."""
        return self._ddp.no_sync()

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a small tensor over processes, the same bits on each of them."""
        return _from_all(value).mean(dim=0)

    def count(self, losses: Losses, firing: Firing, vitals: Vitals, meter: Meter) -> None:
        """Count a step as a process alone does, but of the whole batch."""
        top_acts, top_indices = losses.output.top_acts, losses.output.top_indices
        ours = active_rows(top_acts, top_indices, len(firing.rows_since))  # [M]
        active = _from_all(ours.int()).sum(dim=0)
        rows = len(top_acts) * world_size()
        firing.count(active > 0, rows)
        vitals.count(active, rows)
        meter.count(self.mean(meter.values(losses)))


def world_size() -> int:
    """Processes that share each batch."""
    return dist.get_world_size()


def mean_of_each(bucket: Any) -> torch.futures.Future[Tensor]:
    """DDP's hook: the mean of every gradient over processes, each reduced by itself.

    Args:
        bucket: a `torch.distributed.GradBucket`, gradients side by side.
    """
    flat = bucket.buffer()
    works = [dist.all_reduce(g, async_op=True).get_future() for g in bucket.gradients()]

    def divide(done: torch.futures.Future[Any]) -> Tensor:
        for work in done.value():
            work.value()  # raises what went wrong
        mean: Tensor = flat.div_(world_size())
        return mean

    return torch.futures.collect_all(works).then(divide)


def join_collectives(store: Store, rank: int, processes: int, device: torch.device) -> None:
    """Begin torch's process group. What is on the CPU goes by gloo, with a GPU too."""
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=processes, timeout=_PATIENCE
    )


def said_by_all(number: int) -> list[int]:
    """A number below 256 of every process, by rank. A word between CPUs: no GPU waits for it."""
    return [int(n) for n in _from_all(torch.tensor(number, dtype=torch.uint8))]


def _from_all(value: Tensor) -> Tensor:
    """Every process's tensor [...], by rank. [W, ...]"""
    gathered = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(gathered, value.contiguous())
    return torch.stack(gathered)


class _Objective(nn.Module):
    """Losses as the forward pass of a module, which is what DDP takes."""

    def __init__(self, sae: nn.Module) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, objective: Callable[..., Losses], *arguments: Any) -> Losses:
        return objective(*arguments)
