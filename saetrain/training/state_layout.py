"""Comparison of a checkpoint's tensors and numbers with what an SAE in training needs.

It precedes loading: kernels do not check shapes, and counters become sizes and exponents.
Letters: M num_latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from actcache.errors import FormatError
from saetrain.optim.layout import StateLayout, TensorSpec, spec_of
from saetrain.training.sae_trainer import SaeTrainer

_REMEDY = (
    "it is damaged or of another run: restore it from a copy, or remove checkpoint-* there and "
    "restart the run with --resume"
)


def require_state(
    trainer: SaeTrainer,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, float],
    path: Path,
    step: int,
    rows: int,
) -> None:
    """Require that a saved state has exactly the names, shapes, dtypes and ranges of this SAE's.

    Args:
        trainer: the SAE, built from the run's record, in its initial state.
        tensors: tensors of the state.
        numbers: numbers of the state.
        path: file of the tensors, for errors.
        step: steps done.
        rows: rows trained on.

    Raises:
        FormatError: a tensor or number is missing, surplus, of another shape or dtype, or a value
            is out of range or not finite where training leaves none such.
    """
    layout = _layout(trainer, step)
    allowed = layout.tensors | layout.optional
    _require_names(path, "tensors", set(tensors), set(layout.tensors), set(allowed))
    required, optional = set(layout.numbers), set(layout.optional_numbers)
    _require_names(path, "numbers", set(numbers), required, required | optional)
    for name, tensor in tensors.items():
        if spec_of(tensor) != allowed[name]:
            raise _refused(f"{path}: tensor {name}", allowed[name], spec_of(tensor))
    updates = step // trainer.settings.grad_acc_steps
    for name, least, most in (
        ("meter.steps", 0, step),
        ("vitals.rows", 0, rows),
        ("vitals.updates", 0, updates),
        ("optimizer.k", 1, updates),
        *((name, 1, updates) for name in numbers if name.endswith(".step")),
    ):
        value = numbers.get(name)
        if value is not None and not (least <= value <= most and value == int(value)):
            raise _refused(f"{path}: number {name}", f"a whole number, {least} to {most}", value)
    counters = {name: (1, updates) for name in tensors if name.endswith(".step")}
    for name, (low, high) in (counters | {"firing": (0, rows), "vitals.active": (0, rows)}).items():
        found = tensors[name]
        if not bool(((found >= low) & (found <= high) & (found == found.trunc())).all()):
            got = f"{found.min().item()} to {found.max().item()}"
            raise _refused(f"{path}: tensor {name}", f"whole numbers, {low} to {high}", got)
    _require_average(path, numbers)
    weights = {f"sae.{name}" for name, _ in trainer.sae.named_parameters()}
    for name, tensor in tensors.items():
        of_optimizer = name.startswith("optimizer.") and tensor.is_floating_point()
        if of_optimizer and name.endswith(_SQUARES):
            if not bool((tensor >= 0).all()):  # NaN is not, either; large squares become infinite
                raise _refused(f"{path}: tensor {name}", ">= 0", _worst(tensor, tensor >= 0))
        elif (of_optimizer or name in weights or name in _SUMS) and not _is_finite(tensor):
            # A checkpoint is saved of finite weights and losses only, and moments or points that
            # are not finite make weights so in the same step.
            raise _refused(f"{path}: tensor {name}", "finite", _worst(tensor, tensor.isfinite()))


_SQUARES = (".exp_avg_sq", ".state2", ".absmax2", ".norms")
"""Ends of the names of means of squares, their scales in 8 bits, and norms."""
_SUMS = ("meter", "residual", "controller")
"""Sums of losses."""
_LR_MOST = 1e30  # of --lr


def _require_average(path: Path, numbers: Mapping[str, float]) -> None:
    """Check the numbers by which signum weights its average.

    Of k steps each adds the square of the largest rate so far, whatever --lr was in between.
    """
    largest, k = numbers.get("optimizer.lr_max"), numbers.get("optimizer.k")
    if largest is None or k is None:
        return
    if not 0 < largest <= _LR_MOST:
        raise _refused(f"{path}: number optimizer.lr_max", f"> 0, at most {_LR_MOST:g}", largest)
    least, most = largest**2 * (1 - 1e-9), k * largest**2 * (1 + 1e-9)
    if not least <= (total := numbers["optimizer.weight_sum"]) <= most or total <= 0:
        expected = f"{least} to {most}: lr_max squared to k times that"
        raise _refused(f"{path}: number optimizer.weight_sum", expected, total)


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _worst(tensor: Tensor, fine: Tensor) -> str:
    """Describe the values that are not fine."""
    bad = tensor[~fine]
    return f"{len(bad)} of {tensor.numel()} others, such as {bad[0].item()}"


def _layout(trainer: SaeTrainer, step: int) -> StateLayout:
    """Return the layout of the state of `SaeTrainer.state` after `step` steps."""
    every = trainer.settings.grad_acc_steps
    count = TensorSpec((trainer.sae.num_latents,), torch.int64)
    tensors = {f"sae.{name}": spec_of(p) for name, p in trainer.sae.state_dict().items()}
    tensors |= {"firing": count, "meter": spec_of(trainer.meter.sums)}
    tensors |= {"vitals.active": count, "vitals.norms": TensorSpec((), torch.float64)}
    if trainer.meter.residual is not None:
        tensors["residual"] = spec_of(trainer.meter.residual.sums)
    if trainer.meter.controller is not None:
        tensors["controller"] = spec_of(trainer.meter.controller.state)
    if step % every:  # within an update
        named = trainer.sae.named_parameters()
        tensors |= {f"gradient.{name}": spec_of(p) for name, p in named}
    numbers = frozenset({"vitals.rows", "vitals.updates", "meter.steps"})
    if step < every:
        return StateLayout(tensors, numbers, {}, frozenset({"optimizer.unit_rows"}))
    of_optimizer = trainer.optimizer.state_layout()
    return StateLayout(
        tensors | _prefixed(of_optimizer.tensors),
        numbers | {f"optimizer.{name}" for name in of_optimizer.numbers},
        _prefixed(of_optimizer.optional),
        frozenset(f"optimizer.{name}" for name in of_optimizer.optional_numbers),
    )


def _prefixed(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    return {f"optimizer.{name}": spec for name, spec in specs.items()}


def _require_names(
    path: Path, kind: str, found: set[str], required: set[str], allowed: set[str]
) -> None:
    missing, surplus = sorted(required - found), sorted(found - allowed)
    if missing or surplus:
        got = f"missing {missing}, surplus {surplus}"
        raise _refused(f"{path} holds other {kind} than this run needs", sorted(required), got)


def _refused(what: str, expected: object, got: object) -> FormatError:
    return FormatError(what, expected=expected, got=got, remedy=_REMEDY)
