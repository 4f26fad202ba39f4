"""Harvest a language model's activations once; read them as often as you like.

Harvesting itself is `actcache.harvester.run.harvest`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actcache.cache.reader import Cache
    from actcache.config import HarvestConfig
    from actcache.stream.activation_stream import ActivationStream, Batch


__all__ = ["ActivationStream", "Batch", "Cache", "HarvestConfig"]

_HOMES = {
    "ActivationStream": "stream.activation_stream",
    "Batch": "stream.activation_stream",
    "Cache": "cache.reader",
    "HarvestConfig": "config",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that importing actcache costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'actcache' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"actcache.{_HOMES[name]}"), name)
