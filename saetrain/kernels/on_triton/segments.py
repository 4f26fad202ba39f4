"""Gradients of the weights: each latent's sums over the pairs that it owns.

    dW_dec[m] = Σ a·dY[n]      dW_enc[m] = Σ g·x[n]      db_enc[m] = Σ g

over the pairs (n, k) with indices[n, k] = m, which are neighbours once sorted; pairs that `pairs`
leave out come after those of the last latent. One program computes
one block of columns of both rows of one latent, in the order of its pairs, and writes them, zeros
for a latent that was not hit. The block is so narrow that its columns of all of x and dY fit the
second-level cache, from which N·K rows of each are read.

The program of a latent that owns more than CHUNK pairs would finish last. Its pairs are summed by
the chunks of CHUNK positions that contain them, each chunk by its own program, and the sums of
chunks are added in their order by a second launch. A chunk has pairs of at most two such latents (a
third, between them, would own fewer than a chunk): that of its first position and that of its last.
So there are two sums a chunk, 2·N·K/CHUNK rows in all, which the host allocates without counting.
PIECE pairs are summed apart before they are added to a total.

Letters: N tokens, D d_in, E width of the output, M num_latents, K k, C chunks, cdiv(N·K, CHUNK).
"""
# Triton's decorator and pointer arguments have no types that mypy could check.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from saetrain.kernels.on_triton.launch import columns, device_of, wide
from saetrain.kernels.sorted_pairs import Bags, SortedPairs, sort_pairs

PIECE = 64  # pairs that are summed apart before they are added to a total
CHUNK = 256  # positions that one program sums of a latent that owns more
ROWS = 4  # rows of each matrix that a program loads at once; most latents own few pairs
ROW_BYTES = 512  # bytes of each row in one program: of 32,768 rows, 16 MB


@triton.jit(do_not_specialize=["chunks"])
def segments_kernel(
    acts,  # [N, K]
    dY,  # [N, E]
    g,  # [N, K]; None (and x, dW_enc, db_enc None): compute dW_dec alone
    x,  # [N, D]
    indices,  # [N, K] int64
    bag,  # [N, K] int64: row of dY of each pair; None: its token
    order,  # [N*K] int64
    token,  # [N*K] int64
    offsets,  # [M+1] int64
    dW_dec,  # [M, E]
    dW_enc,  # [M, D]
    db_enc,  # [M]
    part_dec,  # [C, 2, E], of sums
    part_enc,  # [C, 2, D]
    part_b,  # [C, 2]
    latents,  # M
    chunks,  # C
    E,
    D,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum one (edge of a chunk or latent, block of E and D) per program; long chunks first."""
    number = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_chunk = number < 2 * chunks
    begin = (number // 2) * CHUNK
    count = tl.load(offsets + latents)
    stop = tl.minimum(begin + CHUNK, count)
    if in_chunk:
        edge = tl.where(number % 2 == 0, begin, tl.maximum(stop - 1, 0))
        m = tl.load(indices + tl.load(order + edge))
    else:
        m = number - 2 * chunks
    first = tl.load(offsets + m)
    end = tl.load(offsets + m + 1)
    owned_here = end - first <= CHUNK
    if in_chunk:
        # One latent may have both edges; it is summed at the first.
        owned_here = (end - first > CHUNK) & ((first > begin) | (number % 2 == 0))
        owned_here = owned_here & (begin < count)
        first = tl.maximum(first, begin)
        end = tl.minimum(end, stop)
    end = tl.where(owned_here, end, first)

    total_dec = tl.zeros([BLOCK_D], dtype=WIDE)
    total_enc = tl.zeros([BLOCK_D], dtype=WIDE)
    total_b = tl.zeros([ROWS], dtype=WIDE)
    for piece in range(first, end, PIECE):
        sum_dec = tl.zeros([BLOCK_D], dtype=WIDE)
        sum_enc = tl.zeros([BLOCK_D], dtype=WIDE)
        for start in range(piece, tl.minimum(piece + PIECE, end), ROWS):
            p = start + tl.arange(0, ROWS).to(tl.int64)  # in the interpreter `start` has no type
            owned = p < end
            position = tl.load(order + p, mask=owned, other=0)
            n = tl.load(token + p, mask=owned, other=0)
            b = n if bag is None else tl.load(bag + position, mask=owned, other=0)
            mask = owned[:, None] & (d < E)[None, :]
            act = tl.load(acts + position, mask=owned, other=0.0).to(WIDE)
            row = tl.load(dY + b[:, None] * E + d[None, :], mask=mask, other=0.0).to(WIDE)
            sum_dec += tl.sum(act[:, None] * row, axis=0)
            if g is not None:
                mask = owned[:, None] & (d < D)[None, :]
                slope = tl.load(g + position, mask=owned, other=0.0).to(WIDE)
                row = tl.load(x + n[:, None] * D + d[None, :], mask=mask, other=0.0).to(WIDE)
                sum_enc += tl.sum(slope[:, None] * row, axis=0)
                total_b += slope
        total_dec += sum_dec
        total_enc += sum_enc

    mask_dec = d < tl.where(owned_here, E, 0)
    mask_enc = d < tl.where(owned_here, D, 0)
    first_block = owned_here & (tl.program_id(1) == 0)
    if in_chunk:
        tl.store(part_dec + number * E + d, total_dec, mask=mask_dec)
        if g is not None:
            tl.store(part_enc + number * D + d, total_enc, mask=mask_enc)
            tl.store(part_b + number, tl.sum(total_b, axis=0), mask=first_block)
    else:
        tl.store(dW_dec + m * E + d, total_dec.to(dW_dec.dtype.element_ty), mask=mask_dec)
        if g is not None:
            tl.store(dW_enc + m * D + d, total_enc.to(dW_enc.dtype.element_ty), mask=mask_enc)
            sum_b = tl.sum(total_b, axis=0).to(db_enc.dtype.element_ty)
            tl.store(db_enc + m, sum_b, mask=first_block)


@triton.jit
def add_chunks_kernel(
    indices,  # [N, K] int64
    order,  # [N*K] int64
    offsets,  # [M+1] int64
    dW_dec,  # [M, E]
    dW_enc,  # [M, D], or None
    db_enc,  # [M], or None
    part_dec,  # [C, 2, E]
    part_enc,  # [C, 2, D], or None
    part_b,  # [C, 2], or None
    latents,  # M
    E,
    D,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the chunks of the latent that ends in a (chunk, block of E and D), one per program."""
    closing = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = closing * CHUNK
    # A latent that owns more than a chunk and ends in this one owns its first position.
    m = tl.load(indices + tl.load(order + begin))
    first = tl.load(offsets + m)
    end = tl.load(offsets + m + 1)
    count = tl.load(offsets + latents)
    # Behind `count`, m is any latent.
    if (end - first > CHUNK) & (end > begin) & (end <= tl.minimum(begin + CHUNK, count)):
        opening = first // CHUNK
        # In its first chunk it stands at the last edge, unless it owns the first position too.
        slot = opening * 2 + tl.where(first > opening * CHUNK, 1, 0)
        in_row = d < E
        dec = tl.load(part_dec + slot * E + d, mask=in_row, other=0.0)
        for chunk in range(opening + 1, closing + 1):
            dec += tl.load(part_dec + chunk * 2 * E + d, mask=in_row, other=0.0)
        tl.store(dW_dec + m * E + d, dec.to(dW_dec.dtype.element_ty), mask=in_row)
        if dW_enc is not None:
            in_row = d < D
            enc = tl.load(part_enc + slot * D + d, mask=in_row, other=0.0)
            b = tl.load(part_b + slot)
            for chunk in range(opening + 1, closing + 1):
                enc += tl.load(part_enc + chunk * 2 * D + d, mask=in_row, other=0.0)
                b += tl.load(part_b + chunk * 2)
            tl.store(dW_enc + m * D + d, enc.to(dW_enc.dtype.element_ty), mask=in_row)
            if tl.program_id(1) == 0:
                tl.store(db_enc + m, b.to(db_enc.dtype.element_ty))


@triton.jit
def scatter_sum_kernel(
    values,  # [N, K]
    order,  # [N*K] int64
    offsets,  # [M+1] int64
    out,  # [M]
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum one latent per program: BLOCK sums side by side, then one over them."""
    m = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets + m)
    end = tl.load(offsets + m + 1)
    total = tl.zeros([BLOCK], dtype=WIDE)
    for start in range(first, end, BLOCK):
        p = start + tl.arange(0, BLOCK).to(tl.int64)
        owned = p < end
        position = tl.load(order + p, mask=owned, other=0)
        total += tl.load(values + position, mask=owned, other=0.0).to(WIDE)
    tl.store(out + m, tl.sum(total, axis=0).to(out.dtype.element_ty))


def weight_gradients(
    acts: Tensor,
    dY: Tensor,
    g: Tensor,
    x: Tensor,
    indices: Tensor,
    num_latents: int,
    pairs: SortedPairs | None = None,
    dtype: torch.dtype | None = None,
    bags: Bags | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dW_dec [M, E], dW_enc [M, D] and db_enc [M] in one pass over the pairs.

    See `saetrain.kernels.reference`. Results in float32 lose nothing of factors in bfloat16: sums
    are formed in it.
    """
    dtype = dtype or dY.dtype
    dW_dec = torch.empty(num_latents, dY.shape[1], dtype=dtype, device=dY.device)
    dW_enc = torch.empty(num_latents, x.shape[1], dtype=dtype, device=dY.device)
    db_enc = torch.empty(num_latents, dtype=dtype, device=dY.device)
    if indices.numel() == 0 or db_enc.numel() == 0 or dY.shape[1] + x.shape[1] == 0:
        return dW_dec.zero_(), dW_enc.zero_(), db_enc.zero_()
    pairs = sort_pairs(indices, num_latents) if pairs is None else pairs
    _launch(acts, dY, g, x, indices, pairs, bags, (dW_dec, dW_enc, db_enc))
    return dW_dec, dW_enc, db_enc


def scatter_outer(
    acts: Tensor,
    indices: Tensor,
    dY: Tensor,
    num_latents: int,
    pairs: SortedPairs | None = None,
    bags: Bags | None = None,
) -> Tensor:
    """Compute out[m] = sum over (n, k) with indices[n, k] = m of acts[n, k] * dY[n]: [M, D].

    `pairs` are the sorted pairs of `indices`. With `bags`, dY has a row for each of them.
    """
    out = torch.empty(num_latents, dY.shape[1], dtype=dY.dtype, device=dY.device)
    if indices.numel() == 0 or out.numel() == 0:
        return out.zero_()
    pairs = sort_pairs(indices, num_latents) if pairs is None else pairs
    _launch(acts, dY, None, None, indices, pairs, bags, (out, None, None))
    return out


def scatter_sum(
    values: Tensor, indices: Tensor, num_latents: int, pairs: SortedPairs | None = None
) -> Tensor:
    """Compute out[m] = sum of values[n, k] over (n, k) with indices[n, k] = m: [M]."""
    if indices.numel() == 0:
        return torch.zeros(num_latents, dtype=values.dtype, device=values.device)
    pairs = sort_pairs(indices, num_latents) if pairs is None else pairs
    out = torch.empty(num_latents, dtype=values.dtype, device=values.device)
    with device_of(values):
        scatter_sum_kernel[(num_latents,)](
            values.contiguous(),
            pairs.order,
            pairs.offsets,
            out,
            WIDE=wide(values.dtype),
            BLOCK=PIECE,
            num_warps=1,
        )
    return out


def _launch(
    acts: Tensor,
    dY: Tensor,
    g: Tensor | None,
    x: Tensor | None,
    indices: Tensor,
    pairs: SortedPairs,
    bags: Bags | None,
    out: tuple[Tensor, Tensor | None, Tensor | None],
) -> None:
    """Write all of `out`: dW_dec and, with g and x, dW_enc and db_enc."""
    M, E = out[0].shape
    D = E if x is None else x.shape[1]
    chunks = triton.cdiv(indices.numel(), CHUNK)
    sums = torch.float64 if dY.dtype == torch.float64 else torch.float32
    part_dec = torch.empty(chunks, 2, E, dtype=sums, device=dY.device)
    part_enc = None if g is None else torch.empty(chunks, 2, D, dtype=sums, device=dY.device)
    part_b = None if g is None else torch.empty(chunks, 2, dtype=sums, device=dY.device)
    parts = (part_dec, part_enc, part_b)
    block_d, warps = columns(max(E, D), dY.dtype, ROW_BYTES)
    blocks = triton.cdiv(max(E, D), block_d)
    indices = indices.contiguous()
    with device_of(dY):
        segments_kernel[(2 * chunks + M, blocks)](
            acts.contiguous(),
            dY.contiguous(),
            None if g is None else g.contiguous(),
            None if x is None else x.contiguous(),
            indices,
            None if bags is None else bags.bag,
            *pairs,
            *out,
            *parts,
            M,
            chunks,
            E,
            D,
            WIDE=wide(dY.dtype),
            CHUNK=CHUNK,
            PIECE=PIECE,
            ROWS=ROWS,
            BLOCK_D=block_d,
            num_warps=warps,
        )
        add_chunks_kernel[(chunks, blocks)](
            indices,
            pairs.order,
            pairs.offsets,
            *out,
            *parts,
            M,
            E,
            D,
            CHUNK=CHUNK,
            BLOCK_D=block_d,
            num_warps=warps,
        )
