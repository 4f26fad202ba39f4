"""Which device an option means, and which one a model takes its tokens on."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from actcache.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """The torch device that an option names.

    Raises:
        ConfigError: there is no such device.
    """
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
    """Return the largest resident size of this process so far, bytes.

    Read from VmHWM, which starts at exec. `ru_maxrss` is inherited through fork and exec, so that a
    process started by a larger one reports its parent's peak; it is used only where /proc lacks
    VmHWM.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def input_device(model: Any) -> torch.device:
    """Where a model takes its tokens; meta if it has no weights.

    Of a model that is spread over devices, weights that wait in memory or on disk are on the meta
    device; the hook that brings them in says where they compute.
    """
    hook = getattr(model, "_hf_hook", None)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    first: torch.device = next(model.parameters()).device
    return first


def require_whole_machine() -> None:
    """Refuse to spread a model over GPUs that other processes spread theirs over.

    Raises:
        ConfigError: torchrun started several processes on this machine.
    """
    processes = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    if processes != "1":
        raise ConfigError(
            "--device-map auto takes every GPU of the machine",
            expected="one process a machine",
            got=f"{processes} processes",
            remedy="torchrun --nproc_per_node 1, or start without torchrun",
        )
