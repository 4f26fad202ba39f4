"""Sparse encoder and decoder of a TopK autoencoder; needs torch alone, and triton on CUDA.

See README.md beside this file for what is computed, and how accurately.
"""

from saetrain.kernels.autoencode import Autoencoded, WeightRows, autoencode
from saetrain.kernels.backends import select_backend
from saetrain.kernels.bf16_copy import keep_bf16_copy
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
from saetrain.kernels.prefix_groups import PrefixGroups, Selector
from saetrain.kernels.reference import adam_numbers
from saetrain.kernels.selection import batch_topk, group_max, topk
from saetrain.kernels.update import adam_update_, normalise_rows_, project_, signum_update_

__all__ = [
    "Autoencoded",
    "Encoded",
    "PrefixGroups",
    "Selector",
    "WeightRows",
    "adam_numbers",
    "adam_update_",
    "autoencode",
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
]
