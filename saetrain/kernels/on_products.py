"""The sparse primitives by dense products, for tokens with so many pairs that these are faster.

Activations are scattered into [n, M] for as many tokens as take a gibibyte, and multiplied. Nothing
is sorted, and nothing of the size of all pairs is formed. `dense.products_from` says from how many
pairs on; `saetrain.kernels.reference` has every function under the same name and signature. There
is one bag for each token: `bags` must be None.

Products are formed and rounded in the type of the table (W, or dY and x), sums of several products
in that of the result. Scattering adds with atomics on CUDA. Bits are the same from run to run while
no token has three slots of one latent that hold something; this package's selections list none
twice.
Letters: N tokens, n tokens at once, D d_in, M num_latents, K k.
"""

import torch
from torch import Tensor

from saetrain.kernels.dense import multiply
from saetrain.kernels.sorted_pairs import Bags, SortedPairs

BYTES = 1 << 30
"""Bytes of a scattered matrix [n, M]."""


def gather_sum(acts: Tensor, indices: Tensor, W: Tensor, bags: Bags | None = None) -> Tensor:
    """Compute out[n] = sum over k of acts[n, k] * W[indices[n, k]]: [N, D] in the dtype of acts."""
    assert bags is None
    M, n = len(W), _tokens(len(W), W.dtype)
    parts = zip(torch.split(acts, n), torch.split(indices, n), strict=True)
    return torch.cat(
        [multiply(_scattered(*part, M, W.dtype), W.T).to(acts.dtype) for part in parts]
    )


def gather_dot(
    dY: Tensor,
    indices: Tensor,
    W: Tensor,
    pairs: SortedPairs | None = None,
    bags: Bags | None = None,
    acts: Tensor | None = None,
) -> Tensor:
    """Compute out[n, k] = <dY[n], W[indices[n, k]]>: [N, K] in the dtype of W, or of `acts`.

    With `acts`, the result is 0 where they are.
    """
    del pairs
    assert bags is None
    W, n = W.to(dY.dtype), _tokens(len(W), dY.dtype)
    parts = zip(torch.split(dY, n), torch.split(indices, n), strict=True)
    dots = torch.cat([multiply(rows, W).gather(1, latents) for rows, latents in parts])
    return dots if acts is None else dots.to(acts.dtype).masked_fill_(acts == 0, 0)


def scatter_outer(
    acts: Tensor,
    indices: Tensor,
    dY: Tensor,
    num_latents: int,
    pairs: SortedPairs | None = None,
    bags: Bags | None = None,
) -> Tensor:
    """Compute out[m] = sum over (n, k) with indices[n, k] = m of acts[n, k] * dY[n]: [M, D]."""
    del pairs
    assert bags is None
    return _outer_and_sums(acts, indices, dY, num_latents, dY.dtype)[0]


def scatter_sum(
    values: Tensor, indices: Tensor, num_latents: int, pairs: SortedPairs | None = None
) -> Tensor:
    """Compute out[m] = sum of values[n, k] over (n, k) with indices[n, k] = m: [M]."""
    no_rows = values.new_empty(len(values), 0)
    del pairs
    return _outer_and_sums(values, indices, no_rows, num_latents, values.dtype)[1]


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
    """Compute dW_dec [M, E], dW_enc [M, D] and db_enc [M], of `dtype`; None: that of dY.

    acts, g and indices are [N, K], dY is [N, E], x is [N, D].
    """
    del pairs
    assert bags is None
    dtype = dtype or dY.dtype
    dW_dec, _ = _outer_and_sums(acts, indices, dY, num_latents, dtype)
    return dW_dec, *_outer_and_sums(g, indices, x, num_latents, dtype)


def _outer_and_sums(
    values: Tensor, indices: Tensor, rows: Tensor, num_latents: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute `scatter_outer` of values and rows [N, D], and `scatter_sum` of values."""
    outer, sums = None, torch.zeros(num_latents, dtype=dtype, device=values.device)
    n = _tokens(num_latents, rows.dtype)
    parts = (torch.split(each, n) for each in (values, indices, rows))
    for some_values, some_indices, some_rows in zip(*parts, strict=True):
        dense = _scattered(some_values, some_indices, num_latents, rows.dtype)  # [n, M]
        product = multiply(dense.T, some_rows.T)  # [M, D]
        outer = product.to(dtype) if outer is None else outer.add_(product)
        sums += dense.sum(dim=0, dtype=dtype)
    assert outer is not None
    return outer, sums


def _scattered(values: Tensor, indices: Tensor, num_latents: int, dtype: torch.dtype) -> Tensor:
    """Make the dense activations [n, M] of pairs [n, K]."""
    dense = torch.zeros(len(values), num_latents, dtype=dtype, device=values.device)
    return dense.scatter_add_(1, indices, values.to(dtype))


def _tokens(num_latents: int, dtype: torch.dtype) -> int:
    """Return the number of tokens at once."""
    return max(1, BYTES // (num_latents * dtype.itemsize))
