"""How well SAEs in training reconstruct held-out rows: a bounded number, held in memory.

What is judged is what would be exported: of schedule-free optimisers, the averages. Letters: N
rows, D d_in.
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
from actcache.stream.order import Span
from actcache.stream.verified_reads import VerifiedReader, Verify
from saetrain.kernels.sums import total
from saetrain.model.hookpoint_io import rows_of
from saetrain.model.sae import Sae
from saetrain.runs.record import SaeEntry
from saetrain.training.best import keep_only, save_best
from saetrain.training.non_finite import require_finite_loss
from saetrain.training.sae_trainer import SaeTrainer

_ROWS_AT_ONCE = 2048


class Validation:
    """Held-out rows of every hookpoint of a run, the same for all its SAEs and steps.

    Args:
        cache: where they are.
        hookpoints: of the run.
        training: shards whose mean the FVU is taken around.
        held_out: shards that are never trained on.
        most: rows; as many from each shard, from its beginning (rows of a shard are shuffled).
        verify: when files are compared with their receipts.

    Raises:
        ConfigError: nothing is held out.
        RunError: the rows are not finite, or do not vary.
        CorruptShardError: they are not what the receipts promise.
    """

    def __init__(
        self,
        cache: Cache,
        hookpoints: Sequence[str],
        training: list[int],
        held_out: Sequence[int],
        most: int,
        verify: Verify = "first-read",
    ) -> None:
        spans = spread({shard: cache.receipts[shard].rows for shard in held_out}, most)
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
        self._rows = {
            name: row_dtype.to_torch(rows) for name, rows in stored.items()
        }  # each [N, D]
        self._scale = {
            name: self._squares(name, cache.statistics(name, training).mean) for name in hookpoints
        }

    def _squares(self, hookpoint: str, mean: object) -> float:
        """Σ‖x - mean‖² of a hookpoint's rows."""
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
        """An SAE's rows, as `rows_of` says, in the type on disk. [N, D]"""
        return rows_of(entry, self._rows).to(device)

    @torch.no_grad()
    def measure(
        self, sae: Sae, weights: Mapping[str, Tensor], entry: SaeEntry, rows: Tensor
    ) -> dict[str, float]:
        """FVU and L0 of an SAE with given weights on its rows [N, D], as it is used afterwards.

        Of a crosscoder, the mean of its hookpoints' FVUs.
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
    """At most so many rows, from the beginning of each shard, as evenly as shards have them.

    Args:
        rows: of each shard.
        most: of all together.
    """
    spans, left = [], most
    # The small ones first: what they do not have, the others give.
    for place, shard in enumerate(sorted(rows, key=lambda shard: (rows[shard], shard))):
        count = min(rows[shard], left // (len(rows) - place))
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
    """Measure every SAE as it would be exported, and write those that were never better.

    Returns:
        Figures by the SAE's name.
    """
    figures = {}
    for group in groups.values():
        rows = validation.on(group[0].entry, group[0].sae.W_enc.device)
        for trainer in group:
            weights, entry = trainer.export_weights(), trainer.entry
            if trainer.settings.k_anneal_steps:
                trainer.sae.k = entry.config.k  # while k falls, every step sets its own
            found = validation.measure(trainer.sae, weights, entry, rows)
            require_finite_loss(root, trainer, found["fvu"], done)
            figures[entry.name] = found
            if keep_best and is_better(trainer, found["fvu"], done):
                folder, unit = root / entry.name, trainer.unit_norm()
                trainer.best = save_best(folder, entry, weights, unit, done, found["fvu"])
                keep_only(folder, {done, *trainer.saved_bests})
    return figures


def is_better(trainer: SaeTrainer, fvu: float, done: int) -> bool:
    """Whether an SAE is better than its best so far.

    While k still falls or a penalty still rises, more latents are active than in the end (a dense
    activation's, or BatchTopK's by its threshold): a low FVU of then is bought with L0. So whatever
    comes after is better than that.
    """
    best = trainer.best
    return best is None or best.step < trainer.schedules_end <= done or fvu < best.fvu
