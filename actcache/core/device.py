"""Torch devices: choice by option, a model's input device, peak memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from actcache.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """Return the torch device that --device names; raises `ConfigError` if it is unusable."""
    if name == "auto":
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # fails on meta, which computes nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            "--device cannot be used", expected="cpu, cuda, cuda:N or auto", got=f"{name} ({error})"
        ) from error
    return device


def peak_memory() -> int:
    """Return the peak resident memory of this process, bytes.

    Read from /proc, since `getrusage` of a forked process starts at its parent's peak.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux reports VmHWM for every process")


def input_device(model: Any) -> torch.device:
    """Return the device of a model's input tokens; meta for a model without weights.

    With --device-map, offloaded weights are on the meta device, so accelerate's hook is consulted
    for the device of execution.
    """
    hook = getattr(model, "_hf_hook", None)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    first: torch.device = next(model.parameters()).device
    return first


def require_whole_machine() -> None:
    """Raise `ConfigError` if --device-map is combined with several processes on this machine."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    if processes != "1":
        raise ConfigError(
            "--device-map auto uses every GPU of the machine",
            expected="one process per machine",
            got=f"{processes} processes",
            remedy="torchrun --nproc_per_node 1, or start without torchrun",
        )
