"""Updates of weights in place: projection, update and rows of norm 1 in one pass.

Letters: M num_latents, D d_in.
"""

from typing import Any

from torch import Tensor

from saetrain.kernels.on_torch.update import normalise_rows_, project_
from saetrain.kernels.paths import chosen_path, primitives

__all__ = ["adam_update_", "normalise_rows_", "project_", "signum_update_"]


def signum_update_(
    y: Tensor, z: Tensor, grad: Tensor, *, path: str | None = None, **options: Any
) -> None:
    """One step of schedule-free SignSGD; `saetrain.kernels.reference.signum_update_` says it."""
    primitives(chosen_path(y, path)).signum_update_(y, z, grad, **options)


def adam_update_(
    w: Tensor, m: Tensor, v: Tensor, grad: Tensor, *, path: str | None = None, **options: Any
) -> None:
    """One step of Adam or AdamW; `saetrain.kernels.reference.adam_update_` says it."""
    primitives(chosen_path(w, path)).adam_update_(w, m, v, grad, **options)
