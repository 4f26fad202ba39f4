"""The encoder's product, x W^T + b, for some rows of x at a time.

On a CPU with AVX-512 it is oneDNN's, for float32 too: `linear` gives that to MKL, which on
processors of other makers takes almost twice as long. oneDNN wants W in an order of its own, which
is made here once where that pays, and not for every part of the rows. Letters: N tokens, D d_in,
M num_latents.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from saetrain.kernels.bf16_copy import bf16_copy_of

_MANY = 256
"""Rows with which a product in float32 gains nothing by an order of W made before."""


class Product:
    """x to x W^T + b, as long as it takes to encode a batch.

    Under autocast x, W and b are cast to its type, and so is the result; float64 is not. Where a
    copy of W in bfloat16 is kept (`shadow.py`), that serves.

    Args:
        W: [M, D].
        b: [M].
        rows: of x in one call, most often.
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
        """Of rows [R, D], in any type: [R, M]."""
        x = x.to(self.dtype)
        if self._onednn:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(
                x.contiguous(), self._W, self._b, "none", [], ""
            )
            return out
        return linear(x, self._W, self._b)  # autocast has nothing left to cast


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a [R, C] by b^T, b [S, C] of the same type, either in any order in memory: [R, S].

    Not differentiable.
    """
    if a.numel() and by_onednn(b):
        # One number for all, as a sum's gradient is: oneDNN has no fast way to read that.
        a, b = (m.contiguous() if 0 in m.stride() else m for m in (a, b))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return out
    # Someone may call this inside autocast: the types are decided.
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.T


def product_dtype(W: Tensor) -> torch.dtype:
    """The type in which W is multiplied here: its own, or autocast's."""
    kind = W.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts and W.dtype != torch.float64 else W.dtype


def by_onednn(W: Tensor, device: str | None = None) -> bool:
    """Whether oneDNN multiplies by W; by its type, its device and the processor alone."""
    return (
        (device or W.device.type) == "cpu"
        and W.numel() > 0
        and torch._C._has_mkldnn
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and (W.dtype == torch.float32 or (W.dtype == torch.bfloat16 and _has_bfloat16()))
    )


def _has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
