"""The truth that every faster path is compared with: plain PyTorch, slow and wasteful.

Letters: N tokens, D d_in, M num_latents, K k. Every function is differentiable by autograd.
Sums of bfloat16 and float16 are formed in float32 and rounded once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from saetrain.kernels.pairs import SortedPairs


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_sum(acts: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """out[n] = sum over k of acts[n, k] * W[indices[n, k]]: [N, D] in the dtype of W."""
    wide = _wide(W.dtype)
    rows = W[indices].to(wide)  # [N, K, D]
    return (acts.to(wide).unsqueeze(-1) * rows).sum(dim=1).to(W.dtype)


def gather_dot(dY: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """out[n, k] = <dY[n], W[indices[n, k]]>: [N, K] in the dtype of W."""
    wide = _wide(W.dtype)
    rows = W[indices].to(wide)  # [N, K, D]
    return (dY.to(wide).unsqueeze(1) * rows).sum(dim=2).to(W.dtype)


def scatter_outer(
    acts: Tensor,
    indices: Tensor,
    dY: Tensor,
    num_latents: int,
    pairs: SortedPairs | None = None,
) -> Tensor:
    """out[m] = sum over (n, k) with indices[n, k] = m of acts[n, k] * dY[n]: [M, D].

    `pairs` is accepted for the sake of one signature; nothing is sorted here.
    """
    del pairs
    wide = _wide(dY.dtype)
    products = acts.to(wide).unsqueeze(-1) * dY.to(wide).unsqueeze(1)  # [N, K, D]
    out = torch.zeros(num_latents, dY.shape[1], dtype=wide, device=dY.device)
    return out.index_add(0, indices.reshape(-1), products.flatten(0, 1)).to(dY.dtype)


def scatter_sum(
    values: Tensor, indices: Tensor, num_latents: int, pairs: SortedPairs | None = None
) -> Tensor:
    """out[m] = sum of values[n, k] over (n, k) with indices[n, k] = m: [M].

    `pairs` is accepted for the sake of one signature; nothing is sorted here.
    """
    del pairs
    wide = _wide(values.dtype)
    out = torch.zeros(num_latents, dtype=wide, device=values.device)
    return out.index_add(0, indices.reshape(-1), values.reshape(-1).to(wide)).to(values.dtype)


def sparse_decode(
    top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    """`saetrain.kernels.sparse_decode`, differentiated by autograd."""
    out = gather_sum(top_acts, top_indices, W_dec)  # [N, D]
    return out if b_dec is None else out + b_dec


def sparse_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    select: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """`saetrain.kernels.sparse_encode_by`, differentiated by autograd."""
    centred = x if b_dec is None else x - b_dec  # [N, D]
    pre_acts = torch.nn.functional.linear(centred, W_enc, b_enc)  # [N, M]
    values, top_indices = select(pre_acts.detach())  # [N, K]
    top_acts = torch.relu(pre_acts.gather(1, top_indices)) * (values > 0)  # [N, K]
    return top_acts.to(W_enc.dtype), top_indices
