"""Evaluation of a run's exported SAEs on its held-out rows."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from actcache.cache.reader import Cache
from actcache.cache.sinks import SinkRows, find_sinks
from actcache.core.arguments import COUNT, checked
from actcache.core.json_codec import to_json
from actcache.core.process import use_device
from actcache.core.progress import Progress
from actcache.errors import EmptyCacheError, FormatError, RunError
from actcache.filesystem.atomic import write_atomic
from actcache.filesystem.paths import is_url
from actcache.filesystem.rooted import rooted
from actcache.format.manifest import MANIFEST
from actcache.stream.massive_rows import massive_rows
from actcache.stream.order import RowsLeftOut, Span, kept_rows
from actcache.stream.verified_reads import VerifiedReader
from saetrain.config.sae import PENALISED, SaeEntry, hookpoints_of
from saetrain.formats.sparsify import read_sae
from saetrain.kernels import total
from saetrain.model.sae import Sae, rows_of
from saetrain.runs.checkpoint import (
    SaeState,
    State,
    best_folder,
    differing_file,
    newest_state,
    newest_step,
    require_format,
    require_own_files,
    verify_checkpoint,
)
from saetrain.runs.record import RunRecord, check_same_cache, read_run, with_massive_rows
from saetrain.runs.segments import has_ended, held_out_shards, read_used
from saetrain.tracking.jsonl import (
    METRICS,
    TIMINGS,
    last_line,
    number_of,
    require_lines,
    sae_metrics,
)
from saetrain.training.metrics import fired

EVALUATION = "eval.json"
BEST_EVALUATION = "eval-best.json"
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class PartEvaluation:
    """Results of a crosscoder at one hookpoint."""

    fvu: float
    """Fraction of variance unexplained at this hookpoint."""
    decoder_norm: float
    """Mean norm of the decoder rows' columns of this hookpoint. Over all hookpoints the norm is 1,
    except with --decoder-norm free."""


@dataclass(frozen=True)
class SaeEvaluation:
    """Results of one SAE."""

    name: str
    """Name in the run: HOOKPOINT or HOOKPOINT/SETTING."""
    hookpoint: str
    step: int
    """Steps it was trained for."""
    num_latents: int
    k: int | None
    """None with a sparsity penalty."""
    activation: str
    fvu: float
    """Σ‖y - ŷ‖² / Σ‖y - mean‖² over the held-out rows, with the mean of the training rows (with
    --follow, of the first segment). For a crosscoder, the mean over its hookpoints."""
    l0: float
    """Mean number of active latents per row."""
    dead_percent: float | None
    """Share of latents that did not fire in the last `dead_after` training rows, percent; None
    after fewer rows."""
    fired_percent: float
    """Share of latents that fire at least once on the held-out rows, percent."""
    parts: dict[str, PartEvaluation]
    """Results of a crosscoder by hookpoint; empty for other SAEs."""


@dataclass(frozen=True)
class Evaluation:
    """Results of a run. Contents of eval.json."""

    run: str
    cache_id: str
    step: int
    """Steps done at the last checkpoint."""
    steps: int
    """Steps of the whole run."""
    rows: int
    """Number of held-out rows that were evaluated on."""
    rows_left_out: int
    """Number of held-out rows that --max-norm-ratio left out."""
    dead_after: int
    """Rows without firing after which a latent is dead."""
    rows_per_second: float | None
    """Training throughput since the run was last started; None if not measured yet."""
    saes: tuple[SaeEvaluation, ...]
    sinks: tuple[SinkRows, ...]
    """Hookpoints where a few held-out rows of large norm hold much of the variance, which is the
    denominator of the FVU; the worst first."""


@checked(block_cache_bytes=COUNT)
def evaluate(
    run: str | os.PathLike[str],
    cache_folder: str | os.PathLike[str] | None = None,
    device: str = "auto",
    block_cache: str | os.PathLike[str] | None = None,
    block_cache_bytes: int | None = None,
    *,
    best: bool = False,
    max_norm_ratio: float | None = None,
) -> Evaluation:
    """Evaluate a run's exported SAEs on its held-out rows, and write `eval.json`.

    The SAEs of an unfinished run are those of its last checkpoint.

    Args:
        run: folder of the run.
        cache_folder: folder or URL of the cache, if it was moved; None: as recorded in the run.
        device: torch device, or auto.
        block_cache: folder for blocks of a cache at a URL, see `Cache.open`.
        block_cache_bytes: its size limit, see `Cache.open`.
        best: evaluate the SAEs that --save-best kept, and write `eval-best.json`.
        max_norm_ratio: leave out rows above this multiple of the median norm of the training rows;
            0: none; None: those above the run's own limits.

    Raises:
        ConfigError: the ratio is out of range, or leaves out more than a few rows.
        RunError: the folder holds no run, the run held nothing out or has no checkpoint yet, or
            its held-out rows are not finite or do not vary.
        EmptyCacheError: the cache is missing.
        CacheMismatchError: it is another cache, or its shards have changed.
        FormatError: a file of the run is damaged.
        CorruptShardError: held-out rows or statistics differ from their receipts.
    """
    root = rooted(run)
    record = read_run(root)
    require_own_files(root, [sae.name for sae in record.saes])
    folder = record.cache if cache_folder is None else cache_folder
    if not is_url(folder) and not (Path(folder) / MANIFEST).exists():
        raise EmptyCacheError(
            f"the cache of {root} is not at {folder}", remedy="give its path with --cache"
        )
    cache = Cache.open(folder, block_cache=block_cache, block_cache_bytes=block_cache_bytes)
    record = with_massive_rows(record, cache)
    check_same_cache(record, cache)
    if record.segment_shards is not None:
        read_used(root, record, cache)  # raises if a segment has changed
    held_out = held_out_shards(record, cache)
    if not held_out:
        raise RunError(
            f"{root} held nothing out to evaluate on",
            remedy="fit with a --val-fraction above 0",
        )
    massive = record.massive
    if max_norm_ratio is not None:
        hookpoints, training = hookpoints_of(record.saes), record.training_shards
        massive = massive_rows(cache, hookpoints, training, held_out, max_norm_ratio)
        record = dataclasses.replace(record, massive=massive)
    left_out = {} if massive is None else massive.held_out.left_out
    state = newest_state(root)
    if state is None:
        raise RunError(
            f"{root} holds no checkpoint: nothing has been saved yet",
            remedy="saetrain fit with --resume continues it",
        )
    _check_files(root, record, state)
    step, steps = state.step, record.steps
    if has_ended(record, state):
        steps = step
    # Lines after the checkpoint belong to steps that a resumed run repeats.
    metrics, timings = last_line(root / METRICS, step, "saes"), last_line(root / TIMINGS, step)
    if step > record.steps:
        raise FormatError(f"{root} holds a checkpoint that is not of this run")
    lost = timings is not None and (metrics is None or timings["step"] != metrics["step"])
    if lost or (step == steps and (metrics is None or timings is None)):
        raise FormatError(f"{root} lost {METRICS} or {TIMINGS}", remedy="restore them from a copy")
    names = [entry.name for entry in record.saes]
    dead: dict[str, float | None] = dict.fromkeys(names)
    if metrics is not None:
        figures = sae_metrics(root / METRICS, metrics, names)
        dead = {name: figures[name]["dead_percent"] for name in names}
    rate = None
    if timings is not None:
        rate = number_of(root / TIMINGS, timings, "mean_rows_per_second")
    at = use_device(device)
    groups: dict[str, list[tuple[SaeEntry, SaeState]]] = {}
    for entry, saved in zip(record.saes, state.saes, strict=True):
        groups.setdefault(entry.hookpoint, []).append((entry, saved))
    evaluation = Evaluation(
        run=str(root),
        cache_id=record.cache_id,
        step=step,
        steps=steps,
        rows=kept_rows([(shard, cache.receipts[shard].rows) for shard in held_out], left_out),
        rows_left_out=sum(map(len, left_out.values())),
        dead_after=record.dead_after,
        rows_per_second=rate,
        saes=tuple(
            figure
            for group in groups.values()
            for figure in _evaluate_group(
                root, record, group, cache, held_out, at, dead, step, best
            )
        ),
        sinks=find_sinks(
            cache,
            [name for entry in record.saes for name in entry.targets],
            held_out,
            None if massive is None else massive.held_out.statistics,
            left_out,
        ),
    )
    write_atomic(root / (BEST_EVALUATION if best else EVALUATION), [to_json(evaluation)])
    return evaluation


def _check_files(root: Path, record: RunRecord, state: State) -> None:
    """Compare the files of a checkpoint with their digests, also those that only a resume reads.

    Raises:
        RunError: a newer checkpoint has replaced it meanwhile.
        FormatError: a file is damaged.
    """
    require_format(root, record, state)
    try:
        verify_checkpoint(root, state)
        if state.metrics is not None:
            require_lines(root / METRICS, state.metrics)
    except FormatError as error:
        if newest_step(root) == state.step:
            raise
        raise RunError(f"{root} was saved meanwhile", remedy="evaluate it again") from error


def _evaluate_group(
    root: Path,
    record: RunRecord,
    group: list[tuple[SaeEntry, SaeState]],
    cache: Cache,
    shards: list[int],
    device: torch.device,
    dead: dict[str, float | None],
    step: int,
    best: bool,
) -> list[SaeEvaluation]:
    """Evaluate the SAEs of one group, which share their hookpoints, in one pass over the rows."""
    loaded = [_load(root, entry, saved, step, best, device) for entry, saved in group]
    saes = [sae for sae, _ in loaded]
    targets = group[0][0].targets
    means = [record.statistics(cache, name).mean for name in targets]
    left_out: RowsLeftOut = {}
    if record.massive is None:
        held_out = [cache.statistics(name, shards) for name in targets]
    else:
        held_out = [record.massive.held_out.statistics[name] for name in targets]
        left_out = record.massive.held_out.left_out
    denominators = [s.squared_error_of(m) for s, m in zip(held_out, means, strict=True)]
    rows = kept_rows([(shard, cache.receipts[shard].rows) for shard in shards], left_out)
    evaluated = []
    found = squared_errors(saes, cache, group[0][0], shards, left_out)
    for (entry, _), (sae, at), (errors, l0, alive) in zip(group, loaded, found, strict=True):
        for name, error, denominator in zip(targets, errors, denominators, strict=True):
            if not (math.isfinite(error) and 0 < denominator < math.inf):
                raise RunError(
                    f"the held-out rows of {name} cannot be evaluated on",
                    expected="finite rows that vary",
                    got=f"squared error {error}, variance {denominator}",
                    remedy="actcache inspect shows rows that are not finite",
                )
        fvus = [e / denominator for e, denominator in zip(errors, denominators, strict=True)]
        kind = entry.config.activation
        evaluated.append(
            SaeEvaluation(
                name=entry.name,
                hookpoint=entry.hookpoint,
                step=at,
                num_latents=entry.config.num_latents,
                k=None if kind in PENALISED else entry.config.k,
                activation=kind,
                fvu=sum(fvus) / len(fvus),
                l0=l0 / rows,
                dead_percent=dead[entry.name] if at == step else None,
                fired_percent=100.0 * float(alive.double().mean()),
                parts=_parts(sae, targets, [len(mean) for mean in means], fvus),
            )
        )
    return evaluated


def _parts(
    sae: Sae, targets: tuple[str, ...], widths: list[int], fvus: list[float]
) -> dict[str, PartEvaluation]:
    """Return a crosscoder's results at each hookpoint; empty for other SAEs."""
    if len(targets) == 1:
        return {}
    slices = torch.split(sae.W_dec.detach(), widths, dim=1)
    norms = [float(piece.norm(dim=1).double().mean()) for piece in slices]
    return dict(zip(targets, map(PartEvaluation, fvus, norms), strict=True))


def _load(
    root: Path, entry: SaeEntry, saved: SaeState, step: int, best: bool, device: torch.device
) -> tuple[Sae, int]:
    """Load the SAE that a checkpoint names, or its best; return it with its step."""
    folder, named = root / entry.name, saved.export
    if best:
        if saved.best is None:
            raise RunError(
                f"{root} keeps no best SAE of {entry.name}",
                remedy="fit with --val-every N --save-best",
            )
        step = saved.best.step
        folder, named = best_folder(folder, step), saved.best.file
    if path := differing_file(folder, saved.best if best and saved.best is not None else saved):
        raise RunError(
            f"{path} is not that of the last checkpoint",
            remedy="if the run was stopped while saving, saetrain fit with --resume continues it; "
            "if it is running, try again; otherwise restore the SAE from a copy",
        )
    sae, config = read_sae(folder, device, named)
    if config != entry.config:
        raise FormatError(
            f"{folder} holds another SAE than the run's",
            expected=entry.config,
            got=config,
            remedy="restore it from a copy",
        )
    return sae, step


@torch.no_grad()
def squared_errors(
    saes: list[Sae],
    cache: Cache,
    entry: SaeEntry,
    shards: list[int],
    left_out: RowsLeftOut | None = None,
) -> list[tuple[list[float], float, torch.Tensor]]:
    """Run SAEs over whole shards, comparing each file with its receipt before its first rows.

    Args:
        saes: SAEs that read and predict the same hookpoints.
        cache: the run's cache.
        entry: entry of one of them.
        shards: the shards.
        left_out: rows of the shards that are not evaluated on.

    Returns:
        For each SAE, Σ‖y - ŷ‖² at each predicted hookpoint, the number of active latents summed
        over rows, and which latents fired, bool [M].

    Raises:
        CorruptShardError: a file is missing, or differs from its receipt.
    """
    widths = [cache.manifest.width(name) for name in entry.targets]
    errors, active = [[0.0] * len(widths) for _ in saes], [0.0] * len(saes)
    alive = [torch.zeros_like(sae.b_enc, dtype=torch.bool) for sae in saes]
    row_dtype, names = cache.row_dtype, dict.fromkeys(entry.hookpoints)
    reader = VerifiedReader(cache, "first-read")
    bar = Progress(f"eval {entry.hookpoint}", sum(cache.receipts[s].rows for s in shards), "rows")
    for shard in shards:
        for start in range(0, cache.receipts[shard].rows, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, cache.receipts[shard].rows - start)
            stored = {name: row_dtype.empty(count, cache.manifest.width(name)) for name in names}
            reader.load([Span(shard, start, count)], stored)
            loaded = {name: row_dtype.to_torch(rows) for name, rows in stored.items()}
            rows = rows_of(entry, loaded)  # [n, D]
            if left_out and shard in left_out:
                kept = ~np.isin(np.arange(start, start + count), left_out[shard])
                rows = rows[torch.from_numpy(kept)]
            if not len(rows):
                continue
            rows = rows.to(saes[0].W_enc.device)
            for i, sae in enumerate(saes):
                x, y = sae.split(rows.to(sae.W_enc.dtype))
                output = sae(x)
                squares = (y - output.reconstruction).double().pow(2)  # [n, E]
                for j, piece in enumerate(torch.split(squares, widths, dim=1)):
                    errors[i][j] += float(total(piece.sum(dim=1)))
                active[i] += float((output.top_acts > 0).sum())
                alive[i] |= fired(output.top_acts, output.top_indices, sae.num_latents)
            bar.advance(count, sum(rows.nbytes for rows in stored.values()))
    bar.close()
    return list(zip(errors, active, alive, strict=True))
