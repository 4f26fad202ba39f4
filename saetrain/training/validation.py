"""Validation during training: FVU and L0 on a fixed set of held-out rows, kept in memory.

The weights measured are those that would be exported; for schedule-free optimisers, the averages.
Letters: N rows, n rows at once, D d_in, E width of the output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from actcache.cache.reader import Cache
from actcache.errors import ConfigError, RunError
from actcache.stream.massive_rows import MassiveRows
from actcache.stream.order import Span, kept_rows, kept_spans
from actcache.stream.verified_reads import VerifiedReader, Verify
from saetrain.config.sae import SaeEntry
from saetrain.kernels import total
from saetrain.model.sae import Sae, rows_of
from saetrain.training.checkpointing import save_best
from saetrain.training.non_finite import require_finite_loss
from saetrain.training.sae_trainer import SaeTrainer

_ROWS_AT_ONCE = 2048


class Validation:
    """Held-out rows of every hookpoint of a run, the same for all its SAEs and steps.

    Args:
        cache: the run's cache.
        hookpoints: hookpoints of the run.
        training: training shards; their mean is the reference of the FVU.
        held_out: shards that are never trained on.
        most: largest number of rows, taken evenly from the start of each shard (the rows of a
            shard are shuffled).
        verify: when to compare files with their receipts.
        massive: rows that the run leaves out, of training and held-out shards.

    Raises:
        ConfigError: nothing is held out.
        RunError: the rows are not finite, or do not vary.
        CorruptShardError: a file differs from its receipt.
    """

    def __init__(
        self,
        cache: Cache,
        hookpoints: Sequence[str],
        training: list[int],
        held_out: Sequence[int],
        most: int,
        verify: Verify = "first-read",
        massive: MassiveRows | None = None,
    ) -> None:
        left_out = {} if massive is None else massive.held_out.left_out
        rows = {s: kept_rows([(s, cache.receipts[s].rows)], left_out) for s in held_out}
        spans = [
            kept
            for span in spread(rows, most)
            for kept in kept_spans(span.shard, 0, 0, span.rows, left_out)
        ]
        self.rows = sum(span.rows for span in spans)
        if not self.rows:
            raise ConfigError(
                "--val-every needs rows that are held out",
                expected="shards with rows",
                got=f"shards {list(held_out)}",
                remedy="a larger --val-fraction",
            )
        row_dtype = cache.row_dtype
        stored = {
            name: row_dtype.empty(self.rows, cache.manifest.width(name)) for name in hookpoints
        }
        VerifiedReader(cache, verify).load(spans, stored)
        self._rows = {name: row_dtype.to_torch(rows) for name, rows in stored.items()}  # [N, D]
        self._scale = {}
        for name in hookpoints:
            known = None if massive is None else massive.training.statistics[name]
            mean = (known or cache.statistics(name, training)).mean
            self._scale[name] = self._squares(name, mean)

    def _squares(self, hookpoint: str, mean: object) -> float:
        """Return Σ‖x - mean‖² over a hookpoint's rows."""
        around = torch.as_tensor(mean, dtype=torch.float64)  # [D]
        found = 0.0
        for rows in torch.split(self._rows[hookpoint], _ROWS_AT_ONCE):
            found += float(total((rows.double() - around).pow(2).sum(dim=1)))
        if not 0 < found < math.inf:
            raise RunError(
                f"the held-out rows of {hookpoint} cannot be validated on",
                expected="finite rows that vary",
                got=f"a sum of squares of {found}",
                remedy="actcache inspect shows rows that are not finite; or leave out --val-every",
            )
        return found

    def on(self, entry: SaeEntry, device: torch.device) -> Tensor:
        """Return the rows of an SAE's hookpoints side by side, in the dtype on disk. [N, D]"""
        return rows_of(entry, self._rows).to(device)

    @torch.no_grad()
    def measure(
        self, sae: Sae, weights: Mapping[str, Tensor], entry: SaeEntry, rows: Tensor
    ) -> dict[str, float]:
        """Return FVU and L0, in evaluation mode, of an SAE with given weights on its rows [N, D].

        The FVU of a crosscoder is the mean over its hookpoints.
        """
        scales = [self._scale[name] for name in entry.targets]
        widths = [self._rows[name].shape[1] for name in entry.targets]
        errors, active = [0.0] * len(scales), 0.0
        sae.eval()
        for part in torch.split(rows, _ROWS_AT_ONCE):
            x, y = sae.split(part.to(sae.W_enc.dtype))
            output = functional_call(sae, dict(weights), (x,))
            squares = (y - output.reconstruction).double().pow(2)  # [n, E]
            for i, piece in enumerate(torch.split(squares, widths, dim=1)):
                errors[i] += float(total(piece.sum(dim=1)))
            active += float((output.top_acts > 0).sum())
        sae.train()
        fvus = [error / scale for error, scale in zip(errors, scales, strict=True)]
        return {"fvu": sum(fvus) / len(fvus), "l0": active / self.rows}


def spread(rows: Mapping[int, int], most: int) -> list[Span]:
    """Choose at most `most` rows, from the start of each shard, spread evenly over shards.

    Args:
        rows: number of rows of each shard.
        most: largest number of rows in total.
    """
    spans, left = [], most
    # Smallest shards first: larger ones make up for the rows that those lack.
    for position, shard in enumerate(sorted(rows, key=lambda shard: (rows[shard], shard))):
        count = min(rows[shard], left // (len(rows) - position))
        left -= count
        if count:
            spans.append(Span(shard, 0, count))
    return sorted(spans, key=lambda span: span.shard)


def validate(
    root: Path,
    groups: dict[str, list[SaeTrainer]],
    validation: Validation,
    done: int,
    keep_best: bool,
) -> dict[str, dict[str, float]]:
    """Measure every SAE as it would be exported; with `keep_best`, save those that improved.

    Returns:
        FVU and L0 by the SAE's name.

    Raises:
        NonFiniteError: an FVU or an earlier loss is not finite.
    """
    figures = {}
    for group in groups.values():
        rows = validation.on(group[0].entry, group[0].sae.W_enc.device)
        for trainer in group:
            weights, entry = trainer.unscaled_weights(), trainer.entry
            if trainer.settings.k_anneal_steps:
                trainer.sae.k = entry.config.k  # the next step sets its annealed k again
            found = validation.measure(trainer.sae, weights, entry, rows)
            require_finite_loss(root, trainer, found["fvu"], done)
            figures[entry.name] = found
            if keep_best and is_better(trainer, found["fvu"], done):
                save_best(root, trainer, done, found["fvu"])
    return figures


def is_better(trainer: SaeTrainer, fvu: float, done: int) -> bool:
    """Return whether an SAE is better than its best so far.

    While k is annealed or the penalty warms up, more latents are active than at the end, which
    lowers the FVU. So any SAE after that is better than one from before.
    """
    best = trainer.best
    return best is None or best.step < trainer.schedules_end <= done or fvu < best.fvu
