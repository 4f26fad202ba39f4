"""Collective operations of torch.distributed for `--parallel ddp`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

abandoned = threading.Event()
"""Set while a collective is pending, and for good if an exception has ended the wait for it."""

_SPINS = 200  # checks of a collective before the first pause
_PAUSE, _LONGEST_PAUSE = 5e-5, 100  # seconds, growing up to so many times as much
_TIMEOUT = timedelta(days=30)
"""A harvest may be waited for in a collective. `StoreGroup` detects lost ranks."""


def init_collectives(store: Store, rank: int, world_size: int, device: torch.device) -> None:
    """Initialise torch's process group: gloo for tensors on the CPU, NCCL for those on a GPU."""
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT
    )


def all_gather_int(number: int, while_waiting: Callable[[], None]) -> list[int]:
    """All-gather a number below 256, by rank. It is exchanged on CPUs, so that no GPU waits.

    Args:
        number: of this rank.
        while_waiting: called again and again until all ranks have taken part.
    """
    value = torch.tensor(number, dtype=torch.uint8)
    gathered = [torch.empty_like(value) for _ in range(world_size())]
    work = dist.all_gather(gathered, value, async_op=True)
    spins = 0
    abandoned.set()
    while not work.is_completed():  # `wait` would not return on a signal
        spins += 1
        if spins > _SPINS:
            while_waiting()
            time.sleep(min(spins - _SPINS, _LONGEST_PAUSE) * _PAUSE)
    abandoned.clear()
    work.wait()  # raises the error of a failed all-gather
    return [int(n) for n in gathered]


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
