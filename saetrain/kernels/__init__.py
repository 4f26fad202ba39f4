"""Sparse encoder and decoder of a TopK autoencoder; needs torch alone, and triton on CUDA.

See README.md beside this file for what is computed, and how accurately.
"""

from saetrain.kernels.autograd import Encoded, sparse_decode, sparse_encode, sparse_encode_by
from saetrain.kernels.paths import chosen_path

__all__ = ["Encoded", "chosen_path", "sparse_decode", "sparse_encode", "sparse_encode_by"]
