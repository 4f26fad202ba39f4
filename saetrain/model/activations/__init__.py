"""Sparse activation functions, one a file, with the base class `Activation`.

An activation computes latents from rows and the encoder's weights. If every row has the same number
of active latents, they are sparse, [N, K] with their indices, computed by `saetrain.kernels`;
otherwise they are dense, [N, M].
"""

from saetrain.model.activations.base import Activation, Latents
from saetrain.model.activations.batchtopk import BatchTopK
from saetrain.model.activations.gated import Gated
from saetrain.model.activations.groupmax import GroupMax
from saetrain.model.activations.jumprelu import JumpRelu, to_saved
from saetrain.model.activations.relu import Relu
from saetrain.model.activations.topk import TopK

__all__ = [
    "Activation",
    "BatchTopK",
    "Gated",
    "GroupMax",
    "JumpRelu",
    "Latents",
    "Relu",
    "TopK",
    "to_saved",
]
