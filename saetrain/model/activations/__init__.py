"""How latents become active: one file for each way, behind one small protocol. Needs torch alone.

An activation turns rows into latents, given the encoder's weights. Where each row has as many
active latents they come sparse, [N, K] with their numbers, through `saetrain.kernels`; where their
number varies, dense, [N, M].
"""

from saetrain.model.activations.base import Activation, Latents
from saetrain.model.activations.batchtopk import BatchTopK
from saetrain.model.activations.gated import Gated
from saetrain.model.activations.groupmax import GroupMax
from saetrain.model.activations.jumprelu import JumpRelu
from saetrain.model.activations.relu import Relu
from saetrain.model.activations.topk import TopK

__all__ = ["Activation", "BatchTopK", "Gated", "GroupMax", "JumpRelu", "Latents", "Relu", "TopK"]
