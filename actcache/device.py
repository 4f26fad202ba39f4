"""Which device an option means."""

from __future__ import annotations

import os

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
