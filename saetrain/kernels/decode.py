"""The sparse decoder, and its gradients.

Letters: N tokens, D d_in, M num_latents, K k. Gradients are derived in README.md. A second
derivative is not defined, and requesting one raises.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saetrain.kernels import reference
from saetrain.kernels.backends import Primitives, backend_of
from saetrain.kernels.dense import check_vector
from saetrain.kernels.sorted_pairs import SharedSortedPairs


def sparse_decode(
    top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None
) -> Tensor:
    """Decode: out[n] = b_dec + sum over k of top_acts[n, k] * W_dec[top_indices[n, k]].

    Args:
        top_acts: [N, K], cast to the dtype of W_dec.
        top_indices: [N, K] int64 in [0, M); on CUDA this is not checked.
        W_dec: [M, D].
        b_dec: [D], or None to add nothing.

    Returns:
        [N, D] in the dtype of W_dec, under autocast too. Differentiable once with respect to
        top_acts, W_dec and b_dec.

    Raises:
        ValueError: the shapes or the dtype of the indices do not fit.
    """
    _check_decode(top_acts, top_indices, W_dec, b_dec)
    ops = backend_of(W_dec)
    top_acts = top_acts.to(W_dec.dtype)
    b_dec = None if b_dec is None else b_dec.to(W_dec.dtype)
    if ops is reference:
        return reference.sparse_decode(top_acts, top_indices, W_dec, b_dec)
    pairs = SharedSortedPairs.of(top_indices, len(W_dec))
    inputs = (top_acts, top_indices, W_dec, b_dec, pairs, ops)
    out: Tensor = _SparseDecode.apply(*inputs)  # type: ignore[no-untyped-call]
    return out


class _SparseDecode(Function):
    @staticmethod
    def forward(
        ctx: Any,
        top_acts: Tensor,
        top_indices: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None,
        pairs: SharedSortedPairs,
        ops: Primitives,
    ) -> Tensor:
        ctx.save_for_backward(top_acts, top_indices, W_dec)
        ctx.pairs, ctx.ops = pairs, ops
        out = ops.gather_sum(top_acts, top_indices, W_dec)  # [N, D]
        return out if b_dec is None else out.add_(b_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        top_acts, top_indices, W_dec = ctx.saved_tensors
        d_acts = dW = db = None
        need_acts, _, need_W, *_ = ctx.needs_input_grad
        pairs = ctx.pairs.get() if need_W else None
        if need_acts:
            d_acts = ctx.ops.gather_dot(dY, top_indices, W_dec, pairs)  # [N, K]
        if need_W:
            dW = ctx.ops.scatter_outer(top_acts, top_indices, dY, W_dec.shape[0], pairs)  # [M, D]
        if ctx.needs_input_grad[3]:
            db = dY.sum(dim=0)  # [D]
        return d_acts, None, dW, db, None, None


def _check_decode(
    top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> None:
    if W_dec.dim() != 2:
        raise ValueError(f"W_dec must be [num_latents, d_in], got shape {tuple(W_dec.shape)}")
    if top_indices.dtype != torch.int64:
        raise ValueError(f"top_indices must be int64, got {top_indices.dtype}: cast with .long()")
    if top_acts.dim() != 2 or top_acts.shape != top_indices.shape:
        raise ValueError(
            "top_acts and top_indices must both be [tokens, k], got shapes "
            f"{tuple(top_acts.shape)} and {tuple(top_indices.shape)}: flatten batches first"
        )
    check_vector("b_dec", b_dec, W_dec.shape[1])
