"""One optimiser step of a weight matrix in one pass over memory, rows kept at unit norm.

For each row: remove the gradient's component along the row, update, divide the row by its norm, and
write it again in bfloat16. As separate passes, these read and write the matrix five times. Where
the flag `ok` on the device is false nothing is stored, so that the host need not read it.

One program has one row. Up to BLOCK columns it stays in the program's registers from the one load
to the one store; a wider one is read three times, for the product with the gradient, for
the new norm, and for the store: nothing is stored before all of it is known. Without unit rows
(`unit` false, biases) elements are independent, and rows are of FLAT elements.

`saetrain.kernels.reference` defines the results, and computes them in float64.

Letters: M rows, D columns.
"""
# Triton's decorator and pointer arguments have no types that mypy could check.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from saetrain.kernels import reference
from saetrain.kernels.on_triton.launch import device_of, power_of_two
from saetrain.kernels.update import UpdateOptions, adam_numbers

BLOCK = 4096  # columns in the registers of 8 warps, 16 of each matrix to a thread; two programs fit
FLAT = 1024  # elements of a program where rows do not matter


@triton.jit
def _lerp(a, b, t):
    """Interpolate linearly, a + t (b - a), from the nearer end."""
    return tl.where(t < 0.5, a + t * (b - a), b - (1.0 - t) * (b - a))


@triton.jit
def _sign_step(y, z, grad, lr, to_x, mix, to_y):
    """Compute the new y and z of schedule-free SignSGD."""
    x = _lerp(y, z, to_x)
    z -= lr * ((grad > 0).to(tl.float32) - (grad < 0).to(tl.float32))
    x = _lerp(x, z, mix)
    return _lerp(x, z, to_y), z


@triton.jit
def _adam_step(w, m, v, grad, keep, rate, to_m, beta2, to_v, root_v, eps):
    """Compute the new w, m and v of Adam; `adam_update_` derives all scalars but eps."""
    m = _lerp(m, grad, to_m)
    v = beta2 * v + to_v * grad * grad
    w = w * keep - rate * m / (tl.sqrt_rn(v) / root_v + eps)
    return w, m, v


@triton.jit
def _store_weight(w, bf16_copy, position, new, keep):
    """Store weights, and their copy if there is one."""
    tl.store(w + position, new.to(w.dtype.element_ty), mask=keep)
    if bf16_copy is not None:
        rounded = new.to(w.dtype.element_ty).to(bf16_copy.dtype.element_ty)
        tl.store(bf16_copy + position, rounded, mask=keep)


@triton.jit
def update_kernel(
    w,  # [M, D]: y of signum
    first,  # [M, D]: z of signum, m of Adam
    second,  # [M, D]: v of Adam; None: signum
    grad,  # [M, D]
    norms,  # [M], or None
    squares,  # [M] float32, or None
    bf16_copy,  # [M, D] bfloat16, or None
    ok,  # bool, or None
    numbers,  # float32 [2] of signum, [5] of Adam; None: a to g hold them
    count,  # M*D
    D,
    a,  # of the optimiser: see its launcher
    b,
    c,
    d,
    e,
    f,
    g,
    tiny,  # added to a norm
    UNIT: tl.constexpr,
    FITS: tl.constexpr,  # whether the row fits the block
    BLOCK: tl.constexpr,
):
    """Update one row per program."""
    row = tl.program_id(0).to(tl.int64)
    if numbers is not None:
        a = tl.load(numbers)
        if second is None:
            c = tl.load(numbers + 1)
        else:
            b = tl.load(numbers + 1)
            f = tl.load(numbers + 2)
    written = count  # elements that are stored
    if ok is not None:
        written = tl.where(tl.load(ok) != 0, count, 0)
    # `gradient` and `divisor` are sums over the row: the squared norm, and the weight's new norm.
    if FITS:
        i = tl.arange(0, BLOCK)
        position = row * D + i
        mask = (i < D) & (position < count)
        keep = mask & (written > 0)
        # Everything is loaded before the first sum, which waits for all warps.
        new = tl.load(w + position, mask=mask, other=0.0).to(tl.float32)
        slope = tl.load(grad + position, mask=mask, other=0.0).to(tl.float32)
        one = tl.load(first + position, mask=mask, other=0.0).to(tl.float32)
        if second is not None:
            two = tl.load(second + position, mask=mask, other=0.0).to(tl.float32)
        if UNIT:
            slope -= tl.sum(new * slope, axis=0) * new
        if squares is not None:
            gradient = tl.sum(tl.where(mask, slope * slope, 0.0), axis=0)
        if second is None:
            new, one = _sign_step(new, one, slope, a, b, c, d)
        else:
            new, one, two = _adam_step(new, one, two, slope, a, b, c, d, e, f, g)
            # The state does not depend on the new norm: its registers are free before that sum.
            tl.store(second + position, two.to(second.dtype.element_ty), mask=keep)
        tl.store(first + position, one.to(first.dtype.element_ty), mask=keep)
        if UNIT:
            divisor = tl.sqrt_rn(tl.sum(tl.where(mask, new * new, 0.0), axis=0)) + tiny
            new = new / divisor
        _store_weight(w, bf16_copy, position, new, keep)
    else:
        parallel = 0.0
        if UNIT:
            along = tl.zeros([BLOCK], dtype=tl.float32)
            for start in range(0, D, BLOCK):
                i = start + tl.arange(0, BLOCK)
                mask = (i < D) & (row * D + i < count)
                new = tl.load(w + row * D + i, mask=mask, other=0.0).to(tl.float32)
                along += new * tl.load(grad + row * D + i, mask=mask, other=0.0).to(tl.float32)
            parallel = tl.sum(along, axis=0)
        lengths = tl.zeros([BLOCK], dtype=tl.float32)
        slopes = tl.zeros([BLOCK], dtype=tl.float32)
        divisor = tl.full([], 1.0, dtype=tl.float32)
        for turn in tl.static_range(2 if UNIT else 1):
            for start in range(0, D, BLOCK):
                i = start + tl.arange(0, BLOCK)
                position = row * D + i
                mask = (i < D) & (position < count)
                new = tl.load(w + position, mask=mask, other=0.0).to(tl.float32)
                slope = tl.load(grad + position, mask=mask, other=0.0).to(tl.float32)
                one = tl.load(first + position, mask=mask, other=0.0).to(tl.float32)
                if UNIT:
                    slope -= parallel * new
                if second is None:
                    new, one = _sign_step(new, one, slope, a, b, c, d)
                else:
                    two = tl.load(second + position, mask=mask, other=0.0).to(tl.float32)
                    new, one, two = _adam_step(new, one, two, slope, a, b, c, d, e, f, g)
                if turn == 0:
                    lengths += tl.where(mask, new * new, 0.0)
                    slopes += tl.where(mask, slope * slope, 0.0)
                if turn == 1 or not UNIT:
                    keep = mask & (written > 0)
                    if UNIT:
                        new = new / divisor
                    if second is not None:
                        tl.store(second + position, two.to(second.dtype.element_ty), mask=keep)
                    tl.store(first + position, one.to(first.dtype.element_ty), mask=keep)
                    _store_weight(w, bf16_copy, position, new, keep)
            if turn == 0:
                divisor = tl.sqrt_rn(tl.sum(lengths, axis=0)) + tiny
                gradient = tl.sum(slopes, axis=0)
    if squares is not None:
        tl.store(squares + row, gradient)
    if UNIT and norms is not None:  # noqa: SIM102 # known to the compiler, then at run time
        # No mask: triton 3.2's interpreter ignores a false one of no dimensions.
        if written > 0:
            tl.store(norms + row, divisor.to(norms.dtype.element_ty))


def signum_update_(y: Tensor, z: Tensor, grad: Tensor, options: UpdateOptions) -> None:
    """Make one step of schedule-free SignSGD, in place; see `saetrain.kernels.reference`."""
    if y.dtype == torch.float64:
        reference.signum_update_(y, z, grad, options)
        return
    momentum = options.momentum
    scalars = (options.lr, 1 - 1 / momentum, options.mix, 1 - momentum, 0.0, 0.0, 0.0)
    _launch(y, z, None, grad, scalars, options)


def adam_update_(w: Tensor, m: Tensor, v: Tensor, grad: Tensor, options: UpdateOptions) -> None:
    """Make one step of Adam, in place; see `saetrain.kernels.reference`."""
    if w.dtype == torch.float64:
        reference.adam_update_(w, m, v, grad, options)
        return
    o, beta1, beta2 = options, options.beta1, options.beta2
    keep, rate, root_v, _, _ = adam_numbers(o.lr, o.weight_decay, beta1, beta2, o.step)
    _launch(w, m, v, grad, (keep, rate, 1 - beta1, beta2, 1 - beta2, root_v, o.eps), o)


def _launch(
    w: Tensor,
    first: Tensor,
    second: Tensor | None,
    grad: Tensor,
    scalars: tuple[float, ...],
    options: UpdateOptions,
) -> None:
    """Launch the update of a weight `w` with its state.

    All tensors but the gradient must be contiguous: they are written, or indexed directly.
    """
    unit, squares = options.unit, options.squares
    count = w.numel()
    if count == 0:
        return
    outputs = (options.norms, squares, options.bf16_copy)
    for tensor in (w, first, second, *outputs, options.numbers):
        assert tensor is None or tensor.is_contiguous()
    by_rows = unit or squares is not None
    rows = w.shape[0] if by_rows else triton.cdiv(count, FLAT)
    width = count // rows if by_rows else FLAT
    block = min(BLOCK, max(32, power_of_two(width)))
    fits = width <= block
    with device_of(w):
        update_kernel[(rows,)](
            w,
            first,
            second,
            grad.contiguous(),
            options.norms if unit else None,
            squares,
            options.bf16_copy,
            options.ok,
            options.numbers,
            count,
            width,
            *scalars,
            torch.finfo(w.dtype).eps,
            UNIT=unit,
            FITS=fits,
            BLOCK=block,
            num_warps=max(1, block // 512) if fits else 16,
        )
