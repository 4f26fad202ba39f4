"""The largest of each of K groups of neighbouring latents.

An integer holds a number's key (`keys`) in its high half, and 2^31 minus its column in the
low half: the largest such integer is that of the first of a group's largest numbers, or of its
first NaN. A row is read once.

Letters: N tokens, M num_latents, K k, S = M/K latents of a group.
"""
# Triton's decorator and pointer arguments have no types that mypy could check.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from saetrain.kernels.on_triton.keys import DTYPES, ordered
from saetrain.kernels.on_triton.launch import device_of, power_of_two

BLOCK = 2048  # numbers that a program loads at once


@triton.jit
def group_max_kernel(
    pre_acts,  # [N, M]
    values,  # [N, K]
    indices,  # [N, K] int64
    M,
    K,
    S,
    GROUPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    FAR: tl.constexpr,  # 2^31, beyond every column
):
    """Search one (token, GROUPS groups) per program."""
    n = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    best = tl.zeros([GROUPS], dtype=tl.int64)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        column = group[:, None] * S + s[None, :]
        valid = (group[:, None] < K) & (s[None, :] < S)
        x = tl.load(pre_acts + n * M + column, mask=valid, other=0.0)
        x = x.to(tl.float32)
        x = tl.where(x == 0.0, 0.0, x)  # -0 is as large as 0
        rank = ordered(x).to(tl.int64) * FAR + (FAR - 1 - column)
        best = tl.maximum(best, tl.max(tl.where(valid, rank, -1), axis=1))
    column = FAR - 1 - best % FAR
    value = tl.load(pre_acts + n * M + column, mask=group < K, other=0.0)
    tl.store(values + n * K + group, value, mask=group < K)
    tl.store(indices + n * K + group, column, mask=group < K)


def group_max(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the largest of each of k groups of M/k neighbours, the first of equals, in order.

    Values [N, k], indices [N, k] int64. A group with a NaN gives NaN. For float64, torch selects.
    """
    N, M = pre_acts.shape
    size = M // k
    if pre_acts.dtype not in DTYPES:
        largest, within = pre_acts.view(N, k, size).max(dim=-1)
        return largest, within + size * torch.arange(k, device=within.device)
    values = torch.empty(N, k, dtype=pre_acts.dtype, device=pre_acts.device)
    indices = torch.empty(N, k, dtype=torch.int64, device=pre_acts.device)
    if N == 0:
        return values, indices
    block_s = min(BLOCK, power_of_two(size))
    groups = min(BLOCK // block_s, power_of_two(k))
    with device_of(pre_acts):
        group_max_kernel[(N, triton.cdiv(k, groups))](
            pre_acts.contiguous(),
            values,
            indices,
            M,
            k,
            size,
            GROUPS=groups,
            BLOCK_S=block_s,
            FAR=2**31,
            num_warps=4,
        )
    return values, indices
