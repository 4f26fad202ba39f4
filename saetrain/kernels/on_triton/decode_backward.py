"""Gradient of the activations: each token's products with the K rows of W that it uses.

Letters: N tokens, D d_in, M num_latents, K k, B blocks of columns. As in decoding, programs take
one block of columns of W after the other, so that it is read from memory once. Products over a
block are written separately, [B, N, K], and added in order of blocks by a second launch: D·e/256 to
D·e/1024 numbers per pair instead of D read from memory, e bytes each.
"""
# Triton's decorator and pointer arguments have no types that mypy could check.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from saetrain.kernels.on_triton.decode import ROWS, cached_bytes
from saetrain.kernels.on_triton.launch import columns, device_of, power_of_two, wide
from saetrain.kernels.sorted_pairs import Bags, SortedPairs

SUMS = 512  # results of a program of the second launch


@triton.jit(do_not_specialize=["pairs"])
def gather_dot_kernel(
    dY,  # [N, D]
    indices,  # [N, K] int64
    acts,  # [N, K], or None
    offsets,  # [N+1] int64 of bags, whose number replaces N; None: K pairs each
    W,  # [M, D]
    out,  # [B, N, K]
    pairs,  # N*K
    K,
    D,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute one (token, block of D) per program."""
    n = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    gradient = tl.load(dY + n * D + d, mask=in_row, other=0.0).to(WIDE)
    if offsets is None:
        first = n * K
        count = K
    else:
        first = tl.load(offsets + n)
        count = (tl.load(offsets + n + 1) - first).to(tl.int32)
    out += block * pairs + first
    for start in range(0, count, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_top = k < count
        m = tl.load(indices + first + k, mask=in_top, other=0).to(tl.int64)
        used = in_top
        if acts is not None:
            used = in_top & (tl.load(acts + first + k, mask=in_top, other=0.0) != 0)
        mask = used[:, None] & in_row[None, :]
        rows = tl.load(W + m[:, None] * D + d[None, :], mask=mask, other=0.0).to(WIDE)
        products = tl.sum(gradient[None, :] * rows, axis=1)
        tl.store(out + k, products.to(out.dtype.element_ty), mask=in_top)


@triton.jit(do_not_specialize=["count"])
def add_blocks_kernel(
    parts,  # [B, count]
    out,  # [count]
    count,
    blocks,
    BLOCK: tl.constexpr,
):
    """Add the blocks of BLOCK results per program."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_out = i < count
    position = parts + i
    total = tl.load(position, mask=in_out, other=0.0)
    for _ in range(1, blocks):
        position += count
        total += tl.load(position, mask=in_out, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=in_out)


def gather_dot(
    dY: Tensor,
    indices: Tensor,
    W: Tensor,
    pairs: SortedPairs | None = None,
    bags: Bags | None = None,
    acts: Tensor | None = None,
) -> Tensor:
    """Compute out[n, k] = <dY[n], W[indices[n, k]]>: [N, K] in the dtype of W, or of `acts`.

    With `bags`, dY has a row for each of them. With `acts`, the result is 0 where they are, and no
    row is read. `pairs` are accepted for the common signature.
    """
    del pairs
    N, K = indices.shape
    M, D = W.shape
    dtype = W.dtype if acts is None else acts.dtype
    out = torch.empty(N, K, dtype=dtype, device=W.device)
    if out.numel() == 0:
        return out
    block_d, warps = columns(D, W.dtype, cached_bytes(M))
    blocks = triton.cdiv(D, block_d)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    parts = out if blocks == 1 else torch.empty(blocks, N, K, dtype=sums, device=W.device)
    with device_of(W):
        gather_dot_kernel[(len(dY), blocks)](
            dY.contiguous(),
            indices.contiguous(),
            None if acts is None else acts.contiguous(),
            None if bags is None else bags.offsets,
            W.contiguous(),
            parts,
            N * K,
            K,
            D,
            WIDE=wide(dtype),
            BLOCK_K=min(ROWS, power_of_two(K)),
            BLOCK_D=block_d,
            num_warps=warps,
        )
        if blocks > 1:
            grid = (triton.cdiv(N * K, SUMS),)
            add_blocks_kernel[grid](parts, out, N * K, blocks, BLOCK=SUMS, num_warps=4)
    return out
