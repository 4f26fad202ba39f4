"""Sparse and dense encoders, decoders and weight updates of an SAE, with their gradients.

`reference`, `on_torch` and `on_triton` are three backends with the same functions; `backends`
selects one by the tensor's device. It needs torch alone, and triton on CUDA. docs/kernels.md states
the formulas and the accuracy of the results.
"""

from saetrain.kernels.autoencode import Autoencoded, WeightRows, autoencode
from saetrain.kernels.backends import backend_of, select_backend, total
from saetrain.kernels.decode import sparse_decode
from saetrain.kernels.dense import dense_decode, dense_encode
from saetrain.kernels.encode import (
    Encoded,
    make_selector,
    sparse_encode,
    sparse_encode_by,
    topk_selector,
)
from saetrain.kernels.grad_memory import release_gradient
from saetrain.kernels.on_torch.update import normalise_rows_, project_
from saetrain.kernels.prefix_groups import PrefixGroups, Selector
from saetrain.kernels.selection import batch_topk, group_max, topk
from saetrain.kernels.update import (
    UpdateOptions,
    adam_numbers,
    adam_update_,
    keep_bf16_copy,
    signum_update_,
)

__all__ = [
    "Autoencoded",
    "Encoded",
    "PrefixGroups",
    "Selector",
    "UpdateOptions",
    "WeightRows",
    "adam_numbers",
    "adam_update_",
    "autoencode",
    "backend_of",
    "batch_topk",
    "dense_decode",
    "dense_encode",
    "group_max",
    "keep_bf16_copy",
    "make_selector",
    "normalise_rows_",
    "project_",
    "release_gradient",
    "select_backend",
    "signum_update_",
    "sparse_decode",
    "sparse_encode",
    "sparse_encode_by",
    "topk",
    "topk_selector",
    "total",
]
