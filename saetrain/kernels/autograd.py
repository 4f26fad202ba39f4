"""The sparse encoder and decoder, and their gradients.

Letters: N tokens, D d_in, M num_latents, K k. Gradients are derived in README.md. A second
derivative is not defined, and asking for one raises.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from saetrain.kernels import reference
from saetrain.kernels.pairs import sort_pairs
from saetrain.kernels.paths import chosen_path, primitives

Select = Callable[[Tensor], tuple[Tensor, Tensor]]
"""pre_acts [N, M] to values and int64 latents, both [N, S]. A value is the pre-activation of its
latent, or not positive for a slot that stays empty. A latent may come twice in a row."""


class Encoded(NamedTuple):
    """The K largest activations of each token, in no particular order.

    Attributes:
        top_acts: [N, K], at least zero.
        top_indices: [N, K] int64, the latents they belong to, distinct within a token.
    """

    top_acts: Tensor
    top_indices: Tensor


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
    path = chosen_path(W_dec)
    top_acts = top_acts.to(W_dec.dtype)
    b_dec = None if b_dec is None else b_dec.to(W_dec.dtype)
    if path == "reference":
        return reference.sparse_decode(top_acts, top_indices, W_dec, b_dec)
    inputs = (top_acts, top_indices, W_dec, b_dec, path)
    out: Tensor = _SparseDecode.apply(*inputs)  # type: ignore[no-untyped-call]
    return out


def sparse_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int) -> Encoded:
    """Encode: the k largest of relu((x - b_dec) W_enc^T + b_enc) for each token.

    Under autocast the product, and so the selection, has autocast's dtype; all else, the result
    and the gradients included, keeps the dtype of W_enc.

    Args:
        x: [N, D], cast to the dtype of W_enc.
        W_enc: [M, D].
        b_enc: [M].
        b_dec: [D], or None to subtract nothing (a transcoder's input has another mean).
        k: how many latents to keep, 1 to M. Where fewer are positive, the rest have act 0.

    Returns:
        top_acts in the dtype of W_enc and top_indices. Differentiable once, through the positive
        top_acts only, with respect to x, W_enc, b_enc and b_dec.

    Raises:
        ValueError: the shapes do not fit, or k is not in 1 to M.
    """
    _check_encode(x, W_enc, b_enc, b_dec)
    _check_k(k, W_enc)
    # relu keeps the order, so it may follow the selection.
    return sparse_encode_by(x, W_enc, b_enc, b_dec, partial(torch.topk, k=k, dim=-1, sorted=False))


def sparse_encode_by(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, select: Select
) -> Encoded:
    """Encode by a selection of one's own: `sparse_encode`, S slots a token instead of k.

    Args:
        x: [N, D], cast to the dtype of W_enc.
        W_enc: [M, D].
        b_enc: [M].
        b_dec: [D], or None to subtract nothing.
        select: chooses among (x - b_dec) W_enc^T + b_enc; no gradient passes through it.

    Returns:
        top_acts, relu of the values, in the dtype of W_enc, and top_indices; both [N, S].
        Differentiable as `sparse_encode` is.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_encode(x, W_enc, b_enc, b_dec)
    path = chosen_path(W_enc)
    x = x.to(W_enc.dtype)
    b_enc = b_enc.to(W_enc.dtype)
    b_dec = None if b_dec is None else b_dec.to(W_enc.dtype)
    if path == "reference":
        return Encoded(*reference.sparse_encode(x, W_enc, b_enc, b_dec, select))
    inputs = (x, W_enc, b_enc, b_dec, select, path)
    return Encoded(*_SparseEncode.apply(*inputs))  # type: ignore[no-untyped-call]


class _SparseDecode(Function):
    @staticmethod
    def forward(
        ctx: Any,
        top_acts: Tensor,
        top_indices: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None,
        path: str,
    ) -> Tensor:
        ctx.save_for_backward(top_acts, top_indices, W_dec)
        ctx.path = path
        out = primitives(path).gather_sum(top_acts, top_indices, W_dec)  # [N, D]
        return out if b_dec is None else out.add_(b_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        top_acts, top_indices, W_dec = ctx.saved_tensors
        ops = primitives(ctx.path)
        d_acts = dW = db = None
        if ctx.needs_input_grad[0]:
            d_acts = ops.gather_dot(dY, top_indices, W_dec)  # [N, K]
        if ctx.needs_input_grad[2]:
            dW = ops.scatter_outer(top_acts, top_indices, dY, W_dec.shape[0])  # [M, D]
        if ctx.needs_input_grad[3]:
            db = dY.sum(dim=0)  # [D]
        return d_acts, None, dW, db, None


class _SparseEncode(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None,
        select: Select,
        path: str,
    ) -> tuple[Tensor, Tensor]:
        # Subtract first: folded into b_enc, a mean much longer than the rest of x costs digits.
        centred = x if b_dec is None else x - b_dec  # [N, D]
        pre_acts = linear(centred, W_enc, b_enc)  # [N, M], gone when this returns
        values, top_indices = select(pre_acts)  # [N, K]
        top_acts = torch.relu(values).to(W_enc.dtype)
        ctx.mark_non_differentiable(top_indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W_enc, b_dec, top_acts, top_indices)
        ctx.path = path
        return top_acts, top_indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_acts: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if d_acts is None:
            return (None,) * 6
        x, W_enc, b_dec, top_acts, top_indices = ctx.saved_tensors
        ops = primitives(ctx.path)
        M = W_enc.shape[0]
        g = d_acts.masked_fill(top_acts <= 0, 0)  # [N, K]: through the ReLU
        need_x, need_W, need_b_enc, need_b_dec, *_ = ctx.needs_input_grad
        dx = dW = db_enc = db_dec = None
        if need_x:
            dx = ops.gather_sum(g, top_indices, W_enc)  # [N, D]
        if need_W or need_b_enc or need_b_dec:
            pairs = sort_pairs(top_indices, M)
        if need_W:
            centred = x if b_dec is None else x - b_dec
            dW = ops.scatter_outer(g, top_indices, centred, M, pairs)  # [M, D]
        if need_b_enc or need_b_dec:
            db_enc = ops.scatter_sum(g, top_indices, M, pairs)  # [M]
        if need_b_dec:
            # Someone may call backward inside autocast: this product keeps the weights' dtype.
            with torch.autocast(W_enc.device.type, enabled=False):
                db_dec = -(db_enc @ W_enc)  # [D]
        return dx, dW, db_enc if need_b_enc else None, db_dec, None, None


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
    _check_vector("b_dec", b_dec, W_dec.shape[1])


def _check_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> None:
    if W_enc.dim() != 2:
        raise ValueError(f"W_enc must be [num_latents, d_in], got shape {tuple(W_enc.shape)}")
    num_latents, d_in = W_enc.shape
    if x.dim() != 2 or x.shape[1] != d_in:
        raise ValueError(
            f"x must be [tokens, {d_in}] as W_enc is {tuple(W_enc.shape)}, got shape "
            f"{tuple(x.shape)}: flatten batches first"
        )
    _check_vector("b_enc", b_enc, num_latents)
    _check_vector("b_dec", b_dec, d_in)


def _check_k(k: int, W_enc: Tensor) -> None:
    num_latents = W_enc.shape[0]
    if not 1 <= k <= num_latents:
        raise ValueError(
            f"k must be 1 to num_latents = {num_latents}, got {k}: "
            "lower k or give the autoencoder more latents"
        )


def _check_vector(name: str, vector: Tensor | None, length: int) -> None:
    if vector is not None and vector.shape != (length,):
        raise ValueError(f"{name} must be [{length}], got shape {tuple(vector.shape)}")
