"""Options of a training run, as frozen dataclasses with their validation.

`sae` describes one SAE and how it is trained, `fit_config` a whole run, and `grid` expands options
that are given several times. No module here imports torch, so `--help` is fast.
"""

__all__ = ["fit_config", "grid", "sae"]
