"""Updates of weights in place, some rows at a time, so that intermediate results stay in cache.

Letters: M num_latents, D d_in.
"""

import torch
from torch import Tensor

from saetrain.kernels import backends
from saetrain.kernels.update import UpdateOptions

_BYTES = 1 << 20
"""Bytes of each tensor at once, for each thread of a CPU: more, and they leave the thread's cache;
less, and threads wait more for each other."""
_LANES = 16
"""Rows at once are a multiple of this: torch rounds the numbers after the last full vector of the
processor differently, and which these are must not depend on the split."""


@torch.no_grad()
def signum_update_(y: Tensor, z: Tensor, grad: Tensor, options: UpdateOptions) -> None:
    """Make one step of schedule-free SignSGD; see `saetrain.kernels.reference`."""
    momentum, numbers = options.momentum, options.numbers
    go = _may_update(options.ok)
    for part in _parts(y):
        g = _project(y, grad, part, options)
        if not go:
            continue
        kept = _kept(options.ok, (y, z, options.norms, options.bf16_copy), part)
        of_y, of_z = y[part], z[part]
        if numbers is None:
            of_y.lerp_(of_z, 1 - 1 / momentum)  # the average
            of_z.add_(g.sign_(), alpha=-options.lr)
            of_y.lerp_(of_z, options.mix)
            of_y.lerp_(of_z, 1 - momentum)
        else:
            _sign_step(of_y, of_z, g, momentum, numbers)
        _finish(y, part, options, kept)


@torch.no_grad()
def adam_update_(w: Tensor, m: Tensor, v: Tensor, grad: Tensor, options: UpdateOptions) -> None:
    """Make one step of Adam, decoupled weight decay; see `saetrain.kernels.reference`."""
    go = _may_update(options.ok)
    for part in _parts(w):
        g = _project(w, grad, part, options)
        if not go:
            continue
        kept = _kept(options.ok, (w, m, v, options.norms, options.bf16_copy), part)
        lr: float | Tensor = options.lr
        if options.numbers is None:
            count = torch.full((), float(options.step), device=w.device)  # no copy from the host
        else:
            lr, count = options.numbers[3], options.numbers[4]
        torch._fused_adamw_(
            [w[part]],
            [g],
            [m[part]],
            [v[part]],
            [],
            [count],
            lr=lr,
            beta1=options.beta1,
            beta2=options.beta2,
            weight_decay=options.weight_decay,
            eps=options.eps,
            amsgrad=False,
            maximize=False,
        )
        _finish(w, part, options, kept)


def _sign_step(y: Tensor, z: Tensor, g: Tensor, momentum: float, numbers: Tensor) -> None:
    """Make a step of signum with lr and mix read on the device; `g` is overwritten.

    torch would round a scalar tensor to bfloat16 beside a bfloat16 tensor, so this is computed in
    float32.
    """
    wide_y, wide_z = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (y, z))
    lr, mix = numbers.to(wide_y.dtype).unbind()
    wide_y.lerp_(wide_z, 1 - 1 / momentum)
    wide_z.sub_(g.sign_().to(wide_z.dtype) * lr)
    wide_y.lerp_(wide_z, mix)
    wide_y.lerp_(wide_z, 1 - momentum)
    y.copy_(wide_y)  # no copy, where they are the same tensor
    z.copy_(wide_z)


def normalise_rows_(w: Tensor, norms: Tensor | None = None) -> None:
    """Divide each row in place by its norm plus the type's eps, and write these divisors. [M]"""
    for part in _parts(w):
        rows = w[part]
        divisor = rows.norm(dim=1, keepdim=True) + torch.finfo(w.dtype).eps
        rows.div_(divisor)
        if norms is not None:
            norms[part] = divisor.squeeze(1)


def project_(w: Tensor, grad: Tensor) -> None:
    """Remove the component along the row w, of norm 1, from each row g of the gradient: (g·w) w."""
    for part in _parts(w):
        rows, g = w[part], grad[part]
        parallel = (g * rows).sum(dim=1, keepdim=True)
        g.addcmul_(parallel, rows, value=-1)


def _parts(tensor: Tensor) -> list[slice]:
    """Return the ranges of rows that are updated together: on CUDA, all of them."""
    rows = len(tensor)
    each = rows
    if tensor.device.type == "cpu" and rows:
        size = _BYTES * torch.get_num_threads()
        each = size * rows // max(1, tensor.numel() * tensor.element_size())
        each = max(_LANES, each // _LANES * _LANES)
    each = max(1, each)
    return [*map(slice, range(0, rows, each), range(each, rows + each, each))]


def _project(w: Tensor, grad: Tensor, part: slice, options: UpdateOptions) -> Tensor:
    """Project the rows of a part of the gradient if they are to keep norm 1; write its squares."""
    g = grad[part]
    if options.unit:
        project_(w[part], g)
    if options.squares is not None:
        wide = torch.promote_types(g.dtype, torch.float32)
        options.squares[part] = torch.linalg.vector_norm(g, dim=1, dtype=wide).square_()
    return g


def _may_update(ok: Tensor | None) -> bool:
    """Return False where the host can read, without waiting, that nothing is to change."""
    return ok is None or not backends.host_can_read(ok) or bool(ok)


def _kept(
    ok: Tensor | None, tensors: tuple[Tensor | None, ...], part: slice
) -> list[tuple[Tensor, Tensor]]:
    """Copy what a false flag on a device would restore: pairs of a part and its copy."""
    if ok is None or backends.host_can_read(ok):
        return []
    return [(t[part], t[part].clone()) for t in tensors if t is not None]


def _finish(
    w: Tensor, part: slice, options: UpdateOptions, kept: list[tuple[Tensor, Tensor]]
) -> None:
    """Normalise the rows, write the bfloat16 copy, and restore `kept` where the flag is false."""
    if options.unit:
        norms = options.norms
        normalise_rows_(w[part], None if norms is None else norms[part])
    if options.bf16_copy is not None:
        options.bf16_copy[part] = w[part]
    for tensor, before in kept:
        assert options.ok is not None
        torch.where(options.ok, tensor, before, out=tensor)
