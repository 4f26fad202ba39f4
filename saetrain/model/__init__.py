"""The SAE as a torch module, and the losses that training minimises.

`sae` defines the module and builds it from a configuration, `activations` has its sparse
activations, `losses` computes the losses, and `weight_scales` folds decoder norms and input scales
into the saved weights.
"""

__all__ = ["activations", "losses", "sae", "weight_scales"]
