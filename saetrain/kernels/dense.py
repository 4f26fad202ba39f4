"""Dense products: the encoder's x W^T + b, and the dense encoder and decoder with gradients.

On a CPU with AVX-512 the product is oneDNN's, for float32 too: `linear` gives that to MKL, which
takes almost twice as long on processors of other makers. oneDNN takes W in a layout of its own,
which is made once per batch where that pays.

By autograd, b_dec's part of the encoder's gradient is a third product as large as the others, of
which only the sum over tokens is used. Here it is one of a vector with a matrix:
d b_dec = -Σ_n d p[n] W_enc = -(d b_enc) W_enc. A second derivative is not defined, and requesting
one raises. Letters: N tokens, D d_in, E width of the output, M num_latents.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from saetrain.kernels import reference
from saetrain.kernels.backends import Primitives, backend_of
from saetrain.kernels.update import bf16_copy_of

_MANY = 256
"""Rows from which a product in float32 gains nothing by reordering W beforehand."""
_BYTES = 20 << 20
"""Bytes of pre-activations at once on the CPU: what its last cache holds beside the weights."""
_LEAST = 64
"""Rows at once: fewer would read the weights too often."""
_DEVICE_BYTES = 1 << 30
"""Bytes of pre-activations at once on a device: a product of about a millisecond, so that launching
another costs nothing."""
_DEVICE_LEAST = 1024
"""Rows at once on a device: fewer would leave parts of it idle."""
_FEW_PAIRS = 64
"""Pairs of a token that are always gathered: launches, not gathers, take the time of so few."""


def dense_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    ops: Primitives | None = None,
) -> Tensor:
    """Compute the pre-activations of all latents, (x - b_dec) W_enc^T + b_enc.

    Args:
        x: [N, D] in the dtype of W_enc.
        W_enc: [M, D].
        b_enc: [M].
        b_dec: [D], or None to subtract nothing.
        ops: the backend; None: that of W_enc's device.

    Returns:
        [N, M] in the dtype of W_enc; under autocast in autocast's, as the products of its gradient
        are. Differentiable once with respect to all arguments.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_encode(x, W_enc, b_enc, b_dec)
    if (ops or backend_of(W_enc)) is reference:
        return reference.dense_encode(x, W_enc, b_enc, b_dec)
    out: Tensor = _Encode.apply(x, W_enc, b_enc, b_dec)  # type: ignore[no-untyped-call]
    return out


def dense_decode(
    acts: Tensor, W_dec: Tensor, b_dec: Tensor, ops: Primitives | None = None
) -> Tensor:
    """Compute the reconstructions acts W_dec + b_dec.

    Args:
        acts: [N, M].
        W_dec: [M, E].
        b_dec: [E].
        ops: the backend; None: that of W_dec's device.

    Returns:
        [N, E] in the dtype of b_dec: under autocast the product alone is rounded, and those of its
        gradient. Differentiable once with respect to all arguments.
    """
    if (ops or backend_of(W_dec)) is reference:
        return reference.dense_decode(acts, W_dec, b_dec)
    product: Tensor = _Decode.apply(acts, W_dec)  # type: ignore[no-untyped-call]
    return product + b_dec


class _Encode(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec)
        return Product(W_enc, b_enc, len(x))(centred(x, b_dec))  # [N, M]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec = ctx.saved_tensors
        need_x, need_W, need_b_enc, need_b_dec = ctx.needs_input_grad
        dx = dW = db_enc = db_dec = None
        if need_x:
            dx = multiply(d, W_enc.to(d.dtype).T).to(x.dtype)  # [N, D]
        if need_W:
            dW = multiply(d.T, centred(x, b_dec).to(d.dtype).T).to(W_enc.dtype)  # [M, D]
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


class Product:
    """The product x W^T + b, prepared once and applied to several parts of a batch.

    Under autocast x, W and b are cast to its type, and so is the result; float64 is not. An
    up-to-date copy of W in bfloat16 (`saetrain.kernels.update`) replaces the cast.

    Args:
        W: [M, D].
        b: [M].
        rows: rows of x in a typical call.
    """

    def __init__(self, W: Tensor, b: Tensor, rows: int) -> None:
        self.dtype = product_dtype(W)
        bf16_copy = bf16_copy_of(W) if self.dtype == torch.bfloat16 != W.dtype else None
        self._W, self._b = W.to(self.dtype) if bf16_copy is None else bf16_copy, b.to(self.dtype)
        self._onednn = by_onednn(self._W)
        if self._onednn:
            self._W = self._W.detach().contiguous()
            if self.dtype == torch.bfloat16 or rows < _MANY:
                self._W = torch.ops.mkldnn._reorder_linear_weight(self._W, rows)

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply rows [R, D] of any type: [R, M]."""
        x = x.to(self.dtype)
        if self._onednn:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(
                x.contiguous(), self._W, self._b, "none", [], ""
            )
            return out
        return linear(x, self._W, self._b)  # autocast has nothing left to cast


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a [R, C] by b^T, b [S, C] of the same type, either in any memory order: [R, S].

    Not differentiable.
    """
    if a.numel() and by_onednn(b):
        a, b = _packed(a), _packed(b)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return out
    # The caller may be inside autocast, but the types are decided already.
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.T


def _packed(matrix: Tensor) -> Tensor:
    """Copy a matrix unless its rows or its columns follow one another in memory without gaps.

    oneDNN multiplies any other, such as a transcoder's input or a sum's gradient, hundreds of times
    more slowly than the copy takes.
    """
    return matrix if matrix.T.is_contiguous() else matrix.contiguous()


def product_dtype(W: Tensor) -> torch.dtype:
    """Return the type in which W is multiplied: its own, or autocast's."""
    kind = W.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts and W.dtype != torch.float64 else W.dtype


def by_onednn(W: Tensor, device: str | None = None) -> bool:
    """Return whether oneDNN multiplies by W; this follows from type, device and processor alone."""
    return (
        (device or W.device.type) == "cpu"
        and W.numel() > 0
        and torch._C._has_mkldnn
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and (W.dtype == torch.float32 or (W.dtype == torch.bfloat16 and has_bfloat16_products()))
    )


def has_bfloat16_products() -> bool:
    """Return whether this CPU multiplies bfloat16 (AVX512-BF16 or AMX) instead of emulating it."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def tokens_at_once(tokens: int, W: Tensor, device: str | None = None) -> int:
    """Return how many of N tokens are encoded by W in one product.

    On the CPU their pre-activations fit the cache; on a device they take at most a gibibyte.
    """
    on_cpu = (device or W.device.type) == "cpu"
    most, least = (_BYTES, _LEAST) if on_cpu else (_DEVICE_BYTES, _DEVICE_LEAST)
    of_one = max(1, len(W)) * product_dtype(W).itemsize
    return min(max(1, tokens), max(least, most // of_one // least * least))


def products_from(M: int, D: int, E: int, dtype: torch.dtype) -> int:
    """Return the pairs of a token from which on a GPU multiplies faster than it gathers.

    A pair reads four rows: of W_dec in both passes, of x and of the gradient of the output. The
    products that replace these make 2 M operations for each column of the four, and fill, write and
    read matrices [N, M] nine times. A GPU makes `rate` operations while it moves a byte; those of
    an H200 are in docs/kernels.md.

    Args:
        M: num_latents.
        D: width of the input.
        E: width of the output.
        dtype: type of the products; float32 may be multiplied as TF32.
    """
    rate = 184.0
    if dtype not in (torch.bfloat16, torch.float16):
        tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        rate /= 2 if tf32 else 15
    of_latent = 2 / (rate * dtype.itemsize) + 9 / (D + 3 * E)
    return max(_FEW_PAIRS, math.ceil(M * of_latent))


def centred(x: Tensor, b_dec: Tensor | None) -> Tensor:
    """Subtract b_dec from rows x [N, D] before the product.

    Folded into b_enc, a mean much longer than the rest of x costs digits.
    """
    return x if b_dec is None else x - b_dec


def gradient_of_subtracted(db_enc: Tensor, W_enc: Tensor) -> Tensor:
    """Compute the gradient [D] of the vector subtracted from all rows from that of b_enc [M]."""
    # The backward pass may run inside autocast: this product keeps the weights' dtype.
    with torch.autocast(W_enc.device.type, enabled=False):
        return -(db_enc @ W_enc)


def check_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, subtracted: str = "b_dec"
) -> None:
    """Raise `ValueError` unless the shapes fit; messages call b_dec `subtracted`."""
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


def check_vector(name: str, vector: Tensor | None, length: int) -> None:
    """Raise `ValueError` unless a vector has this length, or is None."""
    if vector is not None and vector.shape != (length,):
        raise ValueError(f"{name} must be [{length}], got shape {tuple(vector.shape)}")
