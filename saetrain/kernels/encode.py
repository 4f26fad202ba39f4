"""The sparse encoder, and its gradients.

Letters: N tokens, D d_in, M num_latents, K k, S slots. Gradients are derived in README.md. A second
derivative is not defined, and asking for one raises.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saetrain.kernels import reference
from saetrain.kernels.backends import backend_module, select_backend
from saetrain.kernels.matmul import Product, product_dtype
from saetrain.kernels.prefix_groups import Selector
from saetrain.kernels.selection import topk
from saetrain.kernels.sorted_pairs import SharedSortedPairs

Select = Callable[[Tensor], tuple[Tensor, Tensor]]
"""pre_acts [N, M] to values and int64 latents, both [N, S]. A value is the pre-activation of its
latent, or not positive for a slot that stays empty. A latent may come twice in a row."""

_BYTES = 20 << 20
"""Of pre-activations at once on the CPU: what its last cache holds beside the weights."""
_LEAST = 64
"""Rows at once: fewer would read the weights too often."""
_DEVICE_BYTES = 1 << 30
"""Of pre-activations at once on a device: a product of a millisecond or so, beside which it costs
nothing to start another."""
_DEVICE_LEAST = 1024
"""Rows at once there: fewer would leave parts of the device without work."""


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
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    selector: Selector,
) -> Encoded:
    """Encode by another selection: `sparse_encode`, S slots a token instead of k.

    Args:
        x: [N, D], cast to the dtype of W_enc.
        W_enc: [M, D].
        b_enc: [M].
        b_dec: [D], or None to subtract nothing.
        selector: selects; `topk_selector` or `selector`.

    Returns:
        top_acts, relu of the values, in the dtype of W_enc, and top_indices; both [N, S].
        Differentiable as `sparse_encode` is.

    Raises:
        ValueError: the shapes do not fit, or what `selector` says.
    """
    check_encode(x, W_enc, b_enc, b_dec)
    path = select_backend(W_enc)
    x = x.to(W_enc.dtype)
    b_enc = b_enc.to(W_enc.dtype)
    b_dec = None if b_dec is None else b_dec.to(W_enc.dtype)
    if path == "reference":
        return Encoded(*reference.sparse_encode(x, W_enc, b_enc, b_dec, selector))
    shared: list[SharedSortedPairs] = []
    inputs = (x, W_enc, b_enc, b_dec, selector, shared, path)
    encoded = Encoded(*_SparseEncode.apply(*inputs))  # type: ignore[no-untyped-call]
    shared[0].attach_to(encoded.top_indices)
    return encoded


def topk_selector(k: int, chunk_latents: int | None = None) -> Selector:
    """The selection of `sparse_encode`, for `sparse_encode_by` and `autoencode`."""
    if chunk_latents is not None and chunk_latents < 1:
        raise ValueError(f"chunk_latents must be 1 or more, got {chunk_latents}: leave it out")
    return partial(_largest, k=k, chunk=chunk_latents)


def make_selector(select: Select, *, by_token: bool = False) -> Selector:
    """A selection of one's own, for `sparse_encode_by` and `autoencode`.

    Args:
        select: chooses among (x - b_dec) W_enc^T + b_enc; no gradient passes through it.
        by_token: whether what is selected for one token does not depend on the others, so that
            some may be encoded at a time.
    """
    return partial(_by_tokens if by_token else _at_once, select=select)


def tokens_at_once(tokens: int, W: Tensor, device: str | None = None) -> int:
    """How many of N tokens are encoded together by W: on the CPU, what the cache holds.

    On a device so many that their pre-activations are no more than a gibibyte.
    """
    on_cpu = (device or W.device.type) == "cpu"
    most, least = (_BYTES, _LEAST) if on_cpu else (_DEVICE_BYTES, _DEVICE_LEAST)
    of_one = max(1, len(W)) * product_dtype(W).itemsize
    return min(max(1, tokens), max(least, most // of_one // least * least))


def _largest(
    x: Tensor, W: Tensor, b: Tensor, *, k: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    _check_k(k, W)
    path = select_backend(W)
    if chunk is not None and chunk < len(W) and path != "reference":
        return _by_latents(x, W, b, k=k, chunk=chunk, path=path)
    # relu keeps the order, so it may follow the selection.
    return _by_tokens(x, W, b, select=partial(topk, k=k, path=path))


def _by_tokens(x: Tensor, W: Tensor, b: Tensor, *, select: Select) -> tuple[Tensor, Tensor]:
    rows = tokens_at_once(len(x), W)
    product = Product(W, b, rows)
    found = [select(product(part)) for part in torch.split(x, rows)]
    if len(found) == 1:
        return found[0]
    values, indices = zip(*found, strict=True)
    return torch.cat(values), torch.cat(indices)


def _at_once(x: Tensor, W: Tensor, b: Tensor, *, select: Select) -> tuple[Tensor, Tensor]:
    return select(Product(W, b, len(x))(x))


def _by_latents(
    x: Tensor, W: Tensor, b: Tensor, *, k: int, chunk: int, path: str
) -> tuple[Tensor, Tensor]:
    """The k largest of all latents are among the k largest of each chunk of them."""
    kept: tuple[Tensor, Tensor] | None = None
    for first in range(0, len(W), chunk):
        part = slice(first, first + chunk)
        pre_acts = Product(W[part], b[part], len(x))(x)  # [N, C]
        values, indices = topk(pre_acts, min(k, pre_acts.shape[1]), path=path)
        indices += first
        if kept is not None:
            values = torch.cat([kept[0], values], dim=1)  # [N, up to 2 K]
            indices = torch.cat([kept[1], indices], dim=1)
            values, chosen = topk(values, min(k, values.shape[1]), path=path)
            indices = indices.gather(1, chosen)
        kept = values, indices
    assert kept is not None
    return kept


# What the encoder shares with `autoencode`.


def centred(x: Tensor, b_dec: Tensor | None) -> Tensor:
    """What the encoder multiplies, [N, D].

    Subtract first: folded into b_enc, a mean much longer than the rest of x costs digits.
    """
    return x if b_dec is None else x - b_dec


def select_acts(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, selector: Selector
) -> tuple[Tensor, Tensor]:
    """Top_acts and top_indices, [N, K]; no pre-activations outlive this."""
    read = centred(x, b_dec)  # [N, D]
    values, top_indices = selector(read, W_enc, b_enc)
    return torch.relu(values).to(W_enc.dtype), top_indices


def through_relu(d_acts: Tensor, top_acts: Tensor) -> Tensor:
    """Gradient of the pre-activations that were chosen, [N, K]."""
    return d_acts.masked_fill(top_acts <= 0, 0)


def gradient_of_subtracted(db_enc: Tensor, W_enc: Tensor) -> Tensor:
    """Of what is subtracted from all rows, [D], from that of b_enc."""
    # Someone may call backward inside autocast: this product keeps the weights' dtype.
    with torch.autocast(W_enc.device.type, enabled=False):
        return -(db_enc @ W_enc)


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
        path: str,
    ) -> tuple[Tensor, Tensor]:
        top_acts, top_indices = select_acts(x, W_enc, b_enc, b_dec, selector)  # [N, K]
        ctx.mark_non_differentiable(top_indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W_enc, b_dec, top_acts, top_indices)
        ctx.pairs, ctx.path = SharedSortedPairs(top_indices, len(W_enc)), path
        shared.append(ctx.pairs)
        return top_acts, top_indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_acts: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if d_acts is None:
            return (None,) * 7
        x, W_enc, b_dec, top_acts, top_indices = ctx.saved_tensors
        ops = backend_module(ctx.path)
        M = W_enc.shape[0]
        g = through_relu(d_acts, top_acts)  # [N, K]
        need_x, need_W, need_b_enc, need_b_dec, *_ = ctx.needs_input_grad
        dx = dW = db_enc = db_dec = None
        if need_x:
            dx = ops.gather_sum(g, top_indices, W_enc)  # [N, D]
        if need_W or need_b_enc or need_b_dec:
            pairs = ctx.pairs.get()
        if need_W:
            dW = ops.scatter_outer(g, top_indices, centred(x, b_dec), M, pairs)  # [M, D]
        if need_b_enc or need_b_dec:
            db_enc = ops.scatter_sum(g, top_indices, M, pairs)  # [M]
        if need_b_dec and db_enc is not None:
            db_dec = gradient_of_subtracted(db_enc, W_enc)  # [D]
        return dx, dW, db_enc if need_b_enc else None, db_dec, None, None, None


def check_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, subtracted: str = "b_dec"
) -> None:
    """Raise `ValueError` unless the shapes fit; `subtracted` is what b_dec is called."""
    if W_enc.dim() != 2:
        raise ValueError(f"W_enc must be [num_latents, d_in], got shape {tuple(W_enc.shape)}")
    num_latents, d_in = W_enc.shape
    if x.dim() != 2 or x.shape[1] != d_in:
        raise ValueError(
            f"x must be [tokens, {d_in}] as W_enc is {tuple(W_enc.shape)}, got shape "
            f"{tuple(x.shape)}: flatten batches first"
        )
    check_vector("b_enc", b_enc, num_latents)
    check_vector(subtracted, b_dec, d_in)


def _check_k(k: int, W_enc: Tensor) -> None:
    num_latents = W_enc.shape[0]
    if not 1 <= k <= num_latents:
        raise ValueError(
            f"k must be 1 to num_latents = {num_latents}, got {k}: "
            "lower k or give the autoencoder more latents"
        )


def check_vector(name: str, vector: Tensor | None, length: int) -> None:
    """Raise `ValueError` unless a vector has a length, or is None."""
    if vector is not None and vector.shape != (length,):
        raise ValueError(f"{name} must be [{length}], got shape {tuple(vector.shape)}")
