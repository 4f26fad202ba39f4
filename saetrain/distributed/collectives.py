"""Collective operations of torch.distributed for `--parallel ddp`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

_TIMEOUT = timedelta(days=30)
"""A harvest may be waited for in a collective. `StoreGroup` detects lost ranks."""


def init_collectives(store: Store, rank: int, world_size: int, device: torch.device) -> None:
    """Initialise torch's process group: gloo for tensors on the CPU, NCCL for those on a GPU."""
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT
    )


def all_gather_int(number: int) -> list[int]:
    """All-gather a number below 256, by rank. It is exchanged on CPUs, so that no GPU waits."""
    return [int(n) for n in all_gather(torch.tensor(number, dtype=torch.uint8))]


def world_size() -> int:
    """Return the number of processes that share each batch."""
    return dist.get_world_size()


def all_gather(value: Tensor) -> Tensor:
    """All-gather a tensor [...] by rank: [W, ...]."""
    gathered = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(gathered, value.contiguous())
    return torch.stack(gathered)


def average_each_gradient(bucket: Any) -> torch.futures.Future[Tensor]:
    """All-reduce every gradient of a DDP bucket by itself, and divide by the world size.

    Args:
        bucket: a `torch.distributed.GradBucket`: a flat buffer of several gradients.
    """
    flat = bucket.buffer()
    reductions = [dist.all_reduce(g, async_op=True).get_future() for g in bucket.gradients()]

    def divide(done: torch.futures.Future[Any]) -> Tensor:
        for reduction in done.value():
            reduction.value()  # raises the error of a failed all-reduce
        mean: Tensor = flat.div_(world_size())
        return mean

    return torch.futures.collect_all(reductions).then(divide)
