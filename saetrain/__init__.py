"""Train sparse autoencoders from a cache of activations.

Public names are imported when they are first used, so `import saetrain` needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saetrain.config.fit_config import FitConfig
    from saetrain.config.grid import vary
    from saetrain.evaluation import evaluate
    from saetrain.formats.sparsify import load_sae, save_sae
    from saetrain.launch.run import fit
    from saetrain.model.sae import Sae

__all__ = ["FitConfig", "Sae", "evaluate", "fit", "load_sae", "save_sae", "vary"]

_MODULES = {
    "FitConfig": "config.fit_config",
    "Sae": "model.sae",
    "evaluate": "evaluation",
    "fit": "launch.run",
    "load_sae": "formats.sparsify",
    "save_sae": "formats.sparsify",
    "vary": "config.grid",
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
