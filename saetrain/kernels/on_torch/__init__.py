"""The backend in PyTorch's own operators: the default on the CPU, and the fallback anywhere.

`saetrain.kernels.reference` has every function under the same name and signature.
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

SKIPS_EMPTY = MIXES_TYPES = False

__all__ = [
    "MIXES_TYPES",
    "SKIPS_EMPTY",
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
