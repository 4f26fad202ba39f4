"""The backend on CUDA, in Triton, which only this package imports.

`saetrain.kernels.reference` has every function under the same name and signature. Each file holds
one kernel and the function that launches it. Sums
are formed in float32, of factors in any types; results have the type of acts. Nothing
waits for the device, nothing is tuned or compiled again when the number of tokens changes, and no
floating sum depends on the order in which programs run. Indices are not checked: one outside [0, M)
reads other memory.
"""

from saetrain.kernels.on_triton.batch_topk import batch_topk_threshold
from saetrain.kernels.on_triton.decode import gather_sum
from saetrain.kernels.on_triton.decode_backward import gather_dot
from saetrain.kernels.on_triton.group_max import group_max
from saetrain.kernels.on_triton.segments import scatter_outer, scatter_sum, weight_gradients
from saetrain.kernels.on_triton.topk import topk
from saetrain.kernels.on_triton.update import adam_update_, signum_update_

SKIPS_EMPTY = MIXES_TYPES = True

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
