"""The language model that is harvested: loaded, placed on devices, and hooked.

`loading` loads a causal language model and fingerprints its weights, `quantization` chooses bits
and devices, and `hooks` finds the hookpoints and captures their activations.
"""

__all__ = [
    "hooks",
    "loading",
    "quantization",
]
