"""How well a run's SAEs reconstruct rows that they were never trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from actcache.cache.reader import Cache
from actcache.core.device import choose_device
from actcache.core.json_codec import to_json
from actcache.core.progress import Progress
from actcache.errors import EmptyCacheError, FormatError, RunError
from actcache.filesystem.atomic import FileDigest, digest_file, write_atomic
from actcache.filesystem.paths import is_url
from actcache.format.manifest import MANIFEST
from saetrain.config.sae import PENALISED
from saetrain.formats.sparsify import WEIGHTS, load_sae, read_sae_config
from saetrain.kernels.sums import total
from saetrain.model.hookpoint_io import rows_of
from saetrain.model.sae import Sae
from saetrain.runs.checkpoint import SaeState, newest_state
from saetrain.runs.record import RunRecord, SaeEntry, check_same_cache, read_run
from saetrain.runs.segments import has_ended, held_out_shards, read_used
from saetrain.tracking.jsonl import METRICS, TIMINGS, last_line, number_of, sae_metrics
from saetrain.training.best import best_folder
from saetrain.training.metrics import fired

EVALUATION = "eval.json"
BEST_EVALUATION = "eval-best.json"
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class PartEvaluation:
    """One hookpoint of a crosscoder on the held-out rows."""

    fvu: float
    """Its fraction of variance unexplained."""
    decoder_norm: float
    """Mean norm of the decoder's rows there; all hookpoints together have unit norm, but with
    --decoder-norm free."""


@dataclass(frozen=True)
class SaeEvaluation:
    """One SAE on the held-out rows."""

    name: str
    """Its name in the run: the hookpoint, and what tells it from others of that hookpoint."""
    hookpoint: str
    step: int
    """Steps that it has been trained for."""
    num_latents: int
    k: int | None
    """None where a penalty makes latents sparse."""
    activation: str
    fvu: float
    """Σ‖y - ŷ‖² / Σ‖y - mean‖² over the held-out rows; mean is that of the training rows
    (with --follow: of the first segment's). Of a crosscoder, the mean over its hookpoints."""
    l0: float
    """Mean number of active latents in a row."""
    dead_percent: float | None
    """Latents that did not fire in the last `dead_after` rows of training, percent; None while
    fewer rows have been trained on."""
    fired_percent: float
    """Latents that fire at least once on the held-out rows, percent."""
    parts: dict[str, PartEvaluation]
    """Of a crosscoder, each hookpoint by itself; of others, nothing."""


@dataclass(frozen=True)
class Evaluation:
    """A run on its held-out rows."""

    run: str
    cache_id: str
    step: int
    """Steps that the run has done; the SAEs too, unless it is the best ones that are evaluated."""
    steps: int
    """Of the whole run."""
    rows: int
    """Held-out rows."""
    dead_after: int
    """Rows without firing after which a latent is dead."""
    rows_per_second: float | None
    """Of training, all SAEs together, since the run was last started; None if not measured yet."""
    saes: tuple[SaeEvaluation, ...]


def evaluate(
    root: Path,
    cache_folder: str | None = None,
    device: str = "auto",
    block_cache: str | None = None,
    block_cache_bytes: int | None = None,
    *,
    best: bool = False,
) -> Evaluation:
    """Evaluate a run's exported SAEs and write `eval.json`.

    The SAEs of a run that is not finished are those of its last checkpoint: they are written just
    before it.

    Args:
        root: folder of the run.
        cache_folder: where the cache is now, a folder or URL; None: where it was.
        device: torch device, or auto.
        block_cache: with a URL, see `Cache.open`.
        block_cache_bytes: likewise.
        best: evaluate the best ones that --save-best kept instead, and write `eval-best.json`.

    Raises:
        RunError: no such run, or nothing was held out, or nothing has been saved yet, or the
            held-out rows are not finite or do not vary.
        EmptyCacheError: the cache is not there.
        CacheMismatchError: the cache is another one or has changed.
        FormatError: a file of the run is damaged.
    """
    record = read_run(root)
    folder = cache_folder or record.cache
    if not is_url(folder) and not (Path(folder) / MANIFEST).exists():
        raise EmptyCacheError(
            f"the cache of {root} is not at {folder}", remedy="name it with --cache"
        )
    cache = Cache.open(folder, block_cache=block_cache, block_cache_bytes=block_cache_bytes)
    check_same_cache(record, cache)
    if record.segment_shards is not None:
        read_used(root, record, cache)  # checks it
    held_out = held_out_shards(record, cache)
    if not held_out:
        raise RunError(
            f"{root} held nothing out to evaluate on",
            remedy="fit with a --val-fraction above 0",
        )
    state = newest_state(root)
    if state is None:
        raise RunError(
            f"{root} holds no checkpoint: nothing has been saved yet",
            remedy="saetrain fit with --resume goes on",
        )
    step, steps = state.step, record.steps
    if has_ended(record, state):
        steps = step
    # Lines after the checkpoint are of steps that a resumed run does again.
    metrics, timings = last_line(root / METRICS, step, "saes"), last_line(root / TIMINGS, step)
    if len(state.saes) != len(record.saes) or step > record.steps:
        raise FormatError(f"{root} holds a checkpoint that is not of this run")
    if step == steps and (metrics is None or timings is None):
        raise FormatError(f"{root} lost {METRICS} or {TIMINGS}", remedy="restore them from a copy")
    names = [entry.name for entry in record.saes]
    dead: dict[str, float | None] = dict.fromkeys(names)
    if metrics is not None:
        figures = sae_metrics(root / METRICS, metrics, names)
        dead = {name: figures[name]["dead_percent"] for name in names}
    rate = None
    if timings is not None:
        rate = number_of(root / TIMINGS, timings, "mean_rows_per_second")
    at = choose_device(device)
    groups: dict[str, list[tuple[SaeEntry, SaeState]]] = {}
    for entry, saved in zip(record.saes, state.saes, strict=True):
        groups.setdefault(entry.hookpoint, []).append((entry, saved))
    evaluation = Evaluation(
        run=str(root),
        cache_id=record.cache_id,
        step=step,
        steps=steps,
        rows=sum(cache.receipts[shard].rows for shard in held_out),
        dead_after=record.dead_after,
        rows_per_second=rate,
        saes=tuple(
            figure
            for group in groups.values()
            for figure in _evaluate_group(
                root, record, group, cache, held_out, at, dead, step, best
            )
        ),
    )
    write_atomic(root / (BEST_EVALUATION if best else EVALUATION), [to_json(evaluation)])
    return evaluation


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
    """The SAEs of one hookpoint, or of the same several, from one pass over their rows."""
    places = [_place(root, entry, saved, step, best) for entry, saved in group]
    saes = [_load(place, entry, device) for place, (entry, _) in zip(places, group, strict=True)]
    targets = group[0][0].targets
    means = [cache.statistics(name, record.training_shards).mean for name in targets]
    held_out = [cache.statistics(name, shards) for name in targets]
    denominators = [s.squared_error_of(m) for s, m in zip(held_out, means, strict=True)]
    rows = sum(cache.receipts[shard].rows for shard in shards)
    evaluated = []
    found = squared_errors(saes, cache, group[0][0], shards)
    for (entry, _), place, sae, (errors, l0, alive) in zip(group, places, saes, found, strict=True):
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
                step=place.step,
                num_latents=entry.config.num_latents,
                k=None if kind in PENALISED else entry.config.k,
                activation=kind,
                fvu=sum(fvus) / len(fvus),
                l0=l0 / rows,
                dead_percent=dead[entry.name] if place.step == step else None,
                fired_percent=100.0 * float(alive.double().mean()),
                parts=_parts(sae, targets, [len(mean) for mean in means], fvus),
            )
        )
    return evaluated


def _parts(
    sae: Sae, targets: tuple[str, ...], widths: list[int], fvus: list[float]
) -> dict[str, PartEvaluation]:
    """Of a crosscoder, what it is at each hookpoint."""
    if len(targets) == 1:
        return {}
    prefix_groups = torch.split(sae.W_dec.detach(), widths, dim=1)
    norms = [float(piece.norm(dim=1).double().mean()) for piece in prefix_groups]
    return dict(zip(targets, map(PartEvaluation, fvus, norms), strict=True))


@dataclass(frozen=True)
class _Place:
    """Where an SAE lies, of which step it is, and what its weights' file must be."""

    folder: Path
    step: int
    file: FileDigest


def _place(root: Path, entry: SaeEntry, saved: SaeState, step: int, best: bool) -> _Place:
    if not best:
        return _Place(root / entry.name, step, saved.export)
    if saved.best is None:
        raise RunError(
            f"{root} keeps no best SAE of {entry.name}",
            remedy="fit with --val-every N --save-best",
        )
    folder = best_folder(root / entry.name, saved.best.step)
    return _Place(folder, saved.best.step, saved.best.file)


def _load(place: _Place, entry: SaeEntry, device: torch.device) -> Sae:
    """An SAE that the run exported; refuses another."""
    folder = place.folder
    sae = load_sae(folder, device)
    found = read_sae_config(folder)
    if found != entry.config:
        raise FormatError(
            f"{folder} holds another SAE than the run's",
            expected=entry.config,
            got=found,
            remedy="restore it from a copy",
        )
    if digest_file(folder / WEIGHTS) != place.file:
        raise RunError(
            f"the SAE in {folder} is not that of the last checkpoint",
            remedy="saetrain fit with --resume goes on, if it was stopped while it saved; if it is "
            "at work, try again; else restore the SAE from a copy",
        )
    return sae


@torch.no_grad()
def squared_errors(
    saes: list[Sae], cache: Cache, entry: SaeEntry, shards: list[int]
) -> list[tuple[list[float], float, torch.Tensor]]:
    """Run SAEs over whole shards, of which each row is read once.

    Args:
        saes: that read and predict the same hookpoints.
        cache: where the rows are.
        entry: one of the SAEs.
        shards: which.

    Returns:
        Of each, Σ‖y - ŷ‖² of each hookpoint that is predicted, the number of active latents summed
        over rows, and which latents fired [M].
    """
    widths = [cache.manifest.width(name) for name in entry.targets]
    errors, active = [[0.0] * len(widths) for _ in saes], [0.0] * len(saes)
    alive = [torch.zeros_like(sae.b_enc, dtype=torch.bool) for sae in saes]
    bar = Progress(entry.hookpoint, sum(cache.receipts[s].rows for s in shards), "rows")
    for shard in shards:
        for start in range(0, cache.receipts[shard].rows, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, cache.receipts[shard].rows - start)
            names = dict.fromkeys(entry.hookpoints)
            stored = {name: cache.read(name, shard, start, count) for name in names}
            loaded = {name: cache.row_dtype.to_torch(rows) for name, rows in stored.items()}
            rows = rows_of(entry, loaded).to(saes[0].W_enc.device)  # [n, D]
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
