"""Updates of weights in place, some rows at a time, so that what is in between stays in cache.

Letters: M num_latents, D d_in.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from saetrain.kernels import backends as paths

_BYTES = 1 << 20
"""Of each tensor at once, for each thread of a CPU: more, and it leaves the thread's cache; less,
and threads wait more for each other."""
_LANES = 16
"""Rows at once are a multiple of this: torch rounds numbers otherwise that are left over when a
processor has taken as many as it can at once, and where these are must not hang on the parts."""


@torch.no_grad()
def signum_update_(
    y: Tensor,
    z: Tensor,
    grad: Tensor,
    *,
    lr: float,
    mix: float,
    momentum: float,
    unit: bool,
    norms: Tensor | None = None,
    squares: Tensor | None = None,
    bf16_copy: Tensor | None = None,
    ok: Tensor | None = None,
    numbers: Tensor | None = None,
) -> None:
    """One step of schedule-free SignSGD; see `saetrain.kernels.reference`."""
    go = _goes(ok)
    for part in _parts(y):
        g = _project(y, grad, part, unit, squares)
        if not go:
            continue
        kept = _kept(ok, (y, z, norms, bf16_copy), part)
        of_y, of_z = y[part], z[part]
        if numbers is None:
            of_y.lerp_(of_z, 1 - 1 / momentum)  # the average
            of_z.add_(g.sign_(), alpha=-lr)
            of_y.lerp_(of_z, mix)
            of_y.lerp_(of_z, 1 - momentum)
        else:
            _sign_step(of_y, of_z, g, momentum, numbers)
        _finish(y, part, unit, norms, bf16_copy)
        _put_back(ok, kept)


@torch.no_grad()
def adam_update_(
    w: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    unit: bool,
    norms: Tensor | None = None,
    squares: Tensor | None = None,
    bf16_copy: Tensor | None = None,
    ok: Tensor | None = None,
    numbers: Tensor | None = None,
) -> None:
    """One step of Adam, decoupled weight decay; see `saetrain.kernels.reference`."""
    go = _goes(ok)
    for part in _parts(w):
        g = _project(w, grad, part, unit, squares)
        if not go:
            continue
        kept = _kept(ok, (w, m, v, norms, bf16_copy), part)
        if numbers is None:
            rate: float | Tensor = lr
            count = torch.full((), float(step), device=w.device)  # no copy from the host
        else:
            rate, count = numbers[3], numbers[4]
        torch._fused_adamw_(
            [w[part]],
            [g],
            [m[part]],
            [v[part]],
            [],
            [count],
            lr=rate,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        _finish(w, part, unit, norms, bf16_copy)
        _put_back(ok, kept)


def _sign_step(y: Tensor, z: Tensor, g: Tensor, momentum: float, numbers: Tensor) -> None:
    """A step of signum at the rate and with the share that lie on the device; `g` is overwritten.

    A tensor beside one in bfloat16 would be rounded to that, so all is done in float32 here.
    """
    wide_y, wide_z = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (y, z))
    lr, mix = numbers.to(wide_y.dtype).unbind()
    wide_y.lerp_(wide_z, 1 - 1 / momentum)
    wide_z.sub_(g.sign_().to(wide_z.dtype) * lr)
    wide_y.lerp_(wide_z, mix)
    wide_y.lerp_(wide_z, 1 - momentum)
    y.copy_(wide_y)  # nothing, where they are the same
    z.copy_(wide_z)


def normalise_rows_(w: Tensor, norms: Tensor | None = None) -> None:
    """Divide each row by its norm plus the type's eps, in place, and write these divisors. [M]"""
    for part in _parts(w):
        rows = w[part]
        divisor = rows.norm(dim=1, keepdim=True) + torch.finfo(w.dtype).eps
        rows.div_(divisor)
        if norms is not None:
            norms[part] = divisor.squeeze(1)


def project_(w: Tensor, grad: Tensor) -> None:
    """Take from each row g of the gradient what is parallel to the row w, of norm 1: (g·w) w."""
    for part in _parts(w):
        rows, g = w[part], grad[part]
        parallel = (g * rows).sum(dim=1, keepdim=True)
        g.addcmul_(parallel, rows, value=-1)


def _parts(tensor: Tensor) -> Iterator[slice]:
    """Rows that are worked on together: on CUDA, all of them."""
    rows = len(tensor)
    each = rows
    if tensor.device.type == "cpu" and rows:
        size = _BYTES * torch.get_num_threads()
        each = size * rows // max(1, tensor.numel() * tensor.element_size())
        each = max(_LANES, each // _LANES * _LANES)
    for first in range(0, rows, max(1, each)):
        yield slice(first, first + each)


def _project(w: Tensor, grad: Tensor, part: slice, unit: bool, squares: Tensor | None) -> Tensor:
    g = grad[part]
    if unit:
        project_(w[part], g)
    if squares is not None:
        wide = torch.promote_types(g.dtype, torch.float32)
        squares[part] = torch.linalg.vector_norm(g, dim=1, dtype=wide).square_()
    return g


def _finish(
    w: Tensor, part: slice, unit: bool, norms: Tensor | None, bf16_copy: Tensor | None
) -> None:
    if unit:
        normalise_rows_(w[part], None if norms is None else norms[part])
    if bf16_copy is not None:
        bf16_copy[part] = w[part]


def _goes(ok: Tensor | None) -> bool:
    """False where the host knows, without waiting, that nothing is to change."""
    return ok is None or not paths.host_can_read(ok) or bool(ok)


def _kept(
    ok: Tensor | None, tensors: tuple[Tensor | None, ...], part: slice
) -> list[tuple[Tensor, Tensor]]:
    """What a flag on a device may ask back: each part and a copy of it."""
    if ok is None or paths.host_can_read(ok):
        return []
    return [(t[part], t[part].clone()) for t in tensors if t is not None]


def _put_back(ok: Tensor | None, kept: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, before in kept:
        assert ok is not None
        torch.where(ok, tensor, before, out=tensor)
