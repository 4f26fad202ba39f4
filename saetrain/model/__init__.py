"""The SAE as a torch module, and the losses that training minimises.

`sae` defines the module and builds it from a configuration, `activations` has its sparse
activations, `losses` computes the losses, `weight_scales` folds decoder norms and input scales into
the saved weights, and `hookpoint_io` selects the hookpoints that an SAE reads and predicts.
"""

__all__ = ["activations", "hookpoint_io", "losses", "sae", "weight_scales"]
