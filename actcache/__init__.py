"""Harvest a language model's activations once; read them as often as you like.

Harvesting itself is `actcache.harvest.harvest`: a function cannot share its module's name here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actcache.config import HarvestConfig
    from actcache.reader import Cache
    from actcache.stream import ActivationStream, Batch

__all__ = ["ActivationStream", "Batch", "Cache", "HarvestConfig"]

_HOMES = {
    "ActivationStream": "stream",
    "Batch": "stream",
    "Cache": "reader",
    "HarvestConfig": "config",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that importing actcache costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'actcache' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"actcache.{_HOMES[name]}"), name)
