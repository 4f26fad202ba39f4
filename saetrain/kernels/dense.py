"""Encoder and decoder whose latents may all be active: two products, and their gradients.

By autograd, b_dec's part of the encoder's gradient is a third product as large as the others, of
which only the sum over tokens is wanted. Here it is one of a vector with a matrix:
d b_dec = -Σ_n d p[n] W_enc = -(d b_enc) W_enc. Letters: N tokens, D d_in, E width of the output,
M num_latents. A second derivative is not defined, and asking for one raises.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saetrain.kernels import reference
from saetrain.kernels.backends import select_backend
from saetrain.kernels.encode import centred, check_encode, gradient_of_subtracted
from saetrain.kernels.matmul import Product, multiply, product_dtype


def dense_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Tensor:
    """Pre-activations of all latents, (x - b_dec) W_enc^T + b_enc.

    Args:
        x: [N, D] in the dtype of W_enc.
        W_enc: [M, D].
        b_enc: [M].
        b_dec: [D], or None to subtract nothing.

    Returns:
        [N, M] in the dtype of W_enc; under autocast in autocast's, as the products of its gradient
        are. Differentiable once with respect to all arguments.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_encode(x, W_enc, b_enc, b_dec)
    if select_backend(W_enc) == "reference":
        return reference.dense_encode(x, W_enc, b_enc, b_dec)
    out: Tensor = _Encode.apply(x, W_enc, b_enc, b_dec)  # type: ignore[no-untyped-call]
    return out


def dense_decode(acts: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Reconstructions acts W_dec + b_dec.

    Args:
        acts: [N, M].
        W_dec: [M, E].
        b_dec: [E].

    Returns:
        [N, E] in the dtype of b_dec: under autocast the product alone is rounded, and those of its
        gradient. Differentiable once with respect to all arguments.
    """
    if select_backend(W_dec) == "reference":
        return reference.dense_decode(acts, W_dec, b_dec)
    product: Tensor = _Decode.apply(acts, W_dec)  # type: ignore[no-untyped-call]
    return product + b_dec


class _Encode(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec)
        product = Product(W_enc, b_enc, len(x))
        return product(centred(x, b_dec))  # [N, M]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec = ctx.saved_tensors
        need_x, need_W, need_b_enc, need_b_dec = ctx.needs_input_grad
        dx = dW = db_enc = db_dec = None
        if need_x:
            dx = multiply(d, W_enc.to(d.dtype).T).to(x.dtype)  # [N, D]
        if need_W:
            read = centred(x, b_dec).to(d.dtype)
            dW = multiply(d.T, read.T).to(W_enc.dtype)  # [M, D]
        if need_b_enc or need_b_dec:
            db_enc = d.sum(dim=0, dtype=W_enc.dtype)  # [M]
        if need_b_dec and db_enc is not None:
            db_dec = gradient_of_subtracted(db_enc, W_enc)  # [D]
        return dx, dW, db_enc if need_b_enc else None, db_dec


class _Decode(Function):
    @staticmethod
    def forward(ctx: Any, acts: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(acts, W_dec)
        ctx.dtype = product_dtype(W_dec)
        return multiply(acts.to(ctx.dtype), W_dec.to(ctx.dtype).T)  # [N, E]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        acts, W_dec = ctx.saved_tensors
        need_acts, need_W = ctx.needs_input_grad
        d_acts = dW = None
        dY = dY.to(ctx.dtype)
        if need_acts:
            d_acts = multiply(dY, W_dec.to(ctx.dtype)).to(acts.dtype)  # [N, M]
        if need_W:
            dW = multiply(acts.to(ctx.dtype).T, dY.T).to(W_dec.dtype)  # [M, E]
        return d_acts, dW
