"""Updates of weights in place: projection, update and rows of norm 1 in one pass.

Where a copy of the weight in bfloat16 is kept (`shadow.py`), the pass writes that too.
Letters: M num_latents, D d_in.
"""

from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from saetrain.kernels.backends import backend_module, select_backend
from saetrain.kernels.bf16_copy import bf16_copy_of, mark_bf16_copy
from saetrain.kernels.on_torch.update import normalise_rows_, project_

__all__ = ["adam_update_", "normalise_rows_", "project_", "signum_update_"]


def signum_update_(
    y: Tensor, z: Tensor, grad: Tensor, *, path: str | None = None, **options: Any
) -> None:
    """One step of schedule-free SignSGD; `saetrain.kernels.reference.signum_update_` says it."""
    _update("signum_update_", (y, z), grad, path, options)


def adam_update_(
    w: Tensor, m: Tensor, v: Tensor, grad: Tensor, *, path: str | None = None, **options: Any
) -> None:
    """One step of Adam or AdamW; `saetrain.kernels.reference.adam_update_` says it."""
    _update("adam_update_", (w, m, v), grad, path, options)


def _update(
    name: str, written: tuple[Tensor, ...], grad: Tensor, path: str | None, options: dict[str, Any]
) -> None:
    """Update the first of `written`, the weight, and its state."""
    weight = written[0]
    # One that is not right already is none here: a flag that forbids the update would leave it so.
    bf16_copy = bf16_copy_of(weight) if options.get("shadow") is None else None
    if bf16_copy is not None:
        options["shadow"] = bf16_copy
    getattr(backend_module(select_backend(weight, path)), name)(*written, grad, **options)
    # torch counts neither what Triton writes nor what its own fused Adam does.
    for tensor in (*written, options.get("norms")):
        if tensor is not None:
            increment_version(tensor)
    if bf16_copy is not None:
        mark_bf16_copy(weight)
