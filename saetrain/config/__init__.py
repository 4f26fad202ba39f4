"""Options of a training run, as frozen dataclasses with the rules beside them.

`sae` describes one SAE, `sae_options` how one is trained, `fit_config` a whole run, and `grid`
expands options that are given several times. None of it imports torch: `--help` reads it.
"""

__all__ = [
    "fit_config",
    "grid",
    "sae",
    "sae_options",
]
