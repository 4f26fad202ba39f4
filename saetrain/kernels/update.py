"""Updates of weights in place: projection, update and rows of norm 1 in one pass.

A copy of a weight in bfloat16 saves a product under autocast the cast of its weight. The copy is
found by its weight, is freed with it, and stores the version of the weight that it was made of:
torch counts every write to a tensor, so a copy that is out of date is recognised. Updates write
weight and copy in one pass. Letters: M num_latents, D d_in.
"""

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.weak import WeakTensorKeyDictionary

from saetrain.kernels.backends import Primitives, backend_of


@dataclass(frozen=True)
class UpdateOptions:
    """The options of one update; `saetrain.kernels.reference` computes what they mean."""

    lr: float
    """Learning rate."""
    unit: bool = False
    """Keep each row at norm 1: remove the gradient's component along its row, update, and divide
    the row by its norm plus the dtype's eps. The rows have norm 1 before. False: the weight may
    have any shape, and `norms` is not written."""
    mix: float = 0.0
    """Signum: weight of the new z in the average x."""
    momentum: float = 0.0
    """Signum: momentum of the schedule-free scheme."""
    beta1: float = 0.0
    """Adam: decay of the gradient's mean."""
    beta2: float = 0.0
    """Adam: decay of the squared gradient's mean."""
    eps: float = 0.0
    """Adam: added to the root."""
    weight_decay: float = 0.0
    """Adam: decoupled weight decay per step and learning rate."""
    step: int = 1
    """Adam: number of the step, from 1."""
    norms: Tensor | None = None
    """Receives the divisors of the rows, so that norms * w is the weight before the division.
    [M]"""
    squares: Tensor | None = None
    """Receives the squared norm of each row of the gradient, after the projection and whatever `ok`
    is. float32 [M]"""
    bf16_copy: Tensor | None = None
    """Receives the new weight. bfloat16, of the weight's shape"""
    ok: Tensor | None = None
    """Flag on the device: where it is false, nothing but `squares` and `grad` changes; None: true.
    bool []"""
    numbers: Tensor | None = None
    """What changes from step to step, read on the device by a recorded step (a CUDA graph); the
    fields that it replaces are then ignored. float32, [2] lr and mix, or [5] `adam_numbers`"""


def adam_numbers(
    lr: float, weight_decay: float, beta1: float, beta2: float, step: int
) -> tuple[float, float, float, float, float]:
    """Compute the scalars of Adam that change with the step, in float64, as 1 - beta2 is small.

    Returns:
        Share of w that stays, lr / (1 - beta1^step), sqrt(1 - beta2^step); and lr and step
        themselves, which torch's own kernel takes.
    """
    root_v = math.sqrt(1 - beta2**step)
    return 1 - lr * weight_decay, lr / (1 - beta1**step), root_v, lr, float(step)


def signum_update_(
    y: Tensor, z: Tensor, grad: Tensor, options: UpdateOptions, ops: Primitives | None = None
) -> None:
    """Make one step of schedule-free SignSGD; see `saetrain.kernels.reference.signum_update_`.

    Args:
        y: the weight.
        z: its state.
        grad: its gradient.
        options: scalars, and tensors to write.
        ops: the backend; None: that of the weight's device.
    """
    _update("signum_update_", (y, z), grad, options, ops)


def adam_update_(
    w: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    options: UpdateOptions,
    ops: Primitives | None = None,
) -> None:
    """Make one step of Adam or AdamW; see `saetrain.kernels.reference.adam_update_`.

    Args:
        w: the weight.
        m: mean of its gradient.
        v: mean of its squared gradient.
        grad: its gradient.
        options: scalars, and tensors to write.
        ops: the backend; None: that of the weight's device.
    """
    _update("adam_update_", (w, m, v), grad, options, ops)


def _update(
    name: str,
    written: tuple[Tensor, ...],
    grad: Tensor,
    options: UpdateOptions,
    ops: Primitives | None,
) -> None:
    """Update the weight `written[0]` and its state, the rest of `written`."""
    weight = written[0]
    # A copy that is out of date is ignored: a false flag would leave it out of date.
    bf16_copy = bf16_copy_of(weight) if options.bf16_copy is None else None
    if bf16_copy is not None:
        options = replace(options, bf16_copy=bf16_copy)
    getattr(ops or backend_of(weight), name)(*written, grad, options)
    # torch counts neither the writes of Triton nor those of its own fused Adam.
    for tensor in (*written, options.norms):
        if tensor is not None:
            increment_version(tensor)
    if bf16_copy is not None:
        _COPIES[weight].version = weight._version


@dataclass
class _Copy:
    tensor: Tensor
    version: int
    """Version of the weight when it was copied."""


_COPIES: MutableMapping[Tensor, _Copy] = WeakTensorKeyDictionary()


@torch.no_grad()
def keep_bf16_copy(weight: Tensor) -> None:
    """Keep a copy of a contiguous weight in bfloat16 from now on, and bring it up to date.

    Weights in bfloat16 and float64, which autocast does not cast, have no copy.
    """
    if weight.dtype not in (torch.float32, torch.float16):
        return
    assert weight.is_contiguous()
    copy = _COPIES.get(weight)
    if copy is None or copy.tensor.device != weight.device:
        _COPIES[weight] = _Copy(weight.to(torch.bfloat16), weight._version)
    elif copy.version != weight._version:
        copy.tensor.copy_(weight)
        copy.version = weight._version


def bf16_copy_of(weight: Tensor) -> Tensor | None:
    """Return the copy of a weight, or of rows of it; None: there is none, or it is out of date."""
    whole = weight if weight._base is None else weight._base
    copy = _COPIES.get(whole)
    if copy is None or copy.version != whole._version or copy.tensor.device != whole.device:
        return None
    if whole is weight:
        return copy.tensor
    offset = weight.storage_offset() - whole.storage_offset()
    return copy.tensor.as_strided(weight.shape, weight.stride(), offset)
