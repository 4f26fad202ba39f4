"""Sparse decode: each token's weighted sum of the K rows of W that it uses.

Letters: N tokens, D d_in, M num_latents, K k. A program computes one block of columns of one
token's row. Programs run through all tokens for the first block of columns before they begin the
second (the grid's first axis is the fastest), and the block is so narrow that these columns of all
of W fit the second-level cache: N·K rows are read from there, and W is read from memory once.
"""
# Triton's decorator and pointer arguments have no types that mypy could check.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from saetrain.kernels.on_triton.launch import columns, device_of, power_of_two, wide
from saetrain.kernels.sorted_pairs import Bags

ROWS = 8  # rows of W that a program loads at once
CACHE = 2**25  # bytes of a Hopper chip's cache that a block of columns may fill, of 50 MB or more


@triton.jit
def gather_sum_kernel(
    acts,  # [N, K]
    indices,  # [N, K] int64
    offsets,  # [N+1] int64 of bags, whose number replaces N; None: K pairs each
    W,  # [M, D]
    out,  # [N, D]
    K,
    D,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute one (token, block of D) per program."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    if offsets is None:
        first = n * K
        count = K
    else:
        first = tl.load(offsets + n)
        count = (tl.load(offsets + n + 1) - first).to(tl.int32)
    total = tl.zeros([BLOCK_K, BLOCK_D], dtype=WIDE)
    for start in range(0, count, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_top = k < count
        m = tl.load(indices + first + k, mask=in_top, other=0).to(tl.int64)
        act = tl.load(acts + first + k, mask=in_top, other=0.0).to(WIDE)
        # An empty slot, of act 0, adds nothing: its row is not read.
        mask = (in_top & (act != 0))[:, None] & in_row[None, :]
        rows = tl.load(W + m[:, None] * D + d[None, :], mask=mask, other=0.0).to(WIDE)
        total += act[:, None] * rows
    result = tl.sum(total, axis=0)
    tl.store(out + n * D + d, result.to(out.dtype.element_ty), mask=in_row)


def gather_sum(acts: Tensor, indices: Tensor, W: Tensor, bags: Bags | None = None) -> Tensor:
    """Compute out[n] = sum over k of acts[n, k] * W[indices[n, k]]: [N, D] in the dtype of acts.

    With `bags`, out has a row for each of them, the sum over its pairs.
    """
    N, K = indices.shape
    if bags is not None:
        N = len(bags.offsets) - 1
    M, D = W.shape
    out = torch.empty(N, D, dtype=acts.dtype, device=W.device)
    if out.numel() == 0:
        return out
    block_d, warps = columns(D, W.dtype, cached_bytes(M))
    with device_of(W):
        gather_sum_kernel[(N, triton.cdiv(D, block_d))](
            acts.contiguous(),
            indices.contiguous(),
            None if bags is None else bags.offsets,
            W.contiguous(),
            out,
            K,
            D,
            WIDE=wide(acts.dtype),
            BLOCK_K=min(ROWS, power_of_two(K)),
            BLOCK_D=block_d,
            num_warps=warps,
        )
    return out


def cached_bytes(rows: int) -> int:
    """Return the bytes of a row, 256 to 1024, of which `rows` times as many fit the cache."""
    return min(1024, max(256, power_of_two(CACHE // rows + 1) // 2))
