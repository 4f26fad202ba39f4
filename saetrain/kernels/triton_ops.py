"""The primitives as Triton kernels: the path on CUDA.

Import this only where triton is installed. Letters: N tokens, D d_in, M num_latents, K k.
Floating arguments of one call share a dtype: float64 is summed in float64, all others in float32.
Indices are not checked: one outside [0, M) reads foreign memory.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from saetrain.kernels.pairs import SortedPairs, sort_pairs
from saetrain.kernels.triton_kernels import (
    gather_dot_kernel,
    gather_sum_kernel,
    scatter_outer_kernel,
    scatter_sum_kernel,
)

PIECE = 64  # pairs whose sum is formed apart before it joins a latent's total
ROWS = 8  # rows that a program has under way at once
MAX_BLOCK_D = 512  # ROWS * MAX_BLOCK_D sums stay in the registers of 8 warps


def gather_sum(acts: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """out[n] = sum over k of acts[n, k] * W[indices[n, k]]: [N, D] in the dtype of W."""
    N, K = indices.shape
    D = W.shape[1]
    out = torch.empty(N, D, dtype=W.dtype, device=W.device)
    if out.numel() == 0:
        return out
    block_d = _block_d(D)
    with _device_of(W):
        gather_sum_kernel[(N, triton.cdiv(D, block_d))](
            acts.contiguous(),
            indices.contiguous(),
            W.contiguous(),
            out,
            K,
            D,
            WIDE=_wide(W.dtype),
            BLOCK_K=_rows(K),
            BLOCK_D=block_d,
            num_warps=_warps(block_d),
        )
    return out


def gather_dot(dY: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """out[n, k] = <dY[n], W[indices[n, k]]>: [N, K] in the dtype of W."""
    N, K = indices.shape
    D = W.shape[1]
    out = torch.empty(N, K, dtype=W.dtype, device=W.device)
    if out.numel() == 0:
        return out
    block_d = _block_d(D)
    block_k = _rows(K)
    with _device_of(W):
        gather_dot_kernel[(N, triton.cdiv(K, block_k))](
            dY.contiguous(),
            indices.contiguous(),
            W.contiguous(),
            out,
            K,
            D,
            WIDE=_wide(W.dtype),
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=_warps(block_d),
        )
    return out


def scatter_outer(
    acts: Tensor,
    indices: Tensor,
    dY: Tensor,
    num_latents: int,
    pairs: SortedPairs | None = None,
) -> Tensor:
    """out[m] = sum over (n, k) with indices[n, k] = m of acts[n, k] * dY[n]: [M, D].

    Pass `pairs` if `indices` has been sorted already.
    """
    D = dY.shape[1]
    if indices.numel() == 0:
        return torch.zeros(num_latents, D, dtype=dY.dtype, device=dY.device)
    pairs = sort_pairs(indices, num_latents) if pairs is None else pairs
    out = torch.empty(num_latents, D, dtype=dY.dtype, device=dY.device)
    block_d = _block_d(D)
    with _device_of(dY):
        scatter_outer_kernel[(num_latents, triton.cdiv(D, block_d))](
            acts.contiguous(),
            pairs.order,
            pairs.token,
            pairs.offsets,
            dY.contiguous(),
            out,
            D,
            WIDE=_wide(dY.dtype),
            PIECE=PIECE,
            BLOCK_P=ROWS,
            BLOCK_D=block_d,
            num_warps=_warps(block_d),
        )
    return out


def scatter_sum(
    values: Tensor, indices: Tensor, num_latents: int, pairs: SortedPairs | None = None
) -> Tensor:
    """out[m] = sum of values[n, k] over (n, k) with indices[n, k] = m: [M].

    Pass `pairs` if `indices` has been sorted already.
    """
    if indices.numel() == 0:
        return torch.zeros(num_latents, dtype=values.dtype, device=values.device)
    pairs = sort_pairs(indices, num_latents) if pairs is None else pairs
    out = torch.empty(num_latents, dtype=values.dtype, device=values.device)
    with _device_of(values):
        scatter_sum_kernel[(num_latents,)](
            values.contiguous(),
            pairs.order,
            pairs.offsets,
            out,
            WIDE=_wide(values.dtype),
            PIECE=PIECE,
            num_warps=1,
        )
    return out


def _wide(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _rows(K: int) -> int:
    return min(ROWS, int(triton.next_power_of_2(K)))


def _block_d(D: int) -> int:
    return min(MAX_BLOCK_D, max(16, int(triton.next_power_of_2(D))))


def _warps(block_d: int) -> int:
    return 8 if block_d >= 512 else 4


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
