"""The primitives in PyTorch's own operators: the CPU's path, and the fallback anywhere.

Each is one embedding bag, or the gradient of one: it reads the rows it needs where they lie and
gives each row of the result to one thread, so nothing of size [N*K, D] is formed and the bits are
the same from run to run. Letters: N tokens, D d_in, M num_latents, K k.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saetrain.kernels.pairs import SortedPairs, sort_pairs


def gather_sum(acts: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """out[n] = sum over k of acts[n, k] * W[indices[n, k]]: [N, D] in the dtype of W."""
    return embedding_bag(
        indices.contiguous(), W.contiguous(), mode="sum", per_sample_weights=acts.contiguous()
    )


def gather_dot(dY: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """out[n, k] = <dY[n], W[indices[n, k]]>: [N, K] in the dtype of W.

    This is the gradient of an embedding bag's weights per sample. The operator has no public
    name; asking autograd for it would run the bag forward as well.
    Indices are not checked: one outside [0, M) reads foreign memory.
    """
    N, K = indices.shape
    if W.is_cuda and W.dtype == torch.bfloat16:  # the operator lacks that type on CUDA
        return gather_dot(dY.float(), indices, W.float()).to(W.dtype)
    starts = torch.arange(N, device=indices.device) * K  # [N]
    tokens = torch.arange(N * K, device=indices.device) // K  # [N*K]
    sum_mode = 0
    out: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        dY.contiguous(), W.contiguous(), indices.reshape(-1), starts, tokens, sum_mode
    )
    return out.view(N, K)


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
    pairs = sort_pairs(indices, num_latents) if pairs is None else pairs
    # Seen from a latent this is a bag too: of the tokens that it fired on.
    return embedding_bag(
        pairs.token,
        dY.contiguous(),
        pairs.offsets,
        mode="sum",
        per_sample_weights=acts.reshape(-1)[pairs.order],
        include_last_offset=True,
    )


def scatter_sum(
    values: Tensor, indices: Tensor, num_latents: int, pairs: SortedPairs | None = None
) -> Tensor:
    """out[m] = sum of values[n, k] over (n, k) with indices[n, k] = m: [M].

    Pass `pairs` if `indices` has been sorted already.
    """
    pairs = sort_pairs(indices, num_latents) if pairs is None else pairs
    column = values.reshape(-1, 1)  # [N*K, 1]
    out = embedding_bag(
        pairs.order, column, pairs.offsets, mode="sum", include_last_offset=True
    )  # [M, 1]
    return out.squeeze(1)
