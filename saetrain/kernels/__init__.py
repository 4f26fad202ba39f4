"""Sparse encoder and decoder of a TopK autoencoder; needs torch alone, and triton on CUDA.

See README.md beside this file for what is computed, and how accurately.
"""

from saetrain.kernels.autoencode import Autoencoded, WeightRows, autoencode
from saetrain.kernels.backends import chosen_path
from saetrain.kernels.bf16_copy import keep_shadow
from saetrain.kernels.decode import sparse_decode
from saetrain.kernels.dense import dense_decode, dense_encode
from saetrain.kernels.encode import Encoded, chosen_by, largest, sparse_encode, sparse_encode_by
from saetrain.kernels.grad_memory import drop_gradient
from saetrain.kernels.prefix_groups import Pieces, Way
from saetrain.kernels.reference import adam_numbers
from saetrain.kernels.selection import batch_topk, group_max, topk
from saetrain.kernels.update import adam_update_, normalise_rows_, project_, signum_update_

__all__ = [
    "Autoencoded",
    "Encoded",
    "Pieces",
    "Way",
    "WeightRows",
    "adam_numbers",
    "adam_update_",
    "autoencode",
    "batch_topk",
    "chosen_by",
    "chosen_path",
    "dense_decode",
    "dense_encode",
    "drop_gradient",
    "group_max",
    "keep_shadow",
    "largest",
    "normalise_rows_",
    "project_",
    "signum_update_",
    "sparse_decode",
    "sparse_encode",
    "sparse_encode_by",
    "topk",
]
