"""A loss that is not finite: it reaches no weight, and is told by SAE, step and rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """A loss, or a weight, that is not finite.

    Args:
        what: the message's first line.
        hookpoint: of the SAE.
        step: of the batch whose loss it was, from 0; None: a weight, not a loss.
        got: what was found.
        saved: what is saved, one sentence.
        batch: where the rows of the batch lie, once that is known.
        culprits: rows of it that are not finite.
        at: hookpoints where they are not.
    """

    def __init__(
        self,
        what: str,
        *,
        hookpoint: str,
        step: int | None,
        got: object,
        saved: str,
        batch: str | None = None,
        culprits: Rows | None = None,
        at: tuple[str, ...] = (),
    ) -> None:
        self.hookpoint, self.step, self.saved = hookpoint, step, saved
        self.value = got
        remedy = (
            "a smaller --lr, with another --out; actcache inspect shows rows that are not finite"
        )
        if culprits is not None and len(culprits):
            remedy = (
                f"{_by_shard(culprits)}: not finite on disk, so no --lr helps. Leave "
                f"{' and '.join(at)} out, or harvest anew with --max-norm-ratio, which drops such "
                "rows, or in bfloat16 where float16 overflowed; actcache verify says whether they "
                "are as harvested"
            )
        elif culprits is not None:
            remedy = (
                "its rows are finite, so training diverged: a smaller --lr, more "
                "--lr-warmup-steps or --grad-clip, with another --out"
            )
        got = got if batch is None else f"{got}, of the batch {batch}"
        super().__init__(what, expected="a number", got=got, remedy=f"{remedy}. {saved}")


def require_finite(
    value: float, hookpoint: str, done: int, first_bad: int | None, saved: int | None
) -> None:
    """Raise `NonFiniteError` if a value of an SAE is not finite, or a loss was not.

    Args:
        value: what is looked at now.
        hookpoint: of the SAE.
        done: steps done.
        first_bad: the first step (from 0) whose loss was not finite.
        saved: steps of the newest checkpoint.
    """
    if first_bad is None and math.isfinite(value):
        return
    kept = "Nothing is saved yet" if saved is None else f"Step {saved} is saved, from before"
    raise NonFiniteError(
        f"the loss of {hookpoint} is not finite by step "
        f"{done if first_bad is None else first_bad + 1}",
        hookpoint=hookpoint,
        step=first_bad,
        got=math.nan if math.isfinite(value) else value,
        saved=kept,
    )


def require_finite_loss(root: Path, trainer: SaeTrainer, value: float, done: int) -> None:
    """`require_finite` of an SAE in training, for the run in `root`."""
    saved = newest_step(root)
    require_finite(value, trainer.entry.name, done, trainer.guard.first_bad(), saved)


@contextmanager
def with_row_addresses(
    root: Path,
    cache: Cache,
    read: Mapping[str, Sequence[str]],
    place: Callable[[int], tuple[OrderPlan, int, int]],
) -> Iterator[None]:
    """Let a `NonFiniteError` from within name the rows of its batch, see `with_rows`.

    Args:
        root: folder of the run.
        cache: its cache.
        read: hookpoints that each SAE reads, by its name.
        place: plan of a step (from 0) of the run, its epoch, and the step within both.
    """
    try:
        yield
    except NonFiniteError as error:
        raise with_rows(error, root, cache, read[error.hookpoint], place) from error


def with_rows(
    error: NonFiniteError,
    root: Path,
    cache: Cache,
    hookpoints: Sequence[str],
    place: Callable[[int], tuple[OrderPlan, int, int]],
) -> NonFiniteError:
    """The same error with the addresses of the batch's rows, which `non-finite.json` has all of.

    Args:
        error: what happened.
        root: folder of the run.
        cache: its cache.
        hookpoints: whose rows the SAE is given.
        place: from a step (from 0) to plan, epoch and step in it.
    """
    if error.step is None:
        return error
    plan, epoch, step = place(error.step)
    addresses = batch_rows(plan, epoch, step)  # [B, 2]
    found = {name: _not_finite(cache, name, addresses) for name in dict.fromkeys(hookpoints)}
    culprits = _union(list(found.values()))
    told = {
        "hookpoint": error.hookpoint,
        "step": error.step + 1,
        "epoch": epoch,
        "step_in_plan": step,
        "seed": plan.seed,
        "rows": addresses.tolist(),
        "rows_not_finite": None if culprits is None else culprits.tolist(),
    }
    where = f"of epoch {epoch}: {_by_shard(addresses)}"
    try:
        write_atomic(root / ROWS, [to_json(told)])
    except (ActcacheError, OSError):  # what happened is the news, not that it cannot be written
        pass
    else:
        where += f" (all of them in {root / ROWS})"
    return NonFiniteError(
        error.what,
        hookpoint=error.hookpoint,
        step=error.step,
        got=error.value,
        saved=error.saved,
        batch=where,
        culprits=culprits,
        at=tuple(name for name, rows in found.items() if rows is not None and len(rows)),
    )


def _not_finite(cache: Cache, hookpoint: str, addresses: Rows) -> Rows | None:
    """Those of the rows that are not finite, [n, 2]; None if they cannot be read."""
    bad = []
    try:
        for shard, row in addresses.tolist():
            if not bool(
                cache.row_dtype.to_torch(cache.read(hookpoint, shard, row, 1)).isfinite().all()
            ):
                bad.append((shard, row))
    except (ActcacheError, OSError):
        return None
    return np.array(bad, dtype=np.int64).reshape(-1, 2)


def _union(found: Sequence[Rows | None]) -> Rows | None:
    """Rows that are among any of these, in order; None if nothing could be read."""
    read = [rows for rows in found if rows is not None]
    return np.unique(np.concatenate(read), axis=0) if read else None


def _by_shard(addresses: Rows) -> str:
    """Rows in words, the first few of every shard."""
    pairs = sorted(map(tuple, addresses.tolist()))
    words = []
    for shard, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        rows = [str(row) for _, row in group]
        more = "" if len(rows) <= _NAMED else f" and {len(rows) - _NAMED:,} more"
        words.append(f"shard {shard} row{'s' * (len(rows) > 1)} {', '.join(rows[:_NAMED])}{more}")
    return "; ".join(words)
