"""The SAE as a torch module, and what its training minimises.

`sae` is the module, `activations` its sparse activations, `factory` builds one from its
configuration, `losses` computes what is minimised, `decoder_norm` and `input_scaling` handle the
scale of weights and rows, and `hookpoint_io` selects what an SAE reads and predicts.
"""

__all__ = [
    "activations",
    "decoder_norm",
    "factory",
    "hookpoint_io",
    "input_scaling",
    "losses",
    "sae",
]
