"""Harvest a language model's activations once, then read them as often as needed.

Public names are imported when they are first used, so `import actcache` needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actcache.adapters.feed import open_feed
    from actcache.cache.reader import Cache
    from actcache.cache.verify import verify
    from actcache.config import HarvestConfig
    from actcache.harvester.run import harvest
    from actcache.inspection.summary import inspect
    from actcache.stream.activation_stream import ActivationStream, Batch

__all__ = [
    "ActivationStream",
    "Batch",
    "Cache",
    "HarvestConfig",
    "harvest",
    "inspect",
    "open_feed",
    "verify",
]

_MODULES = {
    "ActivationStream": "stream.activation_stream",
    "Batch": "stream.activation_stream",
    "Cache": "cache.reader",
    "HarvestConfig": "config",
    "harvest": "harvester.run",
    "inspect": "inspection.summary",
    "open_feed": "adapters.feed",
    "verify": "cache.verify",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, so that completion offers them before their first use."""
    return sorted({*globals(), *__all__})
