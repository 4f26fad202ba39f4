"""The sparse encoder, and its gradients.

Letters: N tokens, D d_in, M num_latents, K k, S slots. Gradients are derived in README.md. A second
derivative is not defined, and requesting one raises.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saetrain.kernels import reference
from saetrain.kernels.backends import Primitives, backend_of
from saetrain.kernels.dense import (
    Product,
    centred,
    check_encode,
    gradient_of_subtracted,
    tokens_at_once,
)
from saetrain.kernels.prefix_groups import Selector
from saetrain.kernels.sorted_pairs import SharedSortedPairs

Select = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Select from pre_acts [N, M]: values and int64 latents, both [N, S]. A value is the pre-activation
of its latent, or not positive for a slot that stays empty. A latent may come twice in a row."""


class Encoded(NamedTuple):
    """The K largest activations of each token, in no particular order.

    Attributes:
        top_acts: [N, K], at least zero.
        top_indices: [N, K] int64, the latents they belong to, distinct within a token.
    """

    top_acts: Tensor
    top_indices: Tensor


def sparse_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    k: int,
    chunk_latents: int | None = None,
) -> Encoded:
    """Encode: the k largest of relu((x - b_dec) W_enc^T + b_enc) for each token.

    Under autocast the product, and so the selection, has autocast's dtype; all else, the result
    and the gradients included, keeps the dtype of W_enc. A row with a NaN gives NaN for all its
    top_acts.

    Args:
        x: [N, D], cast to the dtype of W_enc.
        W_enc: [M, D].
        b_enc: [M].
        b_dec: [D], or None to subtract nothing (a transcoder's input has another mean).
        k: how many latents to keep, 1 to M. Where fewer are positive, the rest have act 0.
        chunk_latents: form pre-activations of so many latents at once, [N, C]; None: of all, and
            on the CPU of as many tokens as its cache holds.

    Returns:
        top_acts in the dtype of W_enc and top_indices. Differentiable once, through the positive
        top_acts only, with respect to x, W_enc, b_enc and b_dec.

    Raises:
        ValueError: the shapes do not fit, k is not in 1 to M, or chunk_latents is below 1.
    """
    return sparse_encode_by(x, W_enc, b_enc, b_dec, topk_selector(k, chunk_latents))


def sparse_encode_by(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, selector: Selector
) -> Encoded:
    """Encode as `sparse_encode` does, by another selection: S slots a token instead of k.

    Args:
        x: [N, D], cast to the dtype of W_enc.
        W_enc: [M, D].
        b_enc: [M].
        b_dec: [D], or None to subtract nothing.
        selector: from `topk_selector` or `make_selector`.

    Returns:
        top_acts, relu of the values, in the dtype of W_enc, and top_indices; both [N, S].
        Differentiable as `sparse_encode` is.

    Raises:
        ValueError: the shapes do not fit, or the selector refuses them.
    """
    check_encode(x, W_enc, b_enc, b_dec)
    ops = backend_of(W_enc)
    x = x.to(W_enc.dtype)
    b_enc = b_enc.to(W_enc.dtype)
    b_dec = None if b_dec is None else b_dec.to(W_enc.dtype)
    if ops is reference:
        return Encoded(*reference.sparse_encode(x, W_enc, b_enc, b_dec, selector, ops))
    shared: list[SharedSortedPairs] = []
    inputs = (x, W_enc, b_enc, b_dec, selector, shared, ops)
    encoded = Encoded(*_SparseEncode.apply(*inputs))  # type: ignore[no-untyped-call]
    shared[0].attach_to(encoded.top_indices)
    return encoded


def topk_selector(k: int, chunk_latents: int | None = None) -> Selector:
    """Make the selection of `sparse_encode`, for `sparse_encode_by` and `autoencode`."""
    if chunk_latents is not None and chunk_latents < 1:
        raise ValueError(f"chunk_latents must be 1 or more, got {chunk_latents}: leave it out")
    return partial(_select_topk, k, chunk_latents)


def make_selector(select: Select, *, by_token: bool = False) -> Selector:
    """Make a selection from a function, for `sparse_encode_by` and `autoencode`.

    Args:
        select: selects from (x - b_dec) W_enc^T + b_enc; no gradient passes through it.
        by_token: the selection of one token does not depend on the others, so that a batch may be
            encoded in parts.
    """
    return partial(_select_by, select, by_token)


def _select_by(
    select: Select, by_token: bool, x: Tensor, W: Tensor, b: Tensor, ops: Primitives
) -> tuple[Tensor, Tensor]:
    """Select from the pre-activations of some tokens at a time, or of all."""
    del ops
    rows = tokens_at_once(len(x), W) if by_token else len(x)
    product, found = Product(W, b, rows), []
    for part in torch.split(x, rows) if by_token else (x,):
        # Without a name, the pre-activations of a part are freed before the next are computed.
        found.append(select(product(part)))  # noqa: PERF401
    return _concatenated(found)


def _concatenated(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(found) == 1:
        return found[0]
    values, indices = zip(*found, strict=True)
    return torch.cat(values), torch.cat(indices)


def _select_topk(
    k: int, chunk: int | None, x: Tensor, W: Tensor, b: Tensor, ops: Primitives
) -> tuple[Tensor, Tensor]:
    if not 1 <= k <= len(W):
        raise ValueError(
            f"k must be 1 to num_latents = {len(W)}, got {k}: "
            "lower k or give the autoencoder more latents"
        )
    if chunk is None or chunk >= len(W) or ops is reference:
        rows = tokens_at_once(len(x), W)
        product, found = Product(W, b, rows), []
        for tokens in torch.split(x, rows):
            found.append(ops.topk(product(tokens), k))  # noqa: PERF401  relu may follow: same order
        return _concatenated(found)
    # The k largest of all latents are among the k largest of each chunk of them.
    kept: tuple[Tensor, Tensor] | None = None
    for first in range(0, len(W), chunk):
        part = slice(first, first + chunk)
        pre_acts = Product(W[part], b[part], len(x))(x)  # [N, C]
        values, indices = ops.topk(pre_acts, min(k, pre_acts.shape[1]))
        indices += first
        if kept is not None:
            values = torch.cat([kept[0], values], dim=1)  # [N, up to 2 K]
            indices = torch.cat([kept[1], indices], dim=1)
            values, chosen = ops.topk(values, min(k, values.shape[1]))
            indices = indices.gather(1, chosen)
        kept = values, indices
    assert kept is not None
    return kept


class _SparseEncode(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None,
        selector: Selector,
        shared: list[SharedSortedPairs],
        ops: Primitives,
    ) -> tuple[Tensor, Tensor]:
        values, top_indices = selector(centred(x, b_dec), W_enc, b_enc, ops)  # [N, S]
        top_acts = torch.relu(values).to(W_enc.dtype)
        ctx.mark_non_differentiable(top_indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W_enc, b_dec, top_acts, top_indices)
        ctx.pairs, ctx.ops = SharedSortedPairs(top_indices, len(W_enc)), ops
        shared.append(ctx.pairs)
        return top_acts, top_indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_acts: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if d_acts is None:
            return (None,) * 7
        x, W_enc, b_dec, top_acts, top_indices = ctx.saved_tensors
        M = W_enc.shape[0]
        g = d_acts.masked_fill(top_acts <= 0, 0)  # [N, K]
        need_x, need_W, need_b_enc, need_b_dec, *_ = ctx.needs_input_grad
        dx = dW = db_enc = db_dec = None
        if need_x:
            dx = ctx.ops.gather_sum(g, top_indices, W_enc)  # [N, D]
        if need_W or need_b_enc or need_b_dec:
            pairs = ctx.pairs.get()
        if need_W:
            dW = ctx.ops.scatter_outer(g, top_indices, centred(x, b_dec), M, pairs)  # [M, D]
        if need_b_enc or need_b_dec:
            db_enc = ctx.ops.scatter_sum(g, top_indices, M, pairs)  # [M]
        if need_b_dec and db_enc is not None:
            db_dec = gradient_of_subtracted(db_enc, W_enc)  # [D]
        return dx, dW, db_enc if need_b_enc else None, db_dec, None, None, None
