"""Device code of the Triton path; `triton_ops` launches it.

Letters: N tokens, D d_in, M num_latents, K k. All arrays are contiguous. `WIDE` is the dtype in
which sums are formed. A row's number times its length is taken in int64: M * D passes 2^31 at
sizes in use. Each element of a result is written by one program, in a fixed order of additions.
"""

# Triton's decorator and pointer arguments have no types that mypy could check.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def gather_sum_kernel(
    acts,  # [N, K]
    indices,  # [N, K] int64
    W,  # [M, D]
    out,  # [N, D]
    K,
    D,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (token, block of D)."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    # BLOCK_K rows of W at a time, so that several loads are under way at once.
    total = tl.zeros([BLOCK_K, BLOCK_D], dtype=WIDE)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_top = k < K
        m = tl.load(indices + n * K + k, mask=in_top, other=0).to(tl.int64)
        act = tl.load(acts + n * K + k, mask=in_top, other=0.0).to(WIDE)
        mask = in_top[:, None] & in_row[None, :]
        rows = tl.load(W + m[:, None] * D + d[None, :], mask=mask, other=0.0).to(WIDE)
        total += act[:, None] * rows
    result = tl.sum(total, axis=0)
    tl.store(out + n * D + d, result.to(out.dtype.element_ty), mask=in_row)


@triton.jit
def gather_dot_kernel(
    dY,  # [N, D]
    indices,  # [N, K] int64
    W,  # [M, D]
    out,  # [N, K]
    K,
    D,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (token, block of K)."""
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_top = k < K
    m = tl.load(indices + n * K + k, mask=in_top, other=0).to(tl.int64)
    total = tl.zeros([BLOCK_K, BLOCK_D], dtype=WIDE)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_row = d < D
        gradient = tl.load(dY + n * D + d, mask=in_row, other=0.0).to(WIDE)
        mask = in_top[:, None] & in_row[None, :]
        rows = tl.load(W + m[:, None] * D + d[None, :], mask=mask, other=0.0).to(WIDE)
        total += gradient[None, :] * rows
    result = tl.sum(total, axis=1)
    tl.store(out + n * K + k, result.to(out.dtype.element_ty), mask=in_top)


@triton.jit
def scatter_outer_kernel(
    acts,  # [N, K]
    order,  # [N*K] int64
    token,  # [N*K] int64
    offsets,  # [M+1] int64
    dY,  # [N, D]
    out,  # [M, D]
    D,
    WIDE: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (latent, block of D); it owns that part of the row, hit or not."""
    m = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    first = tl.load(offsets + m)
    end = tl.load(offsets + m + 1)
    total = tl.zeros([BLOCK_D], dtype=WIDE)
    # Pieces are summed apart: a latent that fires on every token would lose digits in one sum.
    for piece in range(first, end, PIECE):
        partial = tl.zeros([BLOCK_P, BLOCK_D], dtype=WIDE)
        for start in range(piece, tl.minimum(piece + PIECE, end), BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            in_segment = p < end
            position = tl.load(order + p, mask=in_segment, other=0)
            act = tl.load(acts + position, mask=in_segment, other=0.0).to(WIDE)
            n = tl.load(token + p, mask=in_segment, other=0)
            mask = in_segment[:, None] & in_row[None, :]
            rows = tl.load(dY + n[:, None] * D + d[None, :], mask=mask, other=0.0).to(WIDE)
            partial += act[:, None] * rows
        total += tl.sum(partial, axis=0)
    tl.store(out + m * D + d, total.to(out.dtype.element_ty), mask=in_row)


@triton.jit
def scatter_sum_kernel(
    values,  # [N, K]
    order,  # [N*K] int64
    offsets,  # [M+1] int64
    out,  # [M]
    WIDE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One program per latent."""
    m = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets + m)
    end = tl.load(offsets + m + 1)
    total = tl.zeros([PIECE], dtype=WIDE)
    for start in range(first, end, PIECE):
        p = start + tl.arange(0, PIECE)
        in_segment = p < end
        position = tl.load(order + p, mask=in_segment, other=0)
        total += tl.load(values + position, mask=in_segment, other=0.0).to(WIDE)
    tl.store(out + m, tl.sum(total, axis=0).to(out.dtype.element_ty))
