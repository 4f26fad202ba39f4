"""Collective operations of torch.distributed between the processes of a run."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store


def init_collectives(store: Store, rank: int, processes: int, device: torch.device) -> None:
    """Begin torch's process group. What is on the CPU goes by gloo, with a GPU too."""
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=_TIMEOUT)


def all_gather_int(number: int) -> list[int]:
    """A number below 256 of every process, by rank. A word between CPUs: no GPU waits for it."""
    return [int(n) for n in all_gather(torch.tensor(number, dtype=torch.uint8))]


def world_size() -> int:
    """Processes that share each batch."""
    return dist.get_world_size()


def all_gather(value: Tensor) -> Tensor:
    """Every process's tensor [...], by rank. [W, ...]"""
    gathered = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(gathered, value.contiguous())
    return torch.stack(gathered)


def average_each_gradient(bucket: Any) -> torch.futures.Future[Tensor]:
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


_TIMEOUT = timedelta(days=30)
"""A harvest may be waited for. Whoever waits for one that is gone learns it from `store_group`."""
