"""The sparse decoder and its gradients, as embedding bags and their gradients.

An embedding bag reads rows where they lie and computes each row of the result in one thread, so
nothing of size [N*K, D] is formed and the bits are the same from run to run. Letters: N tokens,
D d_in, M num_latents, K k.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saetrain.kernels import backends
from saetrain.kernels.grad_memory import reuse_memory
from saetrain.kernels.sorted_pairs import Bags, SortedPairs, sort_pairs

PIECE = 64
"""Pairs that are summed apart before they are added to a latent's total."""
_ROWS = 2048
"""Latents whose gradient is formed at once on the CPU."""
_SUM = 0
"""torch's number of the embedding bag mode "sum"."""


def gather_sum(acts: Tensor, indices: Tensor, W: Tensor, bags: Bags | None = None) -> Tensor:
    """Compute out[n] = sum over k of acts[n, k] * W[indices[n, k]]: [N, D] in the dtype of W.

    With `bags`, out has a row for each of them, the sum over its pairs.
    """
    table = W.detach().contiguous()  # the operator is slower where a gradient is required
    if bags is not None:
        return _bags(table, indices.reshape(-1), bags.offsets, acts.detach().reshape(-1))
    return embedding_bag(
        indices.contiguous(), table, mode="sum", per_sample_weights=acts.detach().contiguous()
    )


def gather_dot(
    dY: Tensor,
    indices: Tensor,
    W: Tensor,
    pairs: SortedPairs | None = None,
    bags: Bags | None = None,
    acts: Tensor | None = None,
) -> Tensor:
    """Compute out[n, k] = <dY[n], W[indices[n, k]]>: [N, K] in the dtype of W.

    This is the gradient of an embedding bag's weights per sample. The operator has no public
    name; through autograd the bag would run forward as well. With `pairs`, the bags are the
    latents and their table is dY: W is then read once, in order, and the smaller dY out of order.
    With `bags`, dY has a row for each of them. With `acts`, the result is 0 where they are. Indices
    are not checked: one outside [0, M) reads other memory.
    """
    N, K = indices.shape
    if acts is not None:
        return gather_dot(dY, indices, W, pairs, bags).masked_fill_(acts == 0, 0)
    if W.is_cuda and W.dtype == torch.bfloat16:  # the operator lacks that type on CUDA
        return gather_dot(dY.float(), indices, W.float(), pairs, bags).to(W.dtype)
    if pairs is not None:
        latents = indices.reshape(-1)[pairs.order]  # [N*K]
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            W.contiguous(), dY.contiguous(), _rows(pairs, bags), pairs.offsets[:-1], latents, _SUM
        )
        return torch.empty_like(dots).index_copy_(0, pairs.order, dots).view(N, K)
    starts = torch.arange(N, device=indices.device) * K  # [N]
    tokens = torch.arange(N * K, device=indices.device) // K  # [N*K]
    if bags is not None:
        starts, tokens = bags.offsets[:-1], bags.bag.reshape(-1)
    out: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        dY.contiguous(), W.contiguous(), indices.reshape(-1), starts, tokens, _SUM
    )
    return out.view(N, K)


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
    pairs = sort_pairs(indices, num_latents) if pairs is None else pairs
    pairs = pairs._replace(token=_rows(pairs, bags))
    acts, dY = acts.reshape(-1)[pairs.order], dY.contiguous()  # [N*K]
    if not backends.host_can_read(dY):
        return _bags(dY, pairs.token, pairs.offsets, acts)
    # A latent is a bag of the tokens that it fired on. As many latents at a time as the processor's
    # cache holds are written into recycled memory.
    out = reuse_memory((num_latents, dY.shape[1]), dY)
    bounds = pairs.offsets[::_ROWS].tolist()
    for row, first in zip(range(0, num_latents, _ROWS), bounds, strict=False):
        offsets = pairs.offsets[row : row + _ROWS + 1]
        end = int(offsets[-1])
        part = slice(first, end)
        out[row : row + _ROWS] = _bags(dY, pairs.token[part], offsets - first, acts[part])
    _sum_in_pieces(out, pairs, acts, dY)
    return out


def scatter_sum(
    values: Tensor, indices: Tensor, num_latents: int, pairs: SortedPairs | None = None
) -> Tensor:
    """Compute out[m] = sum of values[n, k] over (n, k) with indices[n, k] = m: [M]."""
    pairs = sort_pairs(indices, num_latents) if pairs is None else pairs
    column = values.reshape(-1, 1).double()  # [N*K, 1]: so small that float64 costs nothing
    out = embedding_bag(
        pairs.order, column, pairs.offsets, mode="sum", include_last_offset=True
    )  # [M, 1]
    return out.squeeze(1).to(values.dtype)


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
    """Compute dW_dec [M, E], dW_enc [M, D] and db_enc [M]; see `saetrain.kernels.reference`."""
    pairs = sort_pairs(indices, num_latents) if pairs is None else pairs
    if dtype is not None:  # sums have the type of their factors
        acts, dY, g, x = (tensor.to(dtype) for tensor in (acts, dY, g, x))
    return (
        scatter_outer(acts, indices, dY, num_latents, pairs, bags),
        scatter_outer(g, indices, x, num_latents, pairs),
        scatter_sum(g, indices, num_latents, pairs),
    )


def _rows(pairs: SortedPairs, bags: Bags | None) -> Tensor:
    """Return the row of dY of each pair: its token's, or its bag's. [N*K]"""
    return pairs.token if bags is None else bags.bag.reshape(-1)[pairs.order]


def _bags(table: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return embedding_bag(
        rows, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _sum_in_pieces(out: Tensor, pairs: SortedPairs, acts: Tensor, dY: Tensor) -> None:
    """Recompute the rows of latents with more than PIECE pairs: a long sum loses digits."""
    counts = pairs.offsets.diff()  # [M]
    hot = (counts > PIECE).nonzero().squeeze(1)  # [H]
    if not len(hot):
        return
    pieces = (counts[hot] + PIECE - 1) // PIECE  # [H]
    ends = pieces.cumsum(0)
    number = torch.arange(int(ends[-1])) - (ends - pieces).repeat_interleave(pieces)
    first = pairs.offsets[hot].repeat_interleave(pieces) + PIECE * number  # [P]
    sizes = (pairs.offsets[hot + 1].repeat_interleave(pieces) - first).clamp(max=PIECE)
    # The pairs of hot latents, without those between them.
    stops = sizes.cumsum(0)
    position = (first - (stops - sizes)).repeat_interleave(sizes) + torch.arange(int(stops[-1]))
    offsets = torch.cat([stops.new_zeros(1), stops])
    sums = _bags(dY, pairs.token[position], offsets, acts[position])  # [P, D], in the dtype of dY
    bounds = torch.cat([ends.new_zeros(1), ends])
    every = torch.arange(len(sums))
    out[hot] = embedding_bag(every, sums, bounds, mode="sum", include_last_offset=True)
