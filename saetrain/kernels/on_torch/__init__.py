"""The kernels in PyTorch's own operators: the path on the CPU, and the fallback anywhere.

Every function has its twin of the same name and signature in `saetrain.kernels.reference`.
"""

from saetrain.kernels.on_torch.decode import (
    gather_dot,
    gather_sum,
    scatter_outer,
    scatter_sum,
    weight_gradients,
)
from saetrain.kernels.on_torch.selection import batch_topk_threshold, group_max, topk
from saetrain.kernels.on_torch.update import adam_update_, signum_update_

__all__ = [
    "adam_update_",
    "batch_topk_threshold",
    "gather_dot",
    "gather_sum",
    "group_max",
    "scatter_outer",
    "scatter_sum",
    "signum_update_",
    "topk",
    "weight_gradients",
]
