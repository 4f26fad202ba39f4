"""Errors for losses, gradients and weights that are not finite, with addresses of rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actcache.cache.reader import Cache
from actcache.core.json_codec import to_json
from actcache.errors import ActcacheError, RunError
from actcache.filesystem.atomic import write_atomic
from actcache.stream.order import OrderPlan, Rows, batch_rows
from saetrain.runs.checkpoint import newest_step

if TYPE_CHECKING:
    from saetrain.training.sae_trainer import SaeTrainer


ROWS = "non-finite.json"
_NAMED = 8  # rows of a shard that a message names


class NonFiniteError(RunError):
    """A loss, a gradient or a weight is not finite.

    Args:
        what: first line of the message.
        trainer: the SAE.
        step: step of the batch whose loss or gradient it was, from 0; None: it was a weight.
        got: the value found.
        saved: one sentence on what is saved.
        batch: addresses of the batch's rows in words; None until they are known.
        culprits: addresses of those rows that are not finite on disk; None if they cannot be read.
        at: hookpoints at which they are not finite.
    """

    def __init__(
        self,
        what: str,
        trainer: SaeTrainer,
        step: int | None,
        got: float,
        saved: str,
        batch: str | None = None,
        culprits: Rows | None = None,
        at: tuple[str, ...] = (),
    ) -> None:
        self.trainer, self.step, self.value, self.saved = trainer, step, got, saved
        remedy = (
            "a smaller --lr, with another --out; actcache inspect shows rows that are not finite"
        )
        if culprits is not None and len(culprits):
            remedy = (
                f"{_by_shard(culprits)}: not finite on disk, so no --lr helps. Leave "
                f"{' and '.join(at)} out, or harvest again with --max-norm-ratio, which drops such "
                "rows, or in bfloat16 if float16 overflowed; actcache verify checks whether they "
                "are as harvested"
            )
        elif step is not None and trainer.guard.is_in_gradient():
            remedy = (
                "--input-scale rms if its rows are very large or very small, a smaller --lr or "
                "more --lr-warmup-steps, with another --out. No weight has changed"
            )
        elif culprits is not None:
            remedy = (
                "its rows are finite, so training diverged: a smaller --lr, more "
                "--lr-warmup-steps or --grad-clip, with another --out"
            )
        found = f"{got}" if batch is None else f"{got}, of the batch {batch}"
        super().__init__(what, expected="a number", got=found, remedy=f"{remedy}. {saved}")


def require_finite_loss(root: Path, trainer: SaeTrainer, value: float, done: int) -> None:
    """Raise `NonFiniteError` if `value` or an earlier loss or gradient of an SAE is not finite.

    Args:
        root: folder of the run.
        trainer: the SAE.
        value: a loss, or a number that is finite only if all losses are.
        done: steps done.
    """
    first_bad, saved = trainer.guard.first_bad(), newest_step(root)
    if first_bad is None and math.isfinite(value):
        return
    step = done if first_bad is None else first_bad + 1
    what = f"the loss of {trainer.entry.name} is not finite"
    if trainer.guard.is_in_gradient():
        what = f"the gradient of {trainer.entry.name} overflows under a finite loss"
    raise NonFiniteError(
        f"{what} by step {step}",
        trainer,
        first_bad,
        math.nan if math.isfinite(value) else value,
        "Nothing is saved yet" if saved is None else f"Step {saved} is saved, from before",
    )


@contextmanager
def with_row_addresses(
    root: Path, cache: Cache, plan_of: Callable[[int], tuple[OrderPlan, int, int]]
) -> Iterator[None]:
    """Add the addresses of the batch's rows to a `NonFiniteError` raised within.

    The message names the first rows; `non-finite.json` lists all.

    Args:
        root: folder of the run.
        cache: the run's cache.
        plan_of: maps a step (from 0) to its plan, epoch, and step within both.
    """
    try:
        yield
    except NonFiniteError as error:
        if error.step is None:
            raise
        entry = error.trainer.entry
        plan, epoch, step = plan_of(error.step)
        addresses = batch_rows(plan, epoch, step)  # [B, 2]
        found = {name: _not_finite(cache, name, addresses) for name in entry.hookpoints}
        culprits = _union(list(found.values()))
        contents = {
            "hookpoint": entry.name,
            "step": error.step + 1,
            "epoch": epoch,
            "step_in_plan": step,
            "seed": plan.seed,
            "rows": addresses.tolist(),
            "rows_not_finite": None if culprits is None else culprits.tolist(),
        }
        batch = f"of epoch {epoch}: {_by_shard(addresses)}"
        try:
            write_atomic(root / ROWS, [to_json(contents)])
        except (ActcacheError, OSError):  # the loss is the error to report, not this
            pass
        else:
            batch += f" (all of them in {root / ROWS})"
        at = tuple(name for name, rows in found.items() if rows is not None and len(rows))
        raise NonFiniteError(
            error.what, error.trainer, error.step, error.value, error.saved, batch, culprits, at
        ) from error


def _not_finite(cache: Cache, hookpoint: str, addresses: Rows) -> Rows | None:
    """Return the addresses of rows that are not finite, [n, 2]; None if they cannot be read."""
    bad = []
    try:
        for shard, row in addresses.tolist():
            stored = cache.row_dtype.to_torch(cache.read(hookpoint, shard, row, 1))
            if not bool(stored.isfinite().all()):
                bad.append((shard, row))
    except (ActcacheError, OSError):
        return None
    return np.array(bad, dtype=np.int64).reshape(-1, 2)


def _union(found: Sequence[Rows | None]) -> Rows | None:
    """Return the sorted union of addresses; None if no hookpoint could be read."""
    read = [rows for rows in found if rows is not None]
    return np.unique(np.concatenate(read), axis=0) if read else None


def _by_shard(addresses: Rows) -> str:
    """Format addresses by shard, at most `_NAMED` rows each."""
    pairs = sorted(map(tuple, addresses.tolist()))
    words = []
    for shard, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        rows = [str(row) for _, row in group]
        more = "" if len(rows) <= _NAMED else f" and {len(rows) - _NAMED:,} more"
        words.append(f"shard {shard} row{'s' * (len(rows) > 1)} {', '.join(rows[:_NAMED])}{more}")
    return "; ".join(words)
