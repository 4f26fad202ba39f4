"""How latents become active: one file for each way, behind one small protocol. Needs torch alone.

An activation turns rows into latents, given the encoder's weights. Where each row has as many
active latents they come sparse, [N, K] with their numbers, through `saetrain.kernels`; where their
number varies, dense, [N, M].
"""

from saetrain.activations.base import Activation, Latents
from saetrain.activations.batchtopk import BatchTopK
from saetrain.activations.gated import Gated
from saetrain.activations.groupmax import GroupMax
from saetrain.activations.jumprelu import JumpRelu
from saetrain.activations.relu import Relu
from saetrain.activations.topk import TopK

__all__ = [
    "Activation",
    "BatchTopK",
    "Gated",
    "GroupMax",
    "JumpRelu",
    "Latents",
    "Relu",
    "TopK",
]
